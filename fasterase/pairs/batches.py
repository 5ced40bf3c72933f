"""From draws to batches: micro-batches for training steps, and sweeps over a set.

Worker processes read the pairs and turn them into pixels and tokens. With `Prefixes`, a batch
begins with what frozen blocks output for it, and images whose output is cached are not read.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from fasterase.models.forward import Halfway
from fasterase.models.preprocessing import Tokens
from fasterase.pairs.items import Record
from fasterase.pairs.prepare import (
    PreparedText,
    Preparer,
    augment,
    hash_captions,
    is_plain,
    stack_tokens,
)
from fasterase.pairs.processes import load_parallel
from fasterase.pairs.sampler import Sampler
from fasterase.pairs.skips import BrokenPair, Skip
from fasterase.pairs.table import PairTable
from fasterase.parallel.ranks import ALONE, Ranks
from fasterase.seeds import Stream, generator
from fasterase.transfers import to_device

Captions = Literal["all", "first"]
# Pixels of a step that stay on the device: 7,000 images of 224 x 224; more are copied in each pass.
KEPT_BYTES = 2**30


@dataclass
class MicroBatch:
    """Some readable pairs, ready for the towers: part of a step, or rows of a sweep."""

    which: np.ndarray  # [n] number of each pair's source; in a step 0 is forget, which comes first
    rows: np.ndarray  # [n] int64, in that source
    ids: list[str]  # [n]
    # [n] int64, 0 for the image itself, -1 for a view made for this step alone, else the number of
    # a view that `Prefixes` caches
    views: np.ndarray
    captions: list[tuple[int, str]]  # (row, caption key) of all read, in order; in a step [n]
    # [k, 3, H, W] uint8, or float32 (normalised) where the transform does not split; with
    # `Prefixes`, what frozen blocks output for the n images
    pixels: Tensor | Halfway
    fresh: np.ndarray  # [k] int64, which of the n images were read: all but those of `Prefixes`
    tokens: Tokens | Halfway  # [m, L] of `new_keys`, or what frozen blocks output for them
    skipped: list[Skip]  # pairs that are broken
    step: int = 0  # counted from 0
    offset: int = 0  # place of its first pair in the whole step's draw, broken pairs included

    def __post_init__(self) -> None:
        # [m] captions; a sweep leaves out those that an earlier batch had.
        self.new_keys = self.keys

    @property
    def n_forget(self) -> int:
        return int((self.which == 0).sum())

    @property
    def keys(self) -> list[str]:
        """Identities of the captions."""
        return [key for _, key in self.captions]


@dataclass
class StepBatch:
    """A rank's readable pairs of one step; forget pairs come first.

    There is at least one micro-batch; none is empty unless the rank has no readable pair.
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

    @property
    def keys(self) -> list[str]:
        """[n] identities of the captions."""
        return [key for part in self.micro_batches for key in part.keys]

    @cached_property
    def labels(self) -> Tensor:
        """[n] int64, equal for equal captions, whatever step or process they are drawn in."""
        return torch.from_numpy(hash_captions(self.keys).astype(np.int64))

    @property
    def forget_rows(self) -> np.ndarray:
        """Rows of the forget pairs in their source."""
        return self._rows[: self.n_forget]

    @property
    def retain_rows(self) -> np.ndarray:
        """Rows of the retain pairs in their source."""
        return self._rows[self.n_forget :]

    @property
    def _rows(self) -> np.ndarray:
        return np.concatenate([part.rows for part in self.micro_batches])

    def move_pixels(self, device: torch.device) -> None:
        """Copy the pixels to an accelerator, once for all passes, if they are not too many."""
        if sum(part.pixels.nbytes for part in self.micro_batches) <= KEPT_BYTES:
            for part in self.micro_batches:
                part.pixels = to_device(part.pixels, device)


class Prefixes(Protocol):
    """Outputs of the frozen lower blocks of both towers, cached."""

    views: int  # of an image that is altered at random, how many are made and cached

    def has_images(self, source: PairTable, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Return for which images (n,) an output is cached, (n,) bool; see `MicroBatch.views`."""

    def images(self, batch: MicroBatch, sources: Sequence[PairTable]) -> Halfway:
        """Return the outputs for a batch of pixels, and cache those of images that were read."""

    def texts(self, keys: Sequence[str], tokens: Tokens) -> Halfway:
        """Return the outputs for captions, by their identities (m,) and tokens [m, L]."""


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
    prefixes: Prefixes | None = None,
    num_workers: int = 0,
    ranks: Ranks = ALONE,
) -> Iterator[StepBatch]:
    """Yield this rank's part of the batches of steps `first_step` to `last_step - 1`.

    It is a slice of the step's forget pairs and one of its retain pairs. The pairs and their
    augmentation are seeded by (seed, step, position in the step), whatever the number of workers or
    ranks and the micro-batch size. While an item of a source that is not stable is read, the
    generators of Python, NumPy and PyTorch are seeded alike, so that its own augmentation repeats.
    Workers load one micro-batch at a time.

    With `prefixes` (of stable sources), each forget image has as many views as it says, seeded by
    its row, and each step draws one.

    Raises:
        InputError: as `Preparer` does, also from inside a worker.
    """
    largest = sampler.max_pairs_per_rank(ranks.world_size)
    size = micro_batch_size or largest
    # The last part of a step may be empty: steps differ in size by one pair.
    parts = max(1, -(-largest // size))

    def requests() -> Iterator[_Request]:
        for step in range(first_step, last_step):
            draw = sampler.draw(step)
            n_forget = len(draw.forget)
            rows = np.concatenate([draw.forget, draw.retain])
            own = np.array(
                [*ranks.share(n_forget), *(n_forget + k for k in ranks.share(len(draw.retain)))],
                np.int64,
            )
            for start in range(0, parts * size, size):
                places = own[start : start + size]
                request = _Request(
                    (places >= n_forget).astype(np.int64),
                    rows[places],
                    draw.captions[places],
                    [(sampler.seed, step, place) for place in places.tolist()],
                    step,
                    int(places[0]) if len(places) else len(rows),
                )
                if augment_forget:
                    _choose_views(request, forget, 0 if prefixes is None else prefixes.views)
                yield request

    black = prepare.black_level() if augment_forget else None
    reader = _Reader((forget, retain), prepare, black)
    read = _read_all(reader, requests(), prefixes, num_workers, size, ranks.on_this_host)
    while loaded := list(islice(read, parts)):
        skipped = [skip for part in loaded for skip in part.skipped]
        readable = [part for part in loaded if part.ids] or loaded[:1]
        yield StepBatch(loaded[0].step, readable, skipped)


def sweep(
    source: PairTable,
    rows: Sequence[int] | np.ndarray,
    prepare: Preparer,
    *,
    captions: Captions,
    batch_size: int,
    num_workers: int = 0,
    prefixes: Prefixes | None = None,
    on_this_host: int = 1,
) -> Iterator[MicroBatch]:
    """Read distinct rows in the given order, with all their captions or the first one.

    `num_workers` processes load and decode; `prefixes` (see `MicroBatch`) need a stable source.
    """
    rows = np.asarray(rows, dtype=np.int64)

    def requests() -> Iterator[_Request]:
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            zeros = np.zeros(len(part), np.int64)
            seeds: list[tuple[int, ...]] = [(0, row) for row in part.tolist()]
            yield _Request(zeros, part, None if captions == "all" else zeros, seeds)

    reader, largest = _Reader((source,), prepare), min(batch_size, len(rows))
    return _read_all(
        reader, requests(), prefixes, num_workers, largest, on_this_host, distinct_captions=True
    )


@dataclass
class _Request:
    """Pairs to read; see `MicroBatch`."""

    which: np.ndarray
    rows: np.ndarray
    captions: np.ndarray | None  # [n] numbers of the captions wanted, see `Draw`; None for all
    # [n] seed and position of what is random of each pair: its view, and the reading of a source
    # that is not stable
    seeds: list[tuple[int, ...]]
    step: int = 0
    offset: int = 0

    def __post_init__(self) -> None:
        self.views = np.zeros(len(self.rows), np.int64)
        self.wanted = np.ones(len(self.rows), bool)  # whose images are read


def _choose_views(request: _Request, forget: PairTable, count: int) -> None:
    """Choose views of the forget images: for this step alone, or one of `count` of each row."""
    for place in np.flatnonzero(request.which == 0).tolist():
        if not count:
            request.views[place] = -1
            continue
        seed, *position = request.seeds[place]
        row = int(forget.base_rows(request.rows[place : place + 1])[0])
        view = int(generator(seed, Stream.AUGMENTATION, *position).integers(count))
        request.seeds[place] = (seed, row, view)
        if not is_plain(generator(seed, Stream.AUGMENTATION, row, view)):
            request.views[place] = view + 1


def _read_all(
    reader: _Reader,
    requests: Iterable[_Request],
    prefixes: Prefixes | None,
    num_workers: int,
    largest: int,  # pairs of a request
    on_this_host: int,
    *,
    distinct_captions: bool = False,  # give tokens of captions that no earlier batch had
) -> Iterator[MicroBatch]:
    """Yield what is read for each request, and begun by `prefixes` if given."""

    def without_cached() -> Iterator[_Request]:
        for request in requests:
            if prefixes is not None:
                for number, source in enumerate(reader.sources):
                    here = request.which == number
                    rows, views = request.rows[here], request.views[here]
                    request.wanted[here] = ~prefixes.has_images(source, rows, views)
            yield request

    seen: set[str] = set()
    item_bytes = largest * reader.prepare.image_bytes
    for batch in load_parallel(
        reader, without_cached(), num_workers, item_bytes=item_bytes, on_this_host=on_this_host
    ):
        if distinct_captions:
            places: dict[str, int] = {}
            for place, key in enumerate(batch.keys):
                if key not in seen:
                    seen.add(key)
                    places[key] = place
            batch.new_keys, batch.tokens = [*places], batch.tokens.index([*places.values()])
        if prefixes is not None and batch.ids:
            batch.pixels = prefixes.images(batch, reader.sources)
            batch.tokens = prefixes.texts(batch.new_keys, batch.tokens)
        yield batch


@dataclass(frozen=True)
class _Reader:
    """Reads requested pairs, in a worker process; `black`: see `augment`."""

    sources: tuple[PairTable, ...]
    prepare: Preparer
    black: Tensor | None = None

    def __call__(self, request: _Request) -> MicroBatch:
        places: list[int] = []
        ids: list[str] = []
        texts: list[tuple[int, PreparedText]] = []
        pixels: dict[int, Tensor] = {}
        skipped: list[Skip] = []
        for place, row in enumerate(request.rows.tolist()):
            try:
                record, image = self._read(request, place, row)
                captions = self._captions(request, place, record)
            except BrokenPair as broken:
                skipped.append(Skip(broken.id, broken.reason))
                continue
            if image is not None:
                pixels[len(places)] = image
            places.append(place)
            ids.append(record.id)
            texts += [(row, text) for text in captions]
        return MicroBatch(
            request.which[places],
            request.rows[places],
            ids,
            request.views[places],
            [(row, text.key) for row, text in texts],
            self.prepare.stack(list(pixels.values())),
            np.array(list(pixels), np.int64),
            stack_tokens([text.tokens for _, text in texts], self.prepare.context_length),
            skipped,
            request.step,
            request.offset,
        )

    def _read(self, request: _Request, place: int, row: int) -> tuple[Record, Tensor | None]:
        """Return a pair, and its pixels if wanted; raise `BrokenPair`."""
        source = self.sources[request.which[place]]
        if not request.wanted[place]:
            texts = source.texts(row)
            # Only the whole record has the mask of token ids.
            is_text = isinstance(texts, list)
            return (Record(None, texts, source.id(row)) if is_text else source[row]), None
        seed, *position = request.seeds[place]
        # A source that is random itself repeats, whatever the number of workers.
        with nullcontext() if source.stable else _seeded(seed, *position):
            record = source[row]
        image = self.prepare.image(record)
        if request.views[place]:
            numbers = generator(seed, Stream.AUGMENTATION, *position)
            image = augment(image, numbers, black=self.black)
        return record, image

    def _captions(self, request: _Request, place: int, record: Record) -> list[PreparedText]:
        if request.captions is not None:
            return [self.prepare.text(record, int(request.captions[place]))]
        count = len(record.text) if isinstance(record.text, list) else 1
        return [self.prepare.text(record, number) for number in range(count)]


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
