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
from fasterase.pairs.augment import augment
from fasterase.pairs.kept import DrawnPairs, Keeper, draw_views, read_missing, stack_known
from fasterase.pairs.loading import load_parallel, read_record
from fasterase.pairs.prepare import PreparedText, Preparer, hash_captions, stack_tokens
from fasterase.pairs.sampler import Sampler
from fasterase.pairs.skips import BrokenPair, Skip
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
    black = prepare.black_level() if augment_forget else None
    draw = partial(
        _draw_part,
        sampler,
        size=size,
        parts=parts,
        share=partial(share_of, rank=ranks.rank, world_size=ranks.world_size),
    )
    numbers = range(first_step * parts, last_step * parts)
    sources = forget, retain
    if keeper is None:
        load = partial(
            _load_micro_batch, sources, draw, sampler.seed, prepare, augment_forget, black
        )
        micro_batches = load_parallel(load, numbers, num_workers)
    else:
        views = keeper.views if augment_forget else 0
        micro_batches = _kept_micro_batches(
            sources, map(draw, numbers), sampler.seed, prepare, keeper, views, black, num_workers
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
    if keeper is None:
        load = partial(_load_rows, source, prepare, captions)
        batches = load_parallel(load, parts, num_workers)
    else:
        batches = _kept_rows(source, parts, prepare, captions, keeper, num_workers)
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


def _load_micro_batch(
    sources: tuple[PairTable, PairTable],
    draw: Callable[[int], _Part],
    seed: int,
    prepare: Preparer,
    augment_forget: bool,
    black: Tensor | None,
    number: int,
) -> MicroBatch:
    part = draw(number)
    pixels: list[Tensor] = []
    texts: list[PreparedText] = []
    ids: list[str] = []
    kept: list[int] = []
    skipped: list[Skip] = []
    for place, position in enumerate(part.positions):
        is_forget = place < part.n_forget
        source = sources[0] if is_forget else sources[1]
        try:
            record = read_record(source, int(part.rows[place]), seed, part.step, position)
            image = prepare.image(record)
            text = prepare.text(record, int(part.captions[place]))
        except BrokenPair as broken:
            skipped.append(Skip(broken.id, broken.reason))
            continue
        if is_forget and augment_forget:
            numbers = generator(seed, Stream.AUGMENTATION, part.step, position)
            image = augment(image, numbers, black=black)
        pixels.append(image)
        texts.append(text)
        ids.append(record.id)
        kept.append(place)
    return MicroBatch(
        rows=part.rows[kept],
        ids=ids,
        pixels=prepare.stack(pixels),
        skipped=skipped,
        step=part.step,
        offset=part.offset,
        n_forget=sum(place < part.n_forget for place in kept),
        tokens=stack_tokens([text.tokens for text in texts], prepare.context_length),
        keys=[text.key for text in texts],
    )


def _kept_micro_batches(
    sources: tuple[PairTable, PairTable],
    drawn: Iterator[_Part],
    seed: int,
    prepare: Preparer,
    keeper: Keeper,
    num_views: int,
    black: Tensor | None,
    num_workers: int,
) -> Iterator[MicroBatch]:
    waiting: deque[tuple[_Part, np.ndarray]] = deque()

    def pairs() -> Iterator[DrawnPairs]:
        for part in drawn:
            views = np.zeros(len(part.rows), np.int64)
            if num_views:
                forget = slice(0, part.n_forget)
                numbers = [
                    generator(seed, Stream.AUGMENTATION, part.step, position)
                    for position in part.positions[forget]
                ]
                views[forget] = draw_views(
                    sources[0], part.rows[forget], numbers, num_views, seed=seed
                )
            waiting.append((part, views))
            which = (np.arange(len(part.rows)) >= part.n_forget).astype(np.int64)
            yield DrawnPairs(which, part.rows, views)

    for found in read_missing(
        pairs(), sources, prepare, keeper, seed=seed, black=black, num_workers=num_workers
    ):
        part, views = waiting.popleft()
        rows = part.rows[found.places]
        n_forget = int((found.places < part.n_forget).sum())
        texts = [
            every[number % len(every)]
            for every, number in zip(found.texts, part.captions[found.places].tolist(), strict=True)
        ]
        yield MicroBatch(
            rows=rows,
            ids=[sources[place >= n_forget].id(row) for place, row in enumerate(rows.tolist())],
            pixels=found.pixels,
            skipped=found.skipped,
            fresh=found.fresh,
            step=part.step,
            offset=part.offset,
            n_forget=n_forget,
            tokens=stack_known(texts, prepare.context_length),
            keys=[text.key for text in texts],
            views=views[found.places],
        )


def _load_rows(
    source: PairTable, prepare: Preparer, captions: Captions, rows: np.ndarray
) -> SweepBatch:
    kept: list[int] = []
    ids: list[str] = []
    pixels: list[Tensor] = []
    found: list[tuple[int, str]] = []
    tokens: dict[str, Tokens] = {}
    skipped: list[Skip] = []
    for row in rows.tolist():
        try:
            record = read_record(source, row, 0, row)
            image = prepare.image(record)
        except BrokenPair as broken:
            skipped.append(Skip(broken.id, broken.reason))
            continue
        count = len(record.text) if isinstance(record.text, list) and captions == "all" else 1
        for caption in range(count):
            text = prepare.text(record, caption)
            found.append((row, text.key))
            tokens[text.key] = text.tokens
        kept.append(row)
        ids.append(record.id)
        pixels.append(image)
    return SweepBatch(
        rows=np.array(kept, dtype=np.int64),
        ids=ids,
        pixels=prepare.stack(pixels),
        skipped=skipped,
        captions=found,
        new_keys=list(tokens),
        tokens=stack_tokens(list(tokens.values()), prepare.context_length),
    )


def _kept_rows(
    source: PairTable,
    parts: Sequence[np.ndarray],
    prepare: Preparer,
    captions: Captions,
    keeper: Keeper,
    num_workers: int,
) -> Iterator[SweepBatch]:
    nothing = (np.zeros(len(rows), np.int64) for rows in parts)
    drawn = (DrawnPairs(zero, rows, zero) for rows, zero in zip(parts, nothing, strict=True))
    read = read_missing(drawn, (source,), prepare, keeper, num_workers=num_workers)
    for rows, found in zip(parts, read, strict=True):
        kept = rows[found.places]
        wanted = [
            (row, text)
            for row, texts in zip(kept.tolist(), found.texts, strict=True)
            for text in (texts if captions == "all" else texts[:1])
        ]
        distinct = {text.key: text for _, text in wanted}
        yield SweepBatch(
            rows=kept,
            ids=[source.id(row) for row in kept.tolist()],
            pixels=found.pixels,
            skipped=found.skipped,
            fresh=found.fresh,
            captions=[(row, text.key) for row, text in wanted],
            new_keys=list(distinct),
            tokens=stack_known(list(distinct.values()), prepare.context_length),
        )
