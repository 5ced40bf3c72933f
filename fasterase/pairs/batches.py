"""Loading of pairs, in parallel: micro-batches for training steps, and sweeps over a set."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasterase.models.preprocessing import Tokens
from fasterase.pairs.kept import Keeper, draw_views, stack_known
from fasterase.pairs.loading import Drawn, read_pairs
from fasterase.pairs.prepare import Preparer, hash_captions
from fasterase.pairs.sampler import Sampler
from fasterase.pairs.skips import Skip
from fasterase.pairs.table import PairTable
from fasterase.parallel.ranks import ALONE, Ranks, share_of
from fasterase.seeds import Stream, generator

Captions = Literal["all", "first"]


@dataclass
class Loaded:
    """Some pairs, ready for the towers; broken ones are left out.

    Attributes:
        rows: [n] int64, rows of their source.
        ids: [n].
        pixels: [n, 3, H, W] uint8, or float32 (normalised) where the transform does not split;
            with `fresh`, of those pairs alone.
        skipped: rows that are broken.
        fresh: [k] int64, which of the n images are not kept (`Keeper`); None without a keeper.
    """

    rows: np.ndarray
    ids: list[str]
    pixels: Tensor
    skipped: list[Skip]
    fresh: np.ndarray | None = field(default=None, kw_only=True)


@dataclass
class MicroBatch(Loaded):
    """Consecutive pairs of one step, forget pairs first.

    Attributes:
        step: counted from 0.
        offset: position of its first pair in the draw of the step for all ranks, counting broken
            pairs.
        n_forget: how many of the n are forget pairs.
        tokens: ids [n, L].
        keys: [n] identities of the captions.
        views: [n] int64, which of its kept views each image is; 0 is the image itself. None without
            a keeper.
    """

    step: int
    offset: int
    n_forget: int
    tokens: Tokens
    keys: list[str]
    views: np.ndarray | None = None


@dataclass
class StepBatch:
    """A rank's pairs of one step, in micro-batches, without broken pairs. Forget pairs come first.

    Attributes:
        step: counted from 0.
        micro_batches: at least one; none is empty unless the rank has no readable pair.
        skipped: pairs that were drawn and are broken.
    """

    step: int
    micro_batches: list[MicroBatch]
    skipped: list[Skip] = field(default_factory=list)

    @property
    def n_forget(self) -> int:
        return sum(part.n_forget for part in self.micro_batches)

    @property
    def ids(self) -> list[str]:
        return [id for part in self.micro_batches for id in part.ids]

    @cached_property
    def labels(self) -> Tensor:
        """[n] int64, equal for equal captions, whatever step or process they are drawn in."""
        return torch.from_numpy(hash_captions(self.keys).astype(np.int64))

    @property
    def keys(self) -> list[str]:
        """[n] identities of the captions."""
        return [key for part in self.micro_batches for key in part.keys]

    @property
    def forget_rows(self) -> np.ndarray:
        """Rows of the forget pairs in their source."""
        return np.concatenate([part.rows for part in self.micro_batches])[: self.n_forget]

    @property
    def retain_rows(self) -> np.ndarray:
        """Rows of the retain pairs in their source."""
        return np.concatenate([part.rows for part in self.micro_batches])[self.n_forget :]


@dataclass
class SweepBatch(Loaded):
    """Some rows of a source, not augmented.

    Attributes:
        captions: (row, caption key) of every caption read.
        new_keys: keys that no earlier batch had; their texts are in `tokens`.
        tokens: ids [len(new_keys), L].
    """

    captions: list[tuple[int, str]]
    new_keys: list[str]
    tokens: Tokens


def step_batches(
    forget: PairTable,
    retain: PairTable,
    sampler: Sampler,
    prepare: Preparer,
    *,
    first_step: int,
    last_step: int,
    micro_batch_size: int | None = None,
    augment_forget: bool,
    keeper: Keeper | None = None,
    num_workers: int = 0,
    ranks: Ranks = ALONE,
) -> Iterator[StepBatch]:
    """Yield this rank's part of the batches of steps `first_step` to `last_step - 1`.

    It is a slice of the step's forget pairs and one of its retain pairs. The pairs and their
    augmentation do not depend on the number of workers or ranks nor on the micro-batch size: they
    are seeded by (seed, step, position in the step). If a source is not stable, the generators of
    Python, NumPy and PyTorch are seeded in the same way while one of its items is read, so that its
    own augmentation repeats too. Workers load one micro-batch at a time.

    With a `keeper`, each forget image has as many views as it says, seeded by its row, and each
    step draws one. What is kept is not read.

    Raises:
        InputError: as `Preparer` does, also from inside a worker.
    """
    largest = sampler.max_pairs_per_rank(ranks.world_size)
    size = micro_batch_size or largest
    # The last part of a step may be empty: steps differ in size by one pair.
    parts = max(1, -(-largest // size))
    draw = partial(
        _draw_part,
        sampler,
        size=size,
        parts=parts,
        share=partial(share_of, rank=ranks.rank, world_size=ranks.world_size),
    )
    numbers = range(first_step * parts, last_step * parts)
    micro_batches = _micro_batches(
        (forget, retain),
        map(draw, numbers),
        sampler.seed,
        prepare,
        keeper,
        augment_forget,
        num_workers,
    )
    loaded: list[MicroBatch] = []
    for part in micro_batches:
        loaded.append(part)
        if len(loaded) == parts:
            skipped = [skip for each in loaded for skip in each.skipped]
            readable = [each for each in loaded if each.ids] or loaded[:1]
            yield StepBatch(part.step, readable, skipped)
            loaded = []


def sweep(
    source: PairTable,
    rows: Sequence[int] | np.ndarray,
    prepare: Preparer,
    *,
    captions: Captions,
    batch_size: int,
    num_workers: int = 0,
    keeper: Keeper | None = None,
) -> Iterator[SweepBatch]:
    """Read rows once each, in the given order, with all their captions or the first one.

    Args:
        source: the pairs.
        rows: distinct rows.
        prepare: records to pixels and tokens.
        captions: which captions of each row.
        batch_size: rows per batch.
        num_workers: processes that load and decode.
        keeper: what is kept is not read; None reads everything.
    """
    rows = np.asarray(rows, dtype=np.int64)
    parts = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    batches = _sweep_batches(source, parts, prepare, captions, keeper, num_workers)
    seen: set[str] = set()
    for batch in batches:
        fresh = [i for i, key in enumerate(batch.new_keys) if key not in seen]
        if len(fresh) < len(batch.new_keys):
            batch.tokens = batch.tokens.index(fresh)
            batch.new_keys = [batch.new_keys[i] for i in fresh]
        seen.update(batch.new_keys)
        yield batch


class _Part(NamedTuple):
    """A rank's pairs of one micro-batch, before they are read.

    Attributes:
        step, offset: see `MicroBatch`.
        positions: [n] of the pairs in the step's draw.
        rows: [n] int64, in the forget set or, from `n_forget` on, the retain set.
        captions: [n] numbers of the captions, see `Draw`.
        n_forget: how many of the n are forget pairs.
    """

    step: int
    offset: int
    positions: list[int]
    rows: np.ndarray
    captions: np.ndarray
    n_forget: int


def _draw_part(
    sampler: Sampler, number: int, *, size: int, parts: int, share: Callable[[int], range]
) -> _Part:
    step, part = divmod(number, parts)
    draw = sampler.draw(step)
    rows = np.concatenate([draw.forget, draw.retain])
    captions = np.concatenate([draw.forget_captions, draw.retain_captions])
    n_forget = len(draw.forget)
    own = [*share(n_forget), *(n_forget + place for place in share(len(draw.retain)))]
    positions = own[part * size : (part + 1) * size]
    return _Part(
        step,
        positions[0] if positions else len(rows),
        positions,
        rows[positions],
        captions[positions],
        sum(position < n_forget for position in positions),
    )


def _micro_batches(
    sources: tuple[PairTable, PairTable],
    drawn: Iterator[_Part],
    seed: int,
    prepare: Preparer,
    keeper: Keeper | None,
    augment_forget: bool,
    num_workers: int,
) -> Iterator[MicroBatch]:
    waiting: deque[tuple[_Part, np.ndarray]] = deque()
    num_views = keeper.views if keeper is not None and augment_forget else 0

    def pairs() -> Iterator[Drawn]:
        for part in drawn:
            is_forget = np.arange(len(part.rows)) < part.n_forget
            seeds = [(seed, part.step, position) for position in part.positions]
            views = np.zeros(len(part.rows), np.int64)
            if num_views:
                rows = part.rows[is_forget]
                numbers = [
                    generator(seed, Stream.AUGMENTATION, *position)
                    for _, *position in seeds[: part.n_forget]
                ]
                views[is_forget] = draw_views(sources[0], rows, numbers, num_views, seed=seed)
                for place, row in enumerate(sources[0].base_rows(rows).tolist()):
                    seeds[place] = (seed, row, int(views[place]) - 1)
            altered = is_forget & augment_forget if keeper is None else views > 0
            waiting.append((part, views))
            yield Drawn((~is_forget).astype(int), part.rows, part.captions, seeds, altered, views)

    black = prepare.black_level() if augment_forget else None
    for found in read_pairs(
        pairs(), sources, prepare, keeper=keeper, black=black, num_workers=num_workers
    ):
        part, views = waiting.popleft()
        rows = part.rows[found.places]
        n_forget = int((found.places < part.n_forget).sum())
        texts = [text for (text,) in found.texts]
        yield MicroBatch(
            rows=rows,
            ids=[sources[place >= n_forget].id(row) for place, row in enumerate(rows.tolist())],
            pixels=found.pixels,
            skipped=found.skipped,
            fresh=None if keeper is None else found.fresh,
            step=part.step,
            offset=part.offset,
            n_forget=n_forget,
            tokens=stack_known(texts, prepare.context_length),
            keys=[text.key for text in texts],
            views=None if keeper is None else views[found.places],
        )


def _sweep_batches(
    source: PairTable,
    parts: Sequence[np.ndarray],
    prepare: Preparer,
    captions: Captions,
    keeper: Keeper | None,
    num_workers: int,
) -> Iterator[SweepBatch]:
    def pairs() -> Iterator[Drawn]:
        for rows in parts:
            zeros = np.zeros(len(rows), np.int64)
            seeds = [(0, row) for row in rows.tolist()]
            chosen = None if captions == "all" else zeros
            yield Drawn(zeros, rows, chosen, seeds, zeros > 0, zeros)

    read = read_pairs(pairs(), (source,), prepare, keeper=keeper, num_workers=num_workers)
    for rows, found in zip(parts, read, strict=True):
        kept = rows[found.places].tolist()
        wanted = [
            (row, text) for row, texts in zip(kept, found.texts, strict=True) for text in texts
        ]
        distinct = {text.key: text for _, text in wanted}
        yield SweepBatch(
            rows=np.array(kept, np.int64),
            ids=[source.id(row) for row in kept],
            pixels=found.pixels,
            skipped=found.skipped,
            fresh=None if keeper is None else found.fresh,
            captions=[(row, text.key) for row, text in wanted],
            new_keys=list(distinct),
            tokens=stack_known(list(distinct.values()), prepare.context_length),
        )
