"""`matex export`: folders that open_clip and transformers read without this package."""

from __future__ import annotations

import json
import resource
import shutil
import string
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from families import CONFIGS, family, unigram
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from test_refusals import listing, refused
from test_transformers import LENGTH, SENTENCES, features, make
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer, CLIPModel, SiglipModel

from matex_pl.cli import main
from matex_pl.clip import Clip, load_clip, load_trained
from matex_pl.clip.export import write_open_clip, write_transformers

PLAIN = ["No focal consolidation.", "LEFT lower lobe; 3.5 cm nodule?", "effusion " * 60]


@torch.no_grad()
def assert_same(clip: Clip, encode_image: Any, encode_text: Any, tokens: Tensor) -> None:
    """Embeddings of images and of tokens that another library's tokenizer gives for `PLAIN`."""
    images = torch.randn(3, 3, *clip.image_size, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(features(encode_image(images)), clip.model.encode_image(images), atol=1e-5, rtol=1e-5)
    expected = clip.model.encode_text(clip.tokenize(PLAIN))
    torch.testing.assert_close(features(encode_text(tokens)), expected, atol=1e-5, rtol=1e-5)


def assert_open_clip(clip: Clip, folder: Path | str) -> Any:
    """The transform of a folder whose model open_clip reads with the same embeddings."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    assert_same(clip, model.eval().encode_image, model.encode_text, tokenizer(PLAIN))
    return transform


def assert_transformers(clip: Clip, folder: Path | str) -> Any:
    """The processor of a folder whose model transformers reads with the same embeddings."""
    kind: Any = SiglipModel if hasattr(clip.model.visual, "trunk") else CLIPModel
    model, processor = kind.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    tokens = processor(text=PLAIN, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert tokens.shape[1] == clip.context_length
    alone = AutoTokenizer.from_pretrained(folder)(PLAIN, padding="max_length", truncation=True, return_tensors="pt")
    assert torch.equal(alone.input_ids, tokens)
    assert_same(clip, model.get_image_features, model.get_text_features, tokens)
    return processor


@pytest.fixture(scope="module")
def trained(image_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a short training."""
    sizes = {"root": image_root, "num_train": 12, "num_val": 6, "num_test": 6, "stored_size": 64, "batch_size": 4}
    words = [f"--data.{name}={value}" for name, value in (sizes | {"num_workers": 0}).items()]
    words += [f"--model.name={Path(__file__).with_name('tiny.json')}", "--trainer.max_epochs=1"]
    words += ["--trainer.callbacks=null", "--trainer.logger=false"]
    root = tmp_path_factory.mktemp("trained")
    main(["fit", "--config", "phantom.yaml", *words, f"--trainer.default_root_dir={root}"])
    (checkpoint,) = root.rglob("*.ckpt")
    return checkpoint


@pytest.mark.parametrize("library", ["open_clip", "transformers"])
def test_a_checkpoint_leaves_with_its_card(
    trained: Path, tmp_path: Path, library: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "model"
    main(["export", str(trained), "--format", library, "--out", str(out)])
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    assert [path.name for path in out.parent.iterdir()] == ["model"]
    clip = load_trained(str(trained))
    transform = (assert_open_clip if library == "open_clip" else assert_transformers)(clip, out)
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == library
    assert {str(path.relative_to(out)) for path in out.rglob("*")} == set(card.data.to_dict()["matex_pl"]["files"])
    for part in ("PhantomDataModule", "| `data.batch_size` | 4 |", "| steps | 4 |", "| seed | 0 |", "| `val/loss` |"):
        assert part in card.text
    # The card is for others: no paths of this machine.
    assert str(trained.parent) not in card.text
    image = torch.rand(3, *clip.image_size)
    if library == "open_clip":
        # The images of the training were padded.
        assert "longest=1.0" in str(transform)
        again = load_clip(f"local-dir:{out}")
        assert again.config["preprocess_cfg"] == clip.config["preprocess_cfg"] | {"resize_mode": "longest"}
    else:
        assert "pad them first" in card.text
        pixels = (image * 255).byte()
        expected = transform(images=pixels, return_tensors="pt").pixel_values
        torch.testing.assert_close(clip.normalize(pixels[None]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_folder_of_transformers_comes_back_as_it_was(tmp_path: Path, kind: str, act: str) -> None:
    make(tmp_path / "m", kind, text={"hidden_act": act}, image={"hidden_act": act})
    main(["export", "--model", str(tmp_path / "m"), "--format=transformers", f"--out={tmp_path / 'back'}"])
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("m", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((tmp_path / name / "config.json").read_text(encoding="utf-8")) for name in ("m", "back")]
    for tower in ("text_config", "vision_config"):
        same = {"hidden_act", "layer_norm_eps", "num_attention_heads", "intermediate_size", "hidden_size"}
        assert {name: configs[0][tower][name] for name in same} == {name: configs[1][tower][name] for name in same}
    clip, again = load_clip(str(tmp_path / "m")), load_clip(str(tmp_path / "back"))
    assert torch.equal(clip.tokenize(SENTENCES), again.tokenize(SENTENCES))
    assert clip.config["preprocess_cfg"] == again.config["preprocess_cfg"]
    assert_transformers(clip, tmp_path / "back")


@pytest.mark.parametrize("library", ["transformers", "open_clip"])
def test_a_tokenizer_with_only_a_sentencepiece_file_leaves(tmp_path: Path, library: str) -> None:
    make(tmp_path / "m", "siglip", "sentencepiece")
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (tmp_path / "m" / name).unlink(missing_ok=True)
    main(["export", "--model", str(tmp_path / "m"), f"--format={library}", f"--out={tmp_path / 'out'}"])
    clip = load_clip(str(tmp_path / "m"))
    shutil.rmtree(tmp_path / "m")
    (assert_transformers if library == "transformers" else assert_open_clip)(clip, tmp_path / "out")


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_folder_of_transformers_leaves_for_open_clip(tmp_path: Path, kind: str) -> None:
    make(tmp_path / "m", kind)
    main(["export", "--model", str(tmp_path / "m"), "--format=open_clip", f"--out={tmp_path / 'out'}"])
    clip = load_clip(str(tmp_path / "m"))
    shutil.rmtree(tmp_path / "m")
    assert_open_clip(clip, tmp_path / "out")
    assert_open_clip(load_clip(f"local-dir:{tmp_path / 'out'}"), tmp_path / "out")


def test_the_cleaning_of_sentences_leaves_with_the_tokenizer(tmp_path: Path) -> None:
    make(tmp_path / "m", "siglip")
    source = load_clip(str(tmp_path / "m"))
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "config.json").write_bytes(source.files["timm/config.json"].numpy().tobytes())
    model = source.config["model_cfg"]
    vision = model["vision_cfg"] | {"timm_model_name": f"local-dir:{tmp_path / 'timm'}"}
    text = model["text_cfg"] | {"tokenizer_kwargs": {"clean": "canonicalize"}, "hf_tokenizer_name": unigram()}
    clip = load_clip(json.dumps({"model_cfg": model | {"vision_cfg": vision, "text_cfg": text}}))
    (tmp_path / "out").mkdir()
    write_transformers(clip, tmp_path / "out")
    sentences = ["LEFT, lower_lobe (" + string.punctuation + ")", "the   mass.", ""]
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")(sentences, padding="max_length", return_tensors="pt")
    assert torch.equal(tokens.input_ids, clip.tokenize(sentences))
    assert tokens.input_ids.shape[1] == LENGTH


REFUSED = {
    "native": "an input of 32 x 48 pixels",
    "bidirectional": "no causal mask in the text tower",
    "biomedclip": "the Hugging Face text tower BertModel",
    "siglip": "an input of 48 x 64 pixels",
    "average": "the Hugging Face text tower BertModel",
    "registers": "the timm trunk VisionTransformer without SigLIP's attention pool",
    "registers_pool": "a class token or register tokens",
    "resnet": "the image tower ModifiedResNet",
    "coca": "the text decoder of CoCa",
    "avg_native": "the pooling 'avg' of the image",
    "prefixed": "a class token or register tokens",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_leaves_for_open_clip_and_transformers_names_the_part_that_it_lacks(
    name: str, tmp_path: Path
) -> None:
    clip = family(name)
    write_open_clip(clip, tmp_path, tmp_path)
    model = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    images, tokens = torch.zeros(1, 3, *clip.image_size), open_clip.get_tokenizer(f"local-dir:{tmp_path}")(["mass"])
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(images), clip.model.encode_image(images), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            model.encode_text(tokens), clip.model.encode_text(clip.tokenize(["mass"])), atol=1e-5, rtol=1e-5
        )
    if name not in REFUSED:
        write_transformers(clip, tmp_path)
        return
    with pytest.raises(NotImplementedError, match="cannot express this model, because of") as error:
        write_transformers(clip, tmp_path)
    assert REFUSED[name] in str(error.value)


@pytest.mark.parametrize(
    ("vision", "text", "part"),
    [
        ({"ls_init_value": 0.1}, {}, "ls_1"),
        ({"no_ln_pre": True}, {}, "no norm before the blocks"),
        ({}, {"proj_bias": True}, "a text projection with bias"),
        ({"norm_kwargs": {"eps": 1e-3}}, {"pool_type": "last"}, "the pooling 'last'"),
        (
            {"timm_model_name": "eva02_tiny_patch14_224", "image_size": 224, "timm_pool": "token"},
            {},
            "the timm trunk Eva",
        ),
    ],
)
def test_settings_that_transformers_lacks(
    tiny_json: str, tmp_path: Path, vision: dict[str, Any], text: dict[str, Any], part: str
) -> None:
    config = json.loads(tiny_json)
    config["model_cfg"]["vision_cfg"].update(vision)
    config["model_cfg"]["text_cfg"].update(text)
    with pytest.raises(NotImplementedError) as error:
        write_transformers(load_clip(json.dumps(config)), tmp_path)
    assert part in str(error.value)


def test_a_bias_of_the_logits_is_no_part_of_clip(tiny_json: str, tmp_path: Path) -> None:
    config = json.loads(tiny_json)
    config["model_cfg"]["init_logit_bias"] = -10
    with pytest.raises(NotImplementedError, match="a logit bias"):
        write_transformers(load_clip(json.dumps(config)), tmp_path)


# --- outputs


def test_only_an_earlier_export_is_replaced(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, words = tmp_path / "out", ["export", str(trained), f"--out={tmp_path / 'out'}"]
    out.mkdir()
    # An empty folder holds nothing to lose.
    main([*words, "--format=open_clip"])
    main([*words, "--format=transformers"])
    assert (out / "model.safetensors").is_file()
    assert not (out / "open_clip_model.safetensors").exists()
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    before = listing(tmp_path)
    assert "holds files that are of no earlier export: notes.txt" in refused(capsys, *words, "--format=open_clip")
    assert listing(tmp_path) == before


@pytest.mark.parametrize("kind", ["file", "link", "other"])
def test_other_outputs_stay(trained: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine", encoding="utf-8")
    elif kind == "link":
        (tmp_path / "there").mkdir()
        out.symlink_to(tmp_path / "there")
    else:
        out.mkdir()
        (out / "README.md").write_text("---\nmatex_pl: 3\n---\nmine", encoding="utf-8")
    before = listing(tmp_path)
    said = refused(capsys, "export", str(trained), "--format=open_clip", f"--out={out}")
    assert str(out) in said
    assert len(said.splitlines()) == 1
    assert listing(tmp_path) == before


def test_the_folder_of_the_model_is_no_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "m")
    words = ["export", "--format=transformers", "--model", str(tmp_path / "m"), "--out", str(tmp_path / "m")]
    assert "is an input of this command" in refused(capsys, *words)


def test_a_refused_export_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = family("resnet")
    write_open_clip(clip, tmp_path, tmp_path)
    words = ["export", f"--model=local-dir:{tmp_path}", "--format=transformers", f"--out={tmp_path / 'new' / 'out'}"]
    assert "because of the image tower ModifiedResNet" in refused(capsys, *words)
    assert not (tmp_path / "new" / "out").exists()
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("library", ["open_clip", "transformers"])
@pytest.mark.parametrize("room", [100, 100_000])
def test_a_full_disk(
    trained: Path,
    tmp_path: Path,
    library: str,
    room: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["export", str(trained), f"--format={library}", f"--out={tmp_path / 'out'}"]
    main(words)
    # Reading a checkpoint needs room of its own.
    clip = load_trained(str(trained))
    monkeypatch.setattr("matex_pl.clip.load_trained", lambda path: clip)
    before, limits = listing(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        said = refused(capsys, *words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "disk" in said
    # The earlier export is still there.
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--format=open_clip"], "out"),
        (["--out=o", "good.ckpt"], "format"),
        (["--out=o", "--format=onnx", "good.ckpt"], "onnx"),
        (["--out=o", "--format=open_clip"], "Give one model"),
        (["--out=o", "--format=open_clip", "good.ckpt", "--model=ViT-B-32"], "Give one model"),
        (["--out=o", "--format=open_clip", "good.ckpt", "--pretrained=openai"], "leave --pretrained out"),
        (["--out=o", "--format=open_clip", "--model=good.ckpt", "--pretrained=good.ckpt"], "leave --pretrained out"),
        (["--out=o", "--format=open_clip", "--model=ViT-B-32"], "--model ViT-B-32 has no weights"),
        (["--out=o", "--format=open_clip", "none.ckpt"], "none.ckpt"),
        (["--out=o", "--format=open_clip", "cut.ckpt"], "cut.ckpt"),
    ],
)
def test_wrong_lines(workdir: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = listing(workdir)
    assert expected in refused(capsys, "export", *words)
    assert listing(workdir) == before
