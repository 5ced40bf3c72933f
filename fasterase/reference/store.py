"""Rows of features by 64-bit key, in memory-mapped blocks that are each written whole."""

from __future__ import annotations

import logging
import os
import zlib
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)


class FeatureStore:
    """Features of one kind (images or captions) of one model, kept in `folder` between runs.

    A block is one `.npy` file of (key, feature) rows whose name carries the CRC-32 of its bytes. It
    is written under a temporary name and renamed, so that a block is there wholly or not at all,
    and a sweep that was killed goes on behind its last block. Reading maps the files, so a set of
    millions costs no resident memory beyond its keys.

    Args:
        folder: where the blocks live; made if missing.
        width: D0, numbers in a feature.

    Attributes:
        damaged: a block was not as it had been written when the store was opened, and was removed.
    """

    def __init__(self, folder: Path, width: int) -> None:
        self.folder = folder
        self.width = width
        self._dtype = np.dtype([("key", "<i8"), ("feature", "<f4", (width,))])
        self._blocks: list[np.ndarray] = []
        self.damaged = False
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("*.npy")):
            block = self._open(path)
            if block is None:
                self.damaged = True
            else:
                self._blocks.append(block)
        self._index()

    def _open(self, path: Path) -> np.ndarray | None:
        if path.stem.rpartition("-")[2] == f"{_crc32(path):08x}":
            block = np.load(path, mmap_mode="r")
            if block.dtype == self._dtype and block.ndim == 1:
                return block
        log.warning("Reference cache: %s is damaged or foreign; its features are made again.", path)
        path.unlink()
        return None

    def _index(self) -> None:
        # Offsets of each block in the concatenation of all, so that one sorted array of keys finds
        # both the block and the row inside it.
        sizes = [len(block) for block in self._blocks]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        keys = [np.asarray(block["key"]) for block in self._blocks]
        every = np.concatenate(keys) if keys else np.empty(0, np.int64)
        self._order = np.argsort(every, kind="stable")
        self._sorted = every[self._order]

    def __len__(self) -> int:
        return sum(len(block) for block in self._blocks)

    def has(self, keys: np.ndarray) -> np.ndarray:
        """Which of `keys` (n,) had a feature when the store was opened or last refreshed, (n,)."""
        at = np.minimum(np.searchsorted(self._sorted, keys), max(len(self._sorted) - 1, 0))
        return self._sorted[at] == keys if len(self._sorted) else np.zeros(len(keys), bool)

    def refresh(self) -> None:
        """Let `has` and `get` see what was put; not after each of a sweep's thousands of blocks,
        since each time sorts all keys.
        """
        self._index()

    def put(self, keys: np.ndarray, features: np.ndarray) -> None:
        """Append one block: `keys` (n,) int64 and their `features` (n, D0) float32."""
        if len(keys) == 0:
            return
        block = np.empty(len(keys), self._dtype)
        block["key"] = keys
        block["feature"] = features
        temporary = self.folder / f"{os.getpid()}-{len(self._blocks)}.tmp"
        with temporary.open("wb") as file:
            np.save(file, block)
            file.flush()
            os.fsync(file.fileno())
        path = self.folder / f"{int(keys[0]) & (2**64 - 1):016x}-{_crc32(temporary):08x}.npy"
        os.replace(temporary, path)
        self._blocks.append(np.load(path, mmap_mode="r"))

    def get(self, keys: np.ndarray) -> np.ndarray:
        """Features (n, D0) float32 of `keys` (n,); a key without one raises `KeyError`."""
        found = self.has(keys)
        if not found.all():
            raise KeyError(int(keys[~found][0]))
        at = np.searchsorted(self._sorted, keys)
        rows = self._order[at]
        features = np.empty((len(keys), self.width), np.float32)
        block_of = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(block_of):
            here = block_of == number
            features[here] = self._blocks[number]["feature"][rows[here] - self._starts[number]]
        return features


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value
