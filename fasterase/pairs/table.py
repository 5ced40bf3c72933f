"""`PairTable`: image-text pairs as rows, whatever they were read from, and views of them."""

from __future__ import annotations

import copy
import hashlib
import json
import operator
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import compress
from typing import Any, TypeVar, overload

import numpy as np
from torch import Tensor

from fasterase.pairs.images import Images, decode_image
from fasterase.pairs.items import Record
from fasterase.pairs.parts import Part, Parts
from fasterase.pairs.skips import BrokenPair

T = TypeVar("T")


class PairTable(Sequence[Record]):
    """Pairs in rows: id, captions, where the image is, other data. A sequence of `Record`s.

    The rows are Arrow record batches (`Part`). `select`, `where` and slices give views: rows of
    the same table in another order, of which nothing is copied. Negative rows count from the end.

    Args:
        parts: the rows; their columns are `id`, `captions` and perhaps `metadata` (JSON).
        images: reads the encoded images; None if they are held or made decoded.

    Attributes:
        name: the argument it was given as (`"forget"`, `"retain"`, ...), for messages.
        origin: what it was read from, in a few words, such as the name of a file.
        stable: whether row i is the same on every read. False for a dataset with random
            augmentation.
        classes: class names if the source has them (class-per-folder), else None.
        in_memory: whether the images are held decoded in memory, so that reading all is cheap.
        indices: [n] int64, the rows of `base` that a view shows; None if it is no view.
        broken: row of `base` -> why it cannot be read, where more is known than what is missing.
    """

    name: str
    origin: str | None = None
    stable: bool = True
    classes: list[str] | None = None
    in_memory: bool = False
    indices: np.ndarray | None = None
    images: Images | None = None
    _base: PairTable | None = None

    def __init__(
        self,
        name: str,
        parts: Sequence[Part],
        images: Images,
        *,
        classes: list[str] | None = None,
        broken: dict[int, str] | None = None,
    ) -> None:
        self.name = name
        self.parts = Parts(parts)
        self.images = images
        self.classes = classes
        self.broken = broken or {}

    def __repr__(self) -> str:
        origin = "" if self.base.origin is None else f" of {self.base.origin}"
        whole = "" if self.indices is None else f" of {len(self.base):,}"
        return f"{self.name} pairs: {len(self):,}{whole}{origin}"

    @property
    def base(self) -> PairTable:
        """The table that this is a view of; itself if it is none."""
        return self if self._base is None else self._base

    def base_rows(self, rows: np.ndarray) -> np.ndarray:
        """Return `rows` (n,) as rows of `base`."""
        return rows if self.indices is None else self.indices[rows]

    def select(self, rows: Sequence[int] | np.ndarray, *, name: str | None = None) -> PairTable:
        """Return a view of some rows, in the given order."""
        rows = np.asarray(rows, dtype=np.int64)
        view = copy.copy(self)
        view._base = self.base
        view.indices = self.base_rows(rows)
        view.name = self.name if name is None else name
        return view

    def where(self, mask: np.ndarray, *, name: str | None = None) -> PairTable:
        """Return a view of the rows for which `mask` ([n] bool) is true."""
        return self.select(np.flatnonzero(mask), name=name)

    def __len__(self) -> int:
        return self._count() if self.indices is None else len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> PairTable: ...
    def __getitem__(self, index: int | slice) -> Record | PairTable:
        """Decode a pair; raise `BrokenPair` if its image or caption cannot be read."""
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        return self._record(self._row(index))

    def id(self, index: int) -> str:
        """Return the pair's id without decoding the image."""
        return self._id(self._row(index))

    def texts(self, index: int) -> list[str] | Tensor:
        """Return all captions, or token ids [L], if possible without decoding the image.

        Raises:
            BrokenPair: there are none.
        """
        return self._texts(self._row(index))

    def meta(self, index: int) -> dict[str, Any]:
        """Return other data of the pair; see `Record.meta`."""
        return self._meta(self._row(index))

    def every_id(self) -> Iterator[str]:
        """Yield the ids of all pairs in order."""
        return self._every(self._every_id, self._id)

    def every_text(self) -> Iterator[list[str] | Tensor]:
        """Yield what `texts` returns for all pairs in order; an empty list for a broken pair."""
        return self._every(self._every_text, self._texts_or_none)

    def caption_hashes(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the hash (see `hash_captions`) and the row of each caption, both [m] int64.

        Rows are in order; pairs without a readable caption have none.
        """
        hashes, rows = self._caption_hashes()
        if self.indices is None:
            return hashes, rows
        first = np.searchsorted(rows, self.indices)
        counts = np.searchsorted(rows, self.indices, side="right") - first
        before = np.cumsum(counts) - counts
        at = np.arange(counts.sum()) + np.repeat(first - before, counts)
        return hashes[at], np.repeat(np.arange(len(self)), counts)

    def digest(self) -> str:
        """Return a hex digest of ids, sizes and captions, by which caches recognise the data."""
        if self.indices is None:
            return self.base._digest
        digest = hashlib.blake2b(self.base._digest.encode(), digest_size=16)
        digest.update(self.indices.tobytes())
        return digest.hexdigest()

    def shards(self) -> np.ndarray | None:
        """Return the number of each pair's shard, [n] int32, if shards are fetched whole.

        None if any pair is as quickly read as the next.
        """
        shards = self._shards()
        return None if shards is None else self._of_rows(shards)

    def encoded_sizes(self) -> np.ndarray | None:
        """Return the bytes of each encoded image, [n] int64, -1 if missing; None if decoded."""
        return None if self.images is None else self._of_rows(self.base._sizes)

    def encoded_image(self, index: int) -> bytes:
        """Return the bytes of the image file. Only if `encoded_sizes` is not None."""
        return self._image(self._row(index))

    def encoded_location(self, index: int) -> str:
        """Return what identifies those bytes: the resolved path, and the position in a tar."""
        assert self.images is not None
        row = self._row(index)
        return self.images.location(row, self._id(row))

    def _row(self, index: int) -> int:
        """Return the row of `base`; raise IndexError outside the length."""
        row = range(len(self))[operator.index(index)]
        return row if self.indices is None else int(self.indices[row])

    def _of_rows(self, column: np.ndarray) -> np.ndarray:
        """Return the values of a column of `base` for the rows of this view."""
        return column if self.indices is None else column[self.indices]

    def _every(self, every: Callable[[], Iterator[T]], one: Callable[[int], T]) -> Iterator[T]:
        """Yield the value of each row: of few, or in another order, one by one."""
        if self.indices is None:
            return every()
        if 8 * len(self.indices) < self._count() or (np.diff(self.indices) <= 0).any():
            return map(one, self.indices.tolist())
        chosen = np.zeros(self._count(), bool)
        chosen[self.indices] = True
        return compress(every(), chosen.tolist())

    # What follows takes rows of `base`, and reads the columns.

    def _count(self) -> int:
        return self.parts.starts[-1]

    def _find(self, row: int) -> tuple[Part, int]:
        number, at = self.parts.find(row)
        return self.parts.every[number], at

    def _id(self, row: int) -> str:
        part, at = self._find(row)
        return part.string("id", at)

    def _texts(self, row: int) -> list[str] | Tensor:
        part, at = self._find(row)
        captions = part.value("captions", at)
        if not captions:
            raise BrokenPair(self._id(row), self.broken.get(row, "no readable caption"))
        return captions

    def _texts_or_none(self, row: int) -> list[str] | Tensor:
        try:
            return self._texts(row)
        except BrokenPair:
            return []

    def _meta(self, row: int) -> dict[str, Any]:
        part, at = self._find(row)
        return json.loads(part.string("metadata", at) or "{}")

    def _image(self, row: int) -> bytes:
        assert self.images is not None
        return self.images.read(row, self._id(row))

    def _record(self, row: int) -> Record:
        captions, id = self._texts(row), self._id(row)
        image = decode_image(self._image(row), id=id)
        return Record(
            image, captions[0] if len(captions) == 1 else captions, id, meta=self._meta(row)
        )

    def _every_id(self) -> Iterator[str]:
        for part in self.parts.every:
            yield from part.every_id()

    def _every_text(self) -> Iterator[list[str] | Tensor]:
        for part in self.parts.every:
            yield from part.every_captions()

    def _caption_hashes(self) -> tuple[np.ndarray, np.ndarray]:
        found = [part.caption_hashes() for part in self.parts.every]
        rows = [start + rows for start, (_, rows) in zip(self.parts.starts, found, strict=False)]
        return np.concatenate([hashes for hashes, _ in found]), np.concatenate(rows)

    @cached_property
    def _digest(self) -> str:
        parts = "".join(part.digest() for part in self.parts.every).encode()
        return hashlib.blake2b(parts + self._sizes.tobytes(), digest_size=16).hexdigest()

    def _shards(self) -> np.ndarray | None:
        return None

    @cached_property
    def _sizes(self) -> np.ndarray:
        assert self.images is not None
        return self.images.sizes(self._every_id())
