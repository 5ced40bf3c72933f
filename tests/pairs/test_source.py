"""Packed strings behave as lists of strings."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasterase.pairs.source import PackedCaptions, PackedStrings


@given(st.lists(st.text(st.characters())))
def test_strings_come_back(strings):
    packed = pickle.loads(pickle.dumps(PackedStrings(strings)))
    assert [packed[i] for i in range(len(packed))] == strings
    with pytest.raises(IndexError):
        packed[len(strings)]
    with pytest.raises(IndexError):
        packed[-1]


@given(st.lists(st.lists(st.text(min_size=1))))
def test_captions_come_back_without_blank_ones(rows):
    packed = PackedCaptions(rows)
    kept = [[text.strip() for text in row if text.strip()] for row in rows]
    assert [packed[i] for i in range(len(packed))] == kept
    assert packed.counts().tolist() == [len(row) for row in kept]


def test_digests_see_borders():
    assert PackedStrings(["ab", "c"]).digest() != PackedStrings(["a", "bc"]).digest()
    assert PackedCaptions([["a"], ["b"]]).digest() != PackedCaptions([["a", "b"], []]).digest()
    assert PackedStrings(["ab", "c"]).digest() == PackedStrings(["ab", "c"]).digest()
