"""Loading models by every kind of name, and what the wrapper says about their tokens."""

from __future__ import annotations

import copy
import json
import logging
import sys
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import open_clip
import pytest
import torch
from families import CONFIGS, family
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from matex_pl.attribution import Matex
from matex_pl.clip import Clip, cut_text, load_clip, towers
from matex_pl.clip import model as clip_model
from matex_pl.files import find_config, shipped_configs
from matex_pl.training import ClipModule

BOS, EOT = 49406, 49407


def _same(first: Clip, second: Clip) -> bool:
    weights, others = first.model.state_dict(), second.model.state_dict()
    return weights.keys() == others.keys() and all(torch.equal(weights[key], others[key]) for key in weights)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, no cache, and the hub's client not told of it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_json_text_and_file_and_folder_give_the_same_model(tiny_json: str, tmp_path: Path) -> None:
    first = load_clip(tiny_json)
    assert (first.image_size, first.grid, first.context_length, first.pad_id) == ((32, 32), (4, 4), 16, 0)
    assert not first.training
    (tmp_path / "open_clip_config.json").write_text(json.dumps(first.config), encoding="utf-8")
    save_file(first.model.state_dict(), tmp_path / "open_clip_model.safetensors")
    by_folder = load_clip(f"local-dir:{tmp_path}")
    assert _same(by_folder, first)
    assert by_folder.config == first.config
    by_file = load_clip(str(tmp_path / "open_clip_config.json"), str(tmp_path / "open_clip_model.safetensors"))
    assert _same(by_file, first)
    assert _same(load_clip(json.dumps(first.config), str(tmp_path / "open_clip_model.safetensors")), first)


def test_config_is_plain_and_keeps_the_preprocessing(tiny_json: str) -> None:
    config = {**json.loads(tiny_json), "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}}
    model = load_clip(json.dumps(config))
    assert json.loads(json.dumps(model.config)) == model.config
    assert load_clip(json.dumps(model.config)).config == model.config
    half = model.normalize(torch.full((1, 3, 32, 32), 0.75))
    torch.testing.assert_close(half, torch.ones(1, 3, 32, 32))


def test_bare_model_config(tiny_json: str) -> None:
    assert load_clip(json.dumps(json.loads(tiny_json)["model_cfg"])).grid == (4, 4)


def test_shipped_configs_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_clip("models/phantom_vit.json").image_size == (112, 112)
    assert find_config("configs/models/phantom_vit.json") == find_config("models/phantom_vit.json")
    assert find_config("models/none.json") is None
    assert "phantom.yaml" in shipped_configs()
    (tmp_path / "models").mkdir()
    own = Path("models/phantom_vit.json")
    own.write_text("{}", encoding="utf-8")
    assert find_config(str(own)) == own


def test_bad_configs_are_named(tmp_path: Path, tiny_json: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"No model config at 'nowhere\.json'"):
        load_clip("nowhere.json")
    broken = tmp_path / "broken.json"
    broken.write_text('{"embed_dim": 8,', encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken\.json' is no JSON"):
        load_clip(str(broken))
    with pytest.raises(ValueError, match=r"lacks \['text_cfg', 'vision_cfg'\]"):
        load_clip('{"embed_dim": 8}')
    config = json.loads(tiny_json)
    config["model_cfg"]["vision_cfg"]["patchsize"] = 4
    with pytest.raises(ValueError, match="unexpected keyword argument 'patchsize'"):
        load_clip(json.dumps(config))
    config = json.loads(tiny_json)
    config["model_cfg"]["text_cfg"]["vocab_size"] = 1000
    with pytest.raises(ValueError, match=r"vocab_size .* is 1000, but CLIP's tokenizer gives 49408"):
        load_clip(json.dumps(config))


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
def test_checkpoint_files(tiny_json: str, tmp_path: Path, suffix: str) -> None:
    first, path = load_clip(tiny_json), tmp_path / f"weights{suffix}"
    save_file(first.model.state_dict(), path) if suffix == ".safetensors" else torch.save(
        first.model.state_dict(), path
    )
    assert not _same(load_clip(tiny_json), first)
    assert _same(load_clip(tiny_json, str(path)), first)


def test_lightning_checkpoint(tiny_json: str, tmp_path: Path) -> None:
    module = ClipModule(tiny_json)
    trainer = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert _same(load_clip(tiny_json, str(tmp_path / "last.ckpt")), module.clip)
    assert _same(ClipModule(tiny_json, pretrained=str(tmp_path / "last.ckpt")).clip, module.clip)


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_files_that_would_run_code_are_refused(tiny_json: str, tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "evil.pt"
    torch.save({"state_dict": Malicious(trace)}, path)
    with pytest.raises(ValueError, match=r"evil\.pt is no plain state dict .* could run code"):
        load_clip(tiny_json, str(path))
    (tmp_path / "open_clip_config.json").write_text(tiny_json, encoding="utf-8")
    path.rename(tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match="without running code"):
        load_clip(f"local-dir:{tmp_path}")
    assert not trace.exists()


@pytest.mark.parametrize("content", [torch.zeros(3), {"epoch": 3, "model": {"a": 1}}, {}])
def test_files_that_are_no_weights_are_refused(tiny_json: str, tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt is no plain state dict"):
        load_clip(tiny_json, str(tmp_path / "other.pt"))


def test_broken_files_and_missing_ones_are_named(tiny_json: str, tmp_path: Path) -> None:
    (tmp_path / "torn.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match=r"torn\.safetensors is no plain state dict"):
        load_clip(tiny_json, str(tmp_path / "torn.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"No checkpoint file at 'nowhere\.pt'"):
        load_clip(tiny_json, "nowhere.pt")
    with pytest.raises(FileNotFoundError, match="names no model: there is no such folder"):
        load_clip(f"local-dir:{tmp_path / 'nowhere'}")


@pytest.mark.parametrize("where", ["file", "folder"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_with_nan_are_refused(tiny_clip: Clip, tmp_path: Path, where: str, bad: float) -> None:
    state = {key: value.clone() for key, value in tiny_clip.model.state_dict().items()}
    state["ln_final.weight"][3] = bad
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(tiny_clip.config), encoding="utf-8")
    names = [f"local-dir:{tmp_path}"]
    if where == "file":
        names = [json.dumps(tiny_clip.config), str(tmp_path / "model.safetensors")]
    with pytest.raises(ValueError, match=r"holds NaN or Inf in ln_final\.weight \(1 tensors\)"):
        load_clip(*names)


def test_weights_that_do_not_fit_are_named(tiny_clip: Clip, tmp_path: Path) -> None:
    state = {key: value.clone() for key, value in tiny_clip.model.state_dict().items()}
    save_file({**state, "ln_final.weight": torch.zeros(48)}, tmp_path / "wide.safetensors")
    with pytest.raises(
        ValueError, match=r"wide\.safetensors does not fit the model .*ln_final\.weight \(48,\) instead of"
    ):
        load_clip(json.dumps(tiny_clip.config), str(tmp_path / "wide.safetensors"))
    del state["ln_final.weight"]
    save_file(state, tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match=r"missing: 1 key \(ln_final\.weight\)"):
        load_clip(json.dumps(tiny_clip.config), str(tmp_path / "short.safetensors"))


def test_folder_without_weights_is_no_random_model(tiny_clip: Clip, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps(tiny_clip.config), encoding="utf-8")
    with pytest.raises(ValueError, match="holds no weights that fit and are readable"):
        load_clip(f"local-dir:{tmp_path}")
    save_file(tiny_clip.model.state_dict(), tmp_path / "elsewhere.st.safetensors")
    assert _same(load_clip(f"local-dir:{tmp_path}", str(tmp_path / "elsewhere.st.safetensors")), tiny_clip)


def test_unknown_names_and_tags() -> None:
    with pytest.raises(ValueError, match=r"Unknown model 'ViT-B/32'.*ViT-B-32.*list_models"):
        load_clip("ViT-B/32")
    with pytest.raises(ValueError, match=r"'openia' is neither a file nor a tag of ViT-B-32\. Its tags: openai, "):
        load_clip("ViT-B-32", "openia")
    with pytest.raises(ValueError, match="brings its own weights; pretrained='openai' is no checkpoint file"):
        load_clip("hf-hub:org/repo", "openai")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(("name", "tag"), [("ViT-B-32", "openai"), ("hf-hub:org/repo", None)])
def test_without_a_network_the_error_comes_at_once(name: str, tag: str | None) -> None:
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=rf"The files of '{name}'.*not in the local cache, and the hub does not"):
        load_clip(name, tag)
    assert time.monotonic() - start < 5
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_open_clip_name_with_a_tag(monkeypatch: pytest.MonkeyPatch, tiny_json: str, tmp_path: Path) -> None:
    """A tag sets QuickGELU, in the model and in the config that a checkpoint will carry."""
    small = json.loads(tiny_json)["model_cfg"]
    weights = tmp_path / "openai.pt"
    torch.save(load_clip(tiny_json).model.state_dict(), weights)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32", small)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(weights))
    tagged = load_clip("ViT-B-32", "openai")
    assert tagged.config["model_cfg"]["quick_gelu"] is True
    assert sum(isinstance(part, open_clip.transformer.QuickGELU) for part in tagged.model.modules()) == 4
    again = load_clip(json.dumps(tagged.config), str(weights))
    images, tokens = torch.rand(2, 3, 32, 32), tagged.tokenize(["a", "b"])
    torch.testing.assert_close(again.similarity(images, tokens), tagged.similarity(images, tokens))
    plain = load_clip("ViT-B-32", str(weights))
    assert "quick_gelu" not in plain.config["model_cfg"]
    assert not torch.equal(plain.similarity(images, tokens), tagged.similarity(images, tokens))


def test_config_of_openai_tags_without_weights() -> None:
    assert open_clip.get_pretrained_cfg("ViT-B-32", "openai")["quick_gelu"] is True
    assert not open_clip.get_pretrained_cfg("ViT-B-32", "laion2b_s34b_b79k").get("quick_gelu")


@pytest.mark.parametrize("name", ["JSON", "ViT-B-32"])
def test_building_with_random_weights_is_silent_and_leaves_logging_alone(
    tiny_json: str, name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of a checkpoint may follow."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32", json.loads(tiny_json)["model_cfg"])
    root = logging.getLogger()
    before = (list(root.handlers), list(root.filters), root.level)
    with caplog.at_level(logging.INFO):
        load_clip(tiny_json if name == "JSON" else name)
        assert not caplog.records
        logging.warning("of somebody else")
    assert [record.message for record in caplog.records] == ["of somebody else"]
    assert (root.handlers, root.filters, root.level) == before


def test_no_handler_is_left_on_the_root_logger(tiny_json: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    load_clip(tiny_json)
    assert root.handlers == []


@pytest.mark.parametrize("size", [(32, 31), (64, 64), (16, 32)])
def test_images_of_another_size_are_refused(tiny_clip: Clip, size: tuple[int, int]) -> None:
    with pytest.raises(
        ValueError, match=rf"The images are \({size[0]}, {size[1]}\) pixels, the model takes \(32, 32\)"
    ):
        tiny_clip.normalize(torch.zeros(2, 3, *size))


def test_normalize_takes_bytes_and_floats(tiny_clip: Clip) -> None:
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(tiny_clip.normalize(images), tiny_clip.normalize(images / 255))
    gray = tiny_clip.normalize(torch.zeros(1, 3, 32, 32))
    torch.testing.assert_close(gray[0, :, 0, 0], (-tiny_clip.mean / tiny_clip.std).flatten())


def test_tokens_of_short_empty_and_long_phrases(tiny_clip: Clip) -> None:
    phrases = ["Left effusion.", "", " ".join(["effusion"] * 40)]
    tokens = tiny_clip.tokenize(phrases)
    content = tiny_clip.content(tokens)
    assert tokens.shape == content.shape == (3, 16)
    assert tokens[:, 0].tolist() == [BOS] * 3
    assert content.sum(1).tolist() == [4, 0, 14]
    assert [tiny_clip.count_tokens(phrase) for phrase in phrases] == [6, 2, 2 + 40 * 2]
    assert tiny_clip.pieces(tokens[0][content[0]]) == [" left", " ef", "fusion", " ."]
    assert tiny_clip.pieces(tokens[1])[:2] == [" <start_of_text>", "<end_of_text>"]
    assert tiny_clip.text_pooling(tokens).position.tolist() == [5, 1, 15]
    assert tokens[2, -1] == EOT
    assert (tokens[0, 6:] == tiny_clip.pad_id).all()


def test_the_word_piece_that_is_the_pad_id_is_content(tiny_clip: Clip) -> None:
    tokens = tiny_clip.tokenize(["effusion !~{"])
    content = tiny_clip.content(tokens)
    assert tiny_clip.pad_id in tokens[content]
    assert content[0].nonzero()[:, 0].tolist() == list(range(1, int((tokens == EOT).nonzero()[0, 1])))


def test_pieces_of_other_scripts_are_readable(tiny_clip: Clip) -> None:
    tokens = tiny_clip.tokenize(["caf\u00e9"])
    assert "".join(tiny_clip.pieces(tokens[0][tiny_clip.content(tokens)[0]])) == " caf\u00e9"


def test_a_character_of_several_pieces_is_in_the_last(tiny_clip: Clip) -> None:
    tokens = tiny_clip.tokenize(["ratio \u2265 3 \u2190"])[0]
    pieces = tiny_clip.pieces(tokens[tiny_clip.content(tokens[None])[0]])
    assert "".join(pieces).split() == ["ratio", "\u2265", "3", "\u2190"]
    assert "" in [piece.strip() for piece in pieces]


def test_pieces_of_hugging_face_tokenizers_are_readable() -> None:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer, byte_level.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    byte_level.train_from_iterator(["\xe9panchement left basi basi basi"] * 5, trainer)
    word_piece = Tokenizer(models.WordPiece({"[UNK]": 0, "left": 1, "basi": 2, "##lar": 3, ".": 4}, unk_token="[UNK]"))
    word_piece.pre_tokenizer, word_piece.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("\u2581left", -1.0), ("\u2581basi", -1.0), ("lar", -1.0)], 0))
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    for tokenizer, phrase, expected in (
        (byte_level, "\xe9panchement left", [" \xe9panchement", " left"]),
        (word_piece, "left basilar.", [" left", " basi", "lar", " ."]),
        (unigram, "left basilar", [" left", " basi", "lar"]),
    ):
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
        clip = SimpleNamespace(tokenizer=SimpleNamespace(tokenizer=fast))
        assert Clip.pieces(clip, torch.tensor(fast(phrase).input_ids)) == expected  # type: ignore[arg-type]


def test_tokenize_repeats_itself_and_does_not_grow_for_ever(tiny_clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_model, "_KEPT_PHRASES", 4)
    alone = {word: tiny_clip.tokenizer([word])[0] for word in "abcdefg"}
    for words in ("abca", "de", "fgab", "abcdefg", "a"):
        assert torch.equal(tiny_clip.tokenize(list(words)), torch.stack([alone[word] for word in words]))
        assert len(tiny_clip._rows) <= max(4, len(words))


MARKED = st.text(max_size=60) | st.sampled_from(
    ["<end_of_text>", "a <start_of_text> b", "&amp;", "!" * 99, "<b>", "\0"]
)


@pytest.mark.parametrize("kind", ["clip", "biomedclip", "siglip"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(phrases=st.lists(MARKED, min_size=1, max_size=4))
def test_any_phrase_is_tokens(tiny_clip: Clip, kind: str, phrases: list[str]) -> None:
    """Whatever it holds, a phrase has tokens of the model's length, in any company, and it is said if it is cut."""
    model = tiny_clip if kind == "clip" else _shared(kind)
    tokens = model.tokenize(phrases)
    content = model.content(tokens)
    assert tokens.shape == content.shape == (len(phrases), model.context_length)
    assert int(tokens.min()) >= 0
    assert int(tokens.max()) < model.config["model_cfg"]["text_cfg"].get("vocab_size", 2**31)
    for row, phrase in zip(tokens, phrases, strict=True):
        assert torch.equal(row, model.tokenize([phrase])[0])
        if model.count_tokens(phrase) <= model.context_length:
            assert not cut_text(model.tokenizer, phrase)
    position = model.text_pooling(tokens).position
    assert ((position >= 0) & (position < model.context_length)).all()
    assert all(
        isinstance(piece, str) for row, kept in zip(tokens, content, strict=True) for piece in model.pieces(row[kept])
    )


@cache
def _shared(kind: str) -> Clip:
    return family(kind)


def test_hugging_face_text_tower() -> None:
    model = family("biomedclip")
    phrases = ["left effusion.", "", " ".join(["left"] * 40)]
    tokens = model.tokenize(phrases)
    content = model.content(tokens)
    assert model.pieces(tokens[0])[:2] == [" [CLS]", " left"]
    assert content.sum(1).tolist() == [int(content[0].sum()), 0, model.context_length - 2]
    assert model.count_tokens(phrases[2]) == 42
    assert model.encode_text(tokens).shape == (3, 16)
    assert model.pad_id == model.tokenizer.tokenizer.pad_token_id


@pytest.mark.parametrize("name", ["biomedclip", "siglip"])
def test_towers_of_hugging_face_without_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.dumps({"embed_dim": 32} | CONFIGS[name]())
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(open_clip.hf_model, "transformers", None)
    with pytest.raises(ImportError, match=r"needs one more package: pip install 'matex_pl\[hf\]'"):
        load_clip(config)


def test_text_towers_that_also_give_tokens() -> None:
    """CoCa without a class token of its own is cut like CLIP, and gives a pair."""
    config = copy.deepcopy(family("coca").config)
    config["model_cfg"]["text_cfg"]["embed_cls"] = False
    config["model_cfg"]["multimodal_cfg"]["embed_cls"] = False
    clip = load_clip(json.dumps(config))
    tokens = clip.tokenize(["left base", "mass"])
    whole = torch.nn.functional.normalize(clip.model.encode_text(tokens), dim=-1)
    torch.testing.assert_close(clip.encode_text(tokens), whole)


# --- another size of the input


@pytest.mark.parametrize("name", ["square", "avg_native", "biomedclip", "registers", "siglip", "coca"])
@pytest.mark.parametrize("size", [[128, 64], 96])
def test_another_input_size_interpolates_the_positions(name: str, size: int | list[int], tmp_path: Path) -> None:
    """Weights of one size in a model of another: maps at its raster, and a checkpoint that comes back at that size."""
    config, (height, width) = copy.deepcopy(family(name).config), towers.height_width(size)
    config["model_cfg"]["vision_cfg"]["image_size"] = 64
    source, weights = load_clip(json.dumps(config)), tmp_path / "weights.pt"
    torch.save(source.model.state_dict(), weights)
    other = load_clip(json.dumps(config), str(weights), size)
    patch = 64 // source.grid[0]
    assert other.image_size == (height, width)
    assert other.grid == (height // patch, width // patch)
    images, tokens = torch.rand(2, 3, height, width), other.tokenize(["left base", "mass"])
    assert Matex().attribute(other, images, tokens, ["left base", "mass"]).image.shape == (2, height, width)
    torch.save(other.model.state_dict(), weights)
    assert _same(load_clip(json.dumps(other.config), str(weights)), other)
    assert _same(load_clip(json.dumps(other.config), str(weights), size), other)
    if size != 96:
        with pytest.raises(ValueError, match=r"positions of .* patches, which is no square raster"):
            load_clip(json.dumps(config), str(weights))


def test_positions_are_interpolated_smoothly(tmp_path: Path) -> None:
    """A ramp over the raster stays a ramp, in open_clip's towers and in timm's."""
    for name, key in (("square", "positional_embedding"), ("biomedclip", "trunk.pos_embed")):
        config = copy.deepcopy(family(name).config)
        config["model_cfg"]["vision_cfg"]["image_size"] = 64
        source, weights = load_clip(json.dumps(config)), tmp_path / "weights.pt"
        rows, columns = source.grid
        ramp = torch.arange(columns).repeat(rows)
        with torch.no_grad():
            source.model.visual.get_parameter(key)[..., 1:, :] = ramp[:, None].float()
        torch.save(source.model.state_dict(), weights)
        wider = load_clip(json.dumps(config), str(weights), [64, 128])
        positions = wider.model.visual.get_parameter(key).detach().flatten(0, -2)[1:, 0].view(rows, 2 * columns)
        assert (positions.diff(dim=1) > 0).all()
        torch.testing.assert_close(positions[:, 2:-2].diff(dim=1).mean(), torch.tensor(0.5), atol=0.05, rtol=0)
        torch.testing.assert_close(positions, positions[:1].expand_as(positions), atol=1e-4, rtol=0)


def test_sizes_that_do_not_fit_are_refused(tiny_json: str) -> None:
    with pytest.raises(ValueError, match=r"\(33, 32\) pixels, is not a whole number of its \(8, 8\) patches"):
        load_clip(tiny_json, image_size=[33, 32])
    with pytest.raises(ValueError, match="its ResNet pools a raster of fixed size"):
        load_clip(json.dumps(family("resnet").config), image_size=128)
    with pytest.raises(ValueError, match="its ResNet pools a raster of fixed size"):
        load_clip("RN50", image_size=256)


def test_embeddings_are_unit_vectors_and_similarity_is_their_cosine(tiny_clip: Clip) -> None:
    images, tokens = torch.randn(3, 3, 32, 32), tiny_clip.tokenize(["a", "b", "c"])
    image, text = tiny_clip.encode_image(images), tiny_clip.encode_text(tokens)
    torch.testing.assert_close(image.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(tiny_clip.similarity(images, tokens), (image * text).sum(-1))
    assert tiny_clip.image_pooling(images).position.tolist() == [0, 0, 0]
