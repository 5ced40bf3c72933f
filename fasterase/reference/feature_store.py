"""Features by key on disk, in blocks that tell by themselves what is damaged.

A block is one file, written once and whole:

    head      size, width and kind of the block; CRC-32 of sums and captions
    keys      [n] int64
    sums      [n] uint32: CRC-32 of each feature
    captions  [m] (key, caption): the captions whose features each row needs
    features  [n, D0] fp32, fp16 or bf16

The name of the file ends with the CRC-32 of head and keys. They are all that opening reads, at most
1 % of a block of 512 or more numbers per feature. A feature is checked whenever it is read.
"""

from __future__ import annotations

import logging
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from fasterase.errors import FaseraseError
from fasterase.files import replace_file

log = logging.getLogger(__name__)

_SUFFIX = ".features"
_HEAD = struct.Struct("<8sIIIII")  # magic, rows, width, bytes per number, captions, CRC-32
_MAGIC = b"fefeats1"
_CAPTION = np.dtype([("key", "<i8"), ("caption", "<i8")])
NO_CAPTIONS = np.empty(0, _CAPTION)


class FeatureStore:
    """Features by 64-bit key, in memory-mapped blocks that are each written whole.

    A block is written under a temporary name and renamed: either all of it exists or nothing, and
    an interrupted sweep resumes after its last block. Blocks are mapped when their features are
    first read, so that a set of millions costs no resident memory beyond its keys, twice.

    Args:
        folder: where the blocks are; created if missing. Blocks whose head is damaged, or that are
            not whole, are removed with a warning.
        width: D0, numbers per feature.
        dtype: what is stored, `"fp32"`, `"fp16"` or `"bf16"`. A folder has one of them.
    """

    def __init__(self, folder: Path, width: int, *, dtype: str = "fp32") -> None:
        self.folder = folder
        self.width = width
        self._number = np.dtype({"fp32": "<f4", "fp16": "<f2", "bf16": "<u2"}[dtype])
        self._is_bf16 = dtype == "bf16"
        self._blocks: dict[str, _Block] = {}
        self._fresh: dict[str, np.ndarray] = {}  # keys of blocks that are not in the index
        self._index({})
        folder.mkdir(parents=True, exist_ok=True)
        self.refresh()

    def __len__(self) -> int:
        """Return the number of rows, those `put` since the last `refresh` included."""
        return sum(block.count for block in self._blocks.values())

    def has(self, keys: np.ndarray) -> np.ndarray:
        """Return which of `keys` (n,) had a feature at the last `refresh`, (n,) bool."""
        at = np.minimum(np.searchsorted(self._sorted, keys), max(len(self._sorted) - 1, 0))
        return self._sorted[at] == keys if len(self._sorted) else np.zeros(len(keys), bool)

    def get(self, keys: np.ndarray) -> np.ndarray:
        """Return features (n, D0) float32 of `keys` (n,).

        Raises:
            KeyError: one is missing.
            FaseraseError: one is damaged on disk; its block is removed.
        """
        found = self.has(keys)
        if not found.all():
            raise KeyError(int(keys[~found][0]))
        features = np.empty((len(keys), self.width), np.float32)
        for name, here, rows in self._places(keys):
            read = self._blocks[name].read(rows)
            if read is None:
                self._warn(name)
                self.remove([name])
                raise FaseraseError(
                    f"Reference cache: {self.folder / name} was damaged on disk and is removed. "
                    "Run again: its features alone are computed again, and a run with an "
                    "`output_dir` resumes from its last checkpoint."
                )
            features[here] = _from_bf16(read) if self._is_bf16 else read
        return features

    def captions(self, keys: np.ndarray) -> np.ndarray:
        """Return (key, caption) for the captions that came with `keys`, which the store has."""
        parts = [NO_CAPTIONS]
        for name, here, _ in self._places(keys):
            captions = self._blocks[name].captions
            parts.append(captions[np.isin(captions["key"], keys[here])])
        return np.concatenate(parts)

    def damaged_blocks(self, keys: np.ndarray) -> list[str]:
        """Return the blocks, with a warning, in which features of `keys` are damaged."""
        damaged = [
            name
            for name, _, rows in self._places(keys)
            if self._blocks[name].read(rows) is None or not self._blocks[name].is_sound
        ]
        for name in damaged:
            self._warn(name)
        return damaged

    def remove(self, names: Iterable[str]) -> None:
        """Remove blocks, which another process may have removed already."""
        gone = [name for name in names if self._blocks.pop(name, None) is not None]
        if gone:
            for name in gone:
                self._fresh.pop(name, None)
                (self.folder / name).unlink(missing_ok=True)
            self._index({name: keys for name, keys in self._indexed() if name in self._blocks})

    def put(
        self, keys: np.ndarray, features: np.ndarray, captions: np.ndarray = NO_CAPTIONS
    ) -> None:
        """Append one block.

        Args:
            keys: (n,) int64.
            features: (n, D0) float32.
            captions: (m,) pairs of a key and the key of a caption that belongs to it.
        """
        if len(keys) == 0:
            return
        stored = np.ascontiguousarray(
            _to_bf16(features) if self._is_bf16 else features, self._number
        )
        sums = _sums(stored)
        rest = zlib.crc32(captions.tobytes(), zlib.crc32(sums.tobytes()))
        head = _HEAD.pack(_MAGIC, len(keys), self.width, self._number.itemsize, len(captions), rest)
        head += keys.astype("<i8").tobytes()
        path = self.folder / (f"{int(keys[0]) & (2**64 - 1):016x}-{zlib.crc32(head):08x}{_SUFFIX}")
        data = b"".join([head, sums.tobytes(), captions.tobytes(), stored.tobytes()])
        with replace_file(path, sync=True, size_bytes=len(data)) as temporary:
            temporary.write_bytes(data)
        self._blocks[path.name] = _Block(
            path, len(keys), self.width, self._number, len(captions), rest
        )
        self._fresh[path.name] = keys

    def refresh(self) -> None:
        """Make what was `put`, here or by another process, visible to `has` and `get`.

        A separate step, because it sorts all keys.
        """
        for path in sorted(self.folder.glob(f"*{_SUFFIX}")):
            if path.name in self._blocks:
                continue
            opened = self._open(path)
            if opened is None:
                self._warn(path.name)
                path.unlink(missing_ok=True)
            else:
                self._blocks[path.name], self._fresh[path.name] = opened
        if self._fresh:
            self._index(dict(self._indexed()) | self._fresh)
            self._fresh = {}

    def _index(self, keys: dict[str, np.ndarray]) -> None:
        """Sort the keys (n,) of each block."""
        # By name, so that all processes read one of several rows of a key. Offsets of each block in
        # the concatenation of all, so that one sorted array of keys finds both the block and the
        # row inside it.
        self._names = sorted(keys)
        self._starts = np.cumsum([0, *(len(keys[name]) for name in self._names)])
        every = np.concatenate([np.empty(0, np.int64), *(keys[name] for name in self._names)])
        order = np.argsort(every, kind="stable")
        self._sorted = every[order]
        self._order = order.astype(np.int32 if len(order) < 2**31 else np.int64)

    def _indexed(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the name and the keys (n,) of each block in the index."""
        every = np.empty_like(self._sorted)
        every[self._order] = self._sorted
        yield from zip(self._names, np.split(every, self._starts[1:-1]), strict=False)

    def _places(self, keys: np.ndarray) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Yield, for each block, which of `keys` it has (positions) and in which of its rows."""
        rows = self._order[np.searchsorted(self._sorted, keys)]
        block_of = np.searchsorted(self._starts, rows, side="right") - 1
        order = np.argsort(block_of, kind="stable")
        numbers, first = np.unique(block_of[order], return_index=True)
        for number, here in zip(numbers.tolist(), np.split(order, first[1:]), strict=False):
            yield self._names[number], here, rows[here] - self._starts[number]

    def _open(self, path: Path) -> tuple[_Block, np.ndarray] | None:
        """Return a block and its keys (n,), or None if its head is damaged or it is not whole."""
        with path.open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                # Else the system would read ahead, several times what is read here.
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            head = file.read(_HEAD.size)
            if len(head) < _HEAD.size:
                return None
            magic, count, width, itemsize, n_captions, rest = _HEAD.unpack(head)
            if (magic, width, itemsize) != (_MAGIC, self.width, self._number.itemsize):
                return None
            block = _Block(path, count, width, self._number, n_captions, rest)
            if os.fstat(file.fileno()).st_size != block.size_bytes:
                return None
            data = file.read(8 * count)
        if path.stem.rpartition("-")[2] != f"{zlib.crc32(head + data):08x}":
            return None
        return block, np.frombuffer(data, "<i8")

    def _warn(self, name: str) -> None:
        log.warning(
            "Reference cache: %s is damaged or was not written by fasterase; its features are "
            "computed again.",
            self.folder / name,
        )


class _Block:
    """One file of a store, mapped when it is first read."""

    def __init__(
        self, path: Path, count: int, width: int, number: np.dtype, n_captions: int, rest: int
    ) -> None:
        self.count = count
        self._path = path
        self._width = width
        self._number = number
        self._rest = rest
        sizes = [_HEAD.size + 8 * count, 4 * count, n_captions * _CAPTION.itemsize]
        self._sums, self._captions, self._features = np.cumsum(sizes).tolist()
        self.size_bytes = self._features + count * width * number.itemsize

    @cached_property
    def _bytes(self) -> np.ndarray:
        return np.memmap(self._path, np.uint8, mode="r")

    @property
    def is_sound(self) -> bool:
        """Whether sums and captions are as they were written."""
        return zlib.crc32(self._bytes[self._sums : self._features].data) == self._rest

    @property
    def captions(self) -> np.ndarray:
        """[m] (key, caption)."""
        return self._bytes[self._captions : self._features].view(_CAPTION)

    def read(self, rows: np.ndarray) -> np.ndarray | None:
        """Return features (n, D0) as they are stored; None if one is damaged."""
        try:
            features = self._bytes[self._features :].view(self._number)
        except FileNotFoundError:  # another run has found the damage
            return None
        read = features.reshape(self.count, self._width)[rows]
        sums = self._bytes[self._sums : self._captions].view("<u4")
        return read if np.array_equal(_sums(read), sums[rows]) else None


def _to_bf16(features: np.ndarray) -> np.ndarray:
    """Return the bits, uint16, of fp32 numbers in bf16, a type that NumPy does not have."""
    numbers = torch.from_numpy(np.ascontiguousarray(features, np.float32))
    return numbers.bfloat16().view(torch.uint16).numpy()


def _from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _sums(features: np.ndarray) -> np.ndarray:
    """Return the CRC-32 (n,) of each row of `features` (n, D0)."""
    return np.fromiter((zlib.crc32(row.data) for row in features), "<u4", len(features))
