"""The `matex` command, with the configs that are shipped."""

import csv
import json
import shutil
import subprocess
import sys
from inspect import isabstract
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from families import CONFIGS as FAMILY_CONFIGS
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_ms_cxr import annotation_rows, write_annotations, write_images
from test_report import plain, tables_of

from matex_pl import attribution
from matex_pl.attribution.shipped import load_method, method_names, shipped_methods
from matex_pl.cli import main
from matex_pl.commands.options import brings_weights, check_one_model
from matex_pl.files import find_config, shipped_configs
from matex_pl.report.published import PUBLISHED
from matex_pl.roar.make import plan_methods
from matex_pl.roar.plan import Protocol, Training

SMALL_PHANTOM = [
    f"--data.{name}={value}"
    for name, value in {
        "num_train": 24,
        "num_val": 12,
        "num_test": 12,
        "stored_size": 96,
        "batch_size": 8,
        "num_workers": 0,
    }.items()
]
MANIFEST_CHECKPOINT = "runs/manifest/checkpoints/last.ckpt"
SHORT = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--model.warmup_steps=1"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tmp_path_factory.mktemp("images")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to run in, with a tiny model config."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(Path(__file__).with_name("tiny.json"), tmp_path)
    return tmp_path


def nih_folder(root: Path) -> Path:
    """The layout of NIH ChestX-ray14 with 40 patients of one image each."""
    (root / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = [f"{patient:08d}_000" for patient in range(40)]
    for name in names:
        Image.fromarray(rng.integers(0, 255, (64, 64), dtype=np.uint8)).save(root / "images" / f"{name}.png")
    labels = ["Effusion|Mass" if place % 2 else "Nodule" for place in range(40)]
    rows = ["Image Index,Finding Labels,Follow-up #,Patient ID"]
    rows += [f"{name}.png,{label},0,{int(name[:8])}" for name, label in zip(names, labels, strict=True)]
    (root / "Data_Entry_2017_v2020.csv").write_text("\n".join(rows), encoding="utf-8")
    boxes = ["Image Index,Finding Label,Bbox [x,y,w,h],,,"]
    boxes += [f"{name}.png,{label.split('|')[0]},100,200,300,400" for name, label in zip(names, labels, strict=True)]
    (root / "BBox_List_2017.csv").write_text("\n".join(boxes), encoding="utf-8")
    return root


def fit_phantom(images: Path, *more: str) -> None:
    main(
        [
            "fit",
            "--config",
            "phantom.yaml",
            "--model.name=tiny.json",
            f"--data.root={images}",
            *SMALL_PHANTOM,
            *SHORT,
            *more,
        ]
    )


def test_phantom_config_from_fit_to_explain(here, images, capsys):
    fit_phantom(images)
    logged = EventAccumulator(str(here / "runs" / "phantom" / "version_0"), size_guidance={"images": 0}).Reload().Tags()
    assert sum(tag.startswith("maps/matex/") for tag in logged["images"]) == 9
    beside = {f"attribution{name}/pointing_game" for name in ("", "_no_prior", "_center", "_prior_only")}
    assert beside | {"val/zero_shot_top1", "val/zero_shot_auroc", "val/image_to_text_recall@1"} <= set(
        logged["scalars"]
    )

    last = "runs/phantom/checkpoints/last.ckpt"
    common = ["--config", "phantom.yaml", "--model.name=tiny.json", f"--data.root={images}", *SMALL_PHANTOM]
    main(["validate", *common, "--ckpt_path", last])
    main(["test", *common, "--ckpt_path", last])
    main(["predict", *common, "--ckpt_path", last])
    with next(here.glob("runs/phantom/version_*/predictions.csv")).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 12
    assert -1 <= float(rows[0]["cosine"]) <= 1
    assert {"id", "phrase", "nodule"} <= rows[0].keys()

    Path("models").mkdir()
    Path("tiny.json").rename("models/tiny.json")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 70), dtype=np.uint8)).save("image.png")
    capsys.readouterr()
    phrase = ["explain", "image.png", "Left lower lobe consolidation."]
    main([*phrase, "--ckpt_path", last, "--out", "out/panel.png"])
    assert "out/panel.png" in capsys.readouterr().out
    assert cv2.imread("out/panel.png").shape[1] == 880
    # The same weights as those of any CLIP model, by the name of its architecture.
    main([*phrase, "--model", "models/tiny.json", "--pretrained", last, "--out", "model.png"])
    assert np.array_equal(cv2.imread("out/panel.png"), cv2.imread("model.png"))
    main(["explain", "image.png", "Nodule.", "--ckpt_path", last, "--out", "center.png", "--method", "CenterMap"])
    assert Path("center.png").is_file()


def test_roar_plus_in_a_training_from_the_command_line(here, images):
    few = ["--trainer.callbacks.methods=[chefer]", "--trainer.callbacks.training.epochs=1"]
    few += ["--trainer.callbacks.protocol.modalities=[image]", "--trainer.callbacks.protocol.fractions=[0.5]"]
    few += ["--trainer.callbacks.protocol.repeats=1", "--trainer.callbacks.training.batch_size=4"]
    fit_phantom(images, "--trainer.callbacks+=matex_pl.callbacks.RoarPlus", *few)
    logged = EventAccumulator(str(here / "runs" / "phantom" / "version_0")).Reload().Tags()["scalars"]
    assert "roar/image/Chefer" in logged


def test_the_last_checkpoint_of_a_second_run_is_its_own(here, images):
    """Every documented `--ckpt_path .../last.ckpt` is of the run before it."""
    Path("none.yaml").write_text("trainer: {limit_val_batches: 0}", encoding="utf-8")
    steps = []
    for epochs in (2, 1):
        fit_phantom(images, "--config", "none.yaml", f"--trainer.max_epochs={epochs}")
        checkpoint = torch.load("runs/phantom/checkpoints/last.ckpt", weights_only=True)
        steps.append(checkpoint["global_step"])
    assert steps[1] == steps[0] // 2
    assert [path.name for path in Path("runs/phantom/checkpoints").glob("last*")] == ["last.ckpt"]
    # And it is what a training goes on from.
    fit_phantom(images, "--config", "none.yaml", "--trainer.max_epochs=3", "--ckpt_path=last")
    checkpoint = torch.load("runs/phantom/checkpoints/last.ckpt", weights_only=True)
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (2, 3 * steps[1])
    assert len(list(Path("runs/phantom/checkpoints").glob("last*"))) == 1


@pytest.mark.parametrize("config", shipped_configs())
def test_no_shipped_config_puts_a_number_behind_last(config):
    trainer = yaml.safe_load(find_config(config).read_text(encoding="utf-8")).get("trainer", {})
    for callback in trainer.get("callbacks", []):
        settings = callback.get("init_args", {})
        if settings.get("filename") == "last" and "dirpath" in settings:
            assert settings["enable_version_counter"] is False


def test_methods_by_name_and_all_of_them(here, images, capsys):
    fit_phantom(images)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 70), dtype=np.uint8)).save("image.png")
    words = ["explain", "image.png", "Left lower lobe consolidation.", "--ckpt_path"]
    words.append("runs/phantom/checkpoints/last.ckpt")
    main([*words, "--method", "m2ib", "--out", "named.png"])
    main([*words, "--method=m2ib", "--method.steps=1", "--out", "changed.png"])
    assert cv2.imread("named.png").shape == cv2.imread("changed.png").shape
    assert not np.array_equal(cv2.imread("named.png"), cv2.imread("changed.png"))
    main([*words, "--method", "M2ib", "--method.steps=1", "--out", "class.png"])
    assert np.array_equal(cv2.imread("changed.png"), cv2.imread("class.png"))
    main([*words, "--method", "all", "--out", "all.png"])
    # The image and one tile per method, six in a row.
    assert cv2.imread("all.png").shape[1] == 1920
    with pytest.raises(SystemExit, match=r"There is no method 'm3ib'. Use one of center_map.*saliency"):
        main([*words, "--method", "m3ib"])
    with pytest.raises(SystemExit, match="It is a variant of DenseSimilarity now"):
        main([*words, "--method", "PatchSimilarity"])
    Path("mine.yaml").write_text("class_path: matex_pl.attribution.M2ib\ninit_args: {step: 1}", encoding="utf-8")
    with pytest.raises(
        SystemExit, match=r"mine.yaml does not describe an attribution method: .*M2ib has no setting 'step'.*steps"
    ):
        main([*words, "--method", "mine.yaml"])


def test_every_shipped_method_works_inside_attribution_maps(here, images):
    maps = [
        {
            "class_path": "matex_pl.callbacks.AttributionMaps",
            "init_args": {"num_pairs": 1, "name": name, "method": name},
        }
        for name in method_names()
    ]
    Path("maps.yaml").write_text(json.dumps({"trainer": {"callbacks": maps}}), encoding="utf-8")
    fit_phantom(images, "--config", "maps.yaml")
    logged = EventAccumulator(str(here / "runs" / "phantom" / "version_0"), size_guidance={"images": 0}).Reload().Tags()
    assert {tag.split("/")[1] for tag in logged["images"]} == set(method_names())


def test_there_is_a_shipped_setting_of_every_method():
    public = {name: getattr(attribution, name) for name in attribution.__all__}
    methods = {name for name, kind in public.items() if issubclass(kind, attribution.AttributionMethod)}
    assert set(shipped_methods()) == {name for name in methods if not isabstract(public[name])}


def test_shortcut_config_with_the_tag_and_without(here, images):
    words = ["--model.name=tiny.json", f"--data.root={images}", *SMALL_PHANTOM, *SHORT]
    main(["fit", "--config", "phantom_shortcut.yaml", *words])
    main(["fit", "--config", "phantom_shortcut.yaml", *words, "--data.shortcut=0", "--trainer.logger.name=control"])
    scalars = []
    for name in ("phantom_shortcut", "control"):
        run = here / "runs" / name / "version_0"
        assert (run / "checkpoints" / "last.ckpt").is_file()
        scalars.append(set(EventAccumulator(str(run)).Reload().Tags()["scalars"]))
    assert scalars[0] == scalars[1]
    expected = {"outside_thorax_mass", "outside_thorax_mass/nodule"}
    expected |= {"prompt_sensitivity", "prompt_sensitivity/nodule", "side_sensitivity"}
    assert {f"{method}/{name}" for name in expected for method in ("attribution", "attribution_no_prior")} <= scalars[0]


def test_nih_config_from_scratch_and_from_a_checkpoint(here, images):
    root = nih_folder(here / "nih")
    words = ["--model.name=tiny.json", f"--data.root={root}", "--data.batch_size=8", "--data.num_workers=0", *SHORT]
    main(["fit", "--config", "nih.yaml", *words])
    logged = EventAccumulator(str(here / "runs" / "nih" / "version_0")).Reload().Tags()
    per_finding = {tag for tag in logged["scalars"] if tag.startswith("attribution/pointing_game/")}
    assert per_finding == {"attribution/pointing_game/lung nodule", "attribution/pointing_game/pleural effusion"}
    fit_phantom(images)
    main(["fit", "--config", "nih.yaml", *words, "--model.pretrained=runs/phantom/checkpoints/last.ckpt"])


def test_vit_b_32_config_runs_on_other_weights(here):
    root = nih_folder(here / "nih")
    words = ["--model.name=tiny.json", "--model.pretrained=null", f"--data.root={root}", "--data.batch_size=8"]
    main(["fit", "--config", "vit_b_32.yaml", *words, "--data.num_workers=0", *SHORT])
    assert Path("runs/vit_b_32/checkpoints/last.ckpt").is_file()


@pytest.mark.parametrize(("config", "name"), [("biomedclip.yaml", "biomedclip"), ("siglip.yaml", "siglip")])
def test_configs_of_other_towers_run_on_small_ones(here, config, name):
    """A non-square frame, Hugging Face text towers and tokenizers, timm trunks; and the checkpoint is explained."""
    Path("small.json").write_text(json.dumps(FAMILY_CONFIGS[name]() | {"embed_dim": 32}), encoding="utf-8")
    root = nih_folder(here / "nih")
    words = ["--model.name=small.json", "--model.pretrained=null", f"--data.root={root}", "--data.batch_size=8"]
    main(["fit", "--config", config, *words, "--data.num_workers=0", *SHORT])
    checkpoint = f"runs/{name}/checkpoints/last.ckpt"
    image = next(Path(root).rglob("*.png"))
    main(["explain", str(image), "Left effusion.", "--ckpt_path", checkpoint, "--out", "map.png"])
    assert Path("map.png").is_file()


def test_manifest_config_needs_an_image_and_a_phrase_only(here, capsys):
    root = nih_folder(here / "nih")
    rows = [f"images/{path.name};Image {place}." for place, path in enumerate(sorted(root.rglob("*.png")))]
    Path("images.csv").write_text("\n".join(["image;caption", *rows]), encoding="utf-8")
    data = ["--config", "manifest.yaml", "--data.manifest=images.csv", "--data.columns={phrase: caption}"]
    data.append(f"--data.root={root}")
    main(["check-data", *data])
    assert "No bad rows." in capsys.readouterr().out
    few = ["--data.batch_size=8", "--data.num_workers=0", *SHORT]
    main(["fit", *data, "--model.name=tiny.json", "--model.pretrained=null", *few])
    main(["explain", str(root / "images" / "00000003_000.png"), "Image 3.", "--ckpt_path", MANIFEST_CHECKPOINT])
    assert Path("panel.png").is_file()


def fit_ms_cxr(here: Path, config: str, model: str) -> list[str]:
    """What a holder of MS-CXR runs, on a made-up copy of its layout and a small model; the options of the data."""
    rows = annotation_rows(20)
    write_annotations(here, rows)
    write_images(here, [row["path"] for row in rows])
    data = ["--config", config, "--data.root=.", "--data.cache_dir=kept"]
    main(["check-data", *data, "--model", model])
    words = [*data, f"--model.name={model}", "--model.pretrained=null", "--data.batch_size=8", "--data.num_workers=0"]
    main(["fit", *words, *SHORT])
    assert len(list(Path("kept").rglob("*.npz"))) >= 16
    return data


@pytest.mark.slow
def test_ms_cxr_biomedclip_configs_from_check_to_the_papers_tables(here, capsys):
    """The documented commands on a timm trunk and a text tower and a tokenizer of Hugging Face's."""
    Path("small.json").write_text(json.dumps(FAMILY_CONFIGS["biomedclip"]() | {"embed_dim": 32}), encoding="utf-8")
    data = fit_ms_cxr(here, "ms_cxr_biomedclip.yaml", "small.json")
    assert "No bad rows." in capsys.readouterr().out
    few = ["--methods=grad_cam", "--validation_pairs=2", "--sanity_pairs=2", "--steps=2", "--resamples=100"]
    checkpoint, out = "runs/ms_cxr_biomedclip/checkpoints/last.ckpt", "results/ms_cxr_biomedclip"
    main(["benchmark", *data, "--ckpt_path", checkpoint, "--num_pairs=-1", "--budget=full", "--out", out, *few])

    small = ["--data.num_workers=0", "--training.epochs=1", "--training.batch_size=8", "--training.accelerator=cpu"]
    small += ["--protocol.repeats=2", "--protocol.fractions=[0.5]", "--data.root=.", "--data.cache_dir=kept"]
    small += ["--methods=grad_cam", "--init_model=small.json", "--init_weights", "null"]
    small += ["--ckpt_path", checkpoint, "--out", "roar/ms_cxr_biomedclip"]
    main(["roar", "run", "--config", "roar_ms_cxr.yaml", *small])
    main(["roar", "collect", "roar/ms_cxr_biomedclip", "--report", out])
    measured = json.loads(Path("roar/ms_cxr_biomedclip/results.json").read_text(encoding="utf-8"))
    assert not measured["failed"]
    assert {row["modality"] for row in measured["rows"] if row["name"] == "GradCam"} == {"image", "text"}
    assert "ROAR+ is published only" not in Path(out, "tables.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_ms_cxr_vit_b_32_configs_from_check_to_the_papers_tables(here, capsys):
    """What a holder of the data runs for the paper's tables, each command as the configs document it."""
    data = fit_ms_cxr(here, "ms_cxr_vit_b_32.yaml", "tiny.json")
    assert "No bad rows." in capsys.readouterr().out
    few = ["--methods=matex,grad_cam", "--validation_pairs=2", "--sanity_pairs=2", "--steps=2", "--resamples=100"]
    checkpoint = "runs/ms_cxr_vit_b_32/checkpoints/last.ckpt"
    main(["benchmark", *data, "--ckpt_path", checkpoint, "--num_pairs=-1", "--budget=full", "--out=results", *few])
    results = json.loads(Path("results/results.json").read_text(encoding="utf-8"))
    assert results["data"]["settings"]["root"] == "."
    # 20 patients, two of ten in the test split, three phrases each.
    assert results["data"]["pairs"] == 12
    assert "ROAR+ is published only" in Path("results/tables.md").read_text(encoding="utf-8")

    small = ["--init_model=tiny.json", "--init_weights=null"]
    small += ["--data.num_workers=0", "--training.epochs=1", "--training.batch_size=8", "--training.accelerator=cpu"]
    small += ["--protocol.repeats=2", "--protocol.fractions=[0.5]", "--data.root=.", "--data.cache_dir=kept"]
    small += ["--methods=[matex, paper/matex, grad_cam]"]
    main(["roar", "run", "--config", "roar_ms_cxr.yaml", *small])
    main(["roar", "collect", "roar/ms_cxr", "--report", "results"])
    assert "True boxes" in capsys.readouterr().out
    plan = json.loads(Path("roar/ms_cxr/plan.json").read_text(encoding="utf-8"))
    assert plan["about"]["data"]["pairs"] == 60
    assert plan["about"]["model"]["start"] != plan["about"]["model"]["explained"]
    measured = json.loads(Path("roar/ms_cxr/results.json").read_text(encoding="utf-8"))
    assert not measured["failed"]
    text = Path("results/tables.md").read_text(encoding="utf-8")
    assert "ROAR+ is published only" not in text
    tables = [table for table in tables_of(text) if "Published" in plain(table[0][-1])]
    for modality, table in zip(("image", "text"), tables, strict=True):
        assert plain(table[0][-4]).startswith("ROAR+")
        lines = {plain(cells[0]).partition(" (")[0]: [plain(cell) for cell in cells] for cells in table[1:]}
        scores = {row["name"]: row["points"][0] for row in measured["rows"] if row["modality"] == modality}
        for name in ("MATEX", "MATEX, as printed", "GradCam"):
            shown = [float(part.replace("\N{MINUS SIGN}", "-")) for part in lines[name][-4].split(" ± ")]
            assert shown == pytest.approx([scores[name]["value"], scores[name]["std"]], abs=0.0051)
        assert len({point["value"] for point in scores.values()}) > 1


def test_roar_on_ms_cxr_has_the_papers_methods_and_protocol():
    shipped = yaml.safe_load(find_config("roar_ms_cxr.yaml").read_text(encoding="utf-8"))
    rows = {row.name for row in plan_methods(shipped["methods"], 1, 1)}
    for modality in ("image", "text"):
        assert PUBLISHED[modality].keys() <= rows
    protocol, training = Protocol(**shipped["protocol"]), Training(**shipped["training"])
    assert (protocol.repeats, protocol.fractions[0], protocol.train_share) == (5, 0.1, 0.8)
    assert (training.epochs, training.batch_size, training.lr) == (10, 32, 1e-4)


def test_the_printed_matex_is_shipped_for_roar():
    assert load_method("paper/matex").settings == attribution.Matex.paper().settings


@pytest.mark.parametrize("name", ["patch_similarity", "methods/patch_similarity.yaml", "old.yaml"])
def test_the_former_name_of_a_method_gives_the_present_one(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("old.yaml").write_text("class_path: matex_pl.attribution.PatchSimilarity\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"It is a variant of DenseSimilarity now\. Use .* `variant: patch`"):
        load_method(name)


def test_every_shipped_config_has_a_test():
    source = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    assert all(f'"{config}"' in source for config in shipped_configs())


def test_openai_weights_that_cannot_be_fetched_are_said_clearly(here, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    root = nih_folder(here / "nih")
    with pytest.raises(SystemExit, match=r"openai.*Connect once, or pass a checkpoint file"):
        main(["fit", "--config", "vit_b_32.yaml", f"--data.root={root}"])


def test_configs_are_found_as_files_first(here, capsys):
    words = ["fit", "--config", "phantom.yaml", "--print_config"]
    for option in (["--config", "phantom.yaml"], ["-c=configs/phantom.yaml"]):
        with pytest.raises(SystemExit):
            main(["fit", *option, "--print_config"])
        assert "matex_pl.data.PhantomDataModule" in capsys.readouterr().out
    Path("phantom.yaml").write_text("model: {lr: 0.5}", encoding="utf-8")
    with pytest.raises(SystemExit):
        main(words)
    printed = capsys.readouterr().out
    assert "lr: 0.5" in printed
    assert "PhantomDataModule" not in printed


def test_a_config_may_hold_a_part_per_command(here, capsys):
    Path("all.yaml").write_text("fit: {model: {lr: 0.5}}", encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["--config", "all.yaml", "fit", "--print_config"])
    assert "lr: 0.5" in capsys.readouterr().out


def test_an_unknown_config_lists_the_shipped_ones(here):
    with pytest.raises(SystemExit, match=r"Config 'mine.yaml' is neither a file nor a shipped config.*phantom\.yaml"):
        main(["fit", "--config", "mine.yaml"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "none.png"}, "There is no image at 'none.png'"),
        ({"image": "tiny.json"}, "No readable image at 'tiny.json'"),
        ({"phrase": " "}, "The phrase is empty"),
        ({"ckpt_path": "none.ckpt"}, "No checkpoint at 'none.ckpt'"),
        ({"ckpt_path": "tiny.json"}, "no checkpoint of `matex fit`"),
    ],
)
def test_explain_says_what_is_wrong(here, change, message):
    Image.fromarray(np.zeros((64, 64), dtype=np.uint8)).save("image.png")
    words = {"image": "image.png", "phrase": "Nodule.", "ckpt_path": "last.ckpt"} | change
    with pytest.raises(SystemExit, match=message):
        main(["explain", words["image"], words["phrase"], "--ckpt_path", words["ckpt_path"]])
    assert not Path("panel.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Give one model: --ckpt_path, a checkpoint of `matex fit`, or --model"),
        (["--ckpt_path", "last.ckpt", "--model", "ViT-B-32"], "Give one model"),
        (["--model", "ViT-B-32"], "--model ViT-B-32 has no weights. Give --pretrained"),
        (["--ckpt_path", "last.ckpt", "--pretrained", "openai"], "leave --pretrained out"),
        (["--model", "ViT-B-33", "--pretrained", "openai"], "ViT-B-33"),
        (["--model", "tiny.json", "--pretrained", "none.pt"], "No checkpoint file at 'none.pt'"),
    ],
)
def test_explain_takes_one_model(here, words, message):
    Image.fromarray(np.zeros((64, 64), dtype=np.uint8)).save("image.png")
    with pytest.raises(SystemExit, match=message) as end:
        main(["explain", "image.png", "Nodule.", *words])
    assert end.value.code == 2
    assert not Path("panel.png").exists()


def test_names_that_bring_weights(tmp_path, monkeypatch):
    """Commands then ask for no weights, and a training does not claim to start from random ones."""
    monkeypatch.chdir(tmp_path)
    for folder in ("folder", "ViT-B-32"):
        Path(folder).mkdir()
    for file in ("epoch_3", "tiny.json", "RN50"):
        Path(file).write_bytes(b"")
    config = json.dumps({"model_cfg": {"text": "x" * 300}})
    assert all(map(brings_weights, ["hf-hub:org/repo", "local-dir:none", "folder", "./ViT-B-32", "epoch_3", "no.ckpt"]))
    assert not any(map(brings_weights, ["ViT-B-32", "RN50", "tiny.json", "models/chexzero.json", "none", config]))
    assert check_one_model("CKPT", None, "epoch_3", None) == "epoch_3"
    assert check_one_model("CKPT", None, "folder", None) is None
    assert check_one_model("CKPT", None, "folder", "weights.pt") is None


@pytest.mark.parametrize("words", [["--help"], ["fit", "--help"], ["explain", "--help"]])
def test_help_is_there(words, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "explain" in text or "fit" in text
    if words == ["--help"]:
        assert "matex explain image.png" in text
        assert "phantom.yaml" in text


def test_a_misspelled_option_ends_with_status_2(here, capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "phantom.yaml", "--model.learning_rate=1"])
    assert end.value.code == 2
    assert "learning_rate" in capsys.readouterr().err


def test_the_command_is_installed():
    done = subprocess.run(
        [str(Path(sys.executable).with_name("matex")), "--version"], capture_output=True, text=True, check=True
    )
    assert "0.1.0" in done.stdout


def test_checkpoints_hold_plain_types(here, images):
    fit_phantom(images)
    checkpoint = torch.load("runs/phantom/checkpoints/last.ckpt", weights_only=True)
    assert json.loads(json.dumps(checkpoint["hyper_parameters"]))["pretrained"] is None


@pytest.mark.parametrize("option", [["--config", "own.yaml"], ["-c", "own.yaml"], ["--config=own.yaml"]])
def test_options_change_the_data_of_a_config(here, option, capsys):
    root = nih_folder(here / "nih")
    described = {"data": {"class_path": "NihDataModule", "init_args": {"root": "nowhere"}}, "model": {"name": "none"}}
    Path("own.yaml").write_text(json.dumps(described), encoding="utf-8")
    main(["check-data", *option, "--data.root", str(root), "--model", "tiny.json"])
    assert "All phrases fit into the 48 tokens of tiny.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fitt"], "invalid choice: 'fitt'"),
        ([], "required: COMMAND"),
        (["fit"], "No data module given. Pass --config"),
        (["test", "--ckpt_path=last"], "No data module given. Pass --config"),
        (["fit", "--data.root=x", "--config=phantom.yaml"], "--data.root comes before the data module"),
        (["tune", "--config=phantom.yaml", "--out=x"], "required: --ckpt_path"),
        (["benchmark", "--config=none.yaml", "--ckpt_path=x", "--out=x"], "Config 'none.yaml' is neither a file"),
        (["explain", "image.png"], "No phrase given"),
        (["roar", "walk"], "invalid choice: 'walk'"),
    ],
)
def test_errors_of_use_end_with_status_2_and_a_few_lines(here, words, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) < 8
    assert "Traceback" not in said
