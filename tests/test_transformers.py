"""Models of transformers as models of the package: folders and repositories made on the spot by that library."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from families import folder, redraw, unigram
from lightning.pytorch import Trainer
from PIL import Image
from safetensors.torch import load_file, save_file
from test_methods import METHODS, assert_close_maps, batch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from matex_pl import ClipModule
from matex_pl.attribution import AttributionMethod
from matex_pl.cli import main
from matex_pl.clip import Clip, input_size, load_clip, load_tokenizer, load_trained
from matex_pl.clip.export import write_open_clip

LENGTH = 16
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": LENGTH}
IMAGE = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
# 67 and 44 are no multiples of the width.
TEXT |= {"intermediate_size": 44}
IMAGE |= {"intermediate_size": 67}
SENTENCES = [
    "No focal consolidation.",
    "LEFT LOWER LOBE; 3.5 CM NODULE?!",
    "Épanchement pleural à gauche, œdème",
    "heart \N{BLACK HEART SUIT} lung \N{GRINNING FACE}",
    "",
    " ",
    "effusion " * 60,
    "... --- (!!!) ___ \"quoted\" 'single' \N{LEFT DOUBLE QUOTATION MARK}curly\N{RIGHT DOUBLE QUOTATION MARK}",
    "zero\N{ZERO WIDTH SPACE}width\N{ZERO WIDTH JOINER}joined\N{SOFT HYPHEN}hyphen",
    "two\nlines\r\nand\ttabs   and spaces ",
    "A &amp; B &lt;br&gt; 5 &gt; 3",
    "\N{GREEK SMALL LETTER BETA}-thalassemia 10\N{MICRO SIGN}m \N{CJK UNIFIED IDEOGRAPH-80BA}",
]
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh", "gelu_new")


@cache
def clip_words() -> str:
    """A folder with a small tokenizer like CLIP's: `vocab.json` and `merges.txt`, and nothing made ready."""
    words = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=580, show_progress=False, initial_alphabet=alphabet, end_of_word_suffix="</w>"
    )
    words.train_from_iterator(["consolidation effusion nodule left right lower lobe lung pleural"] * 9, trainer)
    merges = json.loads(words.to_str())["model"]["merges"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    pieces = alphabet + [f"{letter}</w>" for letter in alphabet] + ["".join(pair.split()) for pair in pairs]
    pieces = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    path = folder("clip_words")
    (path / "vocab.json").write_text(json.dumps({piece: n for n, piece in enumerate(pieces)}), encoding="utf-8")
    (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n", encoding="utf-8")
    ends = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "unk_token": "<|endoftext|>", **ends}
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return str(path)


@cache
def sentencepiece_words() -> str:
    """A folder with a SentencePiece file, and the class of SigLIP's tokenizer, which cleans sentences itself."""
    spm = pytest.importorskip("sentencepiece")
    path = folder("sentencepiece")
    lines = ["left lower lobe consolidation", "right pleural effusion", "no nodule in the lung of the patient"] * 20
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(path / "spiece"),
        vocab_size=50,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    (path / "spiece.vocab").unlink()
    settings = {"tokenizer_class": "SiglipTokenizer", "model_max_length": LENGTH, "eos_token": "</s>"}
    settings |= {"pad_token": "</s>", "unk_token": "<unk>", "model_input_names": ["input_ids"]}
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return str(path)


@cache
def gemma_words() -> str:
    """A folder with a small tokenizer like SigLIP 2's: lower case, BPE with a fall back to bytes."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    pieces = (
        special + [f"<0x{byte:02X}>" for byte in range(256)] + ["\N{LOWER ONE EIGHTH BLOCK}", *"abcdefghilmnoprstuv"]
    )
    merges = [("\N{LOWER ONE EIGHTH BLOCK}", "l"), ("l", "o"), ("e", "f")]
    pieces += ["".join(pair) for pair in merges]
    words = Tokenizer(
        models.BPE({piece: n for n, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    mark = "\N{LOWER ONE EIGHTH BLOCK}"
    words.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", mark)])
    words.decoder = decoders.Sequence([decoders.Replace(mark, " "), decoders.ByteFallback(), decoders.Fuse()])
    words.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    path = folder("gemma")
    names = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=LENGTH, **names).save_pretrained(path)
    return str(path)


WORDS: dict[str, Callable[[], str]] = {
    "clip": clip_words,
    "siglip": unigram,
    "sentencepiece": sentencepiece_words,
    "gemma": gemma_words,
}


def make(path: Path, kind: str = "clip", words: str | None = None, **settings: Any) -> Any:
    """A small random model of transformers, saved with tokenizer and image processor; `text` and `image` are settings.

    The weights are far from those of an untrained model, so that activations and norms show.
    """
    text, image = TEXT | settings.pop("text", {}), IMAGE | settings.pop("image", {})
    shutil.copytree(WORDS[words or kind](), path, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(str(path))
    text = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id} | text
    frame = {"height": image["image_size"], "width": image["image_size"]}
    if kind == "clip":
        model: Any = CLIPModel(CLIPConfig(text_config=text, vision_config=image, projection_dim=24, **settings))
        mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
        size = {"shortest_edge": frame["height"]}
        CLIPImageProcessor(size=size, crop_size=frame, image_mean=mean, image_std=std).save_pretrained(path)
    else:
        text = {"projection_size": image["hidden_size"], **text}
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=image, **settings))
        SiglipImageProcessor(size=frame).save_pretrained(path)
    redraw(model, torch.Generator().manual_seed(3))
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
        if kind != "clip":
            model.logit_bias.fill_(-7.0)
    model.eval().save_pretrained(path)
    return model


def features(output: Any) -> Tensor:
    """Embeddings in an output of transformers, which are the output in older versions."""
    return output if isinstance(output, Tensor) else output.pooler_output


@torch.no_grad()
def assert_same_embeddings(model: Any, clip: Clip) -> None:
    """Embeddings of images and odd sentences in transformers and in the loaded model."""
    images = torch.randn(3, 3, *clip.image_size, generator=torch.Generator().manual_seed(1))
    own, other = clip.model.encode_image(images), features(model.get_image_features(images))
    assert float(own.abs().max()) > 0.1
    torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-5)
    tokens = clip.tokenize(SENTENCES)
    own, other = clip.model.encode_text(tokens), features(model.get_text_features(input_ids=tokens))
    torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-5)
    # The package leaves out positions that no pooled token reads.
    expected = torch.nn.functional.normalize(other)
    torch.testing.assert_close(clip.encode_text(tokens), expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module", params=["clip", "siglip"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder of each class, and its model."""
    path = tmp_path_factory.mktemp("models") / request.param
    return path, make(path, request.param)


def edit(path: Path, name: str, **settings: Any) -> None:
    """Change settings of a JSON file; `text` and `image` are those of the towers."""
    content = json.loads((path / name).read_text(encoding="utf-8"))
    for tower in ("text", "vision"):
        content.get(f"{tower}_config", {}).update(settings.pop(tower, {}))
    (path / name).write_text(json.dumps(content | settings), encoding="utf-8")


# --- models in


@pytest.mark.parametrize("form", ["{}", "local-dir:{}"])
def test_a_folder_gives_the_embeddings_of_transformers(saved: tuple[Path, Any], form: str) -> None:
    path, model = saved
    clip = load_clip(form.format(path))
    assert_same_embeddings(model, clip)
    assert clip.logit_scale.item() == 2.0
    assert (clip.model.logit_bias is None) == (path.name == "clip")
    if path.name == "siglip":
        assert clip.model.logit_bias.item() == -7.0
    assert (input_size(str(path)), clip.grid) == ((32, 32), (4, 4))
    assert not clip.training


def test_images_have_the_form_of_the_folders_image_processor(saved: tuple[Path, Any]) -> None:
    path, _ = saved
    clip, pixels = load_clip(str(path)), np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    expected = AutoImageProcessor.from_pretrained(str(path))(Image.fromarray(pixels), return_tensors="pt").pixel_values
    own = clip.normalize(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-5)
    mode = {"clip": "shortest", "siglip": "squash"}[path.name]
    assert clip.config["preprocess_cfg"]["resize_mode"] == mode


@pytest.mark.parametrize(
    ("settings", "mode"),
    [
        ({"do_normalize": False}, "shortest"),
        ({"do_rescale": False, "image_mean": [90.0, 100.0, 110.0], "image_std": [60.0, 50.0, 40.0]}, "shortest"),
        ({"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}, "shortest"),
        ({"size": {"height": 32, "width": 32}, "do_center_crop": False}, "squash"),
        ({"size": {"shortest_edge": 40}}, "shortest"),
    ],
)
def test_settings_of_image_processors(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], mode: str
) -> None:
    make(tmp_path / "m")
    edit(tmp_path / "m", "preprocessor_config.json", **settings)
    clip = load_clip(str(tmp_path / "m"))
    assert clip.config["preprocess_cfg"]["resize_mode"] == mode
    # A larger shortest edge only shows in what is cut off, and is logged.
    assert ("40 pixels and crops 32" in caplog.text) == (settings.get("size") == {"shortest_edge": 40})
    processor = AutoImageProcessor.from_pretrained(str(tmp_path / "m"))
    plain = Image.new("RGB", (32, 32), (50, 120, 200))
    expected = processor(plain, return_tensors="pt").pixel_values.float()
    own = clip.normalize(torch.tensor([50, 120, 200], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 32, 32))
    torch.testing.assert_close(own, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation_in_both_towers(tmp_path: Path, kind: str, act: str) -> None:
    model = make(tmp_path / "m", kind, text={"hidden_act": act}, image={"hidden_act": act})
    assert_same_embeddings(model, load_clip(str(tmp_path / "m")))


def test_an_activation_and_a_norm_of_each_tower(tmp_path: Path) -> None:
    text, image = {"hidden_act": "gelu", "layer_norm_eps": 1e-3}, {"hidden_act": "gelu_new", "layer_norm_eps": 1e-2}
    assert_same_embeddings(make(tmp_path / "c", text=text, image=image), load_clip(str(tmp_path / "c")))
    text, image = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-3}, {"hidden_act": "gelu"}
    model = make(tmp_path / "s", "siglip", text=text, image=image)
    assert_same_embeddings(model, load_clip(str(tmp_path / "s")))


def test_the_position_of_the_end_of_text(tmp_path: Path) -> None:
    # The legacy rule: the largest id, here a word that was added behind the end of text.
    model = make(tmp_path / "m", text={"eos_token_id": 2, "vocab_size": 700})
    clip = load_clip(str(tmp_path / "m"))
    assert clip.config["model_cfg"]["text_cfg"]["pool_type"] == "argmax"
    tokens = clip.tokenize(["left lobe"])
    tokens[0, 1] = 690
    with torch.no_grad():
        expected = features(model.get_text_features(input_ids=tokens))
        torch.testing.assert_close(clip.model.encode_text(tokens), expected, atol=1e-5, rtol=1e-5)
    edit(tmp_path / "m", "config.json", text={"eos_token_id": len(AutoTokenizer.from_pretrained(tmp_path / "m")) - 1})
    model, clip = CLIPModel.from_pretrained(tmp_path / "m").eval(), load_clip(str(tmp_path / "m"))
    with torch.no_grad():
        first = features(model.get_text_features(input_ids=tokens))
        torch.testing.assert_close(clip.model.encode_text(tokens), first, atol=1e-5, rtol=1e-5)
    assert float((first - expected).abs().max()) > 1e-3


def test_another_end_of_text_than_the_tokenizers_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make(tmp_path / "m", text={"eos_token_id": 7})
    assert_same_embeddings(model, load_clip(str(tmp_path / "m")))
    assert "eos_token_id 7" in caplog.text


@pytest.mark.parametrize("words", WORDS)
def test_tokens_are_those_of_the_folders_own_processor(tmp_path: Path, words: str) -> None:
    kind = "clip" if words == "clip" else "siglip"
    make(tmp_path / "m", kind, words)
    settings = {"padding": "max_length", "max_length": LENGTH, "truncation": True, "return_tensors": "pt"}
    expected = AutoProcessor.from_pretrained(str(tmp_path / "m"))(text=SENTENCES, **settings).input_ids
    clip = load_clip(str(tmp_path / "m"))
    assert torch.equal(clip.tokenize(SENTENCES), expected)
    assert torch.equal(load_tokenizer(str(tmp_path / "m"))(SENTENCES), expected)
    # A copy, as Lightning makes it, has no folder to read from.
    assert torch.equal(copy.deepcopy(clip).tokenize(SENTENCES), expected)


def test_a_tokenizer_that_cuts_before_the_last_position(tmp_path: Path) -> None:
    model = make(tmp_path / "m", "siglip", text={"max_position_embeddings": 20})
    edit(tmp_path / "m", "tokenizer_config.json", model_max_length=12)
    clip = load_clip(str(tmp_path / "m"))
    assert clip.context_length == 12
    assert_same_embeddings(model, clip)


def test_a_folder_of_the_first_versions(tmp_path: Path) -> None:
    make(tmp_path / "m", text={"eos_token_id": 2})
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 32, "do_center_crop": True}
    old |= {
        "do_normalize": True,
        "do_resize": True,
        "resample": 3,
        "image_mean": [0.4, 0.4, 0.4],
        "image_std": [0.3] * 3,
    }
    (tmp_path / "m" / "preprocessor_config.json").write_text(json.dumps(old), encoding="utf-8")
    (tmp_path / "m" / "tokenizer_config.json").unlink()
    config = json.loads((tmp_path / "m" / "config.json").read_text(encoding="utf-8"))
    for tower in ("text_config", "vision_config"):
        config[f"{tower}_dict"] = {name: value for name, value in config[tower].items() if name != "model_type"}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    clip = load_clip(str(tmp_path / "m"))
    assert_same_embeddings(CLIPModel.from_pretrained(tmp_path / "m").eval(), clip)
    assert clip.config["preprocess_cfg"]["mean"] == [0.4, 0.4, 0.4]
    assert clip.context_length == LENGTH


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "m", "siglip", "sentencepiece")
    monkeypatch.setattr(
        "matex_pl.clip.hf_folder.find_spec", lambda name: None if name == "sentencepiece" else find_spec(name)
    )
    with pytest.raises(ImportError, match=r"needs sentencepiece: pip install 'matex_pl\[hf\]'"):
        load_clip(str(tmp_path / "m"))
    monkeypatch.setattr("matex_pl.clip.hf_folder.find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"model of transformers, which is not installed: pip install 'matex_pl\[hf\]'"
    ):
        load_clip(str(tmp_path / "m"))


def test_sizes_and_tokenizers_need_no_weights(saved: tuple[Path, Any], tmp_path: Path) -> None:
    shutil.copytree(saved[0], tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    assert input_size(str(tmp_path / "m")) == (32, 32)
    assert load_tokenizer(f"local-dir:{tmp_path / 'm'}")(["left"]).shape == (1, load_clip(str(saved[0])).context_length)
    with pytest.raises(ValueError, match="holds no weights"):
        load_clip(str(tmp_path / "m"))


@pytest.mark.parametrize("form", ["sharded", "bin", "sharded bin", "half"])
def test_forms_of_weights(saved: tuple[Path, Any], tmp_path: Path, form: str) -> None:
    shutil.copytree(saved[0], tmp_path / "m")
    state = load_file(tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "model.safetensors").unlink()
    if form == "sharded":
        saved[1].save_pretrained(tmp_path / "m", max_shard_size="40KB")
        assert (tmp_path / "m" / "model.safetensors.index.json").is_file()
    elif form == "bin":
        # A buffer of older versions.
        torch.save(
            state | {"text_model.embeddings.position_ids": torch.arange(16)[None]}, tmp_path / "m/pytorch_model.bin"
        )
    elif form == "sharded bin":
        names = sorted(state)
        parts = {"one.bin": names[::2], "two.bin": names[1::2]}
        for part, keys in parts.items():
            torch.save({key: state[key] for key in keys}, tmp_path / "m" / part)
        index = {"weight_map": {key: part for part, keys in parts.items() for key in keys}}
        (tmp_path / "m" / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    else:
        save_file({key: value.half() for key, value in state.items()}, tmp_path / "m" / "model.safetensors")
    clip = load_clip(str(tmp_path / "m"))
    if form == "half":
        assert all(weight.dtype == torch.float32 for weight in clip.model.parameters())
        return
    assert_same_embeddings(saved[1], clip)


def test_another_input_size(saved: tuple[Path, Any]) -> None:
    clip = load_clip(str(saved[0]), image_size=48)
    assert (clip.image_size, clip.grid) == ((48, 48), (6, 6))
    assert clip.encode_image(torch.zeros(1, 3, 48, 48)).isfinite().all()


def place_in_cache(path: Path, cache: Path) -> None:
    """The files of a folder as the hub's client keeps those of `org/repo`."""
    shutil.copytree(path, cache / "models--org--repo" / "snapshots" / "0123")
    (cache / "models--org--repo" / "refs").mkdir()
    (cache / "models--org--repo" / "refs" / "main").write_text("0123", encoding="utf-8")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of the hub's client, without the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("open_clip.pretrained.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    return tmp_path / "hub"


def test_a_repository_of_the_hub(saved: tuple[Path, Any], hub: Path) -> None:
    with pytest.raises(ConnectionError, match="hf-hub:org/repo"):
        load_clip("hf-hub:org/repo")
    place_in_cache(saved[0], hub)
    assert_same_embeddings(saved[1], load_clip("hf-hub:org/repo"))
    assert input_size("hf-hub:org/repo") == (32, 32)
    assert torch.equal(load_tokenizer("hf-hub:org/repo")(["left lobe"]), load_tokenizer(str(saved[0]))(["left lobe"]))


def test_check_data_needs_no_weights_of_a_repository(
    saved: tuple[Path, Any], hub: Path, phantom_words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    place_in_cache(saved[0], hub)
    (hub / "models--org--repo" / "snapshots" / "0123" / "model.safetensors").unlink()
    report = ["check-data", *phantom_words, "--model=hf-hub:org/repo", "--image_size=64"]
    main(report)
    said = capsys.readouterr().out.partition("Could start with these data and hf-hub:org/repo")[2]
    assert re.search(r"\n  fit +yes\n  test +yes\n  benchmark +yes", said)


def test_a_repository_without_a_model(hub: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text('{"model_type": "dinov2"}', encoding="utf-8")
    place_in_cache(tmp_path / "m", hub)
    with pytest.raises(ValueError, match=r"hf-hub:org/repo holds neither .* config\.json .*model_type 'dinov2'"):
        load_clip("hf-hub:org/repo")


# --- the model behaves as any other


@pytest.fixture(scope="module")
def both_layouts(saved: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Clip, Clip]:
    """The model of a folder, and the same weights from a folder in open_clip's layout."""
    clip, path = load_clip(str(saved[0])), tmp_path_factory.mktemp("layout")
    write_open_clip(clip, path, path)
    other = load_clip(f"local-dir:{path}")
    for one in (clip, other):
        one.mean_image.fill_(0.4)
    return clip.double(), other.double()


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_maps_are_those_of_the_same_weights_in_open_clips_layout(
    both_layouts: tuple[Clip, Clip], method: AttributionMethod
) -> None:
    first, second = (method.attribute(clip, *batch(clip)) for clip in both_layouts)
    assert_close_maps(first, second)
    assert first.grid.isfinite().all()


def test_explain_a_picture_with_a_folder(
    saved: tuple[Path, Any], workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["explain", "image.png", "Left effusion.", "--model", str(saved[0]), "--out", "panel.png"])
    assert capsys.readouterr().out.strip() == "panel.png"
    assert Image.open("panel.png").size[0] > 100


def test_fit_from_a_folder_and_explain_without_it(
    saved: tuple[Path, Any], tmp_path: Path, workdir: Path, phantom_words: list[str]
) -> None:
    model = tmp_path / "m"
    shutil.copytree(saved[0], model)
    words = [*phantom_words, f"--model.name={model}", "--trainer.max_steps=2", "--trainer.callbacks=null"]
    main(["fit", *words, "--trainer.logger=false", "--trainer.default_root_dir=runs"])
    shutil.rmtree(model)
    (checkpoint,) = Path().rglob("*step=2.ckpt")
    clip = load_trained(str(checkpoint))
    assert clip.config["preprocess_cfg"]["mean"] == load_clip(str(saved[0])).config["preprocess_cfg"]["mean"]
    assert torch.equal(clip.tokenize(SENTENCES), load_clip(str(saved[0])).tokenize(SENTENCES))
    main(["explain", "image.png", "Left effusion.", "--ckpt_path", str(checkpoint), "--out", "panel.png"])
    assert Path("panel.png").is_file()


# --- folders that are refused


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "neither": (
        lambda path: (path / "config.json").unlink(),
        r"holds neither open_clip_config\.json nor .* It holds: ",
    ),
    "another model": (
        lambda path: edit(path, "config.json", model_type="blip"),
        r"holds neither .* \(config\.json has model_type 'blip'\)",
    ),
    "half a config": (
        lambda path: edit(path, "config.json", model_type="clip_vision_model"),
        r"holds half a model \(clip_vision_model\)",
    ),
    "no JSON": (lambda path: (path / "config.json").write_text("{"), r"config\.json of .* is no JSON"),
    "no processor": (lambda path: (path / "preprocessor_config.json").unlink(), r"holds no preprocessor_config\.json"),
    "no tokenizer": (
        lambda path: [(path / name).unlink() for name in ("vocab.json", "merges.txt")],
        r"holds no tokenizer",
    ),
    "input": (
        lambda path: edit(path, "preprocessor_config.json", crop_size={"height": 40, "width": 40}),
        r"makes images of 40 x 40 pixels, and config\.json has an input of 32 x 32",
    ),
    "activation": (
        lambda path: edit(path, "config.json", text={"hidden_act": "silu"}),
        r"text_config\.hidden_act silu",
    ),
    "two activations": (
        lambda path: edit(path, "config.json", text={"hidden_act": "gelu"}),
        r"text_config\.hidden_act gelu and vision_config\.hidden_act quick_gelu",
    ),
    "gray": (lambda path: edit(path, "config.json", vision={"num_channels": 1}), r"vision_config\.num_channels 1"),
    "vocabulary": (
        lambda path: edit(path, "config.json", text={"vocab_size": 100}),
        r"ids, and config\.json a vocab_size of 100",
    ),
    "left": (lambda path: edit(path, "tokenizer_config.json", padding_side="left"), r"pads on the left"),
    "half the weights": (
        lambda path: reweigh(path, lambda state: {k: v for k, v in state.items() if "vision" not in k}),
        r"holds half a model: weights of the text tower, and none of the vision tower",
    ),
    "other half": (
        lambda path: reweigh(path, lambda state: {k: v for k, v in state.items() if "vision" in k}),
        r"holds half a model: weights of the vision tower, and none of the text tower",
    ),
    "other weights": (
        lambda path: reweigh(path, lambda state: {"encoder.layer.0.weight": torch.zeros(2)}),
        r"holds half a model|does not fit",
    ),
    "a text tower of another width": (
        lambda path: edit(path, "config.json", text={"hidden_size": 40}),
        r"of another shape: .*text_model.*instead of",
    ),
    "depth": (
        lambda path: edit(path, "config.json", vision={"num_hidden_layers": 3}),
        r"missing: 16 keys \(vision_model\.encoder\.layers\.2",
    ),
    "positions of another size": (
        lambda path: reweigh(path, lambda state: state | {POSITIONS: torch.zeros(26, 48)}),
        r"of another shape: .*position_embedding",
    ),
    "NaN": (
        lambda path: reweigh(path, lambda state: state | {"logit_scale": torch.tensor(torch.nan)}),
        r"NaN or Inf in logit_scale",
    ),
    "a damaged file": (
        lambda path: (path / "model.safetensors").write_bytes(b"abc"),
        r"model\.safetensors of .* cannot",
    ),
    "a missing shard": (lambda path: shard(path), r"lacks two\.safetensors, 1 of the 2 files"),
    "two processors": (
        lambda path: (path / "processor_config.json").write_text('{"image_processor": {"image_mean": [0, 0, 0]}}'),
        r"two files that contradict each other, preprocessor_config\.json and processor_config\.json: image_mean",
    ),
    "both kinds": (
        lambda path: (path / "open_clip_config.json").write_text(json.dumps(OTHER)),
        r"two configs that contradict each other, .*embed_dim is 512 and 24",
    ),
}
POSITIONS = "vision_model.embeddings.position_embedding.weight"
OTHER = {"model_cfg": {"embed_dim": 512, "vision_cfg": {"image_size": 32}, "text_cfg": {}}}


def reweigh(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Change the weights of a folder."""
    state = load_file(path / "model.safetensors")
    save_file(change({key: value.clone() for key, value in state.items()}), path / "model.safetensors")


def shard(path: Path) -> None:
    """An index of two files, of which one is there."""
    state = load_file(path / "model.safetensors")
    (path / "model.safetensors").rename(path / "one.safetensors")
    files = {key: "one.safetensors" if n % 2 else "two.safetensors" for n, key in enumerate(state)}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}), encoding="utf-8")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "m"
    make(path)
    return path


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_folder_is_one_clear_line(
    good: Path, tmp_path: Path, workdir: Path, capsys: pytest.CaptureFixture[str], bad: str
) -> None:
    shutil.copytree(good, tmp_path / "m")
    change, expected = BAD[bad]
    change(tmp_path / "m")
    with pytest.raises(ValueError, match=expected) as raised:
        load_clip(str(tmp_path / "m"))
    assert "\n" not in str(raised.value)
    assert str(tmp_path / "m") in str(raised.value)
    if bad in ("neither", "both kinds", "half the weights"):
        with pytest.raises(SystemExit) as end:
            main(["explain", "image.png", "Left effusion.", f"--model={tmp_path / 'm'}"])
        assert end.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"text": {"projection_size": 40}}, r"text_config\.projection_size 40"),
        ({"vision": {"vision_use_head": False}}, r"vision_config\.vision_use_head False"),
        ({"vision": {"layer_norm_eps": 1e-3}}, r"vision_config\.layer_norm_eps 0\.001"),
    ],
)
def test_settings_of_siglip_that_open_clip_lacks(tmp_path: Path, settings: dict[str, Any], expected: str) -> None:
    make(tmp_path / "m", "siglip")
    edit(tmp_path / "m", "config.json", **settings)
    with pytest.raises(ValueError, match=expected):
        load_clip(str(tmp_path / "m"))


def test_agreeing_configs_of_both_kinds_give_open_clips(saved: tuple[Path, Any], tmp_path: Path) -> None:
    clip = load_clip(str(saved[0]))
    shutil.copytree(saved[0], tmp_path / "m")
    write_open_clip(clip, tmp_path / "m", tmp_path / "m")
    assert_same_embeddings(saved[1], load_clip(str(tmp_path / "m")))


def test_code_of_a_folder_is_not_run(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "m")
    (tmp_path / "m" / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", encoding="utf-8")
    names = {"AutoTokenizer": ["own.Words", None], "AutoImageProcessor": "own.Images", "AutoConfig": "own.Config"}
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        edit(tmp_path / "m", name, auto_map=names)
    with suppress(ValueError):
        load_clip(str(tmp_path / "m"))
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_another_trunk_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "one", "siglip")
    make(tmp_path / "two", "siglip", image={"num_attention_heads": 8})
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(ClipModule(str(tmp_path / "one")))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    checkpoint = torch.load(tmp_path / "one.ckpt", weights_only=True)
    load_clip(str(tmp_path / "one")).refuse_checkpoint(checkpoint, "one.ckpt")
    with pytest.raises(ValueError, match=r"num_heads is 4 in the checkpoint and 8 here"):
        load_clip(str(tmp_path / "two")).refuse_checkpoint(checkpoint, "one.ckpt")


def test_a_folder_with_the_name_of_a_model_of_open_clip(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(good, tmp_path / "ViT-B-32")
    assert input_size("ViT-B-32") == (224, 224)
    assert input_size("./ViT-B-32") == input_size("local-dir:ViT-B-32") == (32, 32)


def test_a_folder_brings_its_own_weights(good: Path) -> None:
    with pytest.raises(ValueError, match=r"brings its own weights; pretrained='openai' is no checkpoint file"):
        load_clip(str(good), "openai")


def test_a_checkpoint_file_for_the_architecture_of_a_folder(good: Path, tmp_path: Path) -> None:
    clip = load_clip(str(good))
    with torch.no_grad():
        clip.model.text_projection.add_(1)
    torch.save(clip.model.state_dict(), tmp_path / "weights.pt")
    again = load_clip(str(good), str(tmp_path / "weights.pt"))
    assert torch.equal(again.model.text_projection, clip.model.text_projection)
    assert again.tokenize(["left"]).tolist() == clip.tokenize(["left"]).tolist()
