"""Words of a phrase as written, and their share of the relevance of the tokens."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import cached_property
from typing import Any

from torch import Tensor

from matex_pl.clip.model import Clip
from matex_pl.clip.tokenizer import count_tokens, word_pieces
from matex_pl.maps import Attribution, Word

# A word in a string where `a` stands for each letter and `0` for each digit.
_WORD = re.compile(r"[a0]+(?:(?:[-'\u2019\u2010\u2011]|(?<=0)[.,:/](?=0))[a0]+)*")


def split_words(phrase: str) -> list[Word]:
    """Words of a phrase, without shares.

    A word is a run of letters, digits and combining marks. Hyphens and apostrophes inside of a word belong to the word
    ("lower-lobe"). Points, commas, colons and slashes between digits do too ("3.5", "1/2"). Other signs belong to no
    word: "and/or" is two words.
    """
    kinds = "".join({"L": "a", "M": "a", "N": "0"}.get(unicodedata.category(sign)[0], sign) for sign in phrase)
    return [Word(phrase[match.start() : match.end()], *match.span()) for match in _WORD.finditer(kinds)]


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Tokens of B phrases.

    Args:
        tokens: `(B, T)` token ids, padded and cut to the context length, on any device.
        content: `(B, T)` bool mask of the content tokens.
    """

    tokens: Tensor
    content: Tensor

    @cached_property
    def on_host(self) -> tuple[Tensor, Tensor]:
        """Tokens and content on the CPU, copied once for all phrases."""
        return self.tokens.cpu(), self.content.cpu()


@dataclass(frozen=True, eq=False)
class TokenizedPhrase:
    """A phrase and its tokens; the words are looked up on first use.

    Args:
        phrase: The whole phrase.
        rows: Tokens of the phrases of its batch.
        place: Place of the phrase in the batch.
        tokenizer: The model's tokenizer, `Clip.tokenizer`.
    """

    phrase: str
    rows: TokenRows
    place: int
    tokenizer: Any

    def words(self, relevance: Sequence[float]) -> list[Word]:
        """Words of the phrase with their shares, which sum to 1, or are all 0 if no word has relevance.

        The share of a word is the sum of the relevance of its pieces, divided by the sum over all words. Punctuation
        and special tokens have no share. The relevance of a piece of several words is split by their letters. A word
        behind the context length has no share. A word that is cut inside keeps the share of the pieces that are read.

        Args:
            relevance: T values of at least 0.
        """
        words, links = self._words
        shares = [0.0] * len(words)
        for place, part, word in links:
            shares[word] += part * float(relevance[place])
        total = sum(shares) or 1
        return [replace(word, share=share / total) for word, share in zip(words, shares, strict=True)]

    def sum_by_word(self, values: Tensor) -> Tensor:
        """Sums `(W, ...)` of values `(T, ...)` over the pieces of each word, as `words` sums the relevance.

        A word behind the context length has zeros.
        """
        words, links = self._words
        sums = values.new_zeros(len(words), *values.shape[1:])
        for place, part, word in links:
            sums[word] += part * values[place]
        return sums

    @property
    def token_words(self) -> list[int]:
        """Index of the word of each of the T tokens, the last of several; -1 for punctuation and special tokens."""
        owners = {place: word for place, _, word in self._words[1]}
        return [owners.get(place, -1) for place in range(self.rows.tokens.shape[1])]

    @cached_property
    def _words(self) -> tuple[list[Word], list[tuple[int, float, int]]]:
        """Words without shares, and links `(token, part of the token, word)`."""
        words = split_words(self.phrase)
        letters = [
            (letter, index)
            for index, word in enumerate(words)
            for letter in _letters(self.phrase[word.start : word.end])
        ]
        places, pieces = self._pieces()
        found = _align("".join(letter for letter, _ in letters), pieces)
        owners = [Counter(letters[letter][1] for letter in linked) for linked in found]
        links, nothing = [], Counter[int]()
        for index, group in enumerate(places):
            shares = owners[index]
            if not pieces[index]:
                # A sign between two pieces of a word belongs to the word.
                before = next(filter(None, reversed(owners[:index])), nothing)
                after = next(filter(None, owners[index + 1 :]), nothing)
                shares = Counter(before.keys() & after.keys())
            total = sum(shares.values())
            links += [(place, count / total, word) for place in group for word, count in shares.items()]
        if count_tokens(self.tokenizer, self.phrase) > self.rows.tokens.shape[1]:
            read = max((letter for linked in found for letter in linked), default=-1)
            cut = {index for _, index in letters[read + 1 :]}
            words = [replace(word, cut=index in cut) for index, word in enumerate(words)]
        return words, links

    def _pieces(self) -> tuple[list[list[int]], list[str]]:
        """Content tokens in groups that hold whole characters, and the letters of each group."""
        tokens, content = (part[self.place] for part in self.rows.on_host)
        places = content.nonzero()[:, 0].tolist()
        texts = word_pieces(self.tokenizer, tokens[places])
        groups: list[list[int]] = []
        letters: list[str] = []
        open_group: list[int] = []
        for place, text in zip(places, texts, strict=True):
            if open_group and place > open_group[-1] + 1:
                # An unknown token lies between.
                open_group = []
            open_group.append(place)
            if text.strip():
                groups.append(open_group)
                letters.append(_letters(text))
                open_group = []
        return groups, letters


def tokenized(tokenizer: Any, tokens: Tensor, content: Tensor, phrases: Sequence[str]) -> list[TokenizedPhrase]:
    """The B phrases with their tokens and content `(B, T)`, without a wait for the device."""
    if len(tokens) != len(phrases):
        raise ValueError(f"There are {len(tokens)} rows of tokens for {len(phrases)} phrases.")
    # The tokens may be the caller's.
    rows = TokenRows(tokens.clone(), content)
    return [TokenizedPhrase(phrase, rows, place, tokenizer) for place, phrase in enumerate(phrases)]


def with_words(maps: Attribution, clip: Clip, tokens: Tensor, phrases: Sequence[str]) -> Attribution:
    """Maps that hold their phrases, for maps from files and from methods that leave the phrases out."""
    if len(maps.phrases) == len(phrases):
        return maps
    return replace(maps, phrases=tokenized(clip.tokenizer, tokens, maps.content, phrases))


def _letters(text: str) -> str:
    """Letters and digits of a text without case, accents and compatibility forms, which tokenizers may remove."""
    folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    return "".join(sign for sign in folded if unicodedata.category(sign)[0] in "LN")


def _align(letters: str, pieces: Sequence[str]) -> list[list[int]]:
    """Places in `letters` of each piece's letters.

    Pieces usually are the letters in their order, up to the cut. Otherwise equal runs are matched first, and the rest
    between two runs in proportion, because a tokenizer may change a phrase, and unknown pieces have no letters.
    """
    owners = [index for index, piece in enumerate(pieces) for _ in piece]
    found: list[list[int]] = [[] for _ in pieces]
    read = "".join(pieces)
    matches: Sequence[tuple[str, int, int, int, int]] = [("equal", 0, len(read), 0, len(read))]
    if not letters.startswith(read):
        matches = SequenceMatcher(None, letters, read, autojunk=False).get_opcodes()
    for kind, start, end, first, last in matches:
        if kind in ("equal", "replace"):
            for place in range(first, last):
                found[owners[place]].append(start + (place - first) * (end - start) // (last - first))
    return found
