"""Run-length encoded masks agree with the encoders of their data sets, and every fault of a code is refused."""

from __future__ import annotations

import numpy as np
import pytest

from matex_pl.data.rle import decode_coco, decode_pairs, decode_relative
from matex_pl.data.validation import RuleError

SIZES = [(7, 5), (1, 9), (64, 48)]


def masks() -> list[np.ndarray]:
    """Random masks, an empty, a full one, and one that ends with its last pixel."""
    rng = np.random.default_rng(0)
    last = np.zeros((7, 5), bool)
    last[-1, -1] = True
    return [rng.random(size) < 0.4 for size in SIZES] + [np.zeros((7, 5), bool), np.ones((7, 5), bool), last]


def pairs_of(mask: np.ndarray) -> str:
    """The mask as CheXmask's `get_RLE_from_mask` writes it: row by row, from 1."""
    pixels = np.concatenate([[0], mask.ravel().astype(int), [0]])
    runs = np.where(pixels[1:] != pixels[:-1])[0] + 1
    runs[1::2] -= runs[::2]
    return " ".join(map(str, runs))


def relative_of(mask: np.ndarray) -> str:
    """The mask as SIIM's `mask2rle` writes it: column by column, offsets from the end of the last run."""
    found, skipped, length = [], 0, 0
    for pixel in [*mask.T.ravel().tolist(), False]:
        if pixel:
            length += 1
        elif length:
            found += [skipped, length]
            skipped, length = 1, 0
        else:
            skipped += 1
    return " ".join(map(str, found)) or " -1"


def counts_of(mask: np.ndarray) -> list[int]:
    """The mask in COCO's uncompressed counts."""
    found, inside = [0], False
    for pixel in mask.T.ravel().tolist():
        if pixel != inside:
            found.append(0)
            inside = pixel
        found[-1] += 1
    return found


@pytest.mark.parametrize("mask", masks(), ids=str)
def test_decoders_invert_the_encoders_of_the_data_sets(mask: np.ndarray) -> None:
    assert (decode_pairs(pairs_of(mask), mask.shape) == mask).all()
    assert (decode_relative(relative_of(mask), mask.shape) == mask).all()
    assert (decode_coco(counts_of(mask), mask.shape) == mask).all()


def test_a_known_code_of_each_form() -> None:
    expected = np.array([[0, 1, 1], [1, 0, 0]], bool)
    assert (decode_pairs("2 3", (2, 3)) == expected).all()
    assert (decode_pairs([2, 3], (2, 3)) == expected).all()
    assert (decode_relative("1 2 1 1", (2, 3)) == expected).all()
    # Of pycocotools.mask.encode.
    assert (decode_coco("121O0", (2, 3)) == expected).all()
    assert (decode_coco(b"121O0", (2, 3)) == expected).all()


@pytest.mark.parametrize("mask", [*masks(), np.add.outer(range(300), range(200)) // 37 % 2 == 1], ids=str)
def test_compressed_counts_agree_with_pycocotools(mask: np.ndarray) -> None:
    pycocotools = pytest.importorskip("pycocotools.mask")
    encoded = pycocotools.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert (decode_coco(encoded["counts"], tuple(encoded["size"])) == mask).all()


@pytest.mark.parametrize(
    ("decode", "code", "message"),
    [
        (decode_pairs, "2 3 6", "odd"),
        (decode_pairs, "2 6", "1 pixels beyond"),
        (decode_pairs, "0 3", "run 1"),
        (decode_pairs, "3 2 4 1", "before the end of the run before it, got 'run 2'"),
        (decode_pairs, "2 0", "not positive, got '0 in run 1'"),
        (decode_pairs, "2 -1", "not positive, got '-1 in run 1'"),
        (decode_pairs, "2 three", "not a whole number, got 'three'"),
        (decode_pairs, "2 1_0", "'1_0'"),
        (decode_pairs, "2 1.5", "'1.5'"),
        (decode_pairs, [2, 1.5], "'1.5'"),
        (decode_pairs, [True, 1], "'True'"),
        (decode_pairs, "2 99999999999999999999", "'99999999999999999999'"),
        (decode_relative, "1 2 4 1", "2 pixels beyond"),
        (decode_relative, "-2 1", "before the end"),
        (decode_coco, [1, 2, 4], "do not sum to the 6 pixels of 3 x 2, got 7"),
        (decode_coco, [1, -2, 7], "negative, got -2"),
        (decode_coco, "121", "do not sum to the 6 pixels"),
        (decode_coco, "12o", "end within a number"),
        (decode_coco, "12 O0", "no compressed text"),
        (decode_coco, "o" * 30, "no compressed text"),
    ],
)
def test_faults_of_a_code_are_refused_with_their_value(decode, code, message: str) -> None:
    with pytest.raises(RuleError, match=message):
        decode(code, (2, 3))


@pytest.mark.parametrize("decode", [decode_pairs, decode_relative, decode_coco])
def test_a_size_beyond_the_memory_is_refused(decode) -> None:
    with pytest.raises(ValueError, match="at most"):
        decode([], (10**6, 10**6))
