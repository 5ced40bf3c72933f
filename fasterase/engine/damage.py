"""What a run costs so far: recall on retain pairs, and which of them are near to the concept."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasterase.encode import PairFeatures
from fasterase.evaluation.scores import find_position, similarity_chunks

# Captions whose features under the original are this close mean the same: either counts as right.
SAME_MEANING = 0.95
NORMAL_Z = 1.645  # of a one-sided 95 % interval


class Damage(NamedTuple):
    """Share of recall@1 image->text lost since the original, negative for a gain."""

    mean: float
    low: float  # near end of its interval (one-sided 95 %)


class DamageMeter:
    """Compares a model's recall@1 image->text on retain pairs with the original's, pair by pair.

    The first captions of all these pairs are the candidates.
    """

    def __init__(self, original: PairFeatures) -> None:
        place = {key: row for row, key in enumerate(original.captions)}
        self._keys = list(dict.fromkeys(original.first_captions))
        text = original.text[[place[key] for key in self._keys]]
        self._alike = text @ text.T > SAME_MEANING
        self._alike.fill_diagonal_(True)
        self._rows = original.rows
        self._before = self._hits(original)

    @property
    def recall(self) -> tuple[int, float]:
        """Number of pairs, and the original's share."""
        return len(self._before), float(self._before.mean())

    def measure(self, features: PairFeatures) -> Damage:
        """Return the loss of a model, on the pairs that both could read."""
        shared = np.intersect1d(self._rows, features.rows)
        if not len(shared):
            return Damage(0.0, 0.0)
        before = self._before[np.isin(self._rows, shared)]
        after = self._hits(features.at(shared))
        lost = before - after
        mean = float(lost.mean())
        deviation = float(lost.std(ddof=1)) if len(lost) > 1 else 0.0
        return Damage(mean, mean - NORMAL_Z * deviation / math.sqrt(len(lost)))

    def _hits(self, features: PairFeatures) -> np.ndarray:
        """[n], 1 if the nearest caption is the own one or means the same; a share for ties."""
        place = {key: row for row, key in enumerate(features.captions)}
        known = [place.get(key) for key in self._keys]
        # A caption that this model did not encode, since its pair was unreadable, is no candidate.
        text = features.text[[row or 0 for row in known]]
        missing = torch.tensor([row is None for row in known])
        similarity = (features.image @ text.T).masked_fill(missing, -torch.inf)
        column = {key: i for i, key in enumerate(self._keys)}
        own = torch.tensor([column[key] for key in features.first_captions])
        return find_position(similarity, self._alike[own]).hit(1)


def find_neighbours(
    forget_text: Tensor, retain: PairFeatures, count: int, *, most: float = math.inf
) -> np.ndarray:
    """Return `count` rows (sorted) of pairs whose captions are nearest to `forget_text` [m, D].

    Those that are nearer than the cosine `most` are left out. Equal captions are equally near.
    """
    first = first_places(retain)
    number = {caption: i for i, caption in enumerate(first)}
    own = torch.tensor([number[caption] for caption in retain.first_captions], dtype=torch.long)
    nearest = closeness(forget_text, retain.first_text[list(first.values())])[own]
    order = nearest.argsort(descending=True, stable=True)
    order = order[nearest[order] <= most][:count]
    return np.sort(retain.rows[order.numpy()])


def first_places(features: PairFeatures) -> dict[str, int]:
    """Return first caption -> the first pair with it, in order."""
    first: dict[str, int] = {}
    for place, caption in enumerate(features.first_captions):
        first.setdefault(caption, place)
    return first


def closeness(forget_text: Tensor, text: Tensor) -> Tensor:
    """Return [n], the largest cosine of each row of `text` [n, D] with `forget_text` [m, D]."""
    return torch.cat([chunk.amax(1) for _, chunk in similarity_chunks(text, forget_text)])
