"""The frozen original's features, encoded once and cached or computed in each step; the floor."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

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
from fasterase.progress import Progress
from fasterase.seeds import Stream, generator
from fasterase.transfers import to_device

# Rows of a block on disk: 4 MB of D=1024. A block holds whole batches, so that a resumed sweep
# repeats the same batches, and with them the same last bits, as an uninterrupted one.
BLOCK = 1024
# Stored rows that are checked before a run, which can repair damage only there: all that a run
# draws by default, in seconds. Of more than these, the others are checked when they are used.
CHECKED_ROWS = 1 << 18
# Pairs of each set behind the floor: 2 x 1024^2 cosines give the mean of unrelated pairs to 1e-3.
FLOOR_PAIRS = 1024
# Distance of unit features of one pair under one model, in batches of other sizes, on other
# devices, with TF32 (fp32), or in half precision. Other pictures are 0.3 to 1.4 apart.
ROUNDING, ROUNDING_HALF = 0.05, 0.2


class OriginalFeatures:
    """Features of any number of sources under the original model; each pair is encoded once.

    Sources whose items are the same on every read are cached on disk: images by their row in the
    source (which its views share), under its digest, and captions by their content, whatever source
    they come from. Other sources are kept in memory: another read would give another view.

    Args:
        encoder: the original model. Each of its ranks encodes its share and writes blocks of its
            own; all of them see the folder, and call the methods alike.
        folder: root of the cache, created when first used.
        model_key: identifies the model: weights, preprocessing and compute dtype.
        is_half: store fp16 in a cache of its own, for a loss that multiplies in fp16 anyway. Of
            unit rows it keeps 11 bits.
    """

    def __init__(
        self, encoder: PairEncoder, folder: Path, model_key: str, *, is_half: bool = False
    ) -> None:
        self.width = encoder.model.embed_dim
        self._encoder, self._ranks = encoder, encoder.ranks
        self._root = folder
        # The part of the cache that has this model's features.
        self.folder = folder / (model_key[:16] + ("-fp16" if is_half else ""))
        self._dtype = "fp16" if is_half else "fp32"
        self._images: dict[str, FeatureStore] = {}
        self._in_memory: dict[int, PairFeatures] = {}

    @cached_property
    def _captions(self) -> FeatureStore:
        with self._ranks.raising_together():
            check_writable(self._root, argument="reference_cache")
        return self._open(self.folder / "captions")

    def _open(self, folder: Path) -> FeatureStore:
        """Open a store on the first rank, which removes damaged blocks, then on the others."""
        for first in (True, False):
            with self._ranks.raising_together():
                if self._ranks.is_first == first:
                    store = FeatureStore(folder, self.width, dtype=self._dtype)
        return store

    def images(self, source: PairTable) -> FeatureStore:
        """Return the store of the source's images, whose keys `base_rows` gives.

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

    def encode(self, source: PairTable, rows: np.ndarray) -> None:
        """Encode those of `rows` (sorted, distinct) that are missing, with all their captions.

        Damaged blocks are removed first, and their features encoded again.

        Raises:
            InputError: too many pairs cannot be read; none, of a source that is not stable.
        """
        encoder, description = self._encoder, f"original's features ({source.name})"
        if not source.stable:
            self._in_memory[id(source)] = encoder.pairs(source, rows, description=description)
            return
        images = self.images(source)
        keys = source.base_rows(rows)
        self._remove_damaged(images, keys)
        present = images.has(keys)
        captions = images.captions(keys[present])
        lost = captions[~self._captions.has(captions[:, 1])]
        # Of a caption that several images have lost, the first of them is encoded again.
        present &= ~np.isin(keys, lost[np.unique(lost[:, 1], return_index=True)[1], 0])
        # First the missing rows of blocks that are partly there, then those of the others: all
        # thereby keep their batches, wherever an earlier sweep was interrupted.
        block = np.arange(len(rows)) // BLOCK
        touched = np.isin(block, block[present])
        parts = [
            encoder.own_rows(rows[some]) for some in (touched & ~present, ~touched) if some.any()
        ]
        known = int(present.sum())
        before = len(images)
        total = known + sum(map(len, parts))
        with self._ranks.raising_together(), encoder.progress(description, total) as bar:
            bar.update(known)
            for part in parts:
                self._encode(source, part, bar)
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

    def pairs(self, source: PairTable, rows: np.ndarray) -> PairFeatures:
        """Return features of `rows` with their first captions; unreadable pairs are left out.

        Raises:
            InputError: none of the pairs can be read.
        """
        if not source.stable:
            return self._in_memory[id(source)].at(rows)
        images = self.images(source)
        readable = rows[images.has(source.base_rows(rows))]
        check_readable(source, len(rows), len(readable))
        place: dict[str, int] = {}
        pair_text = []
        for texts in map(source.texts, readable.tolist()):
            key = caption_key(texts if isinstance(texts, Tensor) else texts[0])
            pair_text.append([place.setdefault(key, len(place))])
        return PairFeatures(
            readable,
            torch.from_numpy(images.get(source.base_rows(readable))),
            torch.from_numpy(self.texts(list(place))),
            list(place),
            pair_text,
            [],
        )

    def _encode(self, source: PairTable, rows: np.ndarray, bar: Progress) -> None:
        """Encode rows, and store their images and the captions that are missing."""
        images, encoder = self.images(source), self._encoder

        def is_known(keys: list[str]) -> np.ndarray:
            return self._captions.has(hash_captions(keys))

        encoded = encoder.batches(source, rows, captions="all", bar=bar, is_known=is_known)
        while block := list(islice(encoded, max(1, BLOCK // encoder.batch_size))):
            # Captions first: the captions of a stored image are not encoded again.
            self._captions.put(
                hash_captions([key for batch in block for key in batch.text_keys]),
                torch.cat([batch.text for batch in block]).numpy(),
            )
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
            keys = keys[images.has(keys)]
            share = self._ranks.share(len(keys))
            keys = keys[share.start : share.stop]
            some = keys[np.linspace(0, len(keys), min(len(keys), CHECKED_ROWS), False, dtype=int)]
            captions = np.unique(images.captions(some)[:, 1])
            captions = captions[self._captions.has(captions)]
            damaged = images.damaged_blocks(some), self._captions.damaged_blocks(captions)
        for of_images, of_captions in self._ranks.gather_objects(damaged):
            images.remove(of_images)
            self._captions.remove(of_captions)


class CachedOriginal:
    """The original's features of a step's batch, read from the cache that has its rows.

    `scale` is its exp(logit_scale), 0-d. `with_forget` returns features of forget rows too, which
    `negatives="joint"` and `cross_weight` use; else they are zeros. A cached row belongs to the
    plain image: the original's answer to a picture is the target for every augmented view.
    """

    def __init__(
        self,
        cache: OriginalFeatures,
        forget: PairTable,
        retain: PairTable,
        *,
        scale: Tensor,
        with_forget: bool,
    ) -> None:
        self._cache, self._sources = cache, (retain, forget) if with_forget else (retain,)
        self.scale = scale

    def features(self, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """Return unit features (n, D0), (n, D0) fp32 of the batch's images and captions."""
        n, keys = batch.n_forget, batch.keys
        places = [(batch.retain_rows, slice(n, None)), (batch.forget_rows, slice(0, n))]
        image, text = np.zeros((2, len(keys), self._cache.width), np.float32)
        for source, (rows, where) in zip(self._sources, places, strict=False):
            try:
                image[where] = self._cache.images(source).get(source.base_rows(rows))
                text[where] = self._cache.texts(keys[where])
            except KeyError as error:
                raise FaseraseError(
                    f"step {batch.step + 1}: a {source.name} pair or its caption is not among the "
                    "original's features: it was unreadable or different when they were computed. "
                    "Check that the data does not change during the run, and run again."
                ) from error
        device = self.scale.device
        return to_device(torch.from_numpy(image), device), to_device(torch.from_numpy(text), device)

    def check_start(
        self, batch: StepBatch, now: Sequence[Tensor], *, towers: Collection[str], precision: str
    ) -> None:
        """Check that a run begins at the features it compares with, so that its KL begins at 0.

        `now` are the model's image and text features (n, D) of the first batch before any update.
        `towers` (of `"image"` and `"text"`) are still the original's.

        Raises:
            InputError: they differ by more than rounding for a retain pair.
        """
        most = ROUNDING if precision == "fp32" else ROUNDING_HALF
        for tower, ours, before in zip(("image", "text"), now, self.features(batch), strict=True):
            moved = (ours - before).norm(dim=1)[batch.n_forget :]
            far = (moved > most).nonzero().flatten().tolist()
            if far and tower in towers:
                raise InputError(
                    f"retain: before the first update, the {tower} features of {len(far)} of "
                    f"{len(moved)} pairs, such as {batch.ids[batch.n_forget + far[0]]}, are not "
                    f"those kept of the original (they are {float(moved[far].max()):.2g} apart; "
                    f"rounding explains {most:g}): the KL of the first step would not be 0, and "
                    f"the run would hold on to other pairs. Either they have changed since they "
                    f"were encoded, or they are others at each read. Give pairs that stay the "
                    f"same, remove {self._cache.folder}, and run again."
                )


class LiveOriginal:
    """A frozen copy of the model, which encodes each batch beside the trained one.

    A cached row would belong to another view of the image, and a wrong target corrupts consistency
    and anchor silently.
    """

    def __init__(self, model: DualEncoder, *, precision: str) -> None:
        original = frozen_copy(model)
        self._forward = TowerForward(original, precision=precision)
        self._device = original.device
        self.scale = original.scale().detach()

    @torch.no_grad()
    def features(self, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """Return unit features (n, D0), (n, D0) fp32 of the batch's images and captions."""
        found = [
            self._forward(
                to_device(part.pixels, self._device), to_device(part.tokens, self._device)
            )
            for part in batch.micro_batches
        ]
        return torch.cat([each.image for each in found]), torch.cat([each.text for each in found])


# What a step takes the original's features from.
Original = CachedOriginal | LiveOriginal


@contextmanager
def cache_folder(
    reference_cache: str | None, output_dir: Path | None, ranks: Ranks = ALONE
) -> Iterator[Path]:
    """Yield where all ranks keep features: `reference_cache`, in `output_dir`, or temporary."""
    if reference_cache is not None:
        yield Path(os.path.expanduser(reference_cache))
    elif output_dir is not None:
        yield output_dir / "reference"
    else:
        with ranks.first_enters(_temporary_folder) as folder:
            yield Path(folder)


def _temporary_folder() -> TemporaryDirectory[str]:
    try:
        return TemporaryDirectory(prefix="fasterase-")
    except OSError as error:
        raise InputError(
            f"reference_cache: no temporary folder can be written to ({error.strerror}). Give a "
            "folder that can, an output_dir, or set TMPDIR."
        ) from error


def feature_key(*encoding: str) -> str:
    """Return the `model_key` of a fingerprint, a compute dtype, and what else changes features."""
    return hashlib.sha256(" ".join(encoding).encode()).hexdigest()


def floor_rows(count: int) -> np.ndarray:
    """Return the rows (sorted) of a set of `count` that the floor of any run is measured on."""
    if count <= FLOOR_PAIRS:
        return np.arange(count)
    return np.sort(generator(0, Stream.FLOOR).choice(count, size=FLOOR_PAIRS, replace=False))


class Unmatched(NamedTuple):
    """Cosines of images and captions that are no pairs: the floor, and how far they spread."""

    mean: float
    deviation: float


def unmatched_cosines(forget: PairFeatures, retain: PairFeatures) -> Unmatched:
    """Return what cosines forget images have with retain captions, and the reverse.

    Never taken inside the forget set, whose pairs may all share one caption. Pairs with equal
    captions are left out; zeros if no two captions of the sets differ.

    Raises:
        InputError: the model's features are not finite, so no run can start from them.
    """
    for pairs in (forget, retain):
        if not (torch.isfinite(pairs.image).all() and torch.isfinite(pairs.first_text).all()):
            raise InputError(
                "model: its features are NaN or infinite before the first step. Give a model with "
                "finite weights, and precision='fp32' if it overflows in fp16."
            )
    captions = [np.array(pairs.first_captions, dtype=object) for pairs in (forget, retain)]
    differ = torch.from_numpy(captions[0][:, None] != captions[1][None, :])
    total = squares = 0.0
    for image, text in ((forget.image, retain.first_text), (forget.first_text, retain.image)):
        cosines = (image @ text.T)[differ].double()
        total, squares = total + float(cosines.sum()), squares + float(cosines.square().sum())
    count = 2 * int(differ.sum())
    if not count:
        return Unmatched(0.0, 0.0)
    mean = total / count
    return Unmatched(mean, math.sqrt(max(0.0, squares / count - mean**2)))
