"""Which captions name a concept, which pairs a sample holds, and what a picture's score means."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from fasterase.errors import InputError
from fasterase.finder.witnesses import (
    NamedPairs,
    Queries,
    read_captions,
    sample,
    scarce_words,
    shared_words,
)
from fasterase.pairs.open import open_pairs

PIXELS = torch.zeros(3, 2, 2)


def captions(*texts: object):
    return open_pairs([(PIXELS, text) for text in texts], name="source")


@pytest.mark.parametrize(
    ("wording", "named", "not_named"),
    [
        ("octopus", ["An OCTOPUS!", "octopuses", "octopus's arm", "octopus_01.jpg"], ["octopushy"]),
        ("apple", ["apples", "an apple-pie"], ["pineapple", "applet", "app le"]),
        (
            "guide dog",
            ["a guide-dog", "Guide  Dogs", "guide_dog"],
            ["guided dog", "dog", "guidedog"],
        ),
        ("café", ["CAFE\u0301 noir", "the café"], ["cafe", "cafés2"]),
        ("ＡＢＣ", ["the abc"], ["abcd"]),
        ("straße", ["STRASSE"], ["strasser"]),
        ("タコ", ["海のタコを見た"], ["イカ"]),
        ("C++", ["c++ code"], ["c code", "ac++"]),
        ("a.b", ["A.B"], ["axb"]),
    ],
)
def test_captions_name_it_in_whole_words(wording, named, not_named):
    found = read_captions(captions(*named, *not_named), [wording], []).named.tolist()
    assert found == [True] * len(named) + [False] * len(not_named)


def test_any_caption_may_name_it_but_not_about_something_else():
    source = captions(["a fruit", "an apple"], "apple store", ["iPhone", "apple"], "store")
    said = read_captions(source, ["apple"], ["store", "iphone"])
    assert said.named.tolist() == [True, False, True, False]
    with pytest.raises(InputError, match="token ids"):
        read_captions(captions(torch.tensor([1, 2])), ["apple"], [])


def test_words_of_longer_names_are_shared_with_other_things():
    wordings = ["guide dog", "seeing-eye dog of the blind", "dog-guide", "mutt"]
    assert shared_words(wordings) == ["blind", "dog", "eye", "guide", "seeing"]
    assert shared_words(["hot dog", "dog"]) == ["hot"]
    said = read_captions(captions("a dog", "guide dog", "a cat"), ["guide dog"], [])
    assert said.related.tolist() == [True, False, False]
    retain = captions("a dog", "dogs and a dog", "A DOG", "a guide")
    assert scarce_words(retain, ["guide dog"], 4) == {"guide": 1, "dog": 3}
    assert scarce_words(retain, ["guide dog"], 1) == {}


def test_a_sample_holds_rare_names_and_their_words_first():
    named, related = np.zeros((2, 10_000), bool)
    named[::1000], related[5::500] = True, True
    rows = sample(NamedPairs(named, related), 40, seed=0)
    assert len(rows) == len(np.unique(rows)) == 40
    assert (np.diff(rows) > 0).all()
    assert (named[rows].sum(), related[rows].sum()) == (10, 10)
    named[:] = True
    assert len(sample(NamedPairs(named, ~named), 40, seed=0)) == 20 + 0 + 20
    assert sample(NamedPairs(named, related), None, seed=0).tolist() == list(range(10_000))


def test_the_kinds_of_similarity_are_on_one_scale_and_the_wrong_meaning_counts_against():
    """Cosines with texts are small and with images large, whatever they show."""
    text, example, other = torch.eye(6)[:3]
    images = normalize(
        torch.tensor(
            [
                [0.3, 0.8, 0.0, 1.0, 0, 0],  # near the text
                [0.0, 1.5, 0.0, 1.0, 0, 0],  # near the example
                [0.3, 0.8, 0.9, 1.0, 0, 0],  # near the text, and nearer the wrong meaning
                [0.0, 0.8, 0.0, 1.0, 0, 0],
                [0.0, 0.8, 0.1, 1.0, 0, 0],
            ]
        ),
        dim=1,
    )
    queries = Queries(text[None], example[None], other[None])
    similarities = queries.similarities(images)
    unrelated = similarities[3:].mean(0), torch.full((3,), 0.05)
    scores = queries.scores(images, unrelated)
    assert scores[0] > 4
    assert scores[1] > 2
    assert scores[2] < 0
    assert scores[3:].abs().max() < 1.5
    without = Queries(text[None], torch.empty(0, 6), torch.empty(0, 6))
    assert without.scores(images, unrelated)[2] > 3
