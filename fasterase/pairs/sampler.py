"""Which pairs each step draws: a pure function of the seed, the step and what is emphasised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fasterase.seeds import Stream, generator

# Remote shards whose rows are shuffled together. The cache has to hold those of both sets, and the
# next ones: of img2dataset's shards (10,000 images of 256 x 256 pixels, 250 MB) some 16 GB.
WINDOW_SHARDS = 16
# How many times as often as others emphasised retain pairs are drawn, each at most once a step.
EMPHASIS = 8


class Draw(NamedTuple):
    """Rows of one step and, for each, which of its captions is used.

    Caption numbers may be as large as 2^31 - 1: `Preparer` takes them modulo the number of captions
    that a row has, which is only known once it is read.
    """

    forget: np.ndarray  # [n_forget] int64
    retain: np.ndarray  # [n_retain] int64
    forget_captions: np.ndarray  # [n_forget] int64
    retain_captions: np.ndarray  # [n_retain] int64


class _Part(NamedTuple):
    """Retain pairs with passes of their own."""

    number: int
    rows: np.ndarray | None  # None for all of the set
    length: int  # rows to draw from
    size: int  # rows of each batch

    def passes(self, stream: Stream) -> tuple[int, ...]:
        """Return what names its passes of a stream."""
        return stream, self.number


class Sampler:
    """Draws a forget and a retain batch for any step, without state: a run resumes anywhere.

    One epoch is one pass over the forget set: a fresh permutation, cut into `steps_per_epoch`
    batches whose sizes differ by at most one, so that no pair is left out and no batch is tiny.
    Of several groups (concepts) each has an equal part of every batch, at least a pair, and passes
    of its own; an epoch is a pass over the largest.
    The retain set cycles in passes of its own, which follow one another and are cut into full
    batches. No batch contains a row twice: where it spans two passes, a row that it already
    contains is postponed to the next batch. Of a set smaller than two batches, the rows that a
    batch leaves out are cut from passes in this way, so that each is left out equally often.
    Emphasised retain pairs have passes of their own, and up to `EMPHASIS` times as many.

    Args:
        n_forget, n_retain: pairs in the sets; 0 draws none.
        forget_groups: rows of the forget set to draw from, a group for each concept; None for all.
        retain_rows: rows (sorted) of the retain set to draw from; None for all.
        emphasised: those among them that are drawn more often; None for none.
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
        self._retain = _divide(n_retain, batch_size, retain_rows, emphasised)
        self._retain_count = sum(part.length for part in self._retain)
        self._retain_batch = sum(part.size for part in self._retain)
        self._shards: dict[tuple[int, ...], np.ndarray | None]
        self._shards = {
            (Stream.FORGET_ORDER, number): None if forget_shards is None else forget_shards[rows]
            for number, rows in enumerate(self.forget_groups)
        }
        for part in self._retain:
            shards = retain_shards
            if shards is not None and part.rows is not None:
                shards = shards[part.rows]
            self._shards[part.passes(Stream.RETAIN_ORDER)] = shards
        share = max(1, forget_batch_size // len(self.forget_groups))
        self._group_steps = [max(1, -(-len(rows) // share)) for rows in self.forget_groups]
        self.steps_per_epoch = max(self._group_steps)
        self._forget_batch = sum(  # the largest
            -(-len(rows) // steps)
            for rows, steps in zip(self.forget_groups, self._group_steps, strict=True)
        )
        self._passes: dict[tuple[int, ...], dict[int, np.ndarray]] = {}

    def max_pairs_per_rank(self, world_size: int = 1) -> int:
        """Return the most pairs that one rank has in a step, of each set an equal share."""
        return -(-self._forget_batch // world_size) - (-self._retain_batch // world_size)

    def retain_pairs_drawn(self, steps: int) -> int:
        """Return how many different retain pairs the first `steps` steps draw, emphasis aside."""
        size, count = self._retain_batch, self._retain_count
        # Of a set smaller than two batches, the second one draws all that the first left out.
        return count if steps > 1 and size > count // 2 else min(count, steps * size)

    def draw(self, step: int) -> Draw:
        """Return the pairs of a step, counted from 0."""
        forget = self._forget_rows(step)
        retain = self._retain_rows(step)
        numbers = generator(self.seed, Stream.CAPTIONS, step)
        captions = numbers.integers(0, 2**31, size=len(forget) + len(retain))
        return Draw(forget, retain, captions[: len(forget)], captions[len(forget) :])

    def _forget_rows(self, step: int) -> np.ndarray:
        drawn = []
        for group, rows in enumerate(self.forget_groups):
            number, part = divmod(step, self._group_steps[group])
            order = self._permutation((Stream.FORGET_ORDER, group), number, len(rows))
            bounds = [len(rows) * k // self._group_steps[group] for k in (part, part + 1)]
            drawn.append(rows[order[bounds[0] : bounds[1]].astype(np.int64)])
        return np.concatenate(drawn)

    def _retain_rows(self, step: int) -> np.ndarray:
        drawn = [self._part_rows(part, step) for part in self._retain if part.size]
        return np.concatenate(drawn) if drawn else np.empty(0, dtype=np.int64)

    def _part_rows(self, part: _Part, step: int) -> np.ndarray:
        size, count = part.size, part.length
        if size <= count // 2:
            drawn = self._cut(part, Stream.RETAIN_ORDER, step, size)
        else:
            drawn = self._permutation(part.passes(Stream.RETAIN_ORDER), step, count)
            if size < count:
                left_out = self._cut(part, Stream.LEFT_OUT, step, count - size)
                drawn = drawn[~np.isin(drawn, left_out)]
        drawn = drawn.astype(np.int64)
        return drawn if part.rows is None else part.rows[drawn]

    def _cut(self, part: _Part, stream: Stream, step: int, size: int) -> np.ndarray:
        """Cut batch `step` of `size` rows, at most half of a part, from its passes of a stream."""
        number, start = divmod(step * size, part.length)
        if start < size:
            return self._first_rows(part, stream, number, size)[start : start + size]
        passes = part.passes(stream)
        order = self._permutation(passes, number, part.length)
        self._passes[passes] = {number: order}  # the one before is not needed any more
        rows = order[start : start + size]
        if len(rows) < size:
            head = self._first_rows(part, stream, number + 1, size)[: size - len(rows)]
            rows = np.concatenate([rows, head])
        return rows

    def _first_rows(self, part: _Part, stream: Stream, number: int, size: int) -> np.ndarray:
        """Return the first rows of a pass, [2 * size], without repeats in a batch.

        The batch that spans two passes must not repeat a row: those it drew from the pass before,
        its last `shared` rows, are swapped with later ones among the first `size`, which suffice.
        """
        passes, count = part.passes(stream), part.length
        rows = self._permutation(passes, number, count)[: 2 * size]
        shared = number * count % size
        if not shared:
            return rows
        before = self._permutation(passes, number - 1, count)[count - shared :]
        held = np.isin(rows[:size], before)
        again = np.flatnonzero(held[: size - shared])
        others = size - shared + np.flatnonzero(~held[size - shared :])[: len(again)]
        rows = rows.copy()
        rows[again], rows[others] = rows[others], rows[again]
        return rows

    def _permutation(self, passes: tuple[int, ...], number: int, length: int) -> np.ndarray:
        """Permute for a pass of a stream and a group of the forget set, or a part of retain."""
        # Keep passes: permuting ten million rows takes a second. A batch may need two.
        kept = self._passes.setdefault(passes, {})
        if number not in kept:
            for other in kept.keys() - {number - 1, number + 1}:
                del kept[other]
            stream, *group = passes
            # The position of the first group, and of the first part, is the pass alone.
            numbers = generator(self.seed, Stream(stream), number, *(g for g in group if g))
            kept[number] = shuffle_rows(numbers, length, self._shards.get(passes))
        return kept[number]


def _divide(
    n_retain: int, batch_size: int, rows: np.ndarray | None, emphasised: np.ndarray | None
) -> list[_Part]:
    """Divide the retain pairs into the emphasised ones and the others, and a batch between them."""
    if rows is None or emphasised is None:
        count = n_retain if rows is None else len(rows)
        return [_Part(0, rows, count, min(batch_size, count))]
    others = np.setdiff1d(rows, emphasised)
    size = min(batch_size, len(rows))
    if size < 2 or not (len(emphasised) and len(others)):
        return [_Part(0, rows, len(rows), size)]
    share = EMPHASIS * len(emphasised) / (EMPHASIS * len(emphasised) + len(others))
    own = min(max(round(share * size), 1, size - len(others)), size - 1, len(emphasised))
    return [
        _Part(0, others, len(others), size - own),
        _Part(1, emphasised, len(emphasised), own),
    ]


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
