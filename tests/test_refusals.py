"""Every command on bad input: a short message with status 2, and nothing left behind."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Trainer
from PIL import Image
from test_invariants import refused_tower

from matex_pl import ClipModule, console
from matex_pl.arguments import check_positive
from matex_pl.cli import main
from matex_pl.commands import prior
from matex_pl.commands.refusals import refusal
from matex_pl.files import check_folder, read_yaml

pytestmark = pytest.mark.filterwarnings("ignore:.*are longer than the model's", "ignore:Checkpoint directory")

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML = {
    "empty": (b"", "is empty"),
    "comment": (b"# Nothing.\n", "is empty"),
    "binary": (b"\xff\xd8\xff\xe0\x00\x10JFIF", "binary"),
    "control characters": (b"a: \x00\x01", "binary"),
    "tab": (b"model:\n\tlr: 1\n", "line 2: The line is indented with a tab"),
    "tag": (b"model: !!python/object/apply:os.system ['touch trace']", "line 1: The tag"),
    "bomb": (BOMB.encode(), "The aliases expand to more than 100,000 values"),
    "loop": (b"a: &a [*a]", "has no complete value above it"),
    "levels": (b"a:\n  " + b"- " * 60 + b"x", "more than 50 levels"),
    "brackets": (b"a: " + b"[" * 10_000, "The line is no YAML"),
    "twice": (b"model: {lr: 1, lr: 2}", "The name 'lr' stands twice"),
    "list": (b"- model", "holds no settings"),
    "text": (b"model", "holds no settings"),
    "half": (b"model: {lr: 1", "The line is no YAML"),
    "large": (b"a: " + b"x" * 2**21, "more than 1,048,576 bytes"),
}


def listing(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its content, and every folder."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The message of a command line that is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(words)
    said = capsys.readouterr().err
    assert end.value.code == 2, said
    assert "Traceback" not in said
    # Lightning and the data modules may have logged before.
    message = re.search(r"^matex [a-z-]+: .*", said, re.MULTILINE | re.DOTALL)
    assert message is not None, said
    return message[0]


CHECKPOINTS = {
    "missing": ("none.ckpt", "none.ckpt"),
    "empty": ("empty.ckpt", "empty.ckpt"),
    "truncated": ("cut.ckpt", "cut.ckpt"),
    "wrong kind": ("image.png", "image.png"),
}
OWN = ["--config", "manifest.yaml", "--data.manifest"]
BAD: list[tuple[str, list[str], str]] = [
    *(
        (verb, ["--model.name=tiny.json", f"--ckpt_path={path}"], said)
        for verb in ("fit", "validate", "test", "predict")
        for path, said in CHECKPOINTS.values()
    ),
    ("fit", ["--model.name=tiny.json", "--model.image_size=33"], "whole number of its"),
    ("fit", ["--model.name=tiny.json", "--model.pretrained=cut.ckpt"], "(it is truncated)"),
    ("fit", ["--model.name=empty.json"], "empty.json"),
    ("fit", ["--model.name=list.json"], "'list.json' is no mapping of names to values"),
    ("fit", ["--model.name=odd_width.json"], "open_clip cannot build the model config 'odd_width.json'"),
    ("fit", ["--model.name=local-dir:none"], "local-dir:none names no model: there is no such folder"),
    ("fit", ["--model.name=tiny.json", "--model.image_size=-32"], "image_size must be at least 1 pixel, got -32"),
    ("fit", ["--model.name=tiny.json", "--model.weight_decay=-1"], "weight_decay must not be negative, got -1"),
    ("fit", ["--model.name=tiny.json", "--data.num_val=-1"], "must not be negative, got 12, -1 and 6"),
    *(
        (
            verb,
            ["--model.name=tiny.json", "--ckpt_path=other.ckpt"],
            "other.ckpt is no checkpoint of `matex fit`: it la",
        )
        for verb in ("fit", "test")
    ),
    ("benchmark", ["--ckpt_path=good.ckpt", "--out=results", "--seed=-1"], "seed must be at least 0, got -1"),
    ("tune", ["--ckpt_path=good.ckpt", "--out=results", "--seed=-1"], "seed must not be negative, got -1"),
    *(
        (verb, ["--model.name=tiny.json", "--ckpt_path=last"], "--ckpt_path last finds no checkpoint")
        for verb in ("validate", "test", "predict")
    ),
    ("test", ["--model.name=tiny.json", "--ckpt_path=best"], "No checkpoint at 'best'"),
    ("validate", ["--model.name=tiny.json", "--data.image_size=40"], "image_size"),
    ("test", ["--model.name=tiny.json", "--data.image_size=40"], "image_size"),
    ("predict", ["--model.name=tiny.json", "--data.image_size=40"], "image_size"),
    *(
        (verb, [f"--ckpt_path={path}", "--out=results"], said)
        for verb in ("benchmark", "tune")
        for path, said in CHECKPOINTS.values()
    ),
    ("benchmark", ["--ckpt_path=good.ckpt", "--out=results", "--num_pairs=1"], "num_pairs must be at least 2"),
    ("benchmark", ["--ckpt_path=good.ckpt", "--out=results", "--methods=matex,matex"], "Two methods have the name"),
    ("tune", ["--ckpt_path=good.ckpt", "--out=results", "--method=center_map"], "Only MATEX can be tuned"),
    ("tune", ["--ckpt_path=good.ckpt", "--out=results", "--raster=inf"], "--raster must be a whole number, got 'inf'"),
]
ROAR = ["--config=roar_phantom.yaml", "--ckpt_path=good.ckpt", "--out=roar"]
ALONE: list[tuple[list[str], str]] = [
    (["explain", "none.png", "Nodule.", "--ckpt_path=good.ckpt"], "none.png"),
    (["explain", "empty.png", "Nodule.", "--ckpt_path=good.ckpt"], "empty.png"),
    (["explain", "cut.png", "Nodule.", "--ckpt_path=good.ckpt"], "cut.png"),
    (["explain", "images.csv", "Nodule.", "--ckpt_path=good.ckpt"], "images.csv"),
    (["explain", "image.png", "Nodule.", "--ckpt_path=good.ckpt", "--model=ViT-B-32"], "Give one model"),
    *((["explain", "image.png", "Nodule.", f"--ckpt_path={path}"], said) for path, said in CHECKPOINTS.values()),
    (["prior", "Nodule.", "--regions=none.yaml"], "none.yaml"),
    (["prior", "Nodule.", "--regions=empty.yaml"], "empty.yaml is empty"),
    (["prior", "Nodule.", "--regions=cut.yaml"], "cut.yaml, line 1"),
    (["prior", "Nodule.", "--regions=image.png"], "image.png is no YAML"),
    (["prior", "Nodule.", "--lambda_s=0.5"], "lambda_s"),
    (["check-data", *OWN, "none.csv"], "none.csv"),
    (["check-data", *OWN, "empty.csv"], "empty.csv"),
    (["check-data", *OWN, "cut.csv.gz"], "cut.csv.gz"),
    (["check-data", *OWN, "image.png"], "image.png"),
    (["check-data", *OWN, "images.csv", "--data.fractions=[1, 1, 1]"], "fractions must be three shares"),
    *(
        (["roar", "run", "--config=roar_phantom.yaml", f"--ckpt_path={path}", "--out=roar"], said)
        for path, said in CHECKPOINTS.values()
    ),
    (["roar", "run", "--config=roar_phantom.yaml", "--ckpt_path=good.ckpt", "--start=init"], "start of the runs is un"),
    (["roar", "run", *ROAR, "--training.accelerator=abacus"], "accelerator must be one of auto, cpu, gpu"),
    (["roar", "run", *ROAR, "--training.precision=12"], "precision must be one of 32-true"),
    *(
        (["roar", verb, folder], said)
        for verb in ("status", "collect")
        for folder, said in (
            ("none", "holds no plan"),
            ("plan_empty", "plan.json is damaged"),
            ("plan_cut", "plan.json is damaged"),
            ("plan_other", "has format None"),
            ("plan_old", "has format 1"),
        )
    ),
    (["roar", "run", "--plan=plan_cut"], "plan.json is damaged"),
    (["roar", "run", "--plan=plan_old", "--ckpt_path=good.ckpt"], "has format 1"),
]


def named(value: object) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)


@pytest.mark.parametrize(("verb", "words", "message"), BAD, ids=named)
def test_bad_input_of_commands_on_data(
    workdir: Path,
    phantom_words: list[str],
    verb: str,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = listing(workdir)
    said = refused(capsys, verb, *phantom_words, *words)
    assert message in said
    assert len(said.splitlines()) <= 5
    assert listing(workdir) == before


@pytest.mark.parametrize(("words", "message"), ALONE, ids=named)
def test_bad_input_of_other_commands(
    workdir: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = listing(workdir)
    said = refused(capsys, *words)
    assert message in said
    assert len(said.splitlines()) <= 5
    assert listing(workdir) == before


# --- options


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["fit", *OWN[:2], "--data.manifst=x"], ["no option --data.manifst", "--data.manifest"]),
        (["check-data", *OWN[:2], "--data.manifst", "x"], ["no option --data.manifst", "--data.manifest"]),
        (["fit", "--config=phantom.yaml", "--model", "ViT-B-32"], ["--model takes a YAML file", "--model.name"]),
        (["fit", "--config=phantom.yaml", "--model", "tiny.json"], ["Give the model config as --model.name tiny.json"]),
        (["check-data", *OWN, "none.csv", "--model", "tiny.json"], ["none.csv"]),
        (["fit", "--config=phantom.yaml", "--model.lrr=3"], ["no option --model.lrr", "--model.lr"]),
        (["fit", "--config=phantom.yaml", "--trainer.max_epoch=3"], ["no option --trainer.max_epoch", "max_epochs"]),
        (["fit", "--config=phantom.yaml", "--model.lr=high"], ["--model.lr must be a number, got 'high'"]),
        (
            ["fit", "--config=phantom.yaml", "--data.batch_size=x"],
            ["--data.batch_size must be a whole number, got 'x'"],
        ),
        (["fit", "--config=phantom.yaml", "--weights_only=false"], ["no option --weights_only"]),
        (["fit", "--config=phantom.yaml", "word"], ["'word' belongs to no option"]),
        (["fit", "--data=images.csv"], ["--data takes the name of a data module", "--data.manifest images.csv"]),
        (["check-data", "--data=images.csv"], ["--data takes the name of a data module"]),
        (["fit", "--data=Manifest"], ["--data takes a data module (", "ManifestDataModule", "got 'Manifest'"]),
        (["fit", "--config=images.csv"], ["images.csv holds no settings"]),
        (["explain", "image.png", "Nodule.", "--ckpt_path=x", "--methd=m2ib"], ["no option --methd", "--method"]),
        (["prior", "Nodule.", "--lambdas=2"], ["no option --lambdas", "--lambda_s"]),
        (["prior", "Nodule.", "--lambda_s=much"], ["--lambda_s must be a number, got 'much'"]),
        (["prior", "Nodule.", "--prior_shape=cone"], ["--prior_shape must be one of 'parabola'", "got 'cone'"]),
        (["roar", "run", "--config=roar_phantom.yaml", "--training.epoch=1"], ["no option --training.epoch", "epochs"]),
        (
            ["roar", "run", "--config=roar_phantom.yaml", "--training.epochs=0"],
            ["epochs must be a number greater than 0, got 0"],
        ),
    ],
    ids=named,
)
def test_a_wrong_option_is_named_with_the_nearest(
    workdir: Path, words: list[str], messages: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = listing(workdir)
    said = refused(capsys, *words)
    assert all(message in said for message in messages), said
    assert "patient of ours" not in said
    assert len(said.splitlines()) == 1
    assert listing(workdir) == before


def test_a_wrong_setting_of_a_config_is_named(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"class_path": "ManifestDataModule", "init_args": {"manifest": "images.csv", "batchsize": 4}}
    Path("mine.yaml").write_text(yaml.safe_dump({"data": data}), encoding="utf-8")
    for verb in ("fit", "check-data"):
        said = refused(capsys, verb, "--config=mine.yaml")
        assert "--data.batchsize, which the config mine.yaml sets" in said
        assert "--data.batch_size" in said
    Path("mine.yaml").write_text(yaml.safe_dump({"model": {"lr": "high"}, "data": data}), encoding="utf-8")
    del data["init_args"]["batchsize"]
    Path("mine.yaml").write_text(yaml.safe_dump({"model": {"lr": "high"}, "data": data}), encoding="utf-8")
    assert "--model.lr in the config mine.yaml must be a number, got 'high'" in refused(
        capsys, "fit", "--config=mine.yaml"
    )


def test_infinity_is_not_a_small_number() -> None:
    with pytest.raises(ValueError, match=r"lr must be finite, got inf\."):
        check_positive(lr=float("inf"))


# --- YAML


@pytest.mark.parametrize("kind", YAML)
def test_what_is_no_yaml_is_refused_within_a_second(
    workdir: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content, message = YAML[kind]
    Path("bad.yaml").write_bytes(content)
    commands = [["fit"], ["validate"], ["test"], ["predict"], ["check-data"], ["roar", "run"], ["roar", "status"]]
    lines = [[*words, "--config=bad.yaml"] for words in commands]
    lines += [[verb, "--config=bad.yaml", "--ckpt_path=good.ckpt", "--out=results"] for verb in ("benchmark", "tune")]
    lines.append(["prior", "Nodule.", "--regions=bad.yaml"])
    lines.append(["explain", "image.png", "Nodule.", "--ckpt_path=good.ckpt", "--method=bad.yaml"])
    refused(capsys, *lines[-1])
    for words in lines:
        start = time.process_time()
        said = refused(capsys, *words)
        assert time.process_time() - start < 1
        assert "bad.yaml" in said
        assert message in said
        assert len(said.splitlines()) == 1
    assert not Path("trace").exists()


def test_yaml_within_yaml_is_checked_too(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("inner.yaml").write_text(BOMB, encoding="utf-8")
    Path("outer.yaml").write_text("data: inner.yaml", encoding="utf-8")
    start = time.process_time()
    refused(capsys, "fit", "--config=outer.yaml")
    assert time.process_time() - start < 5


def test_anchors_and_dates_are_read(tmp_path: Path) -> None:
    path = tmp_path / "good.yaml"
    path.write_text("a: &a {lr: 1.0e-5}\nb: {<<: *a, day: 2020-01-01}\n", encoding="utf-8")
    assert read_yaml(path) == {"a": {"lr": 1e-5}, "b": {"lr": 1e-5, "day": "2020-01-01"}}


# --- refusals and bugs


def raised(code: str, name: str = "matex_pl.part") -> str | None:
    """What `refusal` makes of the exception of some code in a module of this name."""
    try:
        exec(code, {"__name__": name})
    except BaseException as error:
        return refusal(error)
    return "no exception"


def test_only_a_raise_statement_of_the_package_is_a_refusal() -> None:
    assert raised("raise ValueError('No.')") == "No."
    assert raised("try: int('x')\nexcept ValueError as error: raise ValueError('No.') from error") == "No."
    assert raised("int('x')") is None
    assert raised("a, b = [1]") is None
    assert raised("assert False") is None
    assert raised("raise KeyError('x')") is None
    assert raised("raise ValueError('No.')", "another.part") is None
    # A library that wraps the exception of a class.
    wrapped = "try: raise ValueError('No.')\nexcept ValueError as error: raise RuntimeError('Problem') from error"
    assert raised(wrapped) == "No."


def test_errors_of_lightning_are_translated() -> None:
    missing = "Requirement 'wandb>=0.12.10' not met. HINT: Try running `pip install -U 'wandb>=0.12.10'`"
    way_out = "needs the package wandb. Install it with: pip install wandb"
    assert raised(f'raise ModuleNotFoundError("{missing}")', "lightning.loggers") == f"The setting {way_out}"
    # jsonargparse reports errors of all types that a value may have.
    nested = f"Problem with given class_path 'lightning.pytorch.loggers.WandbLogger': {missing}"
    assert raised(f'raise ValueError("{nested}")', "jsonargparse.hints") == f"WandbLogger {way_out}"
    assert raised("raise ValueError('Other.')", "jsonargparse.hints") is None
    other = "raise ValueError('<a.B object at 0x7f> is wrong.\\nAdvice.')"
    expected = "The Trainer cannot run with these settings. a.B is wrong."
    assert raised(other, "lightning.pytorch.trainer") == expected


def test_errors_of_the_system_name_the_file(tmp_path: Path) -> None:
    assert raised("open('/none/at/all')") == "No such file or directory: '/none/at/all'. Check the path."
    assert raised(f"open({str(tmp_path)!r})") == f"Is a directory: {str(tmp_path)!r}. Check the path."
    assert "Make room on the disk" in str(raised("raise OSError(28, 'No space left on device')", "another"))
    assert raised("raise OSError(9, 'Bad file descriptor')", "another") is None
    assert "Lower the batch size" in str(raised("raise MemoryError", "another"))


def test_a_bug_shows_its_traceback_and_where_to_report_it(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prior, "parse_phrase", lambda *_, **__: {}["missing"])
    with pytest.raises(SystemExit) as end:
        main(["prior", "Nodule."])
    said = capsys.readouterr().err
    assert end.value.code == 1
    assert "KeyError: 'missing'" in said
    assert "This is a bug" in said
    assert "issue tracker" in said


@pytest.mark.parametrize("way", ["option", "environment"])
def test_debug_shows_the_traceback_of_a_refusal(
    workdir: Path, way: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if way == "environment":
        monkeypatch.setenv("MATEX_DEBUG", "1")
    with pytest.raises(SystemExit) as end:
        main(["prior", "Nodule.", "--lambda_s=0", *["--debug"] * (way == "option")])
    assert end.value.code == 2
    assert "Traceback" in capsys.readouterr().err


# --- terminals, disks and progress


def test_a_terminal_without_a_letter_loses_the_letter_alone(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    main(["prior", "Nodule ≥ 3 mm in the left lower lobe.", "--out=m.png"])
    terminal.flush()
    printed = terminal.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert "Nodule \\u2265 3 mm" in printed
    assert "m.png" in printed


def test_a_full_disk_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, _: Any) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("matex_pl.files.TemporaryFile", lambda **_: Full())
    with pytest.raises(OSError, match=r"Nothing can be written in .*new: No space left on device"):
        check_folder(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_long_work_without_a_terminal_logs_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "_SILENT_SECONDS", 0.0)
    console.show_messages()
    assert list(console.progress(range(5), "images")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err == "images: 1 of 5, about 0 s left\n"


# --- trainings


@pytest.mark.parametrize("option", ["--trainer.enable_progress_bar=false", "--trainer.callbacks=[]"])
def test_a_training_without_a_progress_bar_or_without_callbacks(
    workdir: Path, phantom_words: list[str], option: str
) -> None:
    main(["fit", *phantom_words, "--model.name=tiny.json", "--trainer.max_steps=1", "--model.warmup_steps=1", option])
    assert list(Path("runs/phantom/version_0").glob("events*"))


def test_a_refusal_keeps_the_runs_before(
    workdir: Path, phantom_words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*phantom_words, "--model.name=tiny.json", "--model.warmup_steps=1", "--trainer.callbacks=[]"]
    main(["fit", *words, "--trainer.max_steps=1"])
    before = listing(workdir)
    assert "image_size" in refused(capsys, "fit", *words, "--data.image_size=40")
    assert listing(workdir) == before


SETTINGS = {
    "accelerator=abacus": "must be one of auto, cpu, cuda, gpu, mps, tpu, got 'abacus'.",
    "accelerator=tpu": "must be auto or cpu, got 'tpu'. This machine, or its installation of torch, has no such",
    "strategy=ddp_spwn": "such as ddp, got 'ddp_spwn'. Nearest: ddp_spawn",
    "devices=0": "must be a number of processes from 1, or auto, on the CPU, got '0'.",
    "devices=-2": "on the CPU, got '-2'.",
    "devices=[9]": "on the CPU, got [9].",
    "num_nodes=0": "must be a number of machines from 1, got 0.",
    "precision=7": "must be one of",
    "max_epochs=-3": "must be a number of epochs from 0, -1 for no limit, or null, got -3.",
    "max_steps=-7": "got -7.",
    "min_epochs=-2": "got -2.",
    "min_steps=-2": "got -2.",
    "max_time=5": "must have the form DD:HH:MM:SS, got '5'.",
    "limit_train_batches=-1": "must be a number of batches from 1",
    "limit_train_batches=0": "must be a number of batches from 1, or a share of them above 0.0 and up to 1.0, got 0",
    "limit_val_batches=2.5": "got 2.5.",
    "limit_test_batches=-3": "must be a number of batches from 0, or a share of them between 0.0 and 1.0, got -3",
    "overfit_batches=1.5": "got 1.5.",
    "val_check_interval=0": "must be a number of batches from 1, or a share of an epoch above 0.0 and up to 1.0, got 0",
    "val_check_interval=2.5": "got 2.5.",
    "check_val_every_n_epoch=0": "must be a number of epochs from 1",
    "gradient_clip_val=-1": "must be a number from 0, or null for none, got -1",
    "gradient_clip_algorithm=sum": "must be norm or value, got 'sum'.",
    "accumulate_grad_batches=0": "must be a number of batches from 1, got 0.",
    "log_every_n_steps=-1": "must be a number of steps from 0, got -1.",
    "num_sanity_val_steps=-2": "or -1 for all, got -2.",
    "profiler=fast": "must be one of simple, advanced, pytorch, xla, or null, got 'fast'.",
    "barebones=true": "--trainer.barebones is true, which does not go with --trainer.logger.",
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_wrong_settings_of_the_trainer(
    workdir: Path,
    phantom_words: list[str],
    setting: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Also on a machine with a GPU.
    monkeypatch.setattr("lightning.pytorch.accelerators.CUDAAccelerator.is_available", lambda: False)
    before = listing(workdir)
    said = refused(capsys, "fit", *phantom_words, "--model.name=tiny.json", f"--trainer.{setting}")
    assert f"--trainer.{setting.partition('=')[0]}" in said
    assert SETTINGS[setting] in said
    assert len(said.splitlines()) == 1
    assert listing(workdir) == before


def test_a_wrong_setting_of_the_trainer_in_a_config(
    workdir: Path, phantom_words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.yaml").write_text("trainer: {num_nodes: 0}", encoding="utf-8")
    said = refused(capsys, "fit", *phantom_words, "--config=mine.yaml")
    assert "--trainer.num_nodes in the config must be a number of machines from 1, got 0." in said
    Path("mine.yaml").write_text("trainer: {callbacks: [{class_path: Nowhere}]}", encoding="utf-8")
    said = refused(capsys, "fit", *phantom_words, "--config=mine.yaml")
    assert "--trainer.callbacks in the config mine.yaml names 'Nowhere', which is no known class." in said
    method = "{class_path: matex_pl.attribution.PatchSimilarity}"
    method = f"{{class_path: matex_pl.callbacks.AttributionMaps, init_args: {{method: {method}}}}}"
    Path("mine.yaml").write_text(f"trainer: {{callbacks: [{method}]}}", encoding="utf-8")
    assert "It is a variant of DenseSimilarity now." in refused(capsys, "fit", *phantom_words, "--config=mine.yaml")
    Path("mine.yaml").write_text("model: {lr: 1.0e-4}", encoding="utf-8")
    assert "options that are required: --data. `matex fit --help`" in refused(capsys, "fit", "--config=mine.yaml")


def test_settings_that_do_not_fit_the_data(
    workdir: Path, phantom_words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fit", *phantom_words, "--model.name=tiny.json", "--model.warmup_steps=1", "--trainer.callbacks=[]"]
    before = listing(workdir)
    said = refused(capsys, *words, "--trainer.val_check_interval=99")
    assert re.search(r"val_check_interval is 99, but an epoch has \d+ batches\. Give a number up to", said)
    assert listing(workdir) == before
    assert "--seed_everything must be a whole number from 0" in refused(capsys, *words, "--seed_everything=-1")
    assert "--ckpt_path is empty" in refused(capsys, *words, "--ckpt_path=")


def test_an_image_that_is_unreadable_in_an_epoch_ends_the_run(
    workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("images").mkdir()
    rows = ["image,phrase,patient_id,split"]
    for place in range(12):
        shutil.copy("image.png", f"images/{place}.png")
        rows.append(f"images/{place}.png,Image {place}.,{place},{'val' if place > 8 else 'train'}")
    Path("mine.csv").write_text("\n".join(rows), encoding="utf-8")
    shutil.copy("cut.png", "images/3.png")
    said = refused(
        capsys,
        "fit",
        *OWN,
        "mine.csv",
        "--data.root=.",
        "--data.batch_size=4",
        "--data.num_workers=0",
        "--model.name=tiny.json",
        "--model.pretrained=null",
        "--trainer.accelerator=cpu",
    )
    assert "3.png" in said
    assert len(said.splitlines()) <= 5
    assert not list(Path("runs").rglob("version_*"))


# --- towers that some methods do not support


@pytest.mark.slow
def test_commands_go_on_without_the_methods_that_refuse_a_tower(
    workdir: Path, phantom_words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = refused_tower("both pools").config
    Path("odd.json").write_text(json.dumps(config), encoding="utf-8")
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    module = ClipModule("odd.json")
    module.clip.mean_image.fill_(0.5)
    trainer.strategy.connect(module)
    trainer.save_checkpoint("odd.ckpt")
    reason = "its pooling is 'avgmax'"

    # Two steps, and no validation: the refusal comes before the first step.
    before = listing(workdir)
    short = ["--trainer.max_steps=2", "--model.warmup_steps=1"]
    assert reason in refused(capsys, "fit", *phantom_words, "--model.name=odd.json", *short)
    assert listing(workdir) == before
    main(["check-data", *phantom_words, "--model=odd.json"])
    said = capsys.readouterr().out
    assert re.search(rf"\n  fit +no: Matex: .*{reason}.*\n  test +no: Matex: .*{reason}", said)
    assert re.search(rf"\n  benchmark +yes, without MATEX, .*Rollout, WordRegions\n  Maps of .*{reason}", said)
    assert "Saliency" not in said
    assert reason in refused(capsys, "explain", "image.png", "Nodule.", "--ckpt_path=odd.ckpt")
    main(["explain", "image.png", "Left nodule.", "--ckpt_path=odd.ckpt", "--method=all", "--out=all.png"])
    assert Image.open("all.png").width == 1920

    data = [*phantom_words, "--ckpt_path=odd.ckpt"]
    few = ["--methods=matex,saliency", "--validation_pairs=2", "--sanity_pairs=2", "--steps=2", "--resamples=100"]
    main(["benchmark", *data, "--num_pairs=4", "--out=results", *few])
    results = json.loads(Path("results/results.json").read_text(encoding="utf-8"))
    errors = {row["name"]: row["error"] for row in results["rows"] if row["modality"] == "image"}
    assert reason in errors["MATEX"]
    assert not errors["Saliency"]
    assert reason in refused(capsys, "tune", *data, "--out=tuned")
    assert not Path("tuned").exists()

    words = ["--methods=matex,saliency", "--start=explained", "--out=roar", "--processes=1", "--protocol.repeats=1"]
    words += ["--protocol.fractions=[0.5]", "--protocol.modalities=[image]", "--training.epochs=1"]
    words += ["--training.batch_size=4", "--training.accelerator=cpu"]
    main(["roar", "run", "--config=roar_phantom.yaml", *phantom_words[2:], "--ckpt_path=odd.ckpt", *words])
    measured = json.loads(Path("roar/results.json").read_text(encoding="utf-8"))
    assert reason in measured["refused"]["MATEX"]
    assert "Saliency" in {row["name"] for row in measured["rows"]}
    assert not measured["failed"]
    pairs = json.loads(Path("roar/pairs.json").read_text(encoding="utf-8"))
    assert {pair["pair"]["patient_id"] for pair in pairs} == {str(number) for number in range(12)}
