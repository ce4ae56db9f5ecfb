import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from markdown_it import MarkdownIt
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG, parse_session_start_info_plugin_data
from test_report import HOSTILE, LOADING, SVG, Page, plain, table_of, tables_of

from matex_pl import ClipModule
from matex_pl.callbacks.roar_plus import log_roar
from matex_pl.cli import main
from matex_pl.console import duration
from matex_pl.data import PhantomDataModule
from matex_pl.report.benchmark import add_to_report
from matex_pl.report.gallery import Panel, encode, read_panels, write_panels
from matex_pl.report.published import PUBLISHED
from matex_pl.report.results import PairedTest, RoarResult, parse
from matex_pl.report.roar import roar_figure, roar_tables, write_roar
from matex_pl.report.tables import MISSING, percent
from matex_pl.visualization.draw import single_line

FRACTIONS = (0.1, 0.25, 0.5)
FILES = ["curves_image.png", "curves_image.svg", "curves_text.png", "curves_text.svg", "report.html", "table.md"]


def spread(values):
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def summary(values):
    whole = None not in values
    return {
        "value": float(np.mean(values)) if whole else None,
        "std": spread(values) if whole else None,
        "repeats": list(values),
    }


def row(name, modality, repeats, control=False, **changes):
    """A row from its ROAR+ per fraction and repeat."""
    points = [
        {"fraction": fraction, "units": 49 * fraction, **summary(values), "missing": []}
        for fraction, values in zip(FRACTIONS, repeats, strict=False)
    ]
    whole = [None if None in column else float(np.mean(column)) for column in zip(*repeats, strict=True)]
    about = {"class": "Matex" if name == "MATEX" else "Other", "settings": {"tau": 0.2}, "note": "", "key": "0f" * 8}
    row = {"name": name, "modality": modality, "control": control, **about, "error": None, "points": points}
    return {**row, "mean": summary(whole), **changes}


def compared(name, against, modality, difference, p, fraction=None):
    ends = (None, None) if p is None else (difference - 1, difference + 1)
    test = {"row": name, "against": against, "modality": modality, "fraction": fraction, "difference": difference}
    return {**test, "low": ends[0], "high": ends[1], "p": None if p is None else p / 10, "p_holm": p, "n": 3}


def rows_of(modality):
    return [
        row("RandomMap", modality, [[1, 2, 3], [2, 3, 4], [3, 4, 5]], control=True),
        row("M2ib", modality, [[20, 21, 22], [5, 6, 7], [30, None, 31]]),
        row("MATEX", modality, [[10, 11, 12], [20, 22, 24], [30, 33, 36]]),
    ]


def read(results):
    return parse(RoarResult, results)


def roar(**changes):
    """Results of ROAR+ on both modalities; M2ib lacks a repeat at half."""
    results = {
        "format": 1,
        "kind": "roar",
        "created": "2026-01-02T03:04:05+00:00",
        "model": {"checkpoint": "runs/last.ckpt", "explained": "ab" * 32, "start": "cd" * 32, "grid": [7, 7]},
        "data": {
            "class": "PhantomDataModule",
            "pairs": 1200,
            "patients": 1000,
            "train_pairs": 960,
            "val_pairs": 240,
            "fingerprint": "ee" * 10,
        },
        "settings": {"fractions": list(FRACTIONS), "repeats": 3, "epochs": 10, "fill": "mean_image", "seed": 0},
        "versions": {"matex_pl": "0.1.0"},
        "machine": "two cores",
        "rows": [*rows_of("image"), *rows_of("text")],
        "clean": [{"repeat": i, "loss": 2.25 + i, "metrics": {"val/zero_shot_top1": 0.75}} for i in range(3)],
        "tests": [
            compared("MATEX", "RandomMap", "image", 20.0, 0.012),
            compared("M2ib", "RandomMap", "image", None, None),
            compared("MATEX", "RandomMap", "image", 9.0, 0.2, 0.1),
            compared("M2ib", "RandomMap", "image", -19.0, 0.0004, 0.1),
            compared("MATEX", "RandomMap", "text", -4.0, 0.03),
        ],
        "failed": [{"run": "repeat-1/image/M2ib/0.5", "error": "Out of memory.", "log": "runs/x/log.txt"}],
        "time": {"runs": 40, "done": 39, "seconds": 7400.0, "training_seconds": 6800.0, "other_share": 0.08},
    }
    return {**results, **changes}


def hostile():
    """Results in which every text is hostile."""
    attack = " ".join(HOSTILE)
    rows = [
        row(name, modality, [[5 * i, 6 * i, 7 * i]] * 3, control=i == 2, note=attack, key=attack, settings={attack: 1})
        for modality, names in (("image", HOSTILE), ("text", HOSTILE[:2]))
        for i, name in enumerate(names)
    ]
    refused = row(attack, "image", [[1, 2, 3]] * 3, error=attack)
    return roar(
        model={"checkpoint": attack, "explained": attack, "start": attack},
        data={"class": attack, "train_pairs": 1, "val_pairs": 1, "patients": 1},
        settings={"fill": attack, "finetune": attack, attack: attack},
        versions={attack: attack},
        machine=attack,
        created=attack,
        rows=[*rows, refused],
        tests=[compared(name, HOSTILE[2], "image", 1.0, 0.01) for name in HOSTILE],
        failed=[{"run": attack, "error": attack, "log": attack}],
        clean=[{"repeat": 0, "loss": 1.0, "metrics": {attack: 1.0}}],
    )


def printed(results):
    """The tables of the Markdown as texts, as GitHub reads them."""
    return [[[plain(cell) for cell in line] for line in table] for table in tables_of(roar_tables(read(results)))]


def written(folder, results):
    write_roar(read(results), folder)
    return (folder / "report.html").read_text(encoding="utf-8")


def drawn(figure):
    """The names in the legend, and the frame."""
    (axes,) = figure.axes
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()], axes


# --- Tables


def test_scores_stand_in_the_papers_form():
    image, phrase = printed(roar())[:2]
    assert image[0] == [
        "Method",
        "ROAR+\N{NO-BREAK SPACE}↑ (10\N{NO-BREAK SPACE}% dropped: 4.9 patches per pair, 3 repeats)",
        "ROAR+\N{NO-BREAK SPACE}↑ (25\N{NO-BREAK SPACE}% dropped: 12.2 patches per pair, 3 repeats)",
        "ROAR+\N{NO-BREAK SPACE}↑ (50\N{NO-BREAK SPACE}% dropped: 24.5 patches per pair, 3 repeats)",
        "ROAR+\N{NO-BREAK SPACE}↑ (mean over the fractions, 3 repeats)",
        "Published: ROAR+\N{NO-BREAK SPACE}↑",
    ]
    assert image[1] == ["MATEX", "11.00 ± 1.00", "22.00 ± 2.00", "33.00 ± 3.00", "22.00 ± 2.00", MISSING]
    assert [line[0] for line in image[1:3]] == ["MATEX", "M2ib"]
    assert image[-1] == ["Control: RandomMap", "2.00 ± 1.00", "3.00 ± 1.00", "4.00 ± 1.00", "3.00 ± 1.00", MISSING]
    assert "tokens per pair" in phrase[0][1]


def test_a_point_without_a_repeat_is_a_dash_and_never_averaged():
    image = printed(roar())[0]
    assert image[2] == [
        "M2ib",
        "21.00 ± 1.00",
        "6.00 ± 1.00",
        f"{MISSING} (2 of 3 repeats)",
        f"{MISSING} (2 of 3 repeats)",
        "38.70 ± 0.86",
    ]


def test_best_is_marked_among_the_methods_only():
    text = roar_tables(read(roar())).partition("\n## Maps of the phrase")[0]
    # At half and in the mean MATEX has no rival.
    assert re.findall(r"\*\*(\d.*?)\*\*", text) == ["22.00 ± 2.00", "21.00 ± 1.00"]
    close = roar(rows=[row("MATEX", "image", [[1.001]]), row("A", "image", [[1.004]]), row("B", "image", [[0.99]])])
    assert re.findall(r"\| (\w+) \| \*\*1.00", roar_tables(read(close))) == ["MATEX", "A"]


def test_published_figures_are_those_of_the_paper():
    found = table_of(roar_tables(read(roar())), "Maps of the phrase")
    assert [head.startswith("Published: ") for head in found.pop("")] == [False] * 4 + [True]
    figures = {name.removesuffix(" (published only)"): cells[-1] for name, cells in found.items()}
    assert (figures.pop("MATEX"), figures.pop("Control: RandomMap")) == (MISSING, MISSING)
    assert figures == {name: "{:.2f} ± {:.2f}".format(*entry["roar"]) for name, entry in PUBLISHED["text"].items()}


@pytest.mark.parametrize(
    ("difference", "p", "is_better"),
    [(2.0, 0.049, True), (-2.0, 0.049, False), (2.0, 0.05, False), (2.0, None, False), (None, None, False)],
)
def test_better_is_what_is_more_than_noise(difference, p, is_better):
    test = PairedTest(row="a", against="b", modality="image", difference=difference, low=1.0, high=3.0, p_holm=p)
    assert test.is_better(True) == is_better


def test_differences_from_noise_stand_with_interval_and_p():
    text = roar_tables(read(roar()))
    over_all = table_of(text, "Each method minus each control: Maps of the image, mean over the fractions")
    assert over_all == {
        "": ["minus RandomMap (n = 3)"],
        "MATEX": ["+20.00 (19.00 to 21.00, p = 0.012)"],
        "M2ib": [MISSING],
    }
    tenth = table_of(text, "Each method minus each control: Maps of the image, 10\N{NO-BREAK SPACE}% dropped")
    assert tenth["MATEX"] == ["+9.00 (8.00 to 10.00, p = 0.200)"]
    assert tenth["M2ib"] == ["-19.00 (-20.00 to -18.00, p < 0.001)"]
    assert re.findall(r"\*\*([+-].*?)\*\*", text) == ["+20.00"]
    short = roar_tables(read(roar()), is_short=True)
    assert "mean over the fractions" in short
    assert "Maps of the image, 10" not in short


def test_one_repeat_has_no_deviation_and_no_test(tmp_path):
    tests = [{**compared("MATEX", "RandomMap", "image", 8.0, None), "n": 1}]
    rows = [row("MATEX", "image", [[10]] * 3), row("RandomMap", "image", [[2]] * 3, control=True)]
    results = roar(rows=rows, tests=tests, failed=[], clean=roar()["clean"][:1])
    text, page = roar_tables(read(results)), Page(written(tmp_path, results)).words()
    assert "| MATEX | 10.00 | 10.00 | 10.00 | 10.00 |" in text
    assert "±" not in re.sub(r"\d ± \d+\.\d+ \|\n", "", text.split("Mean ± standard")[1])
    for said in (text, page):
        assert "Nothing could be tested: a paired test needs at least two complete repeats" in said
        assert "Failed" not in said


def test_failed_trainings_and_refused_methods_are_named(tmp_path):
    results = roar(refused={"M2ib": "No attention weights."})
    del results["rows"][1]
    text, page = roar_tables(read(results)), Page(written(tmp_path, results)).words()
    assert "- repeat-1/image/M2ib/0.5: Out of memory. (log runs/x/log.txt)" in text
    assert "- Left out: M2ib: No attention weights." in text
    assert "1 training failed" in page
    assert "repeat-1/image/M2ib/0.5 : Out of memory. (log runs/x/log.txt)" in page
    assert "Left out: M2ib: No attention weights." in page
    image = printed(results)[0]
    assert [line[0] for line in image if line[0].startswith("M2ib")] == ["M2ib (published only)"]
    assert drawn(roar_figure(read(results), "image"))[0] == ["MATEX", "RandomMap"]


def test_clean_losses_settings_and_time_are_told():
    text = roar_tables(read(roar()))
    assert "| repeat-2 | 4.250 | 0.7500 |" in text
    assert "- fill: mean\\_image" in text
    assert "- 39 of 40 trainings done, 2 h 3 min in all, 92\N{NO-BREAK SPACE}% of it inside training steps" in text
    assert "explained weights abababababababab, trained from cdcdcdcdcdcdcdcd." in text


def test_numbers_as_a_reader_says_them():
    assert [duration(seconds) for seconds in (0, 42.4, 150, 3599, 7380)] == [
        "0 s",
        "42 s",
        "2 min",
        "1 h 0 min",
        "2 h 3 min",
    ]
    assert [percent(share).replace("\N{NO-BREAK SPACE}", " ") for share in (0.1, 0.125, 0.07)] == [
        "10 %",
        "12.5 %",
        "7 %",
    ]


def test_results_of_almost_nothing(tmp_path):
    results = {"format": 1, "kind": "roar", "rows": []}
    page = Page(written(tmp_path, results))
    assert "Nothing was measured." in page.words()
    assert not page.all("table")
    assert not re.search(r"\b(nan|None|Undefined)\b", page.words() + roar_tables(read(results)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "table.md"]


@pytest.mark.parametrize("wrong", [{"kind": "benchmark"}, {"format": 2}], ids=["kind", "format"])
def test_other_results_are_refused(wrong):
    with pytest.raises(ValueError, match=r"results.json of this version's `matex roar`: (kind|format) is"):
        read(roar(**wrong))


# --- Hostile text


def test_hostile_text_stays_text_on_the_page(tmp_path):
    page, harmless = Page(written(tmp_path, hostile())), Page(written(tmp_path, roar()))
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in harmless.elements}
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert not page.inside
    for text in HOSTILE:
        assert single_line(text) in page.words()
    for _, attrs in page.elements:
        assert all(value.startswith(("#", "data:")) for name, value in attrs.items() if name in LOADING)


def test_hostile_text_stays_text_in_markdown():
    text = roar_tables(read(hostile()))
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text)
    children = [child for token in tokens for child in token.children or ()]
    assert {child.type for child in children} <= {"text", "text_special", "strong_open", "strong_close", "softbreak"}
    assert not [token for token in tokens if token.type in ("html_block", "fence", "code_block")]
    assert {len({len(line) for line in table}) for table in tables_of(text)} == {1}


def test_hostile_text_stays_text_in_picture_files(tmp_path):
    write_roar(read(hostile()), tmp_path)
    svg = (tmp_path / "curves_image.svg").read_text(encoding="utf-8")
    for text in HOSTILE:
        name = single_line(text)
        assert (name if len(name) <= 24 else name[:23].rstrip() + "…") in Page(svg[svg.index("<svg") :]).words("text")
    assert not re.search(r"<(script|img|foreignObject)", svg)


# --- Curves


def test_curves_show_every_value_with_its_deviation():
    names, axes = drawn(roar_figure(read(roar()), "image"))
    assert names == ["MATEX", "M2ib", "RandomMap"]
    lines = {tuple(np.asarray(line.get_ydata())[[0, 1]]): line for line in axes.lines if len(line.get_ydata()) == 3}
    matex, noise = lines[11.0, 22.0], lines[2.0, 3.0]
    np.testing.assert_allclose(np.asarray(matex.get_ydata(), float), [11, 22, 33])
    # Side by side around the share itself.
    np.testing.assert_allclose(matex.get_xdata(), [10, 25, 50], atol=0.15 * 15)
    assert (matex.get_linestyle(), noise.get_linestyle()) == ("-", "--")
    assert noise.get_color() == "#7a828b" != matex.get_color()
    m2ib = lines[21.0, 6.0]
    assert np.isnan(m2ib.get_ydata()[2])
    assert len({line.get_marker() for line in (matex, m2ib)}) == 2
    bars = {
        tuple(np.round([path[0, 1], path[1, 1]], 6)) for c in axes.collections for path in c.get_segments() if len(path)
    }
    assert {(10, 12), (20, 24), (30, 36), (1, 3)} <= bars
    assert [line for line in axes.lines if list(line.get_ydata()) == [0, 0]]


def test_a_modality_that_was_not_measured_is_refused():
    message = r"There is no row of modality 'text'. The results have the modalities \['image'\]"
    with pytest.raises(ValueError, match=message):
        roar_figure(read(roar(rows=rows_of("image"))), "text")


# --- Files


def test_the_folder_has_tables_pictures_and_a_page_of_its_own(tmp_path):
    assert sorted(path.name for path in write_roar(read(roar()), tmp_path)) == FILES
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    with Image.open(tmp_path / "curves_text.png") as picture:
        assert min(picture.size) > 500
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert not page.all("script")
    assert len(page.all("caption")) == len(page.all("table"))
    # What it opens with: the curves of both modalities and the scores beside the published ones.
    assert list(page.plots())[:2] == ["ROAR+, maps of the image", "ROAR+, maps of the phrase"]
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == roar_tables(read(roar()))


def test_the_same_results_give_the_same_files(tmp_path):
    for name in ("a", "b"):
        write_roar(read(roar()), tmp_path / name)
    assert [(tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in FILES] == [
        True
    ] * 6


def test_one_modality_only(tmp_path):
    write_roar(read(roar()), tmp_path)
    text = [row for row in roar()["rows"] if row["modality"] == "text"]
    write_roar(read(roar(rows=text)), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES[2:]
    assert "maps of the image" not in (tmp_path / "report.html").read_text(encoding="utf-8").lower()


def test_a_reader_never_sees_half_of_it(tmp_path, monkeypatch):
    write_roar(read(roar()), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    writing = Path.write_bytes

    def fail_late(path, content):
        if "curves_text" in path.name:
            raise OSError("disk full")
        return writing(path, content)

    monkeypatch.setattr(Path, "write_bytes", fail_late)
    with pytest.raises(OSError, match="disk full"):
        write_roar(read(roar(machine="another")), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# --- Loggers


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """What is in the folder of a run that had hyper-parameters and a scalar of its own."""
    folder = tmp_path_factory.mktemp("runs")
    board, table = TensorBoardLogger(folder, name="run"), CSVLogger(folder, name="csv")
    board.log_hyperparams({"lr": 0.5, "model": "tiny"})
    board.log_metrics({"val/loss": 1.0}, step=3)
    trainer = Trainer(accelerator="cpu", logger=[board, table], enable_checkpointing=False)
    log_roar(trainer.loggers, read(roar()))
    return Path(board.log_dir), Path(table.log_dir)


def points(events, tag):
    return [(event.step, round(event.value, 5)) for event in events.Scalars(tag)]


def test_tensorboard_has_scores_curves_and_tables(logged):
    events = EventAccumulator(str(logged[0])).Reload()
    assert points(events, "roar/image/MATEX") == [(10, 11), (25, 22), (50, 33)]
    assert points(events, "roar/image/MATEX/std") == [(10, 1), (25, 2), (50, 3)]
    assert points(events, "roar/text/M2ib") == [(10, 21), (25, 6)]
    assert points(events, "val/loss") == [(3, 1)]
    assert sorted(events.Tags()["images"]) == ["roar/image", "roar/text"]
    (text,) = events.Tensors("roar/table/text_summary")
    assert text.tensor_proto.string_val[0].decode() == roar_tables(read(roar()))


def session(folder):
    """Hyper-parameters as TensorBoard reads them."""
    content = EventAccumulator(str(folder)).Reload().SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content
    found = parse_session_start_info_plugin_data(content).hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in found.items()}


def test_hyper_parameters_of_the_run_stay_as_they_are(logged):
    run, _ = logged
    assert session(run) == {"lr": 0.5, "model": "tiny"}
    own = session(run / "roar")
    assert own["lr"] == 0.5
    assert own["roar/epochs"] == 10
    assert json.loads(own["roar/fractions"]) == list(FRACTIONS)
    assert own["roar/explained"] == "ab" * 6
    scores = EventAccumulator(str(run / "roar")).Reload()
    assert points(scores, "roar/image/MATEX/mean") == [(0, 22)]
    # Without a repeat there is no mean.
    assert "roar/image/M2ib/mean" not in scores.Tags()["scalars"]
    assert "roar" not in (run / "hparams.yaml").read_text(encoding="utf-8")


def test_other_loggers_get_the_scalars(logged):
    lines = (logged[1] / "metrics.csv").read_text(encoding="utf-8").splitlines()
    found = {
        line["step"]: line for line in (dict(zip(lines[0].split(","), x.split(","), strict=True)) for x in lines[1:])
    }
    assert float(found["25"]["roar/text/MATEX"]) == pytest.approx(22)
    assert found["50"]["roar/text/M2ib"] == ""


def test_names_become_tags_of_their_own(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    rows = [row(name, "image", [[1], [2], [3]]) for name in ("a, b", "a; b", "<>/", "漢")]
    log_roar([logger], read(roar(rows=rows)))
    tags = EventAccumulator(logger.log_dir).Reload().Tags()["scalars"]
    assert len(tags) == 4
    assert all(re.fullmatch(r"roar/image/[A-Za-z0-9_.-]+", tag) for tag in tags)


# --- On the benchmark's page


def test_panels_survive_the_disk(tmp_path):
    rng = np.random.default_rng(0)
    jpegs = [encode(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)) for _ in range(3)]
    panels = [Panel(HOSTILE[i], "best", HOSTILE[-i], HOSTILE[i + 1], jpeg) for i, jpeg in enumerate(jpegs)]
    write_panels(panels, tmp_path)
    assert read_panels(tmp_path) == panels
    write_panels(panels[:1], tmp_path)
    assert read_panels(tmp_path) == panels[:1]
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / "index.json").write_text('{"format": 2}')
    with pytest.raises(ValueError, match=r"format 1, got 2\. Run the benchmark again"):
        read_panels(tmp_path)


IMAGES = {"num_train": 8, "num_val": 3, "num_test": 5, "stored_size": 64, "batch_size": 4, "num_workers": 0}
SMALL = {"num_pairs": 4, "validation_pairs": 2, "sanity_pairs": 1, "steps": 2, "resamples": 100}


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Words of a small benchmark without its folder."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    data = PhantomDataModule(root=str(folder / "images"), **IMAGES)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(accelerator="cpu", max_steps=2, limit_val_batches=0, num_sanity_val_steps=0, **quiet)
    trainer.fit(ClipModule(str(Path(__file__).with_name("tiny.json")), warmup_steps=1), data)
    trainer.save_checkpoint(folder / "last.ckpt")
    words = [f"--data.{name}={value}" for name, value in {**IMAGES, "root": folder / "images"}.items()]
    words += [f"--{name}={value}" for name, value in SMALL.items()]
    words += ["--ckpt_path", str(folder / "last.ckpt"), "--methods", "matex"]
    return ["benchmark", "--config", "phantom.yaml", *words]


@pytest.fixture(scope="module")
def benchmarked(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    main([*command, "--out", str(folder)])
    return folder


@pytest.fixture
def bench(benchmarked, tmp_path):
    """The folder of a benchmark that has run."""
    return shutil.copytree(benchmarked, tmp_path / "bench")


def roar_of(bench, **changes):
    """Results of ROAR+ with the benchmark's weights, and its settings in MATEX's rows."""
    found = json.loads((bench / "results.json").read_text(encoding="utf-8"))
    results = roar(model={"explained": found["model"]["weights"]}, **changes)
    settings = {(row["name"], row["modality"]): row["settings"] for row in found["rows"]}
    for entry in results["rows"]:
        entry["settings"] = settings.get((entry["name"], entry["modality"]), {})
    return results


def pages(bench):
    return Page((bench / "report.html").read_text(encoding="utf-8")), (bench / "tables.md").read_text(encoding="utf-8")


def paper_tables(text):
    """Table 1 and Table 2."""
    return [table for table in tables_of(text) if "Published" in plain(table[0][-1])]


def photos(page):
    return [image["src"] for image in page.all("img") if not image["src"].startswith(SVG)]


def test_a_benchmark_gets_measured_roar_beside_the_published(bench):
    before, text = pages(bench)
    assert "not measured here: only the published numbers are shown" in before.words()
    assert "ROAR+ is published only." in text
    results = roar_of(bench)
    results["rows"][-1]["settings"] = {"tau": 9}
    assert add_to_report(read(results), bench) == bench / "report.html"
    after, text = pages(bench)
    assert photos(after) == photos(before) != []
    assert "only the published numbers" not in after.words("p")
    assert "ROAR+ is published only." not in text
    image, phrase = paper_tables(text)
    for table, inside in ((image, ""), (phrase, " (other settings)")):
        heads = [plain(cell) for cell in table[0]]
        assert heads[-4].startswith("ROAR+\N{NO-BREAK SPACE}↑ (10\N{NO-BREAK SPACE}% dropped")
        assert heads[-1] == "Published: ROAR+\N{NO-BREAK SPACE}↑"
        values = {plain(line[0]).partition(" (")[0]: plain(line[-4]) for line in table[1:]}
        assert values["MATEX"] == "11.00 ± 1.00" + inside
        assert values["Control: RandomMap"] == "2.00 ± 1.00"
        assert values["MATEX, as printed"] == values["M2ib"] == MISSING
    assert "Failed, shown as a dash or a gap: repeat-1/image/M2ib/0.5" in after.words()
    assert {"ROAR+, maps of the image", "ROAR+, maps of the phrase"} <= after.plots().keys()


def test_the_next_benchmark_there_shows_it_too(bench, command):
    add_to_report(read(roar_of(bench)), bench)
    added = pages(bench)[1]
    main([*command, "--out", str(bench)])
    again = pages(bench)[1]
    timeless = re.compile(r"## Cost.*?(?=## Notes)|- Made .*", re.DOTALL)
    assert timeless.sub("", again) == timeless.sub("", added)
    assert "11.00 ± 1.00" in again


def test_roar_of_other_weights_is_named_and_not_shown(bench):
    add_to_report(read(roar_of(bench) | {"model": {"explained": "cd" * 32}}), bench)
    page, text = pages(bench)
    said = "ROAR+ is not shown: it was measured with maps of other weights (cdcdcdcdcdcd) than this page"
    assert said in page.words()
    assert said in text
    assert "11.00 ± 1.00" not in page.words() + text


@pytest.mark.parametrize("gone", ["results.json", "panels/index.json"])
def test_a_folder_without_a_benchmark_is_an_error_with_the_way_out(bench, gone):
    results = read(roar_of(bench))
    (bench / gone).unlink()
    page = (bench / "report.html").read_bytes()
    with pytest.raises(
        FileNotFoundError, match=rf"has no {gone}.*Run `matex benchmark --config FILE .* --out .*bench` first"
    ):
        add_to_report(results, bench)
    assert (bench / "report.html").read_bytes() == page
    assert not (bench / "roar.json").exists()


@pytest.mark.parametrize("content", ["{", '{"kind": "benchmark", "format": 1}'], ids=["damaged", "another kind"])
def test_a_roar_that_cannot_be_shown_is_named_before_any_work(tmp_path, command, capsys, content):
    (tmp_path / "roar.json").write_text(content)
    with pytest.raises(SystemExit):
        main([*command, "--out", str(tmp_path)])
    said = capsys.readouterr().err
    assert re.search(r"matex benchmark: The file \S+roar.json cannot be shown: .* Remove the file", said)
    assert [path.name for path in tmp_path.iterdir()] == ["roar.json"]


def test_hostile_roar_stays_text_on_the_benchmarks_page(bench):
    before = {tag for tag, _ in pages(bench)[0].elements}
    results = hostile() | {"model": roar_of(bench)["model"]}
    add_to_report(read(results), bench)
    page, text = pages(bench)
    assert {tag for tag, _ in page.elements} == before
    assert not page.inside
    assert single_line(HOSTILE[0]) in page.words("p")
    assert {len({len(line) for line in table}) for table in tables_of(text)} == {1}
