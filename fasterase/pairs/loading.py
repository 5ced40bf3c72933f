"""Reading of pairs, in parallel: what is drawn becomes pixels and tokens."""

from __future__ import annotations

import random
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fasterase.errors import InputError
from fasterase.pairs.augment import augment
from fasterase.pairs.items import Record
from fasterase.pairs.kept import Keeper, KnownText
from fasterase.pairs.prepare import Preparer
from fasterase.pairs.skips import BrokenPair, Skip
from fasterase.pairs.table import PairTable
from fasterase.seeds import Stream, generator


class Drawn(NamedTuple):
    """Some pairs, before they are read.

    Attributes:
        which: [n] the number of each pair's source.
        rows: [n] int64, in that source.
        captions: [n] the number of the caption that is wanted of each; None for all.
        seeds: [n] the seed and position that make up what is random of each pair: its view, and
            the reading of a source that is not stable.
        altered: [n] bool, whether the image is a view that `augment` makes.
        views: [n] int64, which of the views that are kept it is; 0 is the image itself.
    """

    which: np.ndarray
    rows: np.ndarray
    captions: np.ndarray | None
    seeds: Sequence[tuple[int, ...]]
    altered: np.ndarray
    views: np.ndarray


@dataclass
class Found:
    """What was read or is known of drawn pairs, without those that are broken.

    Attributes:
        places: [m] int64, where the pairs stood among those drawn.
        texts: [m] the wanted captions of each.
        skipped: the broken ones.
        fresh: [k] int64, which of the m images are not kept.
        pixels: [k, 3, H, W] of these.
    """

    places: np.ndarray
    texts: list[Sequence[KnownText]]
    skipped: list[Skip]
    fresh: np.ndarray
    pixels: Tensor


def read_pairs(
    drawn: Iterable[Drawn],
    sources: Sequence[PairTable],
    prepare: Preparer,
    *,
    keeper: Keeper | None = None,
    black: Tensor | None = None,
    num_workers: int = 0,
) -> Iterator[Found]:
    """Read drawn pairs; with a keeper, only what is not known of them.

    Args:
        drawn: the pairs, a batch at a time.
        sources: those that they are numbered by; with a keeper they are stable.
        prepare: records to pixels and tokens.
        keeper: what is kept. It must take in what was yielded before the next item is asked for;
            workers read ahead, and may then read an image again.
        black: see `augment`.
        num_workers: processes that read.
    """
    waiting: deque[Drawn] = deque()

    def requests() -> Iterator[_Request]:
        for pairs in drawn:
            waiting.append(pairs)
            yield _request(pairs, sources, keeper)

    read = partial(_read, tuple(sources), prepare, black)
    for answer in load_parallel(read, requests(), num_workers):
        yield _combine(waiting.popleft(), answer, sources, keeper)


class _Request(NamedTuple):
    """What is to be read of drawn pairs.

    Attributes:
        pairs: all of them.
        images, texts: [n] bool, what to read of each.
    """

    pairs: Drawn
    images: np.ndarray
    texts: np.ndarray


@dataclass
class _Answer:
    """What was read of drawn pairs.

    Attributes:
        places: [k] int64, whose images.
        pixels: [k, 3, H, W].
        found: place -> captions, or what is wrong with the pair.
    """

    places: np.ndarray
    pixels: Tensor
    found: dict[int, list[KnownText] | Skip]


def _request(pairs: Drawn, sources: Sequence[PairTable], keeper: Keeper | None) -> _Request:
    images, texts = (np.ones(len(pairs.rows), bool) for _ in range(2))
    if keeper is None:
        return _Request(pairs, images, texts)
    for number, source in enumerate(sources):
        here = pairs.which == number
        rows = pairs.rows[here]
        texts[here] = ~keeper.known.has(source, rows)
        broken = keeper.known.are_broken(source, rows)
        images[here] = ~(keeper.has_images(source, rows, pairs.views[here]) | broken)
    # All captions, since others of them are drawn later.
    return _Request(pairs._replace(captions=None), images, texts)


def _read(
    sources: Sequence[PairTable], prepare: Preparer, black: Tensor | None, request: _Request
) -> _Answer:
    pairs, wants_image, wants_texts = request
    places: list[int] = []
    pixels: list[Tensor] = []
    found: dict[int, list[KnownText] | Skip] = {}
    for place in np.flatnonzero(wants_image | wants_texts).tolist():
        source, row = sources[pairs.which[place]], int(pairs.rows[place])
        seed, *position = pairs.seeds[place]
        image = None
        try:
            if wants_image[place]:
                record = _read_record(source, row, seed, position)
                image = prepare.image(record)
            else:
                record = _without_image(source, row)
            if wants_texts[place]:
                captions = pairs.captions
                number = None if captions is None else int(captions[place])
                found[place] = _read_texts(record, prepare, number)
        except BrokenPair as broken:
            found[place] = Skip(broken.id, broken.reason)
            continue
        if image is not None:
            if pairs.altered[place]:
                numbers = generator(seed, Stream.AUGMENTATION, *position)
                image = augment(image, numbers, black=black)
            pixels.append(image)
            places.append(place)
    return _Answer(np.array(places, np.int64), prepare.stack(pixels), found)


def _read_record(source: PairTable, row: int, seed: int, position: Sequence[int]) -> Record:
    """Return a record; if the source is random, the global generators are seeded by position."""
    if source.stable:
        return source[row]
    with _seeded(seed, *position):
        return source[row]


def _without_image(source: PairTable, row: int) -> Record:
    texts = source.texts(row)
    # Only the whole record has the mask of token ids.
    return Record(None, texts, source.id(row)) if isinstance(texts, list) else source[row]


def _read_texts(record: Record, prepare: Preparer, number: int | None) -> list[KnownText]:
    """Return a caption of a record, or all of them."""
    count = len(record.text) if isinstance(record.text, list) else 1
    texts = [prepare.text(record, each) for each in (range(count) if number is None else (number,))]
    return [
        KnownText(
            text.key,
            text.tokens.ids.numpy().astype(np.int32),
            None if text.tokens.mask is None else text.tokens.mask.numpy().astype(np.uint8),
        )
        for text in texts
    ]


def _combine(
    pairs: Drawn, answer: _Answer, sources: Sequence[PairTable], keeper: Keeper | None
) -> Found:
    every: dict[int, Sequence[KnownText] | Skip] = dict(answer.found)
    if keeper is not None:
        for place, read in answer.found.items():
            keeper.known.learn(sources[pairs.which[place]], int(pairs.rows[place]), read)
        for number, source in enumerate(sources):
            here = np.flatnonzero(pairs.which == number)
            known = keeper.known.get(source, pairs.rows[here])
            every |= zip(here.tolist(), known, strict=True)
    texts, skipped, places = [], [], []
    for place in range(len(pairs.rows)):
        found = every[place]
        if isinstance(found, Skip):
            skipped.append(found)
            continue
        places.append(place)
        if pairs.captions is not None:
            found = (found[int(pairs.captions[place]) % len(found)],)
        texts.append(found)
    kept = np.array(places, np.int64)
    used = np.isin(answer.places, kept)
    pixels = answer.pixels if used.all() else answer.pixels[torch.from_numpy(used)]
    return Found(kept, texts, skipped, np.searchsorted(kept, answer.places[used]), pixels)


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
    """Maps a request to `load(request)`, or to the InputError that it raised."""

    def __init__(self, load: Callable[[Any], Any]) -> None:
        self._load = load

    def __getitem__(self, request: Any) -> Any:
        try:
            return self._load(request)
        # A value rather than an exception, which DataLoader would wrap in a worker's traceback.
        except InputError as error:
            return error


def load_parallel(
    load: Callable[[Any], Any], requests: Iterable[Any], num_workers: int
) -> Iterator[Any]:
    """Yield `load(request)` for each request, in order.

    Args:
        load: picklable if there are workers; an `InputError` that it raises ends the loop.
        requests: made as they are asked for, a few ahead of the results if there are workers.
        num_workers: processes that load; 0: this one.
    """
    loader = DataLoader(
        _LoadDataset(load),
        batch_size=None,
        sampler=requests,
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
