"""Tokenizers of transformers in the form of open_clip's."""

from __future__ import annotations

import re
from codecs import getincrementaldecoder
from collections.abc import Sequence
from typing import Any

from open_clip.tokenizer import HFTokenizer, SimpleTokenizer, bytes_to_unicode
from torch import Tensor

# Marks of a word's first piece in SentencePiece and byte-level BPE. WordPiece marks the later pieces, with `##`.
_WORD_MARKS = ("▁", "Ġ")
# The sign that decoders give for an incomplete character.
_INCOMPLETE = "\ufffd"


class TransformersTokenizer:
    """A tokenizer of transformers, called as open_clip's: phrases to ids, padded and cut to the context length.

    Phrases are passed on as they are. open_clip's own wrapper removes repeated spaces and HTML entities first.

    Args:
        tokenizer: The tokenizer.
        context_length: Number of tokens that a phrase is padded or cut to.
    """

    def __init__(self, tokenizer: Any, context_length: int) -> None:
        self.tokenizer = tokenizer
        self.context_length = context_length

    @classmethod
    def from_folder(cls, folder: str, context_length: int) -> TransformersTokenizer:
        """The tokenizer of a folder or repository, read without running code."""
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(folder, trust_remote_code=False), context_length)

    def __deepcopy__(self, memo: dict[int, Any]) -> TransformersTokenizer:
        """The tokenizer itself: it has no state, and a copy of a SentencePiece one reads its file again."""
        return self

    def __call__(self, phrases: Sequence[str]) -> Tensor:
        """Token ids `(B, context_length)`."""
        settings: dict[str, Any] = {"padding": "max_length", "max_length": self.context_length, "truncation": True}
        return self.tokenizer(list(phrases), return_tensors="pt", **settings).input_ids


def adapted_tokenizer(tokenizer: Any, context_length: int | None, *, takes_fewer: bool = False) -> Any:
    """A tokenizer in the form of open_clip's: its own unchanged, a tokenizer of transformers wrapped.

    Args:
        tokenizer: Tokenizer of open_clip or transformers, or a processor of transformers, which holds a tokenizer.
        context_length: Number of tokens that the text tower takes; that of the tokenizer by default.
        takes_fewer: Whether the text tower also takes fewer tokens, because it masks the padding.

    Raises:
        ValueError: The tokenizer is neither, has no padding, or has another context length.
    """
    words: Any = getattr(tokenizer, "tokenizer", None) if hasattr(tokenizer, "image_processor") else tokenizer
    if hasattr(words, "convert_ids_to_tokens"):
        if words.pad_token_id is None:
            raise ValueError(
                f"The tokenizer {type(words).__name__} has no pad token, so phrases cannot be padded. Set its "
                "pad_token to the token that the model was trained with."
            )
        length = context_length or int(words.model_max_length)
        # transformers writes 1e30 if the length is unknown.
        if length > 100_000:
            raise ValueError(
                f"The tokenizer {type(words).__name__} states no length. Give context_length, the number of tokens "
                "that phrases are padded to."
            )
        return TransformersTokenizer(words, length)
    own = getattr(words, "context_length", None)
    if own is None or not callable(words):
        raise ValueError(
            f"The tokenizer must be one of open_clip or transformers, or a processor of transformers, got "
            f"{type(tokenizer).__name__}."
        )
    if context_length not in (None, own) and not (takes_fewer and own < context_length):
        raise ValueError(
            f"The tokenizer gives {own} tokens, but the text tower takes {context_length}. Give the tokenizer of the "
            f"model, such as open_clip.get_tokenizer(name, context_length={context_length})."
        )
    return tokenizer


def has_clip_pieces(words: Any) -> bool:
    """Whether a tokenizer of transformers has the pieces of CLIP's, which mark the end of a word by `</w>`."""
    piece = words.convert_tokens_to_ids("a</w>")
    return piece is not None and piece != words.unk_token_id


def count_tokens(tokenizer: Any, phrase: str) -> int:
    """Number of tokens of the whole phrase with special tokens, before the cut to the context length."""
    if isinstance(tokenizer, SimpleTokenizer):
        return len(tokenizer.encode(phrase)) + 2
    if isinstance(tokenizer, HFTokenizer):
        phrase = tokenizer.clean_fn(phrase)
    return len(tokenizer.tokenizer(phrase, truncation=False, verbose=False).input_ids)


def word_pieces(tokenizer: Any, tokens: Tensor) -> list[str]:
    """Word pieces of one row of tokens `(T,)` as text, with a space in front of each piece that begins a word.

    If a character is cut into several pieces, the last of them holds the character.
    """
    ids = [int(token) for token in tokens]
    is_open_clip = isinstance(tokenizer, SimpleTokenizer)
    if is_open_clip or has_clip_pieces(tokenizer.tokenizer):
        table = tokenizer.decoder if is_open_clip else None
        raw = [table[index] for index in ids] if table else tokenizer.tokenizer.convert_ids_to_tokens(ids)
        begins = [before.endswith("</w>") for before in ["</w>", *raw][: len(raw)]]
        decode = getincrementaldecoder("utf-8")("replace").decode
        to_byte = {character: byte for byte, character in bytes_to_unicode().items()}
        texts = [decode(bytes(to_byte[character] for character in piece.removesuffix("</w>"))) for piece in raw]
    else:
        raw = tokenizer.tokenizer.convert_ids_to_tokens(ids)
        marks_begin = any(piece.startswith(_WORD_MARKS) for piece in raw)
        begins = [piece.startswith(_WORD_MARKS) if marks_begin else not piece.startswith("##") for piece in raw]
        texts = _decoded([re.sub("^##(?=.)", "", piece) for piece in raw], tokenizer.tokenizer)
    return [" " * begin + text for begin, text in zip(begins, texts, strict=True)]


def _decoded(raw: Sequence[str], words: Any) -> list[str]:
    """Text of each piece of a tokenizer of transformers; of pieces that share characters, the last holds the text."""
    texts = [words.convert_tokens_to_string([piece]).strip() for piece in raw]
    start = None
    for index, text in enumerate([*texts, ""]):
        if _INCOMPLETE in text:
            start = index if start is None else start
        elif start is not None:
            whole = words.convert_tokens_to_string(list(raw[start:index])).strip()
            texts[start:index] = [""] * (index - start - 1) + [whole]
            start = None
    return texts
