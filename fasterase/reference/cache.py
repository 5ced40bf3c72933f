"""Features of one model on disk, computed once and found again by later runs."""

from __future__ import annotations

import io
import logging
import shutil
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from fasterase.encode import BATCH_SIZE, PairEncoder
from fasterase.errors import InputError
from fasterase.files import check_writable, crc32, replace_file
from fasterase.pairs.prepare import hash_captions
from fasterase.pairs.source import PairSource, Subset
from fasterase.parallel.ranks import ALONE, Ranks

log = logging.getLogger(__name__)

# Batches per block on disk: 1024 rows of D=1024 are 4 MB. A block holds whole batches, so that a
# resumed sweep repeats the same batches, and with them the same last bits, as an uninterrupted one.
BLOCK_BATCHES = 16
BLOCK = BLOCK_BATCHES * BATCH_SIZE


class FeatureCache:
    """Features of one model over any number of sources.

    Images are stored by their row in the source, under the source's manifest; captions by their
    content, whatever source they come from. Views of one source (`fasterase.split`, overlap
    removal) share its rows, so that erasing another concept finds them again.

    Args:
        folder: root of the cache, created when first used.
        model_key: identifies the model: weights, preprocessing and compute dtype.
        width: D0.
        is_half: store fp16, half the size, for a loss that multiplies in fp16 anyway. Of unit rows
            it keeps 11 bits. Caches of the two kinds do not see each other.
        ranks: who takes part: each encodes its share and writes blocks of its own. All of them see
            the folder, and call the methods alike.
    """

    def __init__(
        self,
        folder: Path,
        model_key: str,
        width: int,
        *,
        is_half: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self._root = folder
        self._folder = folder / (model_key[:16] + ("-fp16" if is_half else ""))
        self._is_half = is_half
        self.width = width
        self._ranks = ranks
        self._images: dict[str, FeatureStore] = {}

    @cached_property
    def _captions(self) -> FeatureStore:
        with self._ranks.together():
            check_writable(self._root, argument="reference_cache")
        captions = self._open(self._folder / "captions")
        if self._ranks.tell(captions.damaged):
            # Captions are encoded only when their images are read, and cached images are not read
            # again.
            self._ranks.on_first(lambda: shutil.rmtree(self._folder))
            captions = self._open(self._folder / "captions")
        return captions

    def _open(self, folder: Path) -> FeatureStore:
        """Open a store on the first rank, which removes damaged blocks, then on the others."""
        for first in (True, False):
            with self._ranks.together():
                if self._ranks.is_first == first:
                    store = FeatureStore(folder, self.width, is_half=self._is_half)
        return store

    def images(self, source: PairSource) -> FeatureStore:
        """Return the store of the source's images, whose keys `image_keys` gives.

        Raises:
            InputError: the folder cannot be written to.
        """
        manifest = (source.base if isinstance(source, Subset) else source).manifest()
        if manifest not in self._images:
            # Captions are opened first: if they are damaged, the images are removed too.
            folder = self._captions.folder.with_name(f"images-{manifest[:16]}")
            self._images[manifest] = self._open(folder)
        return self._images[manifest]

    def texts(self, keys: list[str]) -> np.ndarray:
        """Return features (n, D0) of captions by their identities; `KeyError` if one is missing."""
        return self._captions.get(hash_captions(keys))

    def fill(
        self, source: PairSource, rows: np.ndarray, encoder: PairEncoder, *, description: str
    ) -> None:
        """Encode those of `rows` (sorted, distinct) that are missing, with all their captions.

        Raises:
            InputError: too many pairs cannot be read.
        """
        images = self.images(source)
        present = images.has(image_keys(source, rows))
        parts = [encoder.own_rows(part) for part in _resume_blocks(rows, present)]
        known = int(present.sum())
        before = len(images)
        with (
            self._ranks.together(),
            encoder.progress_bar(description, known + sum(map(len, parts))) as bar,
        ):
            bar.update(known)
            for part in parts:
                image_block = _Block(images)
                text_block = _Block(self._captions)
                encoded = encoder.batches(
                    source, part, captions="all", bar=bar, is_known=self._has_captions
                )
                for number, batch in enumerate(encoded, start=1):
                    image_block.add(image_keys(source, batch.rows), batch.image.numpy())
                    text_block.add(hash_captions(batch.text_keys), batch.text.numpy())
                    if number % BLOCK_BATCHES == 0:
                        # Captions first: the captions of a stored image are not encoded again.
                        text_block.flush()
                        image_block.flush()
                text_block.flush()
                image_block.flush()
                self._captions.refresh()
        written = sum(self._ranks.gather_objects(len(images) - before))
        for store in (self._captions, images):
            store.refresh()
        if len(images) < before + written:
            raise InputError(
                f"reference_cache: {images.folder} does not show this process what the others have "
                "written there. Give a folder on storage that all hosts share."
            )
        encoder.ledger.exchange(self._ranks)
        encoder.ledger.warn()

    def _has_captions(self, keys: list[str]) -> np.ndarray:
        return self._captions.has(hash_captions(keys))


class FeatureStore:
    """Features by 64-bit key, in memory-mapped blocks that are each written whole.

    A block is one `.npy` file of (key, feature) rows whose name carries the CRC-32 of its bytes. It
    is written under a temporary name and renamed: either all of it exists or nothing, and an
    interrupted sweep resumes after its last block. Reading maps the files, so that a set of
    millions costs no resident memory beyond its keys.

    Args:
        folder: where the blocks are; created if missing.
        width: D0, numbers per feature.
        is_half: store fp16 instead of fp32.

    Attributes:
        damaged: whether a damaged block was found, and removed, on opening.
    """

    def __init__(self, folder: Path, width: int, *, is_half: bool = False) -> None:
        self.folder = folder
        self.width = width
        number = "<f2" if is_half else "<f4"
        self._dtype = np.dtype([("key", "<i8"), ("feature", number, (width,))])
        self._blocks: dict[str, np.ndarray] = {}
        self.damaged = False
        folder.mkdir(parents=True, exist_ok=True)
        self.refresh()

    def __len__(self) -> int:
        """Return the number of rows, those `put` since the last `refresh` included."""
        return sum(map(len, self._blocks.values()))

    def has(self, keys: np.ndarray) -> np.ndarray:
        """Return which of `keys` (n,) had a feature at the last `refresh`, (n,) bool."""
        at = np.minimum(np.searchsorted(self._sorted, keys), max(len(self._sorted) - 1, 0))
        return self._sorted[at] == keys if len(self._sorted) else np.zeros(len(keys), bool)

    def get(self, keys: np.ndarray) -> np.ndarray:
        """Return features (n, D0) float32 of `keys` (n,); `KeyError` if one is missing."""
        found = self.has(keys)
        if not found.all():
            raise KeyError(int(keys[~found][0]))
        rows = self._order[np.searchsorted(self._sorted, keys)]
        features = np.empty((len(keys), self.width), np.float32)
        block_of = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(block_of):
            here = block_of == number
            features[here] = self._ordered[number]["feature"][rows[here] - self._starts[number]]
        return features

    def put(self, keys: np.ndarray, features: np.ndarray) -> None:
        """Append one block: `keys` (n,) int64 and their `features` (n, D0) float32."""
        if len(keys) == 0:
            return
        block = np.empty(len(keys), self._dtype)
        block["key"] = keys
        block["feature"] = features
        buffer = io.BytesIO()
        np.save(buffer, block)
        data = buffer.getbuffer()
        path = self.folder / f"{int(keys[0]) & (2**64 - 1):016x}-{zlib.crc32(data):08x}.npy"
        with replace_file(path, sync=True, size_bytes=len(data)) as temporary:
            temporary.write_bytes(data)
        self._blocks[path.name] = np.load(path, mmap_mode="r")

    def refresh(self) -> None:
        """Make what was `put`, here or by another process, visible to `has` and `get`.

        A separate step, because it sorts all keys.
        """
        for path in sorted(self.folder.glob("*.npy")):
            if path.name in self._blocks:
                continue
            block = self._open(path)
            if block is None:
                self.damaged = True
            else:
                self._blocks[path.name] = block
        # By name, so that all processes read one of several rows of a key. Offsets of each block in
        # the concatenation of all, so that one sorted array of keys finds both the block and the
        # row inside it.
        self._ordered = [self._blocks[name] for name in sorted(self._blocks)]
        sizes = [len(block) for block in self._ordered]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        keys = [np.asarray(block["key"]) for block in self._ordered]
        every = np.concatenate(keys) if keys else np.empty(0, np.int64)
        self._order = np.argsort(every, kind="stable")
        self._sorted = every[self._order]

    def _open(self, path: Path) -> np.ndarray | None:
        if path.stem.rpartition("-")[2] == f"{crc32(path):08x}":
            block = np.load(path, mmap_mode="r")
            if block.dtype == self._dtype and block.ndim == 1:
                return block
        log.warning(
            "Reference cache: %s is damaged or was not written by fasterase; its features are "
            "computed again.",
            path,
        )
        path.unlink()
        return None


class _Block:
    """Rows collected for the next block of a store."""

    def __init__(self, store: FeatureStore) -> None:
        self._store = store
        self._keys: list[np.ndarray] = []
        self._features: list[np.ndarray] = []

    def add(self, keys: np.ndarray, features: np.ndarray) -> None:
        self._keys.append(keys)
        self._features.append(features)

    def flush(self) -> None:
        if self._keys:
            self._store.put(np.concatenate(self._keys), np.concatenate(self._features))
        self._keys, self._features = [], []


def image_keys(source: PairSource, rows: np.ndarray) -> np.ndarray:
    """Return the keys (n,) of rows of `source`: rows of the source that it is a view of."""
    return source.indices[rows] if isinstance(source, Subset) else rows


def _resume_blocks(rows: np.ndarray, present: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the missing rows: first those of partly present blocks, then untouched blocks.

    Untouched blocks thereby keep their batches, wherever an earlier sweep was interrupted and
    however many unreadable rows it left out.
    """
    block = np.arange(len(rows)) // BLOCK
    touched = np.isin(block, np.unique(block[present]))
    for chosen in (touched & ~present, ~touched):
        if chosen.any():
            yield rows[chosen]
