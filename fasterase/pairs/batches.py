"""Loading of pairs, in parallel: micro-batches for training steps, and sweeps over a set."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fasterase.errors import InputError
from fasterase.models.preprocessing import Tokens
from fasterase.pairs.augment import augment
from fasterase.pairs.prepare import PreparedText, Preparer, hash_captions, stack_tokens
from fasterase.pairs.sampler import Sampler
from fasterase.pairs.skips import BrokenPair, Skip
from fasterase.pairs.source import PairSource, Record
from fasterase.parallel.ranks import ALONE, Ranks, share_of
from fasterase.seeds import Stream, generator

Captions = Literal["all", "first"]


@dataclass
class Loaded:
    """Some pairs, ready for the towers; broken ones are left out.

    Attributes:
        rows: [n] int64, rows of their source.
        ids: [n].
        pixels: [n, 3, H, W] uint8, or float32 (normalised) where the transform does not split.
        skipped: rows that are broken.
    """

    rows: np.ndarray
    ids: list[str]
    pixels: Tensor
    skipped: list[Skip]


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
        views: [n] int64, which of its views each image is; 0 for retain images. None where forget
            images have a new view in each step, or none.
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
    forget: PairSource,
    retain: PairSource,
    sampler: Sampler,
    prepare: Preparer,
    *,
    first_step: int,
    last_step: int,
    micro_batch_size: int | None = None,
    augment_forget: bool,
    views: int | None = None,
    num_workers: int = 0,
    ranks: Ranks = ALONE,
) -> Iterator[StepBatch]:
    """Yield this rank's part of the batches of steps `first_step` to `last_step - 1`.

    It is a slice of the step's forget pairs and one of its retain pairs. The pairs and their
    augmentation do not depend on the number of workers or ranks nor on the micro-batch size: they
    are seeded by (seed, step, position in the step). If a source is not stable, the generators of
    Python, NumPy and PyTorch are seeded in the same way while one of its items is read, so that its
    own augmentation repeats too. Workers load one micro-batch at a time.

    With `views`, each forget image has so many views, seeded by its row; each step draws one.

    Raises:
        InputError: as `Preparer` does, also from inside a worker.
    """
    largest = sampler.max_pairs_per_rank(ranks.world_size)
    size = micro_batch_size or largest
    # The last part of a step may be empty: steps differ in size by one pair.
    parts = max(1, -(-largest // size))
    black = prepare.black_level() if augment_forget else None
    load = partial(
        _load_micro_batch,
        (forget, retain),
        sampler,
        prepare,
        size=size,
        parts=parts,
        augment_forget=augment_forget,
        views=views,
        black=black,
        share=partial(share_of, rank=ranks.rank, world_size=ranks.world_size),
    )
    loaded: list[MicroBatch] = []
    for part in _load(load, range(first_step * parts, last_step * parts), num_workers):
        loaded.append(part)
        if len(loaded) == parts:
            skipped = [skip for each in loaded for skip in each.skipped]
            readable = [each for each in loaded if each.ids] or loaded[:1]
            yield StepBatch(part.step, readable, skipped)
            loaded = []


def sweep(
    source: PairSource,
    rows: Sequence[int] | np.ndarray,
    prepare: Preparer,
    *,
    captions: Captions,
    batch_size: int,
    num_workers: int = 0,
) -> Iterator[SweepBatch]:
    """Read rows once each, in the given order, with all their captions or the first one.

    Args:
        source: the pairs.
        rows: distinct rows.
        prepare: records to pixels and tokens.
        captions: which captions of each row.
        batch_size: rows per batch.
        num_workers: processes that load and decode.
    """
    rows = np.asarray(rows, dtype=np.int64)
    load = partial(_load_rows, source, rows, prepare, captions=captions, batch_size=batch_size)
    seen: set[str] = set()
    for batch in _load(load, range(-(-len(rows) // batch_size)), num_workers):
        fresh = [i for i, key in enumerate(batch.new_keys) if key not in seen]
        if len(fresh) < len(batch.new_keys):
            batch.tokens = batch.tokens.index(fresh)
            batch.new_keys = [batch.new_keys[i] for i in fresh]
        seen.update(batch.new_keys)
        yield batch


def _load_micro_batch(
    sources: tuple[PairSource, PairSource],
    sampler: Sampler,
    prepare: Preparer,
    number: int,
    *,
    size: int,
    parts: int,
    augment_forget: bool,
    views: int | None,
    black: Tensor | None,
    share: Callable[[int], range],
) -> MicroBatch:
    step, part = divmod(number, parts)
    draw = sampler.draw(step)
    rows = np.concatenate([draw.forget, draw.retain])
    captions = np.concatenate([draw.forget_captions, draw.retain_captions])
    n_forget = len(draw.forget)
    own = [*share(n_forget), *(n_forget + place for place in share(len(draw.retain)))]
    positions = own[part * size : (part + 1) * size]
    pixels: list[Tensor] = []
    texts: list[PreparedText] = []
    ids: list[str] = []
    kept: list[int] = []
    seen: list[int] = []
    skipped: list[Skip] = []
    for position in positions:
        is_forget = position < n_forget
        source = sources[0] if is_forget else sources[1]
        try:
            record = _read(source, int(rows[position]), sampler.seed, step, position)
            image = prepare.image(record)
            text = prepare.text(record, int(captions[position]))
        except BrokenPair as broken:
            skipped.append(Skip(broken.id, broken.reason))
            continue
        view = 0
        if is_forget and augment_forget:
            numbers = generator(sampler.seed, Stream.AUGMENTATION, step, position)
            if views is not None:
                view = int(numbers.integers(views))
                row = int(rows[position])
                numbers = generator(sampler.seed, Stream.AUGMENTATION, row, view)
            image = augment(image, numbers, black=black)
        seen.append(view)
        pixels.append(image)
        texts.append(text)
        ids.append(record.id)
        kept.append(position)
    return MicroBatch(
        rows=rows[kept],
        ids=ids,
        pixels=prepare.stack(pixels),
        skipped=skipped,
        step=step,
        offset=positions[0] if positions else len(rows),
        n_forget=sum(position < n_forget for position in kept),
        tokens=stack_tokens([text.tokens for text in texts], prepare.context_length),
        keys=[text.key for text in texts],
        views=None if views is None else np.array(seen, np.int64),
    )


def _load_rows(
    source: PairSource,
    rows: np.ndarray,
    prepare: Preparer,
    number: int,
    *,
    captions: Captions,
    batch_size: int,
) -> SweepBatch:
    kept: list[int] = []
    ids: list[str] = []
    pixels: list[Tensor] = []
    found: list[tuple[int, str]] = []
    tokens: dict[str, Tokens] = {}
    skipped: list[Skip] = []
    for row in rows[number * batch_size : (number + 1) * batch_size].tolist():
        try:
            record = _read(source, row, 0, row)
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


def _read(source: PairSource, row: int, seed: int, *position: int) -> Record:
    """Return a record; if the source is random, the global generators are seeded by position."""
    if source.stable:
        return source[row]
    with _seeded(seed, *position):
        return source[row]


@contextmanager
def _seeded(seed: int, *position: int) -> Iterator[None]:
    """Seed Python's, NumPy's and PyTorch's generators for the block; restore them afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    value = int(generator(seed, Stream.DATASET, *position).integers(2**32))
    random.seed(value)
    np.random.seed(value)
    # Not torch.manual_seed, which reseeds accelerators too.
    torch.random.default_generator.manual_seed(value)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class _LoadDataset(Dataset[Any]):
    """Maps a number to `load(number)`, or to the InputError that it raised."""

    def __init__(self, load: Callable[[int], Loaded]) -> None:
        self._load = load

    def __getitem__(self, number: int) -> Loaded | InputError:
        try:
            return self._load(number)
        # A value rather than an exception, which DataLoader would wrap in a worker's traceback.
        except InputError as error:
            return error


def _load(load: Callable[[int], Loaded], numbers: range, num_workers: int) -> Iterator[Any]:
    loader = DataLoader(
        _LoadDataset(load),
        batch_size=None,
        sampler=numbers,
        num_workers=num_workers,
        # A generator of its own; otherwise each loader would draw from the global one and change
        # Dropout.
        generator=torch.Generator(),
        worker_init_fn=_leave_signals_to_parent,
    )
    batches = iter(loader)
    try:
        for batch in batches:
            if isinstance(batch, InputError):
                raise batch
            yield batch
    finally:
        # The loader stops its workers when its last reference is dropped.
        del batches


def _leave_signals_to_parent(worker: int) -> None:
    """Ignore the signals that end a run, so that the main process can finish its step and save.

    A scheduler's SIGTERM and a terminal's Ctrl-C reach every process of the run. Only the first
    SIGTERM is ignored, so that the parent can still end a worker that hangs.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
