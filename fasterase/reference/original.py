"""The original model's features, encoded once for everyone: evaluation, floor and reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from fasterase.encode import PairEncoder, PairFeatures, check_readable
from fasterase.errors import FaseraseError, InputError
from fasterase.pairs.batches import StepBatch
from fasterase.pairs.prepare import caption_key
from fasterase.pairs.table import PairTable
from fasterase.parallel.ranks import ALONE, Ranks
from fasterase.reference.cache import FeatureCache
from fasterase.seeds import Stream, generator

# Pairs of each set behind the floor: 2 x 1024^2 cosines give the mean of unrelated pairs to 1e-3.
FLOOR_PAIRS = 1024


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


class CachedReference:
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
        # Looked up once, since it takes the manifest of the whole set.
        self._forget = (forget, cache.images(forget)) if with_forget else None
        self._retain = (retain, cache.images(retain))
        self._cache = cache
        self.scale = scale

    def features(self, batch: StepBatch) -> tuple[Tensor, Tensor]:
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
                    f"step {batch.step + 1}: a {source.name} pair or its caption has no reference "
                    "features: it was unreadable or different when they were computed. Check that "
                    "the data does not change during the run, and run again."
                ) from error
        device = self.scale.device
        return torch.from_numpy(image).to(device), torch.from_numpy(text).to(device)


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


def floor_rows(count: int) -> np.ndarray:
    """Return the rows (sorted) of a set of `count` that the floor is measured on.

    They depend on nothing else, so that runs with other steps, batches or seeds have one floor.
    """
    if count <= FLOOR_PAIRS:
        return np.arange(count)
    return np.sort(generator(0, Stream.FLOOR).choice(count, size=FLOOR_PAIRS, replace=False))


def unmatched_cosine(forget: PairFeatures, retain: PairFeatures) -> float:
    """Return the mean cosine of forget images with retain captions and the reverse: the floor.

    Never taken inside the forget set, whose pairs may all share one caption: every "unmatched" pair
    there would be a matched one. Pairs with equal captions are left out.

    Returns:
        The mean; 0 if no two captions of the sets differ.

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
    cosines = forget.image @ retain.first_text.T + forget.first_text @ retain.image.T
    count = 2 * int(differ.sum())
    return float(cosines[differ].double().sum()) / count if count else 0.0


def _first_caption(source: PairTable, row: int) -> str:
    texts = source.texts(row)
    return caption_key(texts if isinstance(texts, Tensor) else texts[0])
