"""What the command line and Python callers may pass."""

from __future__ import annotations

from typing import Literal

import pytest

from matex_pl.arguments import check_choices
from matex_pl.attribution import Matex
from matex_pl.callbacks import AttributionMaps, AttributionMetrics
from matex_pl.cli import main
from matex_pl.data import NihDataModule, PhantomDataModule
from matex_pl.metrics import EnergyInBox, EnergyPointingGame, RankAccuracy, RelevanceRankAccuracy

SHARED = {
    "image_size": "Side of the model's square input in pixels",
    "batch_size": "Number of pairs per batch and process",
    "num_workers": "Number of processes that read and augment images",
    "resize_mode": "{longest,shortest,squash}",
    "augment": "never a horizontal flip",
    "seed": "Random seed of shuffling, augmentation, splits",
}
FILES = SHARED | {"cache_dir": "Folder for decoded, resized images"}
TABLE = FILES | {"on_bad_row": "{error,skip}"}
DATA_MODULES = {
    "PhantomDataModule": SHARED | {"shortcut": "Probability in [0, 1]"},
    "NihDataModule": FILES | {"fractions": "Shares of the patients"},
    "ManifestDataModule": TABLE | {"fractions": "Shares of the patients", "columns": "Names of the file's columns"},
    "MsCxrDataModule": TABLE | {"fractions": "Shares of the patients", "splits": "{file,patients}"},
    "MimicCxrDataModule": TABLE | {"sections": "Literal['findings', 'impression']"},
}


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command that ends at once prints, white space made single."""
    with pytest.raises(SystemExit):
        main(words)
    return " ".join("".join(capsys.readouterr()).split())


@pytest.mark.parametrize("name", DATA_MODULES)
def test_help_of_a_data_module_has_the_arguments_of_its_parents(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "fit", f"--data.help=matex_pl.data.{name}")
    for argument, description in DATA_MODULES[name].items():
        assert f"--data.{argument} " in text
        assert description in text
    assert "kwargs" not in text
    assert ("--data.fractions" in text) == ("fractions" in DATA_MODULES[name])


def test_arguments_of_the_parents_are_set_and_misspelled_ones_refused_by_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = ("fit", "--config", "nih.yaml")
    assert "batch_size: 7" in said(capsys, *config, "--data.batch_size", "7", "--print_config")
    assert "There is no option --data.batchsize. Nearest: --data.batch_size" in said(
        capsys, *config, "--data.batchsize", "7"
    )


@pytest.mark.parametrize(
    ("option", "choices"),
    [
        ("--data.resize_mode=stretch", "'longest', 'shortest', 'squash'"),
        ("--model.freeze=vision", "'none', 'text', 'image', 'all-but-projections', 'all-but-head'"),
    ],
)
def test_a_wrong_word_is_refused_before_anything_loads(
    option: str, choices: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = said(capsys, "fit", "--config", "nih.yaml", option)
    assert choices in text
    assert option.partition("=")[2] in text


def test_the_data_module_takes_geometry_for_one_more_release() -> None:
    with pytest.warns(DeprecationWarning, match="geometry: crop is deprecated. Write resize_mode: shortest"):
        data = NihDataModule("nowhere", geometry="crop")
    assert data.resize_mode == "shortest"
    with pytest.raises(ValueError, match="geometry must be one of pad, crop, squash, got 'longest'"):
        PhantomDataModule(geometry="longest")


def test_old_names_are_still_there() -> None:
    assert (EnergyInBox, RankAccuracy) == (EnergyPointingGame, RelevanceRankAccuracy)
    assert AttributionMaps(log_text=False).show_text is False
    assert AttributionMaps(show_text=True, log_text=False).show_text is True


def test_python_callers_are_told_the_choices() -> None:
    with pytest.raises(ValueError, match="fill must be one of mean_image, mean_color, blur, got 'black'"):
        AttributionMetrics(fill="black")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kappa must be one of tokens, any float, got 'patches'"):
        Matex(kappa="patches")  # type: ignore[arg-type]


def test_only_literals_are_checked() -> None:
    def function(
        one: Literal["a", "b"], two: int | Literal["all"], three: float | None, four: Literal["c"] | None = None
    ) -> None: ...

    def values(**changes: object) -> dict[str, object]:
        return {"one": "a", "two": "all", "three": "any", "four": None} | changes

    for changes in ({}, {"two": 3}, {"four": "c"}, {"local": 1}):
        check_choices(function, values(**changes))
    for changes, message in (
        ({"one": "c"}, "one must be one of a, b, got 'c'"),
        ({"one": None}, "one must be one of a, b, got None"),
        ({"two": "most"}, "two must be one of all, any int, got 'most'"),
        ({"two": 1.5}, "two must be one of all, any int, got 1.5"),
        ({"four": 4}, "four must be one of c, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            check_choices(function, values(**changes))
