"""Decide, by both witnesses, which pairs are to be forgotten, kept, judged by, or looked at."""

from __future__ import annotations

import enum
import math
from typing import NamedTuple

import numpy as np
import torch

from fasterase.evaluation.scores import TIE, similarity_chunks
from fasterase.original.features import OriginalFeatures
from fasterase.pairs.sampler import spread_indices
from fasterase.pairs.table import PairTable
from fasterase.seeds import Stream, generator

# A picture whose caption names the concept shows it unless more of the unrelated pictures than this
# share are nearer: of captions that mention it in passing, so few are believed.
NEARER_SHARE = 0.02
# Pairs that are looked at, where no caption names the concept to learn from how near is near.
WITHOUT_NAMES = 100
# Copies are nearer to each other than this share of the median distance (1 - cosine) of pictures:
# JPEG at quality 75, and half the size, move the demo's drawings by .013 of it at most.
COPY = 0.02
# Pairs among which copies are looked for, and pictures that the median is taken of.
COMPARED, MEDIAN_OF = 20_000, 512
UNSEEN_SHARE = 0.2
# Neighbours: so many of each pair to forget, at least and at most.
NEIGHBOURS_PER_PAIR, FEWEST_NEIGHBOURS, MOST_NEIGHBOURS = 4, 20, 256


class Decision(enum.IntEnum):
    """What becomes of a pair; of copies, all go with the largest up to `FORGET`."""

    UNJUDGED = 0  # unreadable, or not in the sample
    RETAIN = 1
    NEIGHBOUR = 2  # kept, and measured by name
    UNSURE = 3
    FORGET = 4
    UNSEEN = 5  # to be forgotten, but not trained on


class Limits(NamedTuple):
    """Ranks among all pictures, from 0, up to which one without the name is near."""

    certain: int  # as near as those with the name
    near: int


def decide_all(
    original: OriginalFeatures,
    source: PairTable,
    rows: np.ndarray,  # [n] of the source, sorted
    scores: np.ndarray,  # [n], the largest of the pictures nearest to the concept
    named: np.ndarray,  # [n] bool, whether a caption names it
    nearest_captions: np.ndarray,  # places among the n, by the closeness of captions
    *,
    picture_alone: bool,
    seed: int,
) -> tuple[np.ndarray, Limits]:
    """Return the final decision on each of n pairs, and the limits that were learnt for it."""
    limits = choose_limits(scores, named)
    decided = decide(scores, named, limits, picture_alone=picture_alone)
    group = find_copies(original, source, rows, scores, decided)
    decided = keep_together(decided, group)
    decided[choose_unseen(decided, group, seed=seed)] = Decision.UNSEEN
    decided[choose_neighbours(decided, scores, nearest_captions)] = Decision.NEIGHBOUR
    return decided, limits


def choose_limits(scores: np.ndarray, named: np.ndarray) -> Limits:
    """Learn from the pairs with the name which ranks of `scores` [n] show the concept.

    The nearest k pictures hold the share r of those with the name; k maximises r^2 / k. This is, up
    to a constant, precision times recall of "the nearest k show it", if captions leave the name out
    at random (Lee and Liu, ICML 2003): neither a threshold nor the number of nameless ones is
    needed. Up to `near` it is uncertain, the more so the fewer have the name; but pictures that are
    closer to the median one than to the k-th are not near.
    """
    total = int(named.sum())
    most = min(len(scores), max(20 * total, 10_000))  # beyond, r^2 / k is below r / 20 of the best
    nearest = np.argpartition(-scores, most - 1)[:most]
    nearest = nearest[np.argsort(-scores[nearest], kind="stable")]
    found = np.cumsum(named[nearest])
    margin = max(2, len(scores) // 20)
    if not total or not found[-1]:
        return Limits(0, min(WITHOUT_NAMES, margin))
    best = int(np.argmax(found.astype(float) ** 2 / np.arange(1, most + 1))) + 1
    uncertain = math.ceil(2 * best / math.sqrt(found[best - 1])) + 2
    half = (scores[nearest[best - 1]] + np.median(scores)) / 2
    near = min(best + min(uncertain, margin), int((scores[nearest] >= half).sum()))
    return Limits(best, max(best, near))


def decide(
    scores: np.ndarray, named: np.ndarray, limits: Limits, *, picture_alone: bool
) -> np.ndarray:
    """Return the decision on n pairs by their pictures' `scores` and whether captions name it.

    Both testify: forget. Neither: retain. One: unsure, but with `picture_alone` forget where the
    picture is as near as those with the name.
    """
    nearest = np.argpartition(-scores, min(limits.near, len(scores) - 1))[: limits.near]
    nearest = nearest[np.argsort(-scores[nearest], kind="stable")]
    is_near = np.zeros(len(scores), bool)
    is_near[nearest] = True
    unrelated = scores[~named & ~is_near]
    least = np.quantile(unrelated, 1 - NEARER_SHARE) if len(unrelated) else -np.inf
    decided = np.full(len(scores), Decision.RETAIN, np.uint8)
    decided[is_near | named] = Decision.UNSURE
    decided[named & (is_near | (scores >= least))] = Decision.FORGET
    if picture_alone:
        decided[nearest[: limits.certain]] = Decision.FORGET
    return decided


def find_copies(
    original: OriginalFeatures,
    source: PairTable,
    rows: np.ndarray,
    scores: np.ndarray,
    decided: np.ndarray,
) -> np.ndarray:
    """Return a number of each of n pairs that pairs with copies of one picture share.

    `rows` [n] of the source are sorted; they have `scores` [n] and decisions [n].
    """
    first = np.arange(len(rows), dtype=np.int32)  # of millions, half the memory of int64
    # Those that are kept without a doubt come last, where not all are compared.
    farness = np.where(decided == Decision.RETAIN, -scores, -np.inf)
    chosen = np.sort(np.argpartition(farness, min(COMPARED, len(rows) - 1))[:COMPARED])
    image = original.pairs(source, rows[chosen]).image
    every = original.pairs(source, rows[spread_indices(len(rows), MEDIAN_OF)]).image
    least = 1 - COPY * (1 - float((every @ every.T).median())) - TIE
    # The first of those that a picture is a copy of: itself, or an earlier one.
    copies = ((chunk > least).byte() for _, chunk in similarity_chunks(image, image))
    earliest = torch.cat([each.argmax(1) for each in copies])
    while not torch.equal(earliest, earliest[earliest]):
        earliest = earliest[earliest]
    first[chosen] = chosen[earliest.numpy()]
    return first


def keep_together(decided: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Return decisions [n] in which the pairs of each group go with the strongest of theirs."""
    strongest = np.zeros(len(group), decided.dtype)
    np.maximum.at(strongest, group, decided)
    return strongest[group]


def choose_unseen(decided: np.ndarray, group: np.ndarray, *, seed: int) -> np.ndarray:
    """Return which pairs [n] to forget are only for judging: whole groups, at least one of two."""
    groups = np.unique(group[decided == Decision.FORGET])
    if len(groups) < 2:
        return np.zeros(len(decided), bool)
    order = generator(seed, Stream.FIND, 2).permutation(groups)
    unseen = order[: max(1, round(UNSEEN_SHARE * len(groups)))]
    return (decided == Decision.FORGET) & np.isin(group, unseen)


def choose_neighbours(
    decided: np.ndarray, scores: np.ndarray, nearest_captions: np.ndarray
) -> np.ndarray:
    """Return the kept pairs nearest to the concept, half by picture and half by caption.

    They are at most a tenth of those kept, so that these have others too.
    """
    kept = decided == Decision.RETAIN
    wanted = NEIGHBOURS_PER_PAIR * int((decided >= Decision.FORGET).sum())
    wanted = min(MOST_NEIGHBOURS, max(FEWEST_NEIGHBOURS, wanted))
    count = min(wanted, -(-int(kept.sum()) // 10))
    by_caption = nearest_captions[kept[nearest_captions]][: count // 2]
    candidates = np.where(kept, scores, -np.inf)
    candidates[by_caption] = -np.inf
    count -= len(by_caption)
    return np.concatenate([by_caption, np.argpartition(-candidates, max(0, count - 1))[:count]])
