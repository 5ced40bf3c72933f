"""What every set of pairs offers, whatever it was read from."""

from __future__ import annotations

import abc
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from fasterase.pairs.packed import PackedCaptions, PackedStrings
from fasterase.pairs.records import Record, decode_image
from fasterase.pairs.skips import BrokenPair


class PairSource(abc.ABC):
    """Random access to pairs.

    Attributes:
        name: the argument it came from (`"forget"`, `"retain"`, ...), for messages.
        stable: item i is the same on every read; False for a dataset with random augmentation.
        classes: class names where the source has them (class-per-folder), else None.
        cheap_pixels: reading every image costs little (they lie decoded in memory).
    """

    name: str
    stable: bool = True
    classes: list[str] | None = None
    cheap_pixels: bool = False

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Record:
        """The decoded pair; `BrokenPair` where its image or caption cannot be read."""

    @abc.abstractmethod
    def id(self, index: int) -> str:
        """The pair's id, without decoding the image."""

    @abc.abstractmethod
    def texts(self, index: int) -> list[str] | Tensor:
        """All captions, or token ids [L], without decoding the image where the source can."""

    @abc.abstractmethod
    def meta(self, index: int) -> dict[str, Any]:
        """What else is known of the pair; see `Record.meta`."""

    @abc.abstractmethod
    def manifest(self) -> str:
        """Hex digest over names, sizes and captions: a cache made for other data has another."""

    def encoded_sizes(self) -> np.ndarray | None:
        """Bytes of each encoded image, [n] int64, -1 where missing; None for decoded images."""
        return None

    def encoded_image(self, index: int) -> bytes:
        """The image file's bytes, where `encoded_sizes` is not None."""
        raise NotImplementedError

    def encoded_place(self, index: int) -> str:
        """Where those bytes lie: the resolved path, and for a tar the key."""
        raise NotImplementedError


class EncodedSource(PairSource):
    """Pairs whose captions are held in memory and whose images are decoded when read."""

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

    def __getitem__(self, index: int) -> Record:
        captions = self.texts(index)
        return Record(
            image=self._decode(index),
            text=captions[0] if len(captions) == 1 else captions,
            id=self.id(index),
            meta=self.meta(index),
        )

    def _decode(self, index: int) -> Image.Image:
        return decode_image(self.encoded_image(index), id=self.id(index))

    def id(self, index: int) -> str:
        return self._ids[index]

    def texts(self, index: int) -> list[str]:
        captions = self._captions[index]
        if not captions:
            raise BrokenPair(self.id(index), "no readable caption")
        return captions

    def meta(self, index: int) -> dict[str, Any]:
        return json.loads(self._metas[index]) if self._metas is not None else {}

    @abc.abstractmethod
    def encoded_sizes(self) -> np.ndarray: ...

    @abc.abstractmethod
    def encoded_image(self, index: int) -> bytes: ...

    @abc.abstractmethod
    def encoded_place(self, index: int) -> str: ...

    def manifest(self) -> str:
        digest = hashlib.blake2b(self._ids.digest(), digest_size=16)
        digest.update(self._captions.digest())
        digest.update(self.encoded_sizes().tobytes())
        return digest.hexdigest()


class Subset(PairSource):
    """Some rows of another source, in the given order."""

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
    def cheap_pixels(self) -> bool:  # type: ignore[override]
        return self.base.cheap_pixels

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        return self.base[self._row(index)]

    def _row(self, index: int) -> int:
        # Without this check -1 would wrap around, and a plain `for` would never end on a base
        # that does not raise IndexError itself.
        if not 0 <= index < len(self.indices):
            raise IndexError(index)
        return int(self.indices[index])

    def id(self, index: int) -> str:
        return self.base.id(self._row(index))

    def texts(self, index: int) -> list[str] | Tensor:
        return self.base.texts(self._row(index))

    def meta(self, index: int) -> dict[str, Any]:
        return self.base.meta(self._row(index))

    def encoded_sizes(self) -> np.ndarray | None:
        sizes = self.base.encoded_sizes()
        return None if sizes is None else sizes[self.indices]

    def encoded_image(self, index: int) -> bytes:
        return self.base.encoded_image(self._row(index))

    def encoded_place(self, index: int) -> str:
        return self.base.encoded_place(self._row(index))

    def manifest(self) -> str:
        digest = hashlib.blake2b(self.base.manifest().encode(), digest_size=16)
        digest.update(self.indices.tobytes())
        return digest.hexdigest()
