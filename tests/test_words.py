"""Words of phrases, of every family of tokenizers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from families import family
from PIL import Image
from test_transformers import gemma_words
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from matex_pl.attribution import AttributionMethod, Chefer, IntegratedGradients, Matex, PriorOnly, RandomMap, Saliency
from matex_pl.attribution.several import attribute_methods
from matex_pl.cli import main
from matex_pl.clip import Clip
from matex_pl.clip.tokenizer import TransformersTokenizer
from matex_pl.clip.words import TokenizedPhrase, split_words, tokenized, with_words
from matex_pl.evaluation.store import MapStore
from matex_pl.explain import compare_methods, explain_batch, pair_batch
from matex_pl.maps import Attribution
from matex_pl.training import ClipModule
from matex_pl.visualization.draw import on_background
from matex_pl.visualization.panel import panel

# Each part as it stands in the phrase, with the spaces before it, and whether it is a word.
Parts = Sequence[tuple[str, bool]]
LEFT: Parts = [("Left", True), ("  lower", True), (" lobe", True), (" effusion", True), (",", False)]
PHRASES: dict[str, Parts] = {
    "punctuation": [*LEFT, (" (", False), ("small", True), (")", False), (".", False)],
    "hyphens": [("The", True), (" lower-lobe", True), (" mass", True), (" -", False), (" right-sided", True)],
    "case and spaces": [
        ("  MASS", True),
        ("\t OF", True),
        ("\n\nThe   ".rstrip(), True),
        ("   Lung", True),
        (" . ", False),
    ],
    "numbers": [("nodule", True), (" 3.5", True), (" cm", True), (",", False), (" 12:30", True), (" 1,000", True)],
    "accents": [("\u00c9panchement", True), (" pleural", True), (" d\u2019abondance", True), ("\u2026", False)],
    "signs": [
        ("mass", True),
        (" \u2265", False),
        (" 3", True),
        (" cm\u00b2", True),
        (" \u2190", False),
        (" +/-", False),
    ],
    "slashes": [("effusion", True), ("/", False), ("mass", True), (" and", True), ("/", False), ("or", True)],
    "signs alone": [("...", False), (" ?!", False), (" \u2014", False)],
    "nothing": [],
}


@cache
def byte_level() -> TransformersTokenizer:
    """A tokenizer like RoBERTa's: bytes, with a mark at the space before a word."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    words.train_from_iterator(["Left lower lobe effusion the mass of the lung nodule"] * 9, trainer)
    words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>"}
    return TransformersTokenizer(PreTrainedTokenizerFast(tokenizer_object=words, **names), 64)


@cache
def tokenizer_of(kind: str) -> Any:
    """Tokenizer with room for all phrases."""
    if kind == "byte level":
        return byte_level()
    if kind == "bytes behind pieces":
        return TransformersTokenizer.from_folder(gemma_words(), 64)
    words = copy.copy(family(kind).tokenizer)
    words.context_length = 64
    return words


UNKNOWN = [
    ("biomedclip", "numbers"),
    ("biomedclip", "signs"),
    ("siglip", "numbers"),
    ("siglip", "signs"),
    ("siglip", "accents"),
]
TOKENIZERS = ("square", "biomedclip", "siglip", "byte level", "bytes behind pieces")


def content_of(tokenizer: Any, tokens: Tensor) -> Tensor:
    return Clip.content(SimpleNamespace(tokenizer=tokenizer), tokens)  # type: ignore[arg-type]


def count(tokenizer: Any, text: str) -> int:
    """Number of content tokens of a text."""
    return int(content_of(tokenizer, tokenizer([text])).sum())


def slow_words(tokenizer: Any, parts: Parts, relevance: Sequence[float]) -> list[tuple[str, float]]:
    """Words and shares: each part is tokenized after all before it, and takes the tokens that it adds."""
    phrase, read, sums = "", 0, []
    for text, is_word in parts:
        phrase += text
        upto = count(tokenizer, phrase)
        if is_word:
            sums.append((text.strip(), sum(relevance[read:upto])))
        read = upto
    total = sum(value for _, value in sums)
    return [(text, value / total if total else 0.0) for text, value in sums]


@pytest.mark.parametrize("name", PHRASES)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_words_are_those_of_a_tokenizer_that_reads_part_by_part(kind: str, name: str) -> None:
    parts, tokenizer = PHRASES[name], tokenizer_of(kind)
    if (kind, name) in UNKNOWN:
        pytest.skip("Signs next to an unknown token belong to no word.")
    phrase = "".join(text for text, _ in parts)
    tokens = tokenizer([phrase])
    content = content_of(tokenizer, tokens)
    draw = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0))
    found = tokenized(tokenizer, tokens, content, [phrase])[0].words((draw * content)[0].tolist())
    expected = slow_words(tokenizer, parts, draw[content].tolist())
    assert (
        [word.text for word in found]
        == [text for text, _ in expected]
        == [text.strip() for text, is_word in parts if is_word]
    )
    assert [word.share for word in found] == pytest.approx([share for _, share in expected], abs=1e-6)
    assert all(phrase[word.start : word.end] == word.text and not word.cut for word in found)
    assert sum(word.share for word in found) == pytest.approx(1 if any(share for _, share in expected) else 0)


@pytest.mark.parametrize(
    ("phrase", "words"),
    [
        ("lower-lobe, right- and left-sided", ["lower-lobe", "right", "and", "left-sided"]),
        ("3.5 cm. 1/2, 12:30; 2,000 x 4.", ["3.5", "cm", "1/2", "12:30", "2,000", "x", "4"]),
        ("patient's o\u2019clock 'quoted' rock-'n", ["patient's", "o\u2019clock", "quoted", "rock", "n"]),
        ("___ and/or a_b; T4-T5, e.g. C7/T1.", ["and", "or", "a", "b", "T4-T5", "e", "g", "C7", "T1"]),
        ("e\u0301panchement \u80ba \u0432\u044b\u043f", ["e\u0301panchement", "\u80ba", "\u0432\u044b\u043f"]),
        (" .. ", []),
        ("", []),
    ],
)  # fmt: skip
def test_words_as_written(phrase: str, words: list[str]) -> None:
    assert [word.text for word in split_words(phrase)] == words
    assert [phrase[word.start : word.end] for word in split_words(phrase)] == words


@pytest.mark.parametrize("kind", ["square", "biomedclip", "siglip"])
def test_words_behind_the_context_have_no_share_and_are_cut(kind: str) -> None:
    clip = family(kind)
    phrase = "Small nodule, " * 12 + "mass."
    tokens = clip.tokenize([phrase])
    content = clip.content(tokens)
    room = int(content.sum())
    relevance = (torch.arange(tokens.shape[1])[None] + 1.0) * content
    found = tokenized(clip.tokenizer, tokens, content, [phrase])[0].words(relevance[0].tolist())
    # The words that the tokens reach, the last of them in part or whole.
    ends = [count(clip.tokenizer, phrase[: word.end]) for word in found]
    starts = [count(clip.tokenizer, phrase[: word.start].rstrip()) for word in found]
    assert max(ends) == room
    read = [index for index, start in enumerate(starts) if start < room]
    assert 2 < len(read) < len(found) - 2
    assert all(found[index].share > 0 for index in read)
    assert not any(found[index].cut for index in read[:-1])
    assert all(word.cut and not word.share for word in found[len(read) :])
    assert sum(word.share for word in found) == pytest.approx(1)
    whole = "Small nodule."
    tokens = clip.tokenize([whole])
    words = tokenized(clip.tokenizer, tokens, clip.content(tokens), [whole])[0].words([1.0] * tokens.shape[1])
    assert not any(word.cut for word in words)


def test_a_word_that_is_cut_inside_keeps_its_read_pieces(tiny_clip: Clip) -> None:
    phrase = "mass " * 12 + "hydropneumothorax"
    tokens = tiny_clip.tokenize([phrase])
    content = tiny_clip.content(tokens)
    *_, last = tokenized(tiny_clip.tokenizer, tokens, content, [phrase])[0].words(content[0].float().tolist())
    assert (last.text, last.cut) == ("hydropneumothorax", True)
    assert last.share == pytest.approx(2 / 14)


def test_unknown_pieces_and_changed_signs_do_not_move_the_words_after_them(tiny_clip: Clip) -> None:
    """BERT reads Cyrillic as one unknown token, and CLIP's tokenizer resolves HTML and repairs encodings."""
    for clip, phrase in (
        (family("biomedclip"), "small \u0432\u044b\u043f\u043e\u0442 mass of the lung"),
        (tiny_clip, "small &lt;3 cm mass &amp; cafÃ© lung"),
    ):
        tokens = clip.tokenize([phrase])
        content = clip.content(tokens)
        [found] = tokenized(clip.tokenizer, tokens, content, [phrase])
        pieces = [piece.strip() for piece in clip.pieces(tokens[0])]
        for word in ("small", "mass", "lung"):
            place = pieces.index(word)
            alone = found.words([float(index == place) for index in range(len(pieces))])
            assert [other.text for other in alone if other.share] == [word]
            assert alone[found.token_words[place]].text == word


METHODS = {
    "Matex": Matex.recommended(text_grad_layers=1),
    "Chefer": Chefer(),
    "IntegratedGradients": IntegratedGradients(),
    "Saliency": Saliency(),
    "RandomMap": RandomMap(),
}


def attributed(clip: Clip, method: AttributionMethod, phrases: list[str]) -> Attribution:
    pixels = torch.rand(len(phrases), 3, *clip.image_size, generator=torch.Generator().manual_seed(0))
    return method.attribute(clip, clip.normalize(pixels), clip.tokenize(phrases), phrases)


@pytest.mark.parametrize("kind", ["square", "biomedclip", "siglip"])
@pytest.mark.parametrize("name", METHODS)
def test_maps_of_methods_hold_their_words(kind: str, name: str) -> None:
    clip, phrases = family(kind), ["Left  right-lung effusion.", "small mass , of the lung", "..."]
    maps = attributed(clip, METHODS[name], phrases)
    tokens = clip.tokenize(phrases)
    words = [[word.text for word in found] for found in maps.words]
    assert words == [["Left", "right-lung", "effusion"], ["small", "mass", "of", "the", "lung"], []]
    for row, found in enumerate(maps.words[:2]):
        pieces = [clip.pieces(tokens[row])[place].strip() for place in range(tokens.shape[1])]
        # The hyphen is inside of a word.
        signs = torch.tensor([piece in (".", ",", "") for piece in pieces])
        relevance = maps.text[row] * maps.content[row] * ~signs
        first = maps.phrases[row].token_words.index(0)
        assert sum(word.share for word in found) == pytest.approx(1)
        assert found[0].share == pytest.approx(float(relevance[first] / relevance.sum()), abs=1e-6)
        assert torch.equal(maps.content_mask("words")[row], maps.content[row] & ~signs)
    assert torch.equal(maps.content_mask("tokens"), maps.content)


def test_fused_and_shared_maps_hold_words_too() -> None:
    clip, phrases = family("square"), ["Left effusion.", "Mass of the lung."]
    maps = attributed(clip, Matex.recommended(), phrases)
    again = Matex.fuse(maps.parts, text_beta=0.1)
    assert again.words == replaced(again, clip, phrases).words != maps.words
    pixels = torch.rand(3, *clip.image_size, generator=torch.Generator().manual_seed(0))
    several = Matex.recommended().attribute_phrases(clip, clip.normalize(pixels[None])[0], phrases)
    assert [word.text for word in several.words[1]] == ["Mass", "of", "the", "lung"]
    images = clip.normalize(pixels.expand(2, -1, -1, -1))
    given = (images, clip.tokenize(phrases), phrases, torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(2, 4))
    methods = {"": Matex.recommended(), "flow": Matex.recommended(text_beta=0.1)}
    for found in attribute_methods(methods, clip, *given).values():
        assert found.words == replaced(found, clip, phrases).words
    silent = PriorOnly().attribute(clip, *given)
    assert [word.share for found in silent.words for word in found] == [0.0] * 6


def replaced(maps: Attribution, clip: Clip, phrases: list[str]) -> Attribution:
    """The same maps without their phrases, and with them again."""
    bare = Attribution(maps.image, maps.grid, maps.text, maps.content, maps.score)
    with pytest.raises(ValueError, match=r"the words of 0 phrases for 2 pairs\. Add the phrases"):
        _ = bare.words
    with pytest.raises(ValueError, match="the words of 0 phrases for 2 pairs"):
        bare.content_mask("words")
    return with_words(bare, clip, clip.tokenize(phrases), phrases)


def test_words_of_stored_maps(tmp_path: Path) -> None:
    clip, phrases = family("square"), ["Left effusion.", "Mass of the lung."]
    maps = attributed(clip, Chefer(), phrases)
    store = MapStore(tmp_path, "weights", Chefer())
    store.write(["a", "b"], maps)
    read = with_words(store.read(["a", "b"]), clip, clip.tokenize(phrases), phrases)
    assert read.words == maps.words
    assert with_words(read, clip, clip.tokenize(phrases), phrases) is read


def test_phrases_keep_their_tokens_and_can_be_copied_and_pickled(tiny_clip: Clip) -> None:
    tokens = tiny_clip.tokenize(["Left effusion."])
    [phrase] = tokenized(tiny_clip.tokenizer, tokens, tiny_clip.content(tokens), ["Left effusion."])
    expected = TokenizedPhrase("Left effusion.", phrase.rows, 0, tiny_clip.tokenizer).words([1.0] * 16)
    tokens.fill_(0)
    assert [word.share for word in expected] == pytest.approx([1 / 3, 2 / 3])
    for same in (phrase, copy.deepcopy(phrase), pickle.loads(pickle.dumps(phrase))):
        assert same.words([1.0] * 16) == expected


def test_an_explained_phrase_has_one_shade_per_word_and_none_on_signs(
    tiny_json: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The panel of the command line is the panel of the words."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    module = ClipModule(tiny_json)
    clip, method, phrase = module.clip.eval(), RandomMap(), "Pneumothorax, right-sided."
    torch.save(clip.model.state_dict(), "weights.pt")
    Path("tiny.json").write_text(tiny_json, encoding="utf-8")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)).save("image.png")
    main(
        ["explain", "image.png", phrase, "--model", "tiny.json", "--pretrained", "weights.pt", "--method", "RandomMap"]
    )
    batch = pair_batch(clip, "image.png", phrase)
    drawn = explain_batch(clip, method, batch, "RandomMap")[0]
    np.testing.assert_array_equal(np.asarray(Image.open("panel.png")), drawn)
    maps = method.attribute(clip, *clip.inputs(batch), batch["phrase"], batch["content_box"])
    [words] = maps.words
    assert [word.text for word in words] == ["Pneumothorax", "right-sided"]
    mapped = {"image": batch["image"][0, 0].numpy(), "heat": maps.image[0].numpy(), "boxes": [], "phrase": phrase}
    shown = {"score": float(maps.score[0]), "title": "image.png", "subtitle": "RandomMap"}
    by_hand = panel(**mapped, **shown, words=words)
    np.testing.assert_array_equal(by_hand, drawn)
    # The line above the letters: the shade of each word, and none before, between and after.
    line = by_hand[88 + 384 + 48 + 1, 20:-20]
    shades = [tuple(color) for color in line]
    runs = [color for color, before in zip(shades, [None, *shades], strict=False) if color != before]
    strongest = max(word.share for word in words)
    expected = [tuple(on_background(np.array([[word.share / strongest]], np.float32))[0, 0]) for word in words]
    background = tuple(on_background(np.zeros((1, 1), np.float32))[0, 0])
    assert runs == [expected[0], background, expected[1], background]
    sheet = compare_methods(clip, {"RandomMap": method}, batch)
    assert all((sheet == color).all(-1).any() for color in expected)
