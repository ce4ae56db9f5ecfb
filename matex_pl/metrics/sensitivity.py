"""Metrics that need no boxes: dependence of a map on its inputs, and location of its mass."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from matex_pl.maps import Word
from matex_pl.metrics import functional
from matex_pl.metrics.base import PairMetric


class RankCorrelation(PairMetric):
    """Mean rank correlation of two maps of each pair; lower is better.

    Weight randomization compares the map of the model with that of a model with randomized parameters
    (`sanity.randomized`; Adebayo et al. 2018). Prompt sensitivity compares the map under the true phrase with that
    under the phrase of another pair. A method whose maps do not change explains neither the model nor the phrase.
    Constant maps have no order and do not count.

    Examples:
        >>> import torch
        >>> metric = RankCorrelation()
        >>> metric.update(torch.tensor([[0.1, 0.2, 0.9]]), torch.tensor([[0.3, 0.2, 0.1]]))
        >>> float(metric.compute())
        -1.0
    """

    higher_is_better = False
    plot_lower_bound = -1.0
    plot_upper_bound = 1.0

    def update(
        self, maps: Tensor, others: Tensor, among: Tensor | None = None, ids: Sequence[str] | None = None
    ) -> None:
        """Add the maps `(B, ...)` of B pairs under both conditions, and the pairs' ids.

        `among`, `(B, ...)` bool, selects the entries that are compared (content tokens); all by default.
        """
        among = None if among is None else among.flatten(1)
        self._add(functional.spearman(maps.flatten(1), others.flatten(1), among), ids)


class SideSensitivity(PairMetric):
    """Mean share of the map's mass that moves to the other side when the phrase names that side; -1 to 1.

    Examples:
        >>> import torch
        >>> metric = SideSensitivity()
        >>> true, swapped = torch.tensor([[[0.8, 0.2]]]), torch.tensor([[[0.3, 0.7]]])
        >>> metric.update(true, swapped, ["right"])
        >>> round(float(metric.compute()), 4)
        0.5
    """

    higher_is_better = True
    plot_lower_bound = -1.0
    plot_upper_bound = 1.0

    def update(
        self,
        maps: Tensor,
        swapped: Tensor,
        sides: Sequence[str],
        content_box: Tensor | None = None,
        ids: Sequence[str] | None = None,
    ) -> None:
        """Add B pairs, with the arguments of `functional.side_sensitivity`, and their ids.

        Pairs without a side do not count.
        """
        self._add(functional.side_sensitivity(maps, swapped, sides, content_box), ids)


class WordLaterality(PairMetric):
    """Mean share of the map of a word of side that lies on that side of the patient; 0.5 for an even map.

    It asks whether the map of the word "left" lies left. Only methods with `Attribution.interactions` have maps of
    single words.

    Examples:
        >>> import torch
        >>> from matex_pl.maps import Word
        >>> metric = WordLaterality()
        >>> metric.update([torch.tensor([[[0.2, 0.6]]])], [[Word("Left", 0, 4)]], ["Left effusion."])
        >>> round(float(metric.compute()), 4)
        0.75
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def update(
        self,
        word_maps: Sequence[Tensor],
        words: Sequence[Sequence[Word]],
        phrases: Sequence[str],
        content_box: Tensor | None = None,
        ids: Sequence[str] | None = None,
    ) -> None:
        """Add B pairs, with the arguments of `functional.word_laterality`, and their ids.

        Pairs without a word of side do not count.
        """
        self._add(functional.word_laterality(word_maps, words, phrases, content_box), ids)


class OutsideMass(PairMetric):
    """Mean share of the map's mass outside a zone, for example outside the thorax or at the border of the image.

    Examples:
        >>> import torch
        >>> metric = OutsideMass()
        >>> metric.update(torch.tensor([[[0.6, 0.2]]]), torch.tensor([[[True, False]]]))
        >>> round(float(metric.compute()), 4)
        0.25
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def update(self, maps: Tensor, inside: Tensor, ids: Sequence[str] | None = None) -> None:
        """Add B maps `(B, H, W)`, their zones `(B, H, W)` bool or `(1, H, W)` for all, and the pairs' ids."""
        self._add(functional.outside_mass(maps, inside), ids)


class MapMass(PairMetric):
    """Mean value of the maps; it exposes maps of all ones, whose confidence drop is perfect and whose mass is 1.

    Examples:
        >>> import torch
        >>> metric = MapMass()
        >>> metric.update(torch.eye(2)[None])
        >>> float(metric.compute())
        0.5
    """

    higher_is_better = None
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def update(self, maps: Tensor, ids: Sequence[str] | None = None) -> None:
        """Add B maps `(B, ...)` in [0, 1], and the pairs' ids."""
        self._add(maps.flatten(1).mean(1), ids)
