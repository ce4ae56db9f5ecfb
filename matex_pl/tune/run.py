"""`matex tune`: the settings of MATEX that suit a model and its films, found on validation pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from matex_pl.arguments import check_positive
from matex_pl.attribution import AttributionMethod, Matex
from matex_pl.attribution.core.fill import check_fill
from matex_pl.attribution.shipped import load_method
from matex_pl.clip.model import Clip
from matex_pl.data.datamodule import ChestXrayDataModule
from matex_pl.data.study import Study, StudyBatch
from matex_pl.evaluation.pairs import choose_pairs, model_inputs, prepare_data, read_pairs
from matex_pl.evaluation.provenance import provenance
from matex_pl.evaluation.store import weight_hash
from matex_pl.training.module import load_module
from matex_pl.tune.choose import choose_setting
from matex_pl.tune.grid import AXES, Grid, depths, make_grid
from matex_pl.tune.objective import Objective, boxless_objectives, find_objective, gather_pairs, score_setting
from matex_pl.tune.outcome import describe, report, write_files

LAMBDA_S = [1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5]
LAMBDA_C = [0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6]
TAU = [0.0, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0]


def tune_matex(
    data: ChestXrayDataModule,
    ckpt_path: str,
    out: str,
    method: AttributionMethod | str | None = None,
    objective: str = "pointing_game",
    lambda_s: list[float] = LAMBDA_S,
    lambda_c: list[float] = LAMBDA_C,
    tau: list[float] = TAU,
    grad_layers: list[int] | None = None,
    prior_shape: list[str] | None = None,
    num_pairs: int = 256,
    batch_size: int = 32,
    raster: int = 20,
    seed: int = 0,
) -> str:
    """Find lambda_s, lambda_c and tau of MATEX on validation pairs, and score what was found once on test pairs.

    The components are computed once, and every setting is fused from them on a raster; the ten best are scored again on
    all pixels, and the winner is the best of those and of the method's own setting. Of equal ones it is the nearest to
    the method's own: by the sum over the settings of the difference as a share of the range of what was tried, where
    another shape of the prior counts 1. For words, settings are scored at once without a raster. An objective that asks
    the model (confidence) needs a forward per pair and setting, on all pixels. A setting that changes nothing here is
    left as it is, and the text says why: lambda_s where no phrase of the validation pairs names a place.

    Writes `tuned.yaml`, which `--method` and the callbacks take, `surface.png` and `surface.svg`, the scores over
    lambda_s, lambda_c and tau, and `tune.json`, all scores with what made them.

    Args:
        data: The films; the validation split is tuned on, the test split is for the score.
        ckpt_path: A checkpoint of `matex fit`.
        out: The folder to write to.
        method: A Matex, `Matex.measured()` by default, whose settings stay but for those that are tried: the name of a
            shipped setting, a YAML file, or a class.
        objective: What is best: searched on a raster `pointing_game`, `cnr`, `miou`, `energy_in_box`, `rank_accuracy`,
            at a threshold `iou`, `acc50` and `ap50`, as `iou/0.3`, `border_mass`, `outside_thorax_mass` where the data
            module knows the thorax, and `mean_map_mass` (lower: the smaller map); there too, held against the maps
            under another study's phrase `prompt_sensitivity`, with right and left exchanged `side_sensitivity`, under
            shuffled weights `sanity`, which takes the components once more for each block of the towers; and, with
            forwards of the model for each setting, `confidence_drop`, `confidence_increase`,
            `confidence_drop@50`, `confidence_increase@50`, `top20_removal`, `insertion` and `deletion` (their gain,
            which orders settings as the AUC does), filled with the mean film, or with another fill as in
            `top20_removal/blur`. For the words `text_` before one of the first five of these, `mean_map_mass` or
            `sanity`.
        lambda_s: Strengths of the prior to try, at least 1.
        lambda_c: Weights of the consistent gradients to try.
        tau: Temperatures of the attention flow to try.
        grad_layers: Numbers of blocks with gradients to try; the method's own by default.
        prior_shape: Shapes of the prior to try; the method's own by default.
        num_pairs: Pairs of either split, those with boxes if the objective needs them; -1 for all.
        batch_size: Pairs per batch.
        raster: Cells on the longer side of the raster that the settings are compared on; for the pointing game the
            nearest number that puts a cell on the centre of each patch. Correlations, of means of patches, take two per
            patch. On the phantom model, of 12, 16 and 20, only 20 had the best setting for `cnr` among its ten.
        seed: Of the choice of pairs, and of the bootstrap.

    Returns:
        What was found, on how many pairs, with its interval on test, and where the files are.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: An argument is out of range, the method is no Matex, or has its prior off where a map of the image
            is scored, or the objective needs boxes or a mean film that are not there.
    """
    goal = find_objective(objective)
    own = _checked_method(method, goal)
    tried = dict(zip(AXES, (grad_layers, prior_shape, lambda_s, lambda_c, tau), strict=True))
    _check_tried(own, tried)
    _check_numbers(num_pairs, batch_size, raster)
    clip = load_module(ckpt_path).clip
    if goal.fill:
        check_fill(goal.fill, clip)
    prepare_data(data, clip.image_size, "val", "test")
    studies = {split: _choose(data, split, num_pairs, seed, goal) for split in ("val", "test")}
    gather = partial(gather_pairs, clip, objective=goal, thorax=_thorax(data, goal), seed=seed)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)

    batches = read_pairs(data, "val", studies["val"], batch_size)
    depth = _count_blocks(clip, own, batches[0])
    grid = make_grid(own, goal, depth, tried, [study.phrase for study in studies["val"]])
    deepest = _deepest(own, grid, depth)
    pairs, seconds = gather(deepest, batches)
    size = raster_size(raster, clip, goal)
    found = choose_setting(clip, pairs, own, grid, grid.distances(own, depth), goal, size)
    pairs, _ = gather(deepest, read_pairs(data, "test", studies["test"], batch_size))
    tests = [score_setting(clip, pairs, method, goal) for method in (own, found.winner.method)]
    said = provenance(clip, weight_hash(clip), ckpt_path, data, seed) | report(found, tests, studies, seconds, seed)
    return "\n".join([describe(said), "", *map(str, write_files(folder, said, found))])


def _checked_method(method: AttributionMethod | str | None, goal: Objective) -> Matex:
    """The Matex that is tuned.

    Raises:
        ValueError: It is another method, or its prior is off, which only words do without.
    """
    matex = load_method(method or Matex.measured())
    if not isinstance(matex, Matex):
        raise ValueError(
            f"Only MATEX has these settings, got {type(matex).__name__}. Leave method out, or give a Matex."
        )
    for name, off in (("delta", 0), ("lambda_s", 1)):
        if goal.side == "image" and getattr(matex, name) == off:
            raise ValueError(
                f"The method has {name}={off}, which takes the prior out, so that there is no lambda_s to tune. "
                f"Give {name} another value."
            )
    return matex


def _check_tried(own: Matex, tried: Mapping[str, Sequence[Any] | None]) -> None:
    """Refuse values that a Matex would refuse, and lists that are empty.

    Raises:
        ValueError: There are some.
    """
    for name, values in tried.items():
        if values is not None and not len(values):
            raise ValueError(f"{name} names no value to try.")
        for value in values or []:
            type(own)(**own.settings | {name: value})


def _check_numbers(num_pairs: int, batch_size: int, raster: int) -> None:
    check_positive(batch_size=batch_size, raster=raster)
    if num_pairs < -1 or num_pairs == 0:
        raise ValueError(f"num_pairs must be positive, or -1 for all; got {num_pairs}.")


def _choose(data: ChestXrayDataModule, split: str, number: int, seed: int, goal: Objective) -> list[Study]:
    """Pairs of a split.

    Raises:
        ValueError: The objective needs boxes, and there are none.
    """
    studies = choose_pairs(data, split, number, seed, boxed=goal.boxed)
    if goal.boxed and not any(len(study.boxes) for study in studies):
        raise ValueError(
            f"{goal.name} needs boxes, and no {split} study of {type(data).__name__} has any. Take an objective that "
            f"needs none: {', '.join(boxless_objectives())}."
        )
    return studies


def _thorax(data: ChestXrayDataModule, goal: Objective) -> Tensor | None:
    """Where lungs and heart usually are, `(H, W)` bool, if the objective asks for it.

    Raises:
        ValueError: It does, and the data module does not know.
    """
    thorax = data.thorax() if goal.needs_thorax else None
    if goal.needs_thorax and thorax is None:
        raise ValueError(
            f"{goal.name} needs to know where the thorax is, and {type(data).__name__} has no `thorax()`. Take "
            "border_mass, or give the data module one."
        )
    return thorax


def _count_blocks(clip: Clip, method: Matex, batch: StudyBatch) -> tuple[int, int]:
    """Blocks of the image and the text tower, by explaining one pair, which encodes references as well."""
    images, tokens = model_inputs(clip, batch)
    parts = method.attribute(clip, images[:1], tokens[:1], batch["phrase"][:1]).parts
    return parts["attention_layers"].shape[1], parts["text_attention_layers"].shape[1]


def _deepest(method: Matex, grid: Grid, depth: tuple[int, int]) -> Matex:
    """The method with the gradients of all blocks that a setting of the grid, or its own, asks for."""
    image, text = zip(*(depths(k, method, depth) for k in [*grid.grad_layers, method.grad_layers]), strict=True)
    return type(method)(**method.settings | {"grad_layers": max(image), "text_grad_layers": max(text)})


def raster_size(cells: int, clip: Clip, objective: Objective) -> tuple[int, int]:
    """Height and width of the raster: about so many cells on the longer side, at most one per pixel.

    Enlarged bilinearly, a map of patches has its maxima at their centres, of which only rasters with an odd number of
    cells per patch have a sample: an objective of peaks takes the nearest of those, of two the coarser. Such a map is
    linear on each half of a patch, so that two cells per patch hold its means: an objective of patches takes those.
    """
    if objective.patches:
        return min(2 * clip.grid[0], clip.image_size[0]), min(2 * clip.grid[1], clip.image_size[1])
    longer, patches = max(clip.image_size), max(clip.grid)
    if not objective.peaks:
        share = min(1, cells / longer)
        return max(1, round(clip.image_size[0] * share)), max(1, round(clip.image_size[1] * share))
    odd = range(1, max(longer // patches, 1) + 1, 2)
    each = min(odd, key=lambda number: (abs(number * patches - cells), number))
    return clip.grid[0] * each, clip.grid[1] * each
