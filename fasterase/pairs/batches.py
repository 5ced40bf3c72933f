"""Batches for training steps and for sweeps over a set, loaded in parallel."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fasterase.errors import InputError
from fasterase.models.dual_encoder import Tokens
from fasterase.pairs.augment import augment as augmented
from fasterase.pairs.prepare import PreparedText, Preparer, stack_tokens
from fasterase.pairs.sampler import Draw, Sampler
from fasterase.pairs.skips import BrokenPair, Skip, SkipLedger
from fasterase.pairs.source import PairSource

__all__ = ["Draw", "Sampler", "SkipLedger", "StepBatch", "SweepBatch", "step_batches", "sweep"]


@dataclass
class StepBatch:
    """The pairs of one step, forget pairs first, broken ones left out.

    Attributes:
        step: counted from 0.
        pixels: [n, 3, H, W] float32.
        tokens: ids [n, L].
        n_forget: how many of the n are forget pairs.
        labels: [n] int64, equal for equal captions.
        keys: the captions' identities behind `labels`, [n].
        ids: the pairs' ids, [n].
        forget_rows, retain_rows: their rows in the two sources.
        forget_captions, retain_captions: which of a row's captions is in the batch.
        skipped: pairs that were drawn and are broken.
    """

    step: int
    pixels: Tensor
    tokens: Tokens
    n_forget: int
    labels: Tensor
    keys: list[str]
    ids: list[str]
    forget_rows: np.ndarray
    retain_rows: np.ndarray
    forget_captions: np.ndarray
    retain_captions: np.ndarray
    skipped: list[Skip]


@dataclass
class SweepBatch:
    """Some rows of a source, not augmented, broken ones left out.

    Attributes:
        rows: [n] int64.
        ids: [n].
        pixels: [n, 3, H, W] float32.
        captions: (row, caption index, caption key) of every caption asked for.
        new_keys: keys that no batch before this one had; their texts are in `tokens`.
        tokens: ids [len(new_keys), L].
        skipped: rows that are broken.
    """

    rows: np.ndarray
    ids: list[str]
    pixels: Tensor
    captions: list[tuple[int, int, str]]
    new_keys: list[str]
    tokens: Tokens
    skipped: list[Skip]


def step_batches(
    forget: PairSource,
    retain: PairSource,
    sampler: Sampler,
    prepare: Preparer,
    *,
    first_step: int,
    last_step: int,
    augment: bool,
    seed: int,
    num_workers: int = 0,
) -> Iterator[StepBatch]:
    """Batches of steps `first_step` to `last_step - 1`, the same for any number of workers.

    Augmentation of forget images is seeded by (seed, step, position). Where a source is not stable
    its own random numbers (Python's, NumPy's and PyTorch's) are seeded by (seed, step) while it is
    read, so that its augmentation repeats too.

    Raises:
        InputError: as `Preparer` does, also out of a worker.
    """
    steps = _Steps(forget, retain, sampler, prepare, augment=augment, seed=seed)
    yield from _load(steps, range(first_step, last_step), num_workers)


def sweep(
    source: PairSource,
    rows: Sequence[int] | np.ndarray,
    caption_rows: np.ndarray | None,
    prepare: Preparer,
    *,
    batch_size: int,
    num_workers: int = 0,
) -> Iterator[SweepBatch]:
    """Read rows once each, in the given order, with the captions that are wanted of them.

    Args:
        rows: distinct rows.
        caption_rows: [m, 2] int64 of (row, caption index), every row among `rows`; None for all
            captions of each row.
        batch_size: rows a batch.
    """
    wanted: dict[int, list[int]] | None = None
    if caption_rows is not None:
        wanted = {}
        for row, caption in np.asarray(caption_rows, dtype=np.int64).reshape(-1, 2).tolist():
            wanted.setdefault(row, []).append(caption)
    chunks = _Rows(source, np.asarray(rows, dtype=np.int64), wanted, prepare, batch_size)
    seen: set[str] = set()
    for batch in _load(chunks, range(len(chunks)), num_workers):
        fresh = [i for i, key in enumerate(batch.new_keys) if key not in seen]
        if len(fresh) < len(batch.new_keys):
            mask = batch.tokens.mask
            batch.tokens = Tokens(batch.tokens.ids[fresh], None if mask is None else mask[fresh])
            batch.new_keys = [batch.new_keys[i] for i in fresh]
        seen.update(batch.new_keys)
        yield batch


class _Steps(Dataset[Any]):
    """Step -> StepBatch, or the InputError that making it met."""

    def __init__(
        self,
        forget: PairSource,
        retain: PairSource,
        sampler: Sampler,
        prepare: Preparer,
        *,
        augment: bool,
        seed: int,
    ) -> None:
        self._sources = (forget, retain)
        self._sampler = sampler
        self._prepare = prepare
        self._augment = augment
        self._seed = seed
        self._black: Tensor | None = None
        if augment and prepare.image_transform is not None:
            self._black = _black_level(prepare)

    def __getitem__(self, step: int) -> StepBatch | InputError:
        try:
            return self._batch(step)
        except InputError as error:
            return error

    def _batch(self, step: int) -> StepBatch:
        draw = self._sampler.draw(step)
        pixels: list[Tensor] = []
        texts: list[PreparedText] = []
        ids: list[str] = []
        skipped: list[Skip] = []
        kept: tuple[list[int], list[int]] = ([], [])
        sets = ((draw.forget, draw.forget_captions), (draw.retain, draw.retain_captions))
        with _seeded(self._seed, step, needed=not all(s.stable for s in self._sources)):
            for which, (rows, captions) in enumerate(sets):
                source = self._sources[which]
                for position, (row, caption) in enumerate(zip(rows, captions, strict=True)):
                    try:
                        record = source[int(row)]
                        image, text = self._prepare(record, int(caption))
                    except BrokenPair as broken:
                        skipped.append(Skip(broken.id, broken.reason))
                        continue
                    if which == 0 and self._augment:
                        generator = np.random.default_rng([self._seed, 3, step, position])
                        image = augmented(image, generator, black=self._black)
                    pixels.append(image)
                    texts.append(text)
                    ids.append(record.id)
                    kept[which].append(position)
        chosen = np.array([text.caption for text in texts], dtype=np.int64)
        n_forget = len(kept[0])
        return StepBatch(
            step=step,
            pixels=_stack(pixels, self._prepare.image_size),
            tokens=stack_tokens([t.tokens for t in texts], self._prepare.context_length),
            n_forget=n_forget,
            labels=_labels([text.key for text in texts]),
            keys=[text.key for text in texts],
            ids=ids,
            forget_rows=draw.forget[kept[0]],
            retain_rows=draw.retain[kept[1]],
            forget_captions=chosen[:n_forget],
            retain_captions=chosen[n_forget:],
            skipped=skipped,
        )


class _Rows(Dataset[Any]):
    """Chunk number -> SweepBatch, or the InputError that making it met."""

    def __init__(
        self,
        source: PairSource,
        rows: np.ndarray,
        wanted: dict[int, list[int]] | None,
        prepare: Preparer,
        batch_size: int,
    ) -> None:
        self._source = source
        self._rows = rows
        self._wanted = wanted
        self._prepare = prepare
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self._rows) // self._batch_size)

    def __getitem__(self, chunk: int) -> SweepBatch | InputError:
        try:
            with _seeded(0, chunk, needed=not self._source.stable):
                return self._batch(chunk)
        except InputError as error:
            return error

    def _batch(self, chunk: int) -> SweepBatch:
        rows = self._rows[chunk * self._batch_size : (chunk + 1) * self._batch_size]
        kept: list[int] = []
        ids: list[str] = []
        pixels: list[Tensor] = []
        captions: list[tuple[int, int, str]] = []
        tokens: dict[str, Tokens] = {}
        skipped: list[Skip] = []
        for row in rows.tolist():
            try:
                record = self._source[row]
                image = self._prepare.image(record)
            except BrokenPair as broken:
                skipped.append(Skip(broken.id, broken.reason))
                continue
            count = len(record.text) if isinstance(record.text, list) else 1
            chosen = range(count) if self._wanted is None else self._wanted.get(row, [])
            for caption in chosen:
                text = self._prepare.text(record, caption)
                captions.append((row, text.caption, text.key))
                tokens[text.key] = text.tokens
            kept.append(row)
            ids.append(record.id)
            pixels.append(image)
        return SweepBatch(
            rows=np.array(kept, dtype=np.int64),
            ids=ids,
            pixels=_stack(pixels, self._prepare.image_size),
            captions=captions,
            new_keys=list(tokens),
            tokens=stack_tokens(list(tokens.values()), self._prepare.context_length),
            skipped=skipped,
        )


def _load(dataset: Dataset[Any], order: range, num_workers: int) -> Iterator[Any]:
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=order,
        num_workers=num_workers,
        # Its own, or every loader would take a number from the global one and change Dropout.
        generator=torch.Generator(),
        worker_init_fn=_leave_signals_to_parent,
    )
    batches = iter(loader)
    try:
        for batch in batches:
            # A value rather than an exception, which DataLoader would wrap in a worker's traceback.
            if isinstance(batch, InputError):
                raise batch
            yield batch
    finally:
        # Drops the last reference, on which the loader ends its workers.
        del batches


def _leave_signals_to_parent(worker: int) -> None:
    """A scheduler's SIGTERM and a terminal's Ctrl-C reach every process of the run. A worker that
    died of one would fail the step that the main process wants to finish and save.

    Only the first SIGTERM is passed over, so that the parent can still end a worker that hangs.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _stack(pixels: list[Tensor], image_size: tuple[int, int]) -> Tensor:
    return torch.stack(pixels) if pixels else torch.empty(0, 3, *image_size)


def _labels(keys: list[str]) -> Tensor:
    """Numbers in order of first appearance, equal for equal keys."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys], dtype=torch.long)


def _black_level(prepare: Preparer) -> Tensor:
    """What preprocessing makes of a black picture, [3]."""
    assert prepare.image_transform is not None
    height, width = prepare.image_size
    return prepare.image_transform(Image.new("RGB", (width, height))).amin(dim=(1, 2))


@contextmanager
def _seeded(seed: int, step: int, *, needed: bool) -> Iterator[None]:
    """Seed the global random generators for the block and put them back after it."""
    if not needed:
        yield
        return
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    value = int(np.random.SeedSequence([seed, 4, step]).generate_state(1)[0])
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
