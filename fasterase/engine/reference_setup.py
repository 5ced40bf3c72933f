"""Before the first step: which reference a run uses, its features, and the floor they give."""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from fasterase.config import UnlearnConfig
from fasterase.errors import InputError
from fasterase.pairs.batches import Sampler
from fasterase.pairs.prepare import caption_key
from fasterase.pairs.source import PairSource
from fasterase.reference.cache import CachedReference, FeatureCache, caption_keys, image_keys
from fasterase.reference.floor import PairFeatures, unmatched_cosine
from fasterase.reference.live import LiveReference, Reference
from fasterase.reference.sweeper import Sweeper

# Pairs of each set behind the floor: 2 x 1024^2 cosines give the mean of unrelated pairs to 1e-3.
FLOOR_PAIRS = 1024


@contextmanager
def cache_folder(settings: UnlearnConfig) -> Iterator[Path]:
    """Where features are kept: `reference_cache`, else inside `output_dir`, else until the end."""
    if settings.reference_cache is not None:
        yield Path(settings.reference_cache)
    elif settings.output_dir is not None:
        yield Path(settings.output_dir) / "reference"
    else:
        with tempfile.TemporaryDirectory(prefix="fasterase-") as folder:
            yield Path(folder)


def build_reference(
    sweeper: Sweeper,
    forget: PairSource,
    retain: PairSource,
    sampler: Sampler,
    *,
    total_steps: int,
    settings: UnlearnConfig,
    fingerprint: str,
    precision: str,
    folder: Path,
) -> tuple[Reference | None, float]:
    """The reference of the run, and the original's mean cosine of unrelated pairs.

    Args:
        sweeper: reads and encodes pairs; its tower is still the original, whose `fingerprint` tells
            its features from those of others, as the `precision` does.
        forget, retain: the sets.
        sampler: knows which of their rows each of the `total_steps` draws.
        settings: of the run.
        folder: of the features.

    Returns:
        The reference, None where no loss uses it; and the cosine.

    Raises:
        InputError: too many pairs cannot be read, or none of a set.
    """
    used = bool(settings.consistency_weight or settings.anchor_weight)
    if not (forget.stable and retain.stable):
        return _live_reference(sweeper, forget, retain, settings=settings, used=used)
    key = hashlib.sha256(f"{fingerprint} {precision}".encode()).hexdigest()
    cache = _opened(folder, key, sweeper.tower.embed_dim)
    with_forget = used and settings.negatives == "joint"
    drawn = _drawn_rows(sampler, total_steps) if used else {}
    # A retain set of millions is not swept for a run that draws a fraction of it.
    swept = {"forget": drawn.get("forget") if with_forget else None, "retain": drawn.get("retain")}
    pairs = []
    for source, rows in ((forget, swept["forget"]), (retain, swept["retain"])):
        sample = _sample(len(source), rows, seed=settings.seed)
        cache.fill(source, sample if rows is None else rows, sweeper)
        pairs.append(_pair_features(cache, source, sample))
    floor = _floor(forget, pairs[0], retain, pairs[1])
    if not used:
        return None, floor
    scale = sweeper.tower.scale().detach().clone()
    return CachedReference(cache, forget, retain, scale=scale, with_forget=with_forget), floor


def _live_reference(
    sweeper: Sweeper,
    forget: PairSource,
    retain: PairSource,
    *,
    settings: UnlearnConfig,
    used: bool,
) -> tuple[LiveReference | None, float]:
    """The same where a stored feature would belong to another view of the item."""
    pairs = [
        sweeper.pairs(source, _sample(len(source), None, seed=settings.seed))
        for source in (forget, retain)
    ]
    floor = _floor(forget, pairs[0], retain, pairs[1])
    if not used:
        return None, floor
    warnings.warn(
        "forget or retain gives another item at a second read (random augmentation?), so the "
        "original model runs beside the trained one in every step: slower, with a second copy of "
        "the weights. Give plain images to have its features cached.",
        stacklevel=5,
    )
    size = settings.micro_batch_size
    return LiveReference(sweeper.tower, autocast=sweeper.autocast, micro_batch_size=size), floor


def _opened(folder: Path, key: str, width: int) -> FeatureCache:
    try:
        return FeatureCache(folder, key, width)
    except OSError as error:
        raise InputError(
            f"reference_cache: {folder} cannot be used ({error.strerror}). "
            "Give a folder that can be written to."
        ) from error


def _floor(
    forget: PairSource, forget_pairs: PairFeatures, retain: PairSource, retain_pairs: PairFeatures
) -> float:
    for source, pairs in ((forget, forget_pairs), (retain, retain_pairs)):
        if len(pairs.keys) == 0:
            raise InputError(
                f"`{source.name}`: none of the pairs tried can be read; the warnings name them. "
                "Repair them, or give other pairs."
            )
    return unmatched_cosine(forget_pairs, retain_pairs)


def _drawn_rows(sampler: Sampler, total_steps: int) -> dict[str, np.ndarray]:
    """Rows (sorted, distinct) of each set that the run's steps draw."""
    forget = np.zeros(sampler.n_forget, bool)
    retain = np.zeros(sampler.n_retain, bool)
    for step in range(total_steps):
        draw = sampler.draw(step)
        forget[draw.forget] = True
        retain[draw.retain] = True
    return {"forget": np.flatnonzero(forget), "retain": np.flatnonzero(retain)}


def _sample(count: int, drawn: np.ndarray | None, *, seed: int) -> np.ndarray:
    """Rows for the floor, sorted: out of those that are swept anyway where there are some."""
    rows = np.arange(count) if drawn is None else drawn
    order = np.random.default_rng([seed, 5]).permutation(len(rows))
    return np.sort(rows[order[:FLOOR_PAIRS]])


def _pair_features(cache: FeatureCache, source: PairSource, rows: np.ndarray) -> PairFeatures:
    images = cache.images(source)
    readable = rows[images.has(image_keys(source, rows))]
    keys = caption_keys([_first_caption(source, int(row)) for row in readable])
    return PairFeatures(
        torch.from_numpy(images.get(image_keys(source, readable))),
        torch.from_numpy(cache.captions.get(keys)),
        keys,
    )


def _first_caption(source: PairSource, row: int) -> str:
    texts = source.texts(row)
    return caption_key(texts if isinstance(texts, torch.Tensor) else texts[0])
