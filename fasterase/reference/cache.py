"""Features of one model on disk, computed once and found again by later runs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fasterase.encode import PairEncoder
from fasterase.errors import InputError
from fasterase.files import check_writable
from fasterase.pairs.prepare import hash_captions
from fasterase.pairs.table import PairTable
from fasterase.parallel.ranks import ALONE, Ranks
from fasterase.reference.feature_store import NO_CAPTIONS, FeatureStore

# Rows of a block on disk: 4 MB of D=1024. A block holds whole batches, so that a resumed sweep
# repeats the same batches, and with them the same last bits, as an uninterrupted one.
BLOCK = 1024
# Stored rows that a process checks before a run, which can mend damage only there: all that a run
# draws by default, in seconds. Of more than these, the others are checked when they are used.
CHECKED_ROWS = 1 << 18


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
        self._dtype = "fp16" if is_half else "fp32"
        self.width = width
        self._ranks = ranks
        self._images: dict[str, FeatureStore] = {}

    @cached_property
    def _captions(self) -> FeatureStore:
        with self._ranks.together():
            check_writable(self._root, argument="reference_cache")
        return self._open(self._folder / "captions")

    def _open(self, folder: Path) -> FeatureStore:
        """Open a store on the first rank, which removes damaged blocks, then on the others."""
        for first in (True, False):
            with self._ranks.together():
                if self._ranks.is_first == first:
                    store = FeatureStore(folder, self.width, dtype=self._dtype)
        return store

    def images(self, source: PairTable) -> FeatureStore:
        """Return the store of the source's images, whose keys `base_rows` gives.

        Raises:
            InputError: the folder cannot be written to.
        """
        manifest = source.base.digest()
        if manifest not in self._images:
            folder = self._captions.folder.with_name(f"images-{manifest[:16]}")
            self._images[manifest] = self._open(folder)
        return self._images[manifest]

    def texts(self, keys: list[str]) -> np.ndarray:
        """Return features (n, D0) of captions by their identities; `KeyError` if one is missing."""
        return self._captions.get(hash_captions(keys))

    def fill(
        self, source: PairTable, rows: np.ndarray, encoder: PairEncoder, *, description: str
    ) -> None:
        """Encode those of `rows` (sorted, distinct) that are missing, with all their captions.

        Damaged blocks are removed first, and their features encoded again.

        Raises:
            InputError: too many pairs cannot be read.
        """
        images = self.images(source)
        keys = source.base_rows(rows)
        self._remove_damaged(images, keys)
        present = images.has(keys)
        parts = [encoder.own_rows(part) for part in _resume_blocks(rows, present)]
        # Their images are encoded again, to reach their captions, but not stored twice.
        no_captions = encoder.own_rows(rows[self._lack_captions(images, keys)])
        known = int(present.sum())
        before = len(images)
        total = known + sum(map(len, parts)) + len(no_captions)
        with self._ranks.together(), encoder.progress_bar(description, total) as bar:
            bar.update(known)
            for part in parts:
                self._encode(source, part, encoder, bar, images)
            if len(no_captions):
                self._encode(source, no_captions, encoder, bar, None)
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

    def _encode(
        self,
        source: PairTable,
        rows: np.ndarray,
        encoder: PairEncoder,
        bar: tqdm,
        images: FeatureStore | None,
    ) -> None:
        """Encode rows and store the captions that are missing, and the images in `images`."""
        image_block = None if images is None else _NextBlock(images)
        text_block = _NextBlock(self._captions)

        def flush() -> None:
            # Captions first: the captions of a stored image are not encoded again.
            text_block.flush()
            if image_block is not None:
                image_block.flush()

        encoded = encoder.batches(
            source, rows, captions="all", bar=bar, is_known=self._has_captions
        )
        for number, batch in enumerate(encoded, start=1):
            text_block.add(hash_captions(batch.text_keys), batch.text.numpy())
            if image_block is not None:
                captions = np.empty(len(batch.captions), NO_CAPTIONS.dtype)
                of_row = np.array([row for row, _ in batch.captions], np.int64)
                captions["key"] = source.base_rows(of_row)
                captions["caption"] = hash_captions([key for _, key in batch.captions])
                image_block.add(source.base_rows(batch.rows), batch.image.numpy(), captions)
            if number % max(1, BLOCK // encoder.batch_size) == 0:
                flush()
        flush()
        self._captions.refresh()

    def _remove_damaged(self, images: FeatureStore, keys: np.ndarray) -> None:
        """Remove blocks with damaged features of `keys` or of their captions, on all ranks.

        Each rank reads at most `CHECKED_ROWS` of its share, evenly spaced.
        """
        with self._ranks.together():
            own = keys[self._own_present(images, keys)]
            own = own[np.linspace(0, len(own), min(len(own), CHECKED_ROWS), False, dtype=np.int64)]
            damaged = images.damaged_blocks(own)
            captions = np.unique(images.captions(own)["caption"])
            damaged_texts = self._captions.damaged_blocks(captions[self._captions.has(captions)])
        for found in self._ranks.gather_objects((damaged, damaged_texts)):
            images.remove(found[0])
            self._captions.remove(found[1])

    def _lack_captions(self, images: FeatureStore, keys: np.ndarray) -> np.ndarray:
        """Return which of `keys` (n,) have an image whose captions are lost, (n,) bool.

        Of a caption that several images have lost, the first of them on each rank stands for it.
        """
        with self._ranks.together():
            captions = images.captions(keys[self._own_present(images, keys)])
            lost = captions[~self._captions.has(captions["caption"])]
            lost = lost[np.unique(lost["caption"], return_index=True)[1]]
        every = np.concatenate(self._ranks.gather_objects(lost["key"]))
        return np.isin(keys, every)

    def _own_present(self, images: FeatureStore, keys: np.ndarray) -> np.ndarray:
        """Return this rank's share of the positions of `keys` (n,) that have an image."""
        present = np.flatnonzero(images.has(keys))
        share = self._ranks.share(len(present))
        return present[share.start : share.stop]

    def _has_captions(self, keys: list[str]) -> np.ndarray:
        return self._captions.has(hash_captions(keys))


class _NextBlock:
    """Rows collected for the next block of a store."""

    def __init__(self, store: FeatureStore) -> None:
        self._store = store
        self._parts: list[tuple[np.ndarray, ...]] = []

    def add(
        self, keys: np.ndarray, features: np.ndarray, captions: np.ndarray = NO_CAPTIONS
    ) -> None:
        self._parts.append((keys, features, captions))

    def flush(self) -> None:
        if self._parts:
            self._store.put(*map(np.concatenate, zip(*self._parts, strict=True)))
        self._parts = []


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
