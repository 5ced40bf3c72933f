"""Features by key on disk, in safetensors files that tell by themselves what is damaged.

A file, or block, is written once and whole. Its tensors:

    keys      [n] int64
    captions  [m, 2] int64: a key, and a caption whose features that row needs
    sums      [n] uint32: CRC-32 of each feature
    features  [n, D0] fp32, fp16 or bf16

Its header holds the CRC-32 of the keys, and of captions and sums (`rest`). Header and keys are all
that opening reads, at most 1 % of a block of 512 or more numbers per feature. A feature is checked
whenever it is read.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fasterase.errors import FaseraseError
from fasterase.files import replace_file

log = logging.getLogger(__name__)

_SUFFIX = ".safetensors"
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_DTYPE_NAMES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
# Larger than any header of a block: of a foreign file no more is read.
_MAX_HEADER_BYTES = 1 << 12
NO_CAPTIONS = np.empty((0, 2), np.int64)


class FeatureStore:
    """Features by 64-bit key, in memory-mapped blocks that are each written whole.

    A block is written under a temporary name and renamed: either all of it exists or nothing, and
    an interrupted sweep resumes after its last block. Blocks are mapped when their features are
    first read, so that a set of millions costs no resident memory beyond its keys, twice, and no
    open file.

    Args:
        folder: where the blocks are; created if missing. Blocks whose header or keys are damaged,
            or that are not whole, are removed with a warning.
        width: D0, numbers per feature.
        dtype: what is stored, `"fp32"`, `"fp16"` or `"bf16"`. A folder has one of them.
    """

    def __init__(self, folder: Path, width: int, *, dtype: str = "fp32") -> None:
        self.folder = folder
        self.width = width
        self._dtype = _DTYPES[dtype]
        self._layout = (_DTYPE_NAMES[dtype], width)
        self._blocks: dict[str, _Block] = {}
        self._index()
        folder.mkdir(parents=True, exist_ok=True)
        self.refresh()

    def __len__(self) -> int:
        """Return the number of rows, those `put` since the last `refresh` included."""
        return sum(len(block.keys) for block in self._blocks.values())

    def has(self, keys: np.ndarray) -> np.ndarray:
        """Return which of `keys` (n,) had a feature at the last `refresh`, (n,) bool."""
        if not len(self._keys):
            return np.zeros(len(keys), bool)
        return self._keys[self._find(keys)] == keys

    def get(self, keys: np.ndarray) -> np.ndarray:
        """Return features (n, D0) float32 of `keys` (n,).

        Raises:
            KeyError: one is missing.
            FaseraseError: one is damaged on disk; its block is removed.
        """
        found = self.has(keys)
        if not found.all():
            raise KeyError(int(keys[~found][0]))
        features = torch.empty(len(keys), self.width, dtype=self._dtype)
        stored = features.view(torch.uint8).numpy()
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
            stored[here] = read
        return features.float().numpy()

    def captions(self, keys: np.ndarray) -> np.ndarray:
        """Return [m, 2], a key and a caption, what came with `keys`, which the store has."""
        parts = [NO_CAPTIONS]
        for name, here, _ in self._places(keys):
            captions = self._blocks[name].captions
            parts.append(captions[np.isin(captions[:, 0], keys[here])])
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
        for name in gone:
            (self.folder / name).unlink(missing_ok=True)
        if gone:
            self._index()

    def put(
        self, keys: np.ndarray, features: np.ndarray, captions: np.ndarray = NO_CAPTIONS
    ) -> None:
        """Append one block.

        Args:
            keys: (n,) int64.
            features: (n, D0) float32.
            captions: (m, 2) pairs of a key and the key of a caption that belongs to it.
        """
        if len(keys) == 0:
            return
        stored = torch.from_numpy(features).to(self._dtype).contiguous()
        sums = _sums(stored.view(torch.uint8).numpy())
        tensors = {
            "keys": torch.tensor(keys),
            "captions": torch.tensor(captions),
            "sums": torch.tensor(sums),
            "features": stored,
        }
        name = f"{int(keys[0]) & (2**64 - 1):016x}-{_checksum(keys, captions, sums):08x}{_SUFFIX}"
        path = self.folder / name
        rest = _checksum(captions, sums)
        checksums = {"keys": f"{_checksum(keys):08x}", "rest": f"{rest:08x}"}
        size_bytes = sum(tensor.nbytes for tensor in tensors.values())
        with replace_file(path, sync=True, size_bytes=size_bytes) as temporary:
            save_file(tensors, temporary, checksums)
            # safetensors lets the owner alone read its files, whatever the folder allows.
            temporary.chmod(self.folder.stat().st_mode & 0o666)
        self._blocks[name] = _Block(path, keys, rest)

    def refresh(self) -> None:
        """Make what was `put`, here or by another process, visible to `has` and `get`.

        A separate step, because it sorts all keys.
        """
        for path in sorted(self.folder.glob(f"*{_SUFFIX}")):
            if path.name in self._blocks:
                continue
            block = _open_block(path, self._layout)
            if block is None:
                self._warn(path.name)
                path.unlink(missing_ok=True)
            else:
                self._blocks[path.name] = block
        if len(self._blocks) > len(self._names):
            self._index()

    def _index(self) -> None:
        """Sort the keys of all blocks."""
        # By name, so that all processes read one of several rows of a key. One order of all keys
        # finds both the block and the row inside it.
        self._names = sorted(self._blocks)
        blocks = [self._blocks[name] for name in self._names]
        self._starts = np.cumsum([0, *(len(block.keys) for block in blocks)])
        self._keys = np.concatenate([np.empty(0, np.int64), *(block.keys for block in blocks)])
        self._order = np.argsort(self._keys, kind="stable")
        for block, start in zip(blocks, self._starts, strict=False):
            block.keys = self._keys[start : start + len(block.keys)]  # so that memory has one copy

    def _find(self, keys: np.ndarray) -> np.ndarray:
        """Return the places of `keys` (n,) among those of all blocks, or of others if missing."""
        at = np.searchsorted(self._keys, keys, sorter=self._order)
        return self._order[np.minimum(at, len(self._order) - 1)]

    def _places(self, keys: np.ndarray) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Yield, for each block, which of `keys` it has (positions) and in which of its rows."""
        if not len(keys):
            return
        rows = self._find(keys)
        block_of = np.searchsorted(self._starts, rows, side="right") - 1
        order = np.argsort(block_of, kind="stable")
        numbers, first = np.unique(block_of[order], return_index=True)
        for number, here in zip(numbers.tolist(), np.split(order, first[1:]), strict=True):
            yield self._names[number], here, rows[here] - self._starts[number]

    def _warn(self, name: str) -> None:
        log.warning(
            "Reference cache: %s is damaged or was not written by fasterase; its features are "
            "computed again.",
            self.folder / name,
        )


class _Block:
    """One file of a store, mapped when it is first read.

    Args:
        path: the file.
        keys: (n,) int64.
        rest: CRC-32 of captions and sums.
    """

    def __init__(self, path: Path, keys: np.ndarray, rest: int) -> None:
        self.keys = keys
        self._path = path
        self._rest = rest

    @cached_property
    def _tensors(self) -> dict[str, np.ndarray] | None:
        """Captions, sums and features, as bytes; None if the file is no longer whole or there."""
        try:
            # As torch's tensors they stay mapped once the file is closed.
            with safe_open(self._path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in ("captions", "sums", "features")}
        except (FileNotFoundError, SafetensorError):
            return None
        tensors["features"] = tensors["features"].view(torch.uint8)
        return {name: tensor.numpy() for name, tensor in tensors.items()}

    @property
    def captions(self) -> np.ndarray:
        """[m, 2], a key and a caption."""
        return NO_CAPTIONS if self._tensors is None else self._tensors["captions"]

    @property
    def is_sound(self) -> bool:
        """Whether captions and sums are as they were written."""
        found = self._tensors
        return found is not None and self._rest == _checksum(found["captions"], found["sums"])

    def read(self, rows: np.ndarray) -> np.ndarray | None:
        """Return bytes of features (n, bytes of a feature); None if one is damaged."""
        if self._tensors is None:
            return None
        read = self._tensors["features"].take(rows, axis=0)
        return read if np.array_equal(_sums(read), self._tensors["sums"][rows]) else None


def _open_block(path: Path, layout: tuple[str, int]) -> _Block | None:
    """Return a block of a dtype and width; None if it is damaged, not whole, or another file."""
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            # Else the system would read ahead, several times what is read here.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        size = os.fstat(file.fileno()).st_size
        try:
            start = 8 + int.from_bytes(file.read(8), "little")
            tensors = json.loads(file.read(min(start - 8, _MAX_HEADER_BYTES)))
            checksums = tensors.pop("__metadata__")
            of_keys, of_rest = int(checksums["keys"], 16), int(checksums["rest"], 16)
            dtype, (_, width) = tensors["features"]["dtype"], tensors["features"]["shape"]
            end = start + max(tensor["data_offsets"][1] for tensor in tensors.values())
            first, last = tensors["keys"]["data_offsets"]
            file.seek(start + first)
            keys = np.frombuffer(file.read(min(last - first, size)), "<i8")
        except (ValueError, LookupError, TypeError, AttributeError):  # no such header
            return None
    is_whole = (dtype, width, end, _checksum(keys)) == (*layout, size, of_keys)
    return _Block(path, keys, of_rest) if is_whole else None


def _checksum(*arrays: np.ndarray) -> int:
    """Return the CRC-32 of arrays, one after the other."""
    return zlib.crc32(b"".join(array.tobytes() for array in arrays))


def _sums(features: np.ndarray) -> np.ndarray:
    """Return the CRC-32 (n,) of each row of `features`, bytes (n, bytes of a feature)."""
    return np.fromiter((zlib.crc32(row) for row in features), "<u4", len(features))
