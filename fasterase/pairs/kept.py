"""Pairs of which something is kept, so that they need not be read again.

Where the frozen lower blocks of a model run once per pair, their outputs take the place of pixels:
of a pair that is kept no image is opened, and no caption tokenised a second time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fasterase.models.preprocessing import Tokens
from fasterase.pairs.augment import augment, is_plain
from fasterase.pairs.items import Record
from fasterase.pairs.loading import load_parallel
from fasterase.pairs.prepare import Preparer, stack_tokens
from fasterase.pairs.skips import BrokenPair, Skip
from fasterase.pairs.table import PairTable
from fasterase.seeds import Stream, generator


class KnownText(NamedTuple):
    """One caption.

    Attributes:
        key: see `caption_key`.
        ids: [L] int32.
        mask: [L] uint8, or None.
    """

    key: str
    ids: np.ndarray
    mask: np.ndarray | None


class KnownPairs:
    """The captions of pairs that were read, and which pairs are broken; some 2 KB for each pair.

    Views of one source share its pairs.
    """

    def __init__(self) -> None:
        self._texts: dict[str, KnownText] = {}
        self._pairs: dict[PairTable, dict[int, tuple[KnownText, ...] | Skip]] = {}

    def has(self, source: PairTable, rows: np.ndarray) -> np.ndarray:
        """Return which of `rows` (n,) were read, (n,) bool."""
        pairs = self._of(source)
        keys = source.base_rows(rows).tolist()
        return np.fromiter((key in pairs for key in keys), bool, len(keys))

    def are_broken(self, source: PairTable, rows: np.ndarray) -> np.ndarray:
        """Return which of `rows` (n,) were read and are broken, (n,) bool."""
        pairs = self._of(source)
        keys = source.base_rows(rows).tolist()
        return np.fromiter((isinstance(pairs.get(key), Skip) for key in keys), bool, len(keys))

    def learn(self, source: PairTable, row: int, found: Sequence[KnownText] | Skip) -> None:
        """Take note of all captions of a pair, or of what is wrong with it."""
        if not isinstance(found, Skip):
            found = tuple(self._texts.setdefault(text.key, text) for text in found)
        self._of(source)[int(source.base_rows(np.array([row]))[0])] = found

    def get(self, source: PairTable, rows: np.ndarray) -> list[tuple[KnownText, ...] | Skip]:
        """Return what `learn` was told of `rows` (n,)."""
        pairs = self._of(source)
        return [pairs[key] for key in source.base_rows(rows).tolist()]

    def _of(self, source: PairTable) -> dict[int, tuple[KnownText, ...] | Skip]:
        return self._pairs.setdefault(source.base, {})


class Keeper(Protocol):
    """Keeps outputs for images.

    Attributes:
        known: the captions of the pairs that were read.
        views: of an image that is altered at random, how many are made and kept.
    """

    known: KnownPairs
    views: int

    def has_images(self, source: PairTable, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Return for which images (n,) an output is kept, (n,) bool; see `DrawnPairs`."""
        ...


class DrawnPairs(NamedTuple):
    """Some pairs, before they are read.

    Attributes:
        which: [n] the number of each pair's source.
        rows: [n] int64, in that source.
        views: [n] int64, which view of the image: 0 is the image itself.
    """

    which: np.ndarray
    rows: np.ndarray
    views: np.ndarray


@dataclass
class KeptPairs:
    """What is known of drawn pairs, without those that are broken.

    Attributes:
        places: [m] int64, where the pairs stood among those drawn.
        texts: [m] all captions of each.
        skipped: the broken ones.
        fresh: [k] int64, which of the m images are not kept.
        pixels: [k, 3, H, W] of these.
    """

    places: np.ndarray
    texts: list[tuple[KnownText, ...]]
    skipped: list[Skip]
    fresh: np.ndarray
    pixels: Tensor


def draw_views(
    source: PairTable, rows: np.ndarray, numbers: Sequence[np.random.Generator], count: int, *,
    seed: int,
) -> np.ndarray:  # fmt: skip
    """Return which view of each image a step takes, [n] int64, 0 for the image itself.

    Args:
        source: of the images.
        rows: [n].
        numbers: [n] which draw one of the views.
        count: views of each image, seeded by its row.
        seed: of the views.
    """
    views = np.array([int(each.integers(count)) for each in numbers], np.int64)
    plain = [
        is_plain(_of_view(seed, row, view + 1))
        for row, view in zip(source.base_rows(rows).tolist(), views.tolist(), strict=True)
    ]
    return np.where(np.array(plain, bool), 0, views + 1)


def read_missing(
    drawn: Iterable[DrawnPairs],
    sources: Sequence[PairTable],
    prepare: Preparer,
    keeper: Keeper,
    *,
    seed: int = 0,
    black: Tensor | None = None,
    num_workers: int = 0,
) -> Iterator[KeptPairs]:
    """Read what is not known of drawn pairs, and yield all that is.

    Args:
        drawn: the pairs, a batch at a time.
        sources: those that they are numbered by, which give the same pair at every read.
        prepare: records to pixels and tokens.
        keeper: what is kept. It must take in what was yielded before the next item is asked for;
            workers read ahead, and may then read an image again.
        seed: of views.
        black: see `augment`.
        num_workers: processes that read.
    """
    waiting: deque[DrawnPairs] = deque()

    def requests() -> Iterator[_Request]:
        for pairs in drawn:
            waiting.append(pairs)
            yield _request(pairs, sources, keeper)

    read = partial(_read, tuple(sources), prepare, seed=seed, black=black)
    for answer in load_parallel(read, requests(), num_workers):
        pairs = waiting.popleft()
        for place, found in answer.found.items():
            keeper.known.learn(sources[pairs.which[place]], int(pairs.rows[place]), found)
        yield _combine(pairs, answer, sources, keeper.known)


def stack_known(texts: Sequence[KnownText], context_length: int) -> Tokens:
    """Return the tokens of captions, as `stack_tokens` does."""
    rows = [
        Tokens(
            torch.from_numpy(text.ids).long(),
            None if text.mask is None else torch.from_numpy(text.mask).long(),
        )
        for text in texts
    ]
    return stack_tokens(rows, context_length)


class _Request(NamedTuple):
    """What is to be read of drawn pairs.

    Attributes:
        pairs: all of them.
        images, texts: [n] bool, what to read of each.
    """

    pairs: DrawnPairs
    images: np.ndarray
    texts: np.ndarray


@dataclass
class _Answer:
    """What was read of drawn pairs.

    Attributes:
        places: [k] int64, whose images.
        pixels: [k, 3, H, W].
        found: place -> all captions, or what is wrong with the pair.
    """

    places: np.ndarray
    pixels: Tensor
    found: dict[int, list[KnownText] | Skip]


def _request(pairs: DrawnPairs, sources: Sequence[PairTable], keeper: Keeper) -> _Request:
    images, texts = (np.zeros(len(pairs.rows), bool) for _ in range(2))
    for number, source in enumerate(sources):
        here = pairs.which == number
        rows = pairs.rows[here]
        texts[here] = ~keeper.known.has(source, rows)
        broken = keeper.known.are_broken(source, rows)
        images[here] = ~(keeper.has_images(source, rows, pairs.views[here]) | broken)
    return _Request(pairs, images, texts)


def _read(
    sources: Sequence[PairTable],
    prepare: Preparer,
    request: _Request,
    *,
    seed: int,
    black: Tensor | None,
) -> _Answer:
    which, rows, views = request.pairs
    places: list[int] = []
    pixels: list[Tensor] = []
    found: dict[int, list[KnownText] | Skip] = {}
    for place in np.flatnonzero(request.images | request.texts).tolist():
        source, row, view = sources[which[place]], int(rows[place]), int(views[place])
        try:
            record = source[row] if request.images[place] else _without_image(source, row)
            if request.texts[place]:
                found[place] = _read_texts(record, prepare)
            if request.images[place]:
                image = prepare.image(record)
                if view:
                    base = int(source.base_rows(np.array([row]))[0])
                    image = augment(image, _of_view(seed, base, view), black=black)
                pixels.append(image)
                places.append(place)
        except BrokenPair as broken:
            found[place] = Skip(broken.id, broken.reason)
    return _Answer(np.array(places, np.int64), prepare.stack(pixels), found)


def _without_image(source: PairTable, row: int) -> Record:
    texts = source.texts(row)
    # Only the whole record has the mask of token ids.
    return Record(None, texts, source.id(row)) if isinstance(texts, list) else source[row]


def _read_texts(record: Record, prepare: Preparer) -> list[KnownText]:
    count = len(record.text) if isinstance(record.text, list) else 1
    texts = [prepare.text(record, number) for number in range(count)]
    return [
        KnownText(
            text.key,
            text.tokens.ids.numpy().astype(np.int32),
            None if text.tokens.mask is None else text.tokens.mask.numpy().astype(np.uint8),
        )
        for text in texts
    ]


def _of_view(seed: int, row: int, view: int) -> np.random.Generator:
    """Return the numbers that make a view, counted from 1, of an image."""
    return generator(seed, Stream.AUGMENTATION, row, view - 1)


def _combine(
    pairs: DrawnPairs, answer: _Answer, sources: Sequence[PairTable], known: KnownPairs
) -> KeptPairs:
    every: list[tuple[KnownText, ...] | Skip] = [()] * len(pairs.rows)
    for number, source in enumerate(sources):
        here = np.flatnonzero(pairs.which == number)
        for place, found in zip(here.tolist(), known.get(source, pairs.rows[here]), strict=True):
            every[place] = found
    readable = np.array([not isinstance(found, Skip) for found in every], bool)
    places = np.flatnonzero(readable)
    used = readable[answer.places]
    return KeptPairs(
        places,
        [found for found in every if not isinstance(found, Skip)],
        [found for found in every if isinstance(found, Skip)],
        np.searchsorted(places, answer.places[used]),
        answer.pixels[torch.from_numpy(used)],
    )
