"""`PairSource`: random access to image-text pairs, whatever they were read from."""

from __future__ import annotations

import abc
import hashlib
import io
import json
import operator
import os
import warnings
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fasterase.pairs.skips import BrokenPair

Item = TypeVar("Item")


class Record(tuple[Any, Any]):
    """A decoded pair: a tuple `(image, text)` that also knows where it comes from.

    Attributes:
        image: PIL image, uint8 tensor [3, H, W], or float tensor [3, H, W] (already preprocessed).
        text: a caption, a list of alternative captions, or token ids [L] int64.
        id: stable and readable: a file path, `shard.tar/key`, or `forget[12]`.
        mask: attention mask [L] that came with the token ids.
        meta: other data of the pair: the json entry of a tar sample, the other columns of a table
            row, or `{"class": name}` for a class-per-folder image.
    """

    id: str
    mask: Tensor | None
    meta: dict[str, Any]

    def __new__(
        cls,
        image: Any,
        text: Any,
        id: str,
        mask: Tensor | None = None,
        meta: dict[str, Any] | None = None,
    ) -> Record:
        record = super().__new__(cls, (image, text))
        record.id = id
        record.mask = mask
        record.meta = {} if meta is None else meta
        return record

    def __getnewargs__(self) -> tuple[Any, ...]:
        return self.image, self.text, self.id, self.mask, self.meta

    def __repr__(self) -> str:
        return f"Record(image={self.image!r}, text={self.text!r}, id={self.id!r})"

    @property
    def image(self) -> Any:
        return self[0]

    @property
    def text(self) -> Any:
        return self[1]


class PairSource(abc.ABC):
    """Random access to pairs.

    Attributes:
        name: the argument it was given as (`"forget"`, `"retain"`, ...), for messages.
        origin: what it was read from, in a few words, such as the name of a file.
        stable: whether item i is the same on every read. False for a dataset with random
            augmentation.
        classes: class names if the source has them (class-per-folder), else None.
        in_memory: whether the images are held decoded in memory, so that reading all is cheap.
    """

    name: str
    origin: str | None = None
    stable: bool = True
    classes: list[str] | None = None
    in_memory: bool = False

    def __repr__(self) -> str:
        origin = "" if self.origin is None else f" of {self.origin}"
        return f"{self.name} pairs: {len(self):,}{origin}"

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Record:
        """Decode a pair; raise `BrokenPair` if its image or caption cannot be read."""

    @abc.abstractmethod
    def id(self, index: int) -> str:
        """Return the pair's id without decoding the image."""

    @abc.abstractmethod
    def texts(self, index: int) -> list[str] | Tensor:
        """Return all captions, or token ids [L], if possible without decoding the image."""

    @abc.abstractmethod
    def meta(self, index: int) -> dict[str, Any]:
        """Return other data of the pair; see `Record.meta`."""

    @abc.abstractmethod
    def manifest(self) -> str:
        """Return a hex digest of names, sizes and captions, by which caches recognise the data."""

    def every_id(self) -> Iterator[str]:
        """Yield the ids of all pairs in order."""
        return map(self.id, range(len(self)))

    def every_text(self) -> Iterator[list[str] | Tensor]:
        """Yield what `texts` returns for all pairs in order; an empty list for a broken pair."""
        for index in range(len(self)):
            try:
                yield self.texts(index)
            except BrokenPair:
                yield []

    def shards(self) -> np.ndarray | None:
        """Return the number of each pair's shard, [n] int32, if shards are fetched whole.

        None if any pair is as quickly read as the next.
        """
        return None

    def encoded_sizes(self) -> np.ndarray | None:
        """Return the bytes of each encoded image, [n] int64, -1 if missing; None if decoded."""
        return None

    def encoded_image(self, index: int) -> bytes:
        """Return the bytes of the image file. Only if `encoded_sizes` is not None."""
        raise NotImplementedError

    def encoded_location(self, index: int) -> str:
        """Return what identifies those bytes: the resolved path, and the position in a tar."""
        raise NotImplementedError


class EncodedSource(PairSource):
    """Pairs whose images are decoded from the bytes of image files when they are read."""

    def __getitem__(self, index: int) -> Record:
        captions = self.texts(index)
        return Record(
            image=decode_image(self.encoded_image(index), id=self.id(index)),
            text=captions[0] if len(captions) == 1 else captions,
            id=self.id(index),
            meta=self.meta(index),
        )

    @abc.abstractmethod
    def texts(self, index: int) -> list[str]: ...

    @abc.abstractmethod
    def encoded_sizes(self) -> np.ndarray: ...

    @abc.abstractmethod
    def encoded_image(self, index: int) -> bytes: ...

    @abc.abstractmethod
    def encoded_location(self, index: int) -> str: ...


class ListedSource(EncodedSource):
    """Pairs whose ids and captions are held in memory."""

    def __init__(
        self,
        name: str,
        *,
        ids: PackedStrings,
        captions: PackedCaptions,
        metas: PackedStrings | None = None,
        classes: list[str] | None = None,
    ) -> None:
        self.name = name
        self.classes = classes
        self._ids = ids
        self._captions = captions
        self._metas = metas

    def __len__(self) -> int:
        return len(self._ids)

    def id(self, index: int) -> str:
        return self._ids[index]

    def texts(self, index: int) -> list[str]:
        captions = self._captions[index]
        if not captions:
            raise BrokenPair(self.id(index), "no readable caption")
        return captions

    def meta(self, index: int) -> dict[str, Any]:
        return json.loads(self._metas[index]) if self._metas is not None else {}

    def manifest(self) -> str:
        digest = hashlib.blake2b(self._ids.digest(), digest_size=16)
        digest.update(self._captions.digest())
        digest.update(self.encoded_sizes().tobytes())
        return digest.hexdigest()


class ImageFiles(ListedSource):
    """Image files under `root`; the ids are their paths, absolute or relative to `root`."""

    def __init__(
        self,
        name: str,
        *,
        root: Path,
        ids: PackedStrings,
        captions: PackedCaptions,
        metas: PackedStrings | None = None,
        classes: list[str] | None = None,
    ) -> None:
        super().__init__(name, ids=ids, captions=captions, metas=metas, classes=classes)
        self.root = os.path.abspath(root)

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.id(index))

    @cached_property
    def _sizes(self) -> np.ndarray:
        return np.fromiter((_file_size(self.path(i)) for i in range(len(self))), dtype=np.int64)

    def encoded_sizes(self) -> np.ndarray:
        return self._sizes

    def encoded_image(self, index: int) -> bytes:
        return read_image_file(self.path(index), id=self.id(index))

    def encoded_location(self, index: int) -> str:
        return os.path.realpath(self.path(index))


class Subset(PairSource, Sequence[Record]):
    """Selected rows of another source, in the given order: a sequence of `(image, text)` pairs.

    A slice of it is another view; nothing is read before an item is asked for.
    """

    def __init__(self, base: PairSource, indices: Sequence[int] | np.ndarray, *, name: str) -> None:
        rows = np.asarray(indices, dtype=np.int64)
        self.base: PairSource = base.base if isinstance(base, Subset) else base
        self.indices: np.ndarray = base.indices[rows] if isinstance(base, Subset) else rows
        self.name = name

    @property
    def stable(self) -> bool:  # type: ignore[override]
        return self.base.stable

    @property
    def classes(self) -> list[str] | None:  # type: ignore[override]
        return self.base.classes

    @property
    def in_memory(self) -> bool:  # type: ignore[override]
        return self.base.in_memory

    def __repr__(self) -> str:
        origin = "" if self.base.origin is None else f" of {self.base.origin}"
        return f"{self.name} pairs: {len(self):,} of {len(self.base):,}{origin}"

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Subset: ...
    def __getitem__(self, index: int | slice) -> Record | Subset:
        if isinstance(index, slice):
            return Subset(self, np.arange(len(self))[index], name=self.name)
        return self.base[self._row(index)]

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def _row(self, index: int) -> int:
        # NumPy raises IndexError outside the length, and takes -1 as the last.
        return int(self.indices[operator.index(index)])

    def id(self, index: int) -> str:
        return self.base.id(self._row(index))

    def texts(self, index: int) -> list[str] | Tensor:
        return self.base.texts(self._row(index))

    def meta(self, index: int) -> dict[str, Any]:
        return self.base.meta(self._row(index))

    def every_id(self) -> Iterator[str]:
        return super().every_id() if self._is_sparse() else self._from(self.base.every_id())

    def every_text(self) -> Iterator[list[str] | Tensor]:
        return super().every_text() if self._is_sparse() else self._from(self.base.every_text())

    def _is_sparse(self) -> bool:
        """Tell whether a pass over the whole base is no way to read these rows in order."""
        return 8 * len(self) < len(self.base) or bool((np.diff(self.indices) <= 0).any())

    def _from(self, every: Iterator[Item]) -> Iterator[Item]:
        chosen = np.zeros(len(self.base), bool)
        chosen[self.indices] = True
        return compress(every, chosen.tolist())

    def shards(self) -> np.ndarray | None:
        shards = self.base.shards()
        return None if shards is None else shards[self.indices]

    def encoded_sizes(self) -> np.ndarray | None:
        sizes = self.base.encoded_sizes()
        return None if sizes is None else sizes[self.indices]

    def encoded_image(self, index: int) -> bytes:
        return self.base.encoded_image(self._row(index))

    def encoded_location(self, index: int) -> str:
        return self.base.encoded_location(self._row(index))

    def manifest(self) -> str:
        digest = hashlib.blake2b(self.base.manifest().encode(), digest_size=16)
        digest.update(self.indices.tobytes())
        return digest.hexdigest()


def base_rows(source: PairSource, rows: np.ndarray) -> np.ndarray:
    """Return `rows` (n,) of a source as rows of the source that it is a view of, if it is one."""
    return source.indices[rows] if isinstance(source, Subset) else rows


def decode_image(data: bytes, *, id: str) -> Image.Image:
    """Decode the bytes of a JPEG, PNG, WebP, ... completely; raise `BrokenPair` on failure.

    Truncated files count as broken, since a half-grey picture must not be trained on. So do
    decompression bombs, from the size at which PIL only warns.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            image.load()
    except UnidentifiedImageError as error:
        raise BrokenPair(id, "image cannot be decoded: unknown image format") from error
    # PIL's plugins raise OSError, SyntaxError, ValueError, struct.error, ... on damaged input.
    except Exception as error:
        raise BrokenPair(id, f"image cannot be decoded: {error}") from error
    return image


def read_image_file(path: str, *, id: str) -> bytes:
    """Read the bytes of an image file; raise `BrokenPair` if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BrokenPair(id, f"image file {path} cannot be read: {reason}") from error


def _file_size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return -1


# File names may contain undecodable bytes as lone surrogates.
_ERRORS = "surrogatepass"


class PackedStrings:
    """An append-only sequence of strings in one buffer.

    Takes less memory than a list of str. Reading it updates no reference counts, so the memory
    stays shared with forked workers.
    """

    def __init__(self, strings: Iterable[str] = ()) -> None:
        self._data = bytearray()
        self._ends = array("q", [0])
        for string in strings:
            self.append(string)

    def append(self, string: str) -> None:
        self._data += string.encode("utf-8", _ERRORS)
        self._ends.append(len(self._data))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._data[self._ends[index] : self._ends[index + 1]].decode("utf-8", _ERRORS)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the encoded strings one after another, uint8, and their bounds, [n + 1] int64."""
        return np.frombuffer(self._data, np.uint8), np.frombuffer(self._ends, np.int64)

    def digest(self) -> bytes:
        """Hash all strings and their boundaries."""
        return hashlib.blake2b(self._data + self._ends.tobytes()).digest()


class PackedCaptions:
    """An append-only sequence of caption lists; an empty list is a pair without a caption."""

    def __init__(self, rows: Iterable[Sequence[str]] = ()) -> None:
        self._captions = PackedStrings()
        self._ends = array("q", [0])
        for row in rows:
            self.append(row)

    def append(self, captions: Sequence[str]) -> None:
        """Append the captions of one pair, without blank ones."""
        for caption in captions:
            if caption.strip():
                self._captions.append(caption.strip())
        self._ends.append(len(self._captions))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> list[str]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return [self._captions[i] for i in range(self._ends[index], self._ends[index + 1])]

    def counts(self) -> np.ndarray:
        """Return the number of captions per pair, [n] int64."""
        return np.diff(np.frombuffer(self._ends, dtype=np.int64))

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return `PackedStrings.arrays` of the captions, and bounds of each pair's, [n + 1]."""
        return *self._captions.arrays(), np.frombuffer(self._ends, np.int64)

    def digest(self) -> bytes:
        """Hash all captions and their boundaries."""
        return hashlib.blake2b(self._captions.digest() + self._ends.tobytes()).digest()
