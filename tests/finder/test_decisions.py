"""Both witnesses, one, none: what becomes of pairs; copies stay together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from fasterase.finder.decisions import (
    Decision,
    choose_limits,
    choose_neighbours,
    choose_unseen,
    decide,
    find_copies,
    keep_together,
)

SHOWN, HIDDEN, PASSING, OTHERS = (np.arange(60), np.arange(60, 90), np.arange(90, 110), 5000)


@pytest.fixture
def corpus() -> tuple[np.ndarray, np.ndarray]:
    """Scores and names: 60 named pictures of a concept, 30 nameless ones, 20 mentions."""
    random = np.random.default_rng(0)
    scores = random.normal(size=OTHERS).astype(np.float32)
    scores[:90] += 6
    named = np.zeros(OTHERS, bool)
    named[SHOWN] = named[PASSING] = True
    return scores, named


def test_two_witnesses_decide_and_one_is_unsure(corpus):
    scores, named = corpus
    limits = choose_limits(scores, named)
    assert 80 <= limits.certain <= 100
    assert limits.certain < limits.near <= 150
    decided = decide(scores, named, limits, picture_alone=False)
    assert (decided[SHOWN] == Decision.FORGET).mean() > 0.95
    assert (decided[HIDDEN] == Decision.UNSURE).mean() > 0.95
    assert (decided[PASSING] == Decision.UNSURE).mean() >= 0.9
    rest = decided[110:]
    assert (rest == Decision.RETAIN).mean() > 0.99
    assert not (rest == Decision.FORGET).any()
    alone = decide(scores, named, limits, picture_alone=True)
    assert (alone[HIDDEN] == Decision.FORGET).mean() > 0.9
    assert (alone[110:] == Decision.FORGET).sum() <= 2


def test_scales_of_cosines_do_not_matter(corpus):
    scores, named = corpus
    bent = np.exp(scores / 3).astype(np.float32) - 7
    assert choose_limits(bent, named).certain == choose_limits(scores, named).certain
    assert choose_limits(3 * scores - 8, named) == choose_limits(scores, named)
    decided = [
        decide(x, named, choose_limits(scores, named), picture_alone=False) for x in (scores, bent)
    ]
    assert (decided[0] != decided[1]).mean() < 0.001


def test_one_name_is_enough_to_find_the_nameless_one():
    """Of two octopus pictures one is captioned "a pink creature with eight arms"."""
    scores = np.concatenate([[9.0, 8.5], np.linspace(3, -3, 98)]).astype(np.float32)
    for first in (0, 1):
        named = np.arange(100) == first
        decided = decide(scores, named, choose_limits(scores, named), picture_alone=False)
        assert decided[first] == Decision.FORGET
        assert decided[1 - first] == Decision.UNSURE
        assert (decided[2:] == Decision.RETAIN).all()
        few = decide(
            scores[:10], named[:10], choose_limits(scores[:10], named[:10]), picture_alone=False
        )
        assert few.tolist() == decided[:10].tolist(), "in a corpus of ten pairs too"


def test_without_a_name_the_nearest_are_unsure():
    scores = np.arange(1000, dtype=np.float32)
    nobody = np.zeros(1000, bool)
    limits = choose_limits(scores, nobody)
    decided = decide(scores, nobody, limits, picture_alone=True)
    assert not (decided == Decision.FORGET).any()
    assert (np.flatnonzero(decided == Decision.UNSURE) == np.arange(1000 - limits.near, 1000)).all()
    assert 0 < limits.near <= 100


class Features:
    """Stands in for the original's features."""

    def __init__(self, image: torch.Tensor) -> None:
        self.image = image

    def pairs(self, source: object, rows: np.ndarray) -> Features:
        return Features(self.image[rows])


@pytest.mark.parametrize("shared", [0, 3])
def test_copies_share_what_becomes_of_them_and_are_unseen_together(shared):
    """Also where all pictures are alike to the model, as those of some are."""
    base = normalize(torch.randn(6, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    near = normalize(base + 0.01 * base.flip(0), dim=1)
    image = torch.cat([base, near])  # row i + 6 is a copy of row i
    image = normalize(image + shared * torch.eye(32)[0], dim=1)
    chosen = np.full(12, Decision.RETAIN, np.uint8)
    chosen[[0, 1, 2, 3, 9]] = Decision.FORGET
    chosen[4], scores = Decision.UNSURE, np.zeros(12, np.float32)
    group = find_copies(Features(image), None, np.arange(12), scores, chosen)
    assert (group[:6] == group[6:]).all()
    assert len(np.unique(group)) == 6
    together = keep_together(chosen, group)
    assert together[:6].tolist() == together[6:].tolist()
    assert together[:6].tolist() == [Decision.FORGET] * 4 + [Decision.UNSURE, Decision.RETAIN]
    unseen = choose_unseen(together, group, seed=1)
    assert unseen.sum() == 2
    assert unseen[:6].tolist() == unseen[6:].tolist()
    assert (together[unseen] == Decision.FORGET).all()


def test_neighbours_are_kept_pairs_nearest_by_caption_and_by_picture():
    decided = np.full(1000, Decision.RETAIN, np.uint8)
    decided[:10] = Decision.FORGET
    scores = np.linspace(5, -5, 1000).astype(np.float32)
    by_caption = np.array([3, 700, 10, 500, *range(900, 1000)])
    rows = choose_neighbours(decided, scores, by_caption)
    assert len(rows) == len(set(rows.tolist())) == 40
    assert {700, 10, 500} < set(rows.tolist())
    assert set(range(11, 31)) <= set(rows.tolist())
    assert not set(rows.tolist()) & set(range(10))
    assert len(choose_neighbours(decided[:30], scores[:30], np.arange(0))) == 2
