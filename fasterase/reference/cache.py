"""The original's features of the pairs that a run draws, computed once and kept between runs."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from fasterase.errors import FaseraseError
from fasterase.pairs.batches import StepBatch, sweep
from fasterase.pairs.source import PairSource, Subset
from fasterase.reference.sweeper import ENCODED, Sweeper

# Rows of a block on disk: 1024 rows of D=1024 are 4 MB. A block holds whole batches, so that a
# sweep that was killed repeats the same batches, and with them the same last bits, when it goes on.
BLOCK = 16 * ENCODED


class FeatureCache:
    """Features of one model over any number of sources, in `folder`.

    Images are kept by the row of the source they came from, under the source's manifest; captions
    by their content, whatever source they stand in. Views of one source (`fasterase.split`, overlap
    removal) share its rows, so that erasing another concept finds them again.

    Args:
        folder: root of the cache.
        model_key: tells models apart: weights, preprocessing and compute dtype.
        width: D0.
    """

    def __init__(self, folder: Path, model_key: str, width: int) -> None:
        self._folder = folder / model_key[:16]
        self._width = width
        self._images: dict[str, FeatureStore] = {}
        self.captions = FeatureStore(self._folder / "captions", width)
        if self.captions.damaged:
            # Images are not swept again while they are there, and with them their captions.
            shutil.rmtree(self._folder)
            self.captions = FeatureStore(self._folder / "captions", width)

    def images(self, source: PairSource) -> FeatureStore:
        """The store of the source's images, whose keys `image_keys` gives."""
        manifest = (source.base if isinstance(source, Subset) else source).manifest()
        if manifest not in self._images:
            store = FeatureStore(self._folder / f"images-{manifest[:16]}", self._width)
            self._images[manifest] = store
        return self._images[manifest]

    def fill(self, source: PairSource, rows: np.ndarray, sweeper: Sweeper) -> None:
        """Encode, with all captions, those of `rows` (sorted, distinct) that are not there yet.

        Raises:
            InputError: too many pairs cannot be read.
        """
        store = self.images(source)
        bar = tqdm(
            total=len(rows),
            desc=f"original's features ({source.name})",
            unit="pair",
            disable=not sweeper.progress,
        )
        with bar:
            there = store.has(image_keys(source, rows))
            bar.update(int(there.sum()))
            for part in _parts(rows, there):
                self._sweep(source, part, store, sweeper, bar)
        store.refresh()
        sweeper.ledger.warn()

    def _sweep(
        self,
        source: PairSource,
        rows: np.ndarray,
        store: FeatureStore,
        sweeper: Sweeper,
        bar: tqdm,
    ) -> None:
        images = _Block(store)
        captions = _Block(self.captions)
        batches = sweep(
            source,
            rows,
            None,
            sweeper.prepare,
            batch_size=ENCODED,
            num_workers=sweeper.num_workers,
        )
        for number, batch in enumerate(batches, start=1):
            sweeper.ledger.add(batch.ids, batch.skipped)
            if len(batch.rows):
                images.add(image_keys(source, batch.rows), sweeper.image(batch.pixels))
            keys = caption_keys(batch.new_keys)
            fresh = ~self.captions.has(keys)
            if fresh.any():
                rows_of = torch.from_numpy(np.flatnonzero(fresh))
                captions.add(keys[fresh], sweeper.text(batch.tokens.index(rows_of)))
            bar.update(len(batch.rows) + len(batch.skipped))
            if number % (BLOCK // ENCODED) == 0:
                captions.flush()
                images.flush()
        # Captions first: an image whose captions are missing would never be swept again.
        captions.flush()
        images.flush()
        self.captions.refresh()


class _Block:
    """Rows gathered for the next block of a store."""

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


class CachedReference:
    """The original's features of a step's batch, from a filled cache.

    Args:
        cache: the cache, filled with the rows that are asked for.
        forget, retain: the sources that batches' rows belong to.
        scale: 0-d, exp(logit_scale) of the original.
        with_forget: also give forget rows their features. Where the losses do not use them they
            are zeros. A cached row is of the image as it is, not as augmented: what the original
            says of a picture is the target for every view of it.
    """

    def __init__(
        self,
        cache: FeatureCache,
        forget: PairSource,
        retain: PairSource,
        *,
        scale: Tensor,
        with_forget: bool,
    ) -> None:
        # Looked up here, since it goes through the manifest of the whole set.
        self._forget = (forget, cache.images(forget)) if with_forget else None
        self._retain = (retain, cache.images(retain))
        self._captions = cache.captions
        self.scale = scale

    def features(self, batch: StepBatch) -> tuple[Tensor, Tensor]:
        n = batch.n_forget
        parts = [(*self._retain, batch.retain_rows, slice(n, None))]
        if self._forget is not None:
            parts.append((*self._forget, batch.forget_rows, slice(0, n)))
        width = self._captions.width
        image = np.zeros((len(batch.ids), width), np.float32)
        text = np.zeros((len(batch.ids), width), np.float32)
        for source, images, rows, where in parts:
            try:
                image[where] = images.get(image_keys(source, rows))
                text[where] = self._captions.get(caption_keys(batch.keys[where]))
            except KeyError as error:
                raise FaseraseError(
                    f"step {batch.step + 1}: a {source.name} pair or its caption has no reference "
                    "features: it could not be read, or was another, when they were computed. "
                    "Check that the data does not change during the run, and run again."
                ) from error
        device = self.scale.device
        return torch.from_numpy(image).to(device), torch.from_numpy(text).to(device)


def image_keys(source: PairSource, rows: np.ndarray) -> np.ndarray:
    """Keys (n,) of rows of `source`: rows of the source that it is a view of."""
    return source.indices[rows] if isinstance(source, Subset) else rows


def caption_keys(captions: Sequence[str]) -> np.ndarray:
    """64-bit keys (n,) of caption identities."""
    digests = (
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        for text in captions
    )
    return np.frombuffer(b"".join(digests), dtype="<i8")


def _parts(rows: np.ndarray, there: np.ndarray) -> Iterator[np.ndarray]:
    """Missing rows: first those of blocks that are partly there, then those of untouched blocks.

    Untouched blocks so keep their batches, wherever an earlier sweep was killed and however many
    unreadable rows it left out.
    """
    block = np.arange(len(rows)) // BLOCK
    touched = np.isin(block, np.unique(block[there]))
    for chosen in (touched & ~there, ~touched):
        if chosen.any():
            yield rows[chosen]


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
