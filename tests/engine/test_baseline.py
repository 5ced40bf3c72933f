"""What an automatic run withholds, and the retain captions that it warns of."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from fasterase.encode import PairFeatures
from fasterase.engine.baseline import _warn_of_naming_captions
from fasterase.engine.job import RetainPool


def features(captions: list[str], directions: list[int] | None = None) -> PairFeatures:
    """Pairs of one caption each; captions of one direction are alike to the model."""
    text = torch.eye(40)[list(range(len(captions))) if directions is None else directions]
    text = normalize(text, dim=1)
    rows = np.arange(len(captions))
    return PairFeatures(rows, text, text, captions, [[row] for row in rows.tolist()], [])


FORGET = features(["apple", "Granny Smith"], [0, 1])


@pytest.mark.parametrize(
    "caption",
    ["a red apple", "Apple!", "an (apple)", "a granny smith, peeled", "boats and apple"],
)
def test_captions_that_hold_one_of_the_concept_s_are_named(caption):
    retain = features([caption, "a boat"], [20, 21])
    with pytest.warns(UserWarning, match=r"^retain: 1 of 2 captions seem to name") as caught:
        _warn_of_naming_captions([FORGET], retain)
    assert f"{caption!r} (0.00)" in str(caught[0].message)


def test_captions_that_mean_the_same_are_named_nearest_first_and_few():
    retain = features([f"pomme {i}" for i in range(6)] + ["an apple"], [0] * 6 + [20])
    with pytest.warns(UserWarning, match=r"^retain: 7 of 7 captions") as caught:
        _warn_of_naming_captions([FORGET], retain)
    message = str(caught[0].message)
    assert message.count("(1.00)") == 5
    assert "an apple" not in message
    assert ", ...." in message


def test_other_captions_are_no_reason_to_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _warn_of_naming_captions(
            [FORGET], features(["pineapple", "granny", "a boat"], [20, 21, 22])
        )


def test_equal_captions_and_those_of_further_sets_are_named():
    """The verdict leaves them out, but training on them teaches them again."""
    further = features(["pear"], [5])
    with pytest.warns(UserWarning, match=r"^retain: 2 of 3 captions.*'apple' \(1.00\), 'pear'"):
        _warn_of_naming_captions([FORGET, further], features(["apple", "pear", "x"], [0, 5, 9]))


def test_a_share_of_the_retain_pool_is_withheld():
    pool = RetainPool.choose(1000, batch_size=8, seed=3)
    assert len(pool.withheld) == 40
    assert len(pool.drawn) == 760
    assert not set(pool.drawn) & set(pool.withheld)
    for rows in pool.drawn, pool.withheld:
        assert np.array_equal(rows, np.unique(rows))
    again, other = (RetainPool.choose(1000, batch_size=8, seed=seed) for seed in (3, 4))
    assert np.array_equal(pool.withheld, again.withheld)
    assert not np.array_equal(pool.withheld, other.withheld)
    assert len(RetainPool.choose(10**6, batch_size=300, seed=0).withheld) == 1000
    small = RetainPool.choose(99, batch_size=256, seed=0)
    assert (len(small.drawn), len(small.withheld)) == (99, 0), "needed whole"
