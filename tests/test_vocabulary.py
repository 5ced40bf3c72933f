"""Word lists: what they hold, and in which language captions are looked up."""

from __future__ import annotations

import pytest

from fasterase.vocabulary import english_frequencies, everyday_things, words_of


def test_frequencies_are_those_of_english():
    frequencies = english_frequencies()
    assert len(frequencies) > 25_000
    assert frequencies["the"] > 7
    assert 4.5 < frequencies["dog"] < 5.5
    assert 3 <= frequencies["octopus"] < 4 < frequencies["mountain"] < frequencies["of"]
    assert "qwxyz" not in frequencies
    assert english_frequencies() is frequencies, "read once"


def test_things_are_many_distinct_and_of_known_words():
    things = everyday_things()
    assert len(things) == len(set(things)) == 2000
    assert {"castle", "dog", "jellyfish", "granny smith apple"} <= set(things)
    assert not [thing for thing in things if thing != thing.lower() or not words_of(thing)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a snow-capped mountain", ["a", "snow", "capped", "mountain"]),
        ("Fire engine, No. 42!", ["Fire", "engine", "No"]),
        ("Äpfel & Öl", ["Äpfel", "Öl"]),
        ("", []),
    ],
)
def test_words_are_letters_in_a_row(text, words):
    assert words_of(text) == words
