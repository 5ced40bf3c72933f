"""Where the right candidates stand among all, and the chance of meeting one among the first k.

Ties are counted as a random order would break them: a collapsed model, for which all candidates are
alike, scores exactly chance and neither 0 nor 100 %.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Two cosines this close are a tie: fp32 dot products of equal unit vectors differ by about 1e-7.
TIE = 1e-6
# Elements of a similarity chunk; with its masks about 20 bytes each, so 80 MB.
CHUNK_ELEMENTS = 4_000_000


class Position(NamedTuple):
    """The best right candidate of each query among all candidates."""

    above: np.ndarray  # [n] candidates that stand before it, all of them wrong
    tied: np.ndarray  # [n] candidates that tie with it, itself included
    right: np.ndarray  # [n] right ones among the tied

    def hit(self, k: int) -> np.ndarray:
        """[n] probability that a right candidate is among the first `k`, ties in random order.

        `1 - C(tied - right, d) / C(tied, d)` with `d = k - above` draws from the tied ones.
        """
        miss = np.ones(len(self.above))
        for draw in range(k):
            drawn = (draw < k - self.above) & (draw < self.tied)
            wrong_left = np.maximum(self.tied - self.right - draw, 0)
            left = np.maximum(self.tied - draw, 1)
            miss = np.where(drawn, miss * wrong_left / left, miss)
        return 1.0 - miss

    def rank(self) -> np.ndarray:
        """[n] rank counted from 1, the mean over the tied places."""
        return 1.0 + self.above + (self.tied - 1) / 2


def position(similarity: Tensor, right: Tensor) -> Position:
    """Position of each row's best right candidate.

    Args:
        similarity: [n, m] cosines of queries with candidates.
        right: [n, m] or [1, m] bool, at least one True in each row.
    """
    best = similarity.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    above = similarity > best + TIE
    tied = (similarity >= best - TIE) & ~above
    return Position(_count(above), _count(tied), _count(tied & right))


def _count(mask: Tensor) -> np.ndarray:
    """True values of each row. Summing bytes is ten times faster than summing bool on a CPU."""
    return mask.view(torch.uint8).sum(dim=1, dtype=torch.int32).numpy()


def chance(candidates: int, right: np.ndarray) -> Position:
    """The position under a random order: all `candidates` tied, `right` [n] of them right."""
    return Position(np.zeros(len(right)), np.full(len(right), candidates), right)


def joined(parts: list[Position]) -> Position:
    """Positions of consecutive chunks of queries, as one."""
    return Position(*(np.concatenate(field) for field in zip(*parts, strict=True)))


def similarity_chunks(queries: Tensor, candidates: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """`queries @ candidates.T` in slices of rows, at most `CHUNK_ELEMENTS` elements at a time."""
    step = max(1, CHUNK_ELEMENTS // max(1, len(candidates)))
    for start in range(0, len(queries), step):
        rows = slice(start, min(start + step, len(queries)))
        yield rows, queries[rows] @ candidates.T
