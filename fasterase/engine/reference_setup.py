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
from fasterase.pairs.batches import Sampler
from fasterase.pairs.pair_source import PairSource
from fasterase.pairs.prepare import caption_key
from fasterase.reference.cached import (
    CachedReference,
    FeatureCache,
    Sweeper,
    caption_keys,
    image_keys,
)
from fasterase.reference.floor import PairFeatures, unmatched_cosine
from fasterase.reference.live import LiveReference, Reference

# Pairs of each set behind the floor: 2 x 1024^2 cosines give the mean of unrelated pairs to 1e-3.
FLOOR_PAIRS = 1024


@contextmanager
def cache_folder(settings: UnlearnConfig, *, stable: bool) -> Iterator[Path]:
    """Where features are kept: `reference_cache`, else inside `output_dir`, else until the end.

    Features of items that differ from one read to the next (`stable` False) are never kept.
    """
    if stable and settings.reference_cache is not None:
        yield Path(settings.reference_cache)
    elif stable and settings.output_dir is not None:
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
    precision: str,
    folder: Path,
) -> tuple[Reference, float]:
    """The reference of the run, and the original's mean cosine of unrelated pairs.

    Sweeps the pairs that the sampler will draw, not the whole sets, and a sample for the floor.

    Raises:
        InputError: too many pairs cannot be read.
    """
    tower = sweeper.tower
    key = hashlib.sha256(f"{tower.fingerprint()} {precision}".encode()).hexdigest()
    cache = FeatureCache(folder, key, tower.embed_dim)
    used = bool(settings.consistency_weight or settings.anchor_weight)
    live = used and not (forget.stable and retain.stable)
    with_forget = used and settings.negatives == "joint"
    drawn = _drawn_rows(sampler, total_steps) if used and not live else {}
    samples: dict[str, np.ndarray] = {}
    for name, source in (("forget", forget), ("retain", retain)):
        rows = drawn.get(name, np.empty(0, np.int64)) if name == "retain" or with_forget else None
        samples[name] = _sample(len(source), rows, seed=settings.seed)
        wanted = samples[name] if rows is None else np.union1d(rows, samples[name])
        cache.fill(source, wanted, sweeper)
    floor = unmatched_cosine(
        _pair_features(cache, forget, samples["forget"]),
        _pair_features(cache, retain, samples["retain"]),
    )
    scale = tower.scale().detach().clone()
    if not live:
        return CachedReference(cache, forget, retain, scale=scale, with_forget=with_forget), floor
    warnings.warn(
        "forget or retain gives another item at a second read (random augmentation?), so the "
        "original model runs beside the trained one in every step: slower, with a second copy of "
        "the weights. Give plain images to have its features cached.",
        stacklevel=4,
    )
    size = settings.micro_batch_size
    return LiveReference(tower, autocast=sweeper.autocast, micro_batch_size=size), floor


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
    rows = np.arange(count) if drawn is None or len(drawn) == 0 else drawn
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
