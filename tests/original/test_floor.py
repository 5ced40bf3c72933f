"""The cosine of unrelated pairs, against its definition pair by pair."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fasterase.encode import PairFeatures
from fasterase.errors import InputError
from fasterase.original.features import unmatched_cosine


def features(keys, seed):
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.nn.functional.normalize(
        torch.randn(2, len(keys), 5, generator=generator), dim=-1
    )
    pair_text = [[i] for i in range(len(keys))]
    return PairFeatures(np.arange(len(keys)), image, text, keys, pair_text, [])


def test_equal_captions_are_left_out():
    forget, retain = features(["a", "a", "b"], 1), features(["c", "a", "d", "b"], 2)
    cosines = []
    for i, key in enumerate(forget.captions):
        for j, other in enumerate(retain.captions):
            if key != other:
                cosines.append(float(forget.image[i] @ retain.text[j]))
                cosines.append(float(retain.image[j] @ forget.text[i]))
    assert unmatched_cosine(forget, retain) == pytest.approx(np.mean(cosines), abs=1e-6)


def test_nothing_to_compare_is_zero():
    assert unmatched_cosine(features(["a"], 1), features(["a", "a"], 2)) == 0.0


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_model_of_non_finite_features_is_refused_as_such(tower):
    forget, retain = features(["a"], 1), features(["b", "c"], 2)
    getattr(retain, tower)[1, 0] = torch.nan
    with pytest.raises(InputError, match=r"^model: its features are NaN"):
        unmatched_cosine(forget, retain)
