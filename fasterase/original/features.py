"""The frozen original's features: encoded once and cached on disk, or computed in each step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fasterase.encode import PairEncoder, PairFeatures, check_readable
from fasterase.errors import FaseraseError, InputError
from fasterase.files import check_writable
from fasterase.models.dual_encoder import DualEncoder, frozen_copy
from fasterase.models.forward import TowerForward
from fasterase.original.store import FeatureStore
from fasterase.pairs.batches import StepBatch
from fasterase.pairs.prepare import caption_key, hash_captions
from fasterase.pairs.table import PairTable
from fasterase.parallel.ranks import ALONE, Ranks

# Rows of a block on disk: 4 MB of D=1024. A block holds whole batches, so that a resumed sweep
# repeats the same batches, and with them the same last bits, as an uninterrupted one.
BLOCK = 1024
# Stored rows that a process checks before a run, which can mend damage only there: all that a run
# draws by default, in seconds. Of more than these, the others are checked when they are used.
CHECKED_ROWS = 1 << 18


class FeatureCache:
    """Features of one model over any number of sources.

    Images are stored by their row in the source, under the source's digest; captions by their
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
        with self._ranks.raising_together():
            check_writable(self._root, argument="reference_cache")
        return self._open(self._folder / "captions")

    def _open(self, folder: Path) -> FeatureStore:
        """Open a store on the first rank, which removes damaged blocks, then on the others."""
        for first in (True, False):
            with self._ranks.raising_together():
                if self._ranks.is_first == first:
                    store = FeatureStore(folder, self.width, dtype=self._dtype)
        return store

    def images(self, source: PairTable) -> FeatureStore:
        """Return the store of the source's images, whose keys `base_rows` gives.

        Raises:
            InputError: the folder cannot be written to.
        """
        digest = source.base.digest()
        if digest not in self._images:
            folder = self._captions.folder.with_name(f"images-{digest[:16]}")
            self._images[digest] = self._open(folder)
        return self._images[digest]

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
        with self._ranks.raising_together(), encoder.progress_bar(description, total) as bar:
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
        encoded = encoder.batches(
            source, rows, captions="all", bar=bar, is_known=self._has_captions
        )
        while block := list(islice(encoded, max(1, BLOCK // encoder.batch_size))):
            # Captions first: the captions of a stored image are not encoded again.
            self._captions.put(
                hash_captions([key for batch in block for key in batch.text_keys]),
                torch.cat([batch.text for batch in block]).numpy(),
            )
            if images is not None:
                captions = [caption for batch in block for caption in batch.captions]
                of_row = source.base_rows(np.array([row for row, _ in captions], np.int64))
                images.put(
                    source.base_rows(np.concatenate([batch.rows for batch in block])),
                    torch.cat([batch.image for batch in block]).numpy(),
                    np.stack([of_row, hash_captions([key for _, key in captions])], axis=1),
                )
        self._captions.refresh()

    def _remove_damaged(self, images: FeatureStore, keys: np.ndarray) -> None:
        """Remove blocks with damaged features of `keys` or of their captions, on all ranks.

        Each rank reads at most `CHECKED_ROWS` of its share, evenly spaced.
        """
        with self._ranks.raising_together():
            own = self._own_present(images, keys)
            own = own[np.linspace(0, len(own), min(len(own), CHECKED_ROWS), False, dtype=np.int64)]
            damaged = images.damaged_blocks(own)
            captions = np.unique(images.captions(own)[:, 1])
            damaged_texts = self._captions.damaged_blocks(captions[self._captions.has(captions)])
        for found in self._ranks.gather_objects((damaged, damaged_texts)):
            images.remove(found[0])
            self._captions.remove(found[1])

    def _lack_captions(self, images: FeatureStore, keys: np.ndarray) -> np.ndarray:
        """Return which of `keys` (n,) have an image whose captions are lost, (n,) bool.

        Of a caption that several images have lost, the first of them on each rank stands for it.
        """
        with self._ranks.raising_together():
            captions = images.captions(self._own_present(images, keys))
            lost = captions[~self._captions.has(captions[:, 1])]
            lost = lost[np.unique(lost[:, 1], return_index=True)[1]]
        every = np.concatenate(self._ranks.gather_objects(lost[:, 0]))
        return np.isin(keys, every)

    def _own_present(self, images: FeatureStore, keys: np.ndarray) -> np.ndarray:
        """Return this rank's share of those of `keys` (n,) that have an image."""
        present = keys[images.has(keys)]
        share = self._ranks.share(len(present))
        return present[share.start : share.stop]

    def _has_captions(self, keys: list[str]) -> np.ndarray:
        return self._captions.has(hash_captions(keys))


class OriginalFeatures:
    """Features of the sets under the original model; each pair is encoded once.

    Sources whose items are the same on every read go through the cache on disk. The others are
    kept in memory: another read would give another view of the pair.

    Args:
        encoder: the original model.
        cache: where features are stored between runs.
    """

    def __init__(self, encoder: PairEncoder, cache: FeatureCache) -> None:
        self._encoder = encoder
        self._cache = cache
        self._in_memory: dict[int, PairFeatures] = {}

    def encode(self, source: PairTable, rows: np.ndarray) -> None:
        """Encode rows (sorted, distinct) of a set, once for all later uses.

        Raises:
            InputError: too many pairs cannot be read, or none.
        """
        description = f"original's features ({source.name})"
        if source.stable:
            self._cache.fill(source, rows, self._encoder, description=description)
        else:
            self._in_memory[id(source)] = self._encoder.pairs(source, rows, description=description)

    def pairs(self, source: PairTable, rows: np.ndarray) -> PairFeatures:
        """Return features of `rows` with their first captions; unreadable pairs are left out.

        Raises:
            InputError: none of the pairs can be read.
        """
        if not source.stable:
            return self._in_memory[id(source)].at(rows)
        images = self._cache.images(source)
        readable = rows[images.has(source.base_rows(rows))]
        check_readable(source, len(rows), len(readable))
        place: dict[str, int] = {}
        pair_text = [
            [place.setdefault(_first_caption(source, row), len(place))] for row in readable.tolist()
        ]
        return PairFeatures(
            readable,
            torch.from_numpy(images.get(source.base_rows(readable))),
            torch.from_numpy(self._cache.texts(list(place))),
            list(place),
            pair_text,
            [],
        )


class CachedOriginal:
    """The original's features of a step's batch, read from the filled cache.

    Args:
        cache: filled with the rows that the batches hold.
        forget, retain: the sources of the batches' rows.
        scale: 0-d, exp(logit_scale) of the original.
        with_forget: also return features of forget rows, which `negatives="joint"` and
            `cross_weight` use; else they are zeros. A cached row belongs to the plain image, not to
            its augmented view: the original's answer to a picture is the target for every view.
    """

    def __init__(
        self,
        cache: FeatureCache,
        forget: PairTable,
        retain: PairTable,
        *,
        scale: Tensor,
        with_forget: bool,
    ) -> None:
        # Looked up once, since it takes the digest of the whole set.
        self._forget = (forget, cache.images(forget)) if with_forget else None
        self._retain = (retain, cache.images(retain))
        self._cache = cache
        self.scale = scale

    def features(self, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """Return unit features (n, D0), (n, D0) fp32 of the batch's images and captions."""
        n = batch.n_forget
        parts = [(*self._retain, batch.retain_rows, slice(n, None))]
        if self._forget is not None:
            parts.append((*self._forget, batch.forget_rows, slice(0, n)))
        keys = batch.keys
        image = np.zeros((len(keys), self._cache.width), np.float32)
        text = np.zeros((len(keys), self._cache.width), np.float32)
        for source, images, rows, where in parts:
            try:
                image[where] = images.get(source.base_rows(rows))
                text[where] = self._cache.texts(keys[where])
            except KeyError as error:
                raise FaseraseError(
                    f"step {batch.step + 1}: a {source.name} pair or its caption is not among the "
                    "original's features: it was unreadable or different when they were computed. "
                    "Check that the data does not change during the run, and run again."
                ) from error
        device = self.scale.device
        return torch.from_numpy(image).to(device), torch.from_numpy(text).to(device)


class LiveOriginal:
    """A frozen copy of the model, which encodes each batch beside the trained one.

    It costs a second set of weights and one more forward pass per step. A cached row would belong
    to another view of the image, and a wrong target corrupts consistency and anchor silently.
    """

    def __init__(self, model: DualEncoder, *, precision: str) -> None:
        original = frozen_copy(model)
        self._forward = TowerForward(original, precision=precision)
        self._device = original.device
        self.scale = original.scale().detach()

    @torch.no_grad()
    def features(self, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """Return unit features (n, D0), (n, D0) fp32 of the batch's images and captions."""
        images, texts = [], []
        for part in batch.micro_batches:
            found = self._forward(part.pixels.to(self._device), part.tokens.to(self._device))
            images.append(found.image)
            texts.append(found.text)
        return torch.cat(images), torch.cat(texts)


# What a step takes the original's features from.
Original = CachedOriginal | LiveOriginal


@contextmanager
def cache_folder(
    reference_cache: str | None, output_dir: Path | None, ranks: Ranks = ALONE
) -> Iterator[Path]:
    """Yield where features are kept: `reference_cache`, inside `output_dir`, or temporary.

    All ranks get the same folder.
    """
    if reference_cache is not None:
        yield Path(reference_cache)
    elif output_dir is not None:
        yield output_dir / "reference"
    else:
        with ranks.first_enters(lambda: TemporaryDirectory(prefix="fasterase-")) as folder:
            yield Path(folder)


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


def _first_caption(source: PairTable, row: int) -> str:
    texts = source.texts(row)
    return caption_key(texts if isinstance(texts, Tensor) else texts[0])
