"""How many of something there are, in words."""

from __future__ import annotations

import pytest

from fasterase.numerals import counted


@pytest.mark.parametrize(
    ("number", "words", "said"),
    [
        (0, ["token"], "0 tokens"),
        (1, ["token"], "1 token"),
        (1024, ["token"], "1,024 tokens"),
        (1, ["pair is", "pairs are"], "1 pair is"),
        (2, ["pair is", "pairs are"], "2 pairs are"),
    ],
)
def test_one_is_singular(number, words, said):
    assert counted(number, *words) == said
