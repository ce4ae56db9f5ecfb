"""Whose phrase a pair is compared with."""

import pytest

from matex_pl.evaluation.pairs import other_phrases


@pytest.mark.parametrize(
    ("phrases", "findings", "expected"),
    [
        (["a", "b", "c"], ["edema", "edema", "nodule"], ["c", "c", "a"]),
        # The next one over the end, not the first one of all.
        (["a", "b", "c", "d"], ["x", "x", "y", "y"], ["c", "c", "a", "a"]),
        # The same words are no other phrase, whatever they are said to be about.
        (["a", "a", "b"], ["x", "y", "x"], ["b", "b", "a"]),
        (["a", "b", "b"], ["x", "x", "x"], ["b", "a", "a"]),
        # What is unknown is not known to be another finding.
        (["a", "b", "c"], ["x", "", "y"], ["c", "c", "a"]),
        (["a", "b", "a"], ["", "", ""], ["b", "a", "b"]),
        (["a", "a"], ["x", "y"], [None, None]),
        (["a"], ["x"], [None]),
        ([], [], []),
    ],
)
def test_the_next_pair_about_something_else(phrases, findings, expected):
    assert other_phrases(phrases, findings) == expected


def test_lists_of_two_lengths_are_refused():
    with pytest.raises(ValueError, match="2 phrases, but findings of 1"):
        other_phrases(["a", "b"], ["x"])
