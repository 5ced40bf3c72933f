"""Features by key on disk, in checksummed safetensors files.

A file, or block, is written once and whole. Its tensors:

    keys      [n] int64
    captions  [m, 2] int64: a key, and a caption whose features that row needs
    sums      [n] uint32: CRC-32 of each feature
    features  [n, D0] fp32, fp16 or bf16

Its header holds the CRC-32 of the keys, which are checked when the block is opened, and that of
captions and sums. A feature is checked whenever it is read.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fasterase.errors import FaseraseError
from fasterase.files import replace_file

log = logging.getLogger(__name__)

_SUFFIX = ".safetensors"
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NO_CAPTIONS = np.empty((0, 2), np.int64)


class FeatureStore:
    """Features by 64-bit key, in blocks that are each written whole or not at all.

    Blocks are mapped when their features are first read: a set of millions costs no memory of its
    own beyond its keys, and no open file.

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
        for block, here, rows in self._places(keys):
            read = block.read(rows)
            if read is None:
                _warn(block.path)
                self.remove([block.path.name])
                raise FaseraseError(
                    f"Reference cache: {block.path} was damaged on disk and is removed. Run again: "
                    "its features alone are computed again, and a run with an `output_dir` resumes "
                    "from its last checkpoint."
                )
            features[torch.from_numpy(here)] = read
        return features.float().numpy()

    def captions(self, keys: np.ndarray) -> np.ndarray:
        """Return [m, 2], a key and a caption, what came with `keys`, which the store has."""
        parts = [NO_CAPTIONS]
        for block, here, _ in self._places(keys):
            if (tensors := block.tensors) is not None:
                captions = tensors["captions"].numpy()
                parts.append(captions[np.isin(captions[:, 0], keys[here])])
        return np.concatenate(parts)

    def damaged_blocks(self, keys: np.ndarray) -> list[str]:
        """Return the blocks, with a warning, in which features of `keys` are damaged."""
        damaged = [block.path for block, _, rows in self._places(keys) if block.read(rows) is None]
        for path in damaged:
            _warn(path)
        return [path.name for path in damaged]

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
        """Append a block of `keys` (n,), `features` (n, D0) float32 and `captions` (m, 2)."""
        if len(keys) == 0:
            return
        stored = torch.from_numpy(features).to(self._dtype).contiguous()
        tensors = {
            "keys": torch.tensor(keys),
            "captions": torch.tensor(captions),
            "sums": torch.tensor(_sums(stored)),
            "features": stored,
        }
        rest = _checksum(tensors["captions"], tensors["sums"])
        checksums = {"keys": _checksum(tensors["keys"]), "rest": rest}
        path = self.folder / f"{int(keys[0]) & (2**64 - 1):016x}-{rest}{_SUFFIX}"
        size_bytes = sum(tensor.nbytes for tensor in tensors.values())
        with replace_file(path, sync=True, size_bytes=size_bytes) as temporary:
            save_file(tensors, temporary, checksums)
            # safetensors lets the owner alone read its files, whatever the folder allows.
            temporary.chmod(self.folder.stat().st_mode & 0o666)
        self._blocks[path.name] = _Block(path, keys, rest)

    def refresh(self) -> None:
        """Sort all keys: makes what was `put`, here or elsewhere, visible to `has` and `get`."""
        for path in sorted(self.folder.glob(f"*{_SUFFIX}")):
            if path.name in self._blocks:
                continue
            if (block := _open_block(path, (self._dtype, self.width))) is not None:
                self._blocks[path.name] = block
            else:
                _warn(path)
                path.unlink(missing_ok=True)
        if len(self._blocks) > len(self._sorted):
            self._index()

    def _index(self) -> None:
        """Sort the keys of all blocks."""
        # By name, so that all processes read one of several rows of a key. One order of all keys
        # finds both the block and the row inside it.
        self._sorted = [self._blocks[name] for name in sorted(self._blocks)]
        self._starts = np.cumsum([0, *(len(block.keys) for block in self._sorted)])
        self._keys = np.concatenate([np.empty(0, np.int64), *(b.keys for b in self._sorted)])
        self._order = np.argsort(self._keys, kind="stable")
        for block, start in zip(self._sorted, self._starts, strict=False):
            block.keys = self._keys[start : start + len(block.keys)]  # so that memory has one copy

    def _find(self, keys: np.ndarray) -> np.ndarray:
        """Return the places of `keys` (n,) among those of all blocks; of others if missing."""
        at = np.searchsorted(self._keys, keys, sorter=self._order)
        return self._order[np.minimum(at, len(self._order) - 1)]

    def _places(self, keys: np.ndarray) -> Iterator[tuple[_Block, np.ndarray, np.ndarray]]:
        """Yield each block that has some of `keys`, which (positions), and in which of its rows."""
        if not len(keys):
            return
        rows = self._find(keys)
        block_of = np.searchsorted(self._starts, rows, side="right") - 1
        order = np.argsort(block_of, kind="stable")
        numbers, first = np.unique(block_of[order], return_index=True)
        for number, here in zip(numbers.tolist(), np.split(order, first[1:]), strict=True):
            yield self._sorted[number], here, rows[here] - self._starts[number]


def _warn(path: Path) -> None:
    log.warning(
        "Reference cache: %s is damaged or was not written by fasterase; its features are "
        "computed again.",
        path,
    )


class _Block:
    """One file of a store, mapped when it is first used; `rest`: checksum of captions and sums."""

    def __init__(self, path: Path, keys: np.ndarray, rest: str) -> None:
        self.keys = keys
        self.path = path
        self._rest = rest

    @cached_property
    def tensors(self) -> dict[str, Tensor] | None:
        """Captions, sums and features; None if one of the former is damaged or the file is gone."""
        try:
            # As torch's tensors they stay mapped once the file is closed.
            with safe_open(self.path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in ("captions", "sums", "features")}
        except (FileNotFoundError, SafetensorError):
            return None
        is_whole = _checksum(tensors["captions"], tensors["sums"]) == self._rest
        return tensors if is_whole else None

    def read(self, rows: np.ndarray) -> Tensor | None:
        """Return features [n, D0] of `rows` (n,); None if one is damaged."""
        if self.tensors is None:
            return None
        read = self.tensors["features"][torch.from_numpy(rows)]
        return read if np.array_equal(_sums(read), self.tensors["sums"].numpy()[rows]) else None


def _open_block(path: Path, layout: tuple[torch.dtype, int]) -> _Block | None:
    """Return a block of a dtype and width; None if its head is damaged, or it is another file."""
    try:
        # Refuses a file that is not as long as its header says.
        with safe_open(path, "pt") as file:
            checksums = file.metadata()
            keys, features = file.get_tensor("keys"), file.get_tensor("features")
            is_ours = (features.dtype, features.shape[1]) == layout
            if not is_ours or checksums["keys"] != _checksum(keys):
                return None
            return _Block(path, keys.numpy().copy(), checksums["rest"])
    except (SafetensorError, LookupError, TypeError):
        return None


def _checksum(*tensors: Tensor) -> str:
    """Return the CRC-32 of tensors, one after the other, in hexadecimal."""
    value = 0
    for tensor in tensors:
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def _sums(features: Tensor) -> np.ndarray:
    """Return the CRC-32 (n,) of each row of `features`."""
    rows = features.view(torch.uint8).numpy()
    return np.fromiter((zlib.crc32(row) for row in rows), "<u4", len(rows))
