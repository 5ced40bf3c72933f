"""Which pairs each step draws: a pure function of the seed, the step and what is emphasised."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from fasterase.seeds import Stream, generator

# Remote shards whose rows are shuffled together. The cache has to hold those of both sets, and the
# next ones: of img2dataset's shards (10,000 images of 256 x 256 pixels, 250 MB) some 16 GB.
WINDOW_SHARDS = 16
# How many times as often as others emphasised retain pairs are drawn, each at most once a step.
EMPHASIS = 8


class Draw(NamedTuple):
    """Rows of one step, and which caption of each is used.

    Caption numbers are below 2^31: `Preparer` takes them modulo the number of captions of a row,
    which is only known once it is read.
    """

    forget: np.ndarray  # [n_forget] int64
    retain: np.ndarray  # [n_retain] int64
    captions: np.ndarray  # [n_forget + n_retain] int64, of forget pairs first


class Sampler:
    """Draws a forget and a retain batch for any step, without state: a run resumes anywhere.

    One epoch is one pass over the forget set: a fresh permutation, cut into `steps_per_epoch`
    batches whose sizes differ by at most one, so that no pair is left out and no batch is tiny.
    Of several groups (concepts) each has an equal part of every batch, at least one pair, and
    passes of its own; an epoch is a pass over the largest.
    The retain set cycles in passes of its own, which follow one another and are cut into full
    batches. No batch contains a row twice: where it spans two passes, a row that it already
    contains is postponed to the next batch. Of a set smaller than two batches, the rows that a
    batch leaves out are cut from passes in this way, so that each is left out equally often.
    Emphasised retain pairs have passes of their own, and up to `EMPHASIS` times as many.

    Args:
        n_forget, n_retain: pairs in the sets; 0 draws none.
        forget_groups: rows of the forget set to draw from, a group for each concept; None for all.
        retain_rows: rows (sorted) of the retain set to draw from; None for all.
        emphasised: those of them that are drawn more often; None for none.
        forget_batch_size, batch_size: forget and retain pairs per step, clipped to the sets.
        seed: not negative.
        forget_shards, retain_shards: see `PairTable.shards`; None shuffles all rows alike.
    """

    def __init__(
        self,
        n_forget: int,
        n_retain: int,
        *,
        forget_batch_size: int,
        batch_size: int,
        seed: int,
        forget_groups: Sequence[np.ndarray] | None = None,
        retain_rows: np.ndarray | None = None,
        emphasised: np.ndarray | None = None,
        forget_shards: np.ndarray | None = None,
        retain_shards: np.ndarray | None = None,
    ) -> None:
        self.n_forget = n_forget
        self.n_retain = n_retain
        self.seed = seed
        self.forget_groups = [np.arange(n_forget)] if forget_groups is None else forget_groups
        share = max(1, forget_batch_size // len(self.forget_groups))
        self._group_steps = [max(1, -(-len(rows) // share)) for rows in self.forget_groups]
        self.steps_per_epoch = max(self._group_steps)
        self._forget_passes = [
            _Passes(seed, Stream.FORGET_ORDER, number, rows, forget_shards)
            for number, rows in enumerate(self.forget_groups)
        ]
        rows = np.arange(n_retain) if retain_rows is None else retain_rows
        self._retain_count, self._retain_size = len(rows), min(batch_size, len(rows))
        self._retain_passes = [
            (
                _Passes(seed, Stream.RETAIN_ORDER, number, part, retain_shards),
                _Passes(seed, Stream.LEFT_OUT, number, part),
                size,
            )
            for number, (part, size) in enumerate(_divide(rows, self._retain_size, emphasised))
        ]

    def max_pairs_per_rank(self, world_size: int = 1) -> int:
        """Return the most pairs that one rank has in a step, of each set an equal share."""
        groups = zip(self.forget_groups, self._group_steps, strict=True)
        largest_forget = sum(-(-len(rows) // steps) for rows, steps in groups)
        return -(-largest_forget // world_size) - (-self._retain_size // world_size)

    def retain_pairs_drawn(self, steps: int) -> int:
        """Return how many different retain pairs the first `steps` steps draw, emphasis aside."""
        size, count = self._retain_size, self._retain_count
        # Of a set smaller than two batches, the second one draws all that the first left out.
        return count if steps > 1 and size > count // 2 else min(count, steps * size)

    def draw(self, step: int) -> Draw:
        """Return the pairs of a step, counted from 0."""
        forget, retain = [], [np.empty(0, np.int64)]
        for passes, steps in zip(self._forget_passes, self._group_steps, strict=True):
            number, part = divmod(step, steps)
            start, end = (len(passes.rows) * k // steps for k in (part, part + 1))
            forget.append(passes.rows[passes.order(number)[start:end]])
        for passes, left_out, size in self._retain_passes:
            count = len(passes.rows)
            if size <= count // 2:
                places = passes.cut(step, size)
            else:
                places = passes.order(step)
                if size < count:
                    places = places[~np.isin(places, left_out.cut(step, count - size))]
            retain.append(passes.rows[places])
        count = sum(map(len, forget + retain))
        captions = generator(self.seed, Stream.CAPTIONS, step).integers(0, 2**31, size=count)
        return Draw(np.concatenate(forget), np.concatenate(retain), captions)


class _Passes:
    """Passes over `rows`: permutations of their places, which follow one another.

    Two are kept, since a batch may span two and permuting ten million rows takes a second.
    """

    def __init__(
        self,
        seed: int,
        stream: Stream,
        number: int,  # of the group of the forget set, or of the part of retain
        rows: np.ndarray,
        shards: np.ndarray | None = None,
    ) -> None:
        self.rows = rows
        shards = None if shards is None else shards[rows]
        # The position of the first group, and of the first part, is the pass alone.
        own = (number,) if number else ()

        @lru_cache(maxsize=2)
        def order(number: int) -> np.ndarray:
            return shuffle_rows(generator(seed, stream, number, *own), len(rows), shards)

        self.order = order

    def cut(self, step: int, size: int) -> np.ndarray:
        """Cut batch `step` of `size` places, at most half of them, from the passes."""
        number, start = divmod(step * size, len(self.rows))
        if start < size:
            return self._first(number, size)[start : start + size]
        places = self.order(number)[start : start + size]
        if len(places) < size:
            head = self._first(number + 1, size)[: size - len(places)]
            places = np.concatenate([places, head])
        return places

    def _first(self, number: int, size: int) -> np.ndarray:
        """Return the first places of a pass, [2 * size], without repeats in a batch.

        The batch that spans two passes must not repeat a row: those it drew from the pass before,
        its last `shared` rows, are swapped with later ones among the first `size`, which suffice.
        """
        count = len(self.rows)
        places = self.order(number)[: 2 * size]
        shared = number * count % size
        if not shared:
            return places
        before = self.order(number - 1)[count - shared :]
        held = np.isin(places[:size], before)
        again = np.flatnonzero(held[: size - shared])
        others = size - shared + np.flatnonzero(~held[size - shared :])[: len(again)]
        places = places.copy()
        places[again], places[others] = places[others], places[again]
        return places


def _divide(
    rows: np.ndarray, size: int, emphasised: np.ndarray | None
) -> list[tuple[np.ndarray, int]]:
    """Divide rows into the others and the emphasised ones, and a batch of `size` between them."""
    if size == 0:
        return []
    others = rows if emphasised is None else np.setdiff1d(rows, emphasised)
    if emphasised is None or size < 2 or not (len(emphasised) and len(others)):
        return [(rows, size)]
    share = EMPHASIS * len(emphasised) / (EMPHASIS * len(emphasised) + len(others))
    own = min(max(round(share * size), 1, size - len(others)), size - 1, len(emphasised))
    return [(others, size - own), (emphasised, own)]


def shuffle_rows(
    numbers: np.random.Generator, count: int, shards: np.ndarray | None = None
) -> np.ndarray:
    """Return the rows 0 to `count - 1` in random order.

    With the `shards` [count] of the rows, the shards are shuffled first, and then the rows within
    each window of `WINDOW_SHARDS` of them: a pass over the rows needs few shards at a time, each
    once. One window alone is the order without shards.
    """
    order = numbers.permutation(np.arange(count, dtype=np.int32 if count < 2**31 else np.int64))
    if shards is None or count == 0:
        return order
    window = numbers.permutation(int(shards.max()) + 1) // WINDOW_SHARDS
    # NumPy sorts short integers by radix: ten million rows in half a second.
    window = window.astype(np.int16 if len(window) < 2**15 else np.int64)
    return order[np.argsort(window[shards[order]], kind="stable")]


def drawn_rows(sampler: Sampler, total_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows (sorted, distinct) of the forget and retain sets that the steps draw."""
    forget = np.zeros(sampler.n_forget, bool)
    retain = np.zeros(sampler.n_retain, bool)
    for step in range(total_steps):
        draw = sampler.draw(step)
        forget[draw.forget] = True
        retain[draw.retain] = True
    return np.flatnonzero(forget), np.flatnonzero(retain)


def spread_indices(length: int, count: int) -> list[int]:
    """Return at most `count` evenly spaced indices below `length`."""
    return sorted({int(i) for i in np.linspace(0, length - 1, min(count, length))})
