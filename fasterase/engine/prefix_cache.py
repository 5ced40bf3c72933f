"""Outputs of the frozen lower blocks on disk: each pair runs through these once.

They are stored like the original's features, one row per image or caption, in bf16 where the towers
compute in bf16. Whatever the run encodes later, in steps and in checks, begins with these rows, and
an image that has one is not read again. Forget images are altered at random in each step: of each a
few views are made and cached, of which each step draws one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fasterase.config import UnlearnConfig
from fasterase.engine.job import Job
from fasterase.errors import InputError
from fasterase.files import check_writable
from fasterase.models.forward import Halfway, SplitTower, autocast
from fasterase.models.preprocessing import Tokens
from fasterase.original.store import FeatureStore
from fasterase.pairs.batches import MicroBatch, Prefixes
from fasterase.pairs.prepare import hash_captions
from fasterase.pairs.table import PairTable
from fasterase.progress import say

# Views of a forget image that are cached, where forget images are altered.
VIEWS = 8
# What a row takes on disk beside its numbers: key, checksum, and its share of a file's head.
_ROW_BYTES = 20


class PrefixCache(Prefixes):
    """Begins batches halfway through the towers, for the tuned blocks to finish.

    The `folder` is that of a model and precision; the cache is beside it, one for each `tune`.
    """

    def __init__(self, folder: Path, job: Job) -> None:
        model, tune = job.model, job.config.tune
        self.views = VIEWS if job.config.forget_augment else 0
        self._seed = job.config.seed
        self._device, self._precision = model.device, job.precision
        self._image = SplitTower(model, "image", tune)
        self._text = SplitTower(model, "text", tune)
        self.row_bytes = {
            "image": row_bytes(self._image.width, job.precision),
            "text": row_bytes(self._text.width, job.precision),
        }
        self._folder = folder.with_name(f"{folder.name}-below-{tune.replace(':', '-')}")
        self._images: dict[str, tuple[FeatureStore, np.ndarray]] = {}
        self._room_for_captions = 0

    @cached_property
    def _captions(self) -> FeatureStore:
        return self._open("captions", self._text.width)

    def admit(self, source: PairTable, rows: np.ndarray, *, limit_bytes: float = math.inf) -> int:
        """Cache images of `rows`, and as many captions, if all of them fit; nothing is read yet.

        Returns:
            What they take at most, in bytes; 0 if they do not fit.
        """
        _, admitted = self._images_of(source)
        fresh = np.unique(source.base_rows(rows))
        fresh = fresh[~admitted[fresh]]
        needed = len(fresh) * sum(self.row_bytes.values())
        if needed > limit_bytes:
            return 0
        admitted[fresh] = True
        self._room_for_captions += len(fresh)
        return needed

    def has_images(self, source: PairTable, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        store, _ = self._images_of(source)
        return store.has(self._keys(source, rows, views))

    def images(self, batch: MicroBatch, sources: Sequence[PairTable]) -> Halfway:
        came = np.zeros(len(batch.rows), bool)
        came[batch.fresh] = True
        outputs = np.empty((len(batch.rows), self._image.width), np.float32)
        if came.any():
            assert isinstance(batch.pixels, Tensor)
            outputs[came] = self._run_lower(self._image, batch.pixels)
        for number, source in enumerate(sources):
            here = np.flatnonzero(batch.which == number)
            store, admitted = self._images_of(source)
            keys = self._keys(source, batch.rows[here], batch.views[here])
            cached = ~came[here]
            outputs[here[cached]] = store.get(keys[cached])
            # Workers read ahead: meanwhile, an image that came may have been cached.
            new = ~cached & ~store.has(keys) & admitted[source.base_rows(batch.rows[here])]
            _add(store, keys[new], outputs[here[new]])
        return Halfway(self._image, torch.from_numpy(outputs))

    def texts(self, keys: Sequence[str], tokens: Tokens) -> Halfway:
        # A caption that repeats runs once.
        distinct, first, places = np.unique(
            hash_captions(keys), return_index=True, return_inverse=True
        )
        outputs = np.empty((len(distinct), self._text.width), np.float32)
        missing = ~self._captions.has(distinct)
        outputs[~missing] = self._captions.get(distinct[~missing])
        if missing.any():
            computed = self._run_lower(self._text, tokens.index(torch.from_numpy(first[missing])))
            outputs[missing] = computed
            new = distinct[missing][: self._room_for_captions]
            _add(self._captions, new, computed[: len(new)])
            self._room_for_captions -= len(new)
        return Halfway(self._text, torch.from_numpy(outputs[places]), tokens)

    def _run_lower(self, tower: SplitTower, given: Tensor | Tokens) -> np.ndarray:
        with autocast(self._precision, self._device):
            outputs = tower.lower(given.to(self._device)).cpu()
        # What comes from disk is rounded: so is what has not been there.
        return (outputs.bfloat16().float() if self._precision == "bf16" else outputs).numpy()

    def _keys(self, source: PairTable, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Return the keys (n,) of views of images: rows of the base, or hashes of altered views."""
        keys = source.base_rows(rows).copy()
        altered = np.flatnonzero(views)
        named = [f"seed {self._seed} row {keys[i]} view {views[i]}" for i in altered.tolist()]
        keys[altered] = hash_captions(named)
        return keys

    def _images_of(self, source: PairTable) -> tuple[FeatureStore, np.ndarray]:
        """Return the store of a source's images, and which rows of its base are admitted."""
        digest = source.base.digest()
        if digest not in self._images:
            store = self._open(f"images-{digest[:16]}", self._image.width)
            self._images[digest] = store, np.zeros(len(source.base), bool)
        return self._images[digest]

    def _open(self, name: str, width: int) -> FeatureStore:
        dtype = "bf16" if self._precision == "bf16" else "fp32"
        return FeatureStore(self._folder / name, width, dtype=dtype)


def _add(store: FeatureStore, keys: np.ndarray, rows: np.ndarray) -> None:
    if len(keys):
        store.put(keys, rows)
        store.refresh()


def row_bytes(width: int, precision: str) -> int:
    """Return what an output of `width` numbers takes on disk."""
    return (2 if precision == "bf16" else 4) * width + _ROW_BYTES


def training_bytes(row_bytes: Mapping[str, int], *, forget: int, retain: int, views: int) -> int:
    """Return what the pairs that training draws take on disk at most, with a caption of each.

    `row_bytes` is that of each tower's outputs; there are as many `views` of each forget image,
    beside the image itself.
    """
    images = forget * (1 + views) + retain
    return images * row_bytes["image"] + (forget + retain) * row_bytes["text"]


def check_prefix_cache(config: UnlearnConfig, processes: int) -> None:
    """Raise `InputError` if nothing is frozen or several processes take part."""
    if not re.fullmatch(r"projections|last:\d+", config.tune) or config.train_mode:
        found = "train_mode" if config.train_mode else f"tune={config.tune!r}"
        raise InputError(
            f"prefix_cache with {found}: only with tune='last:N' or 'projections', and in eval "
            "mode, do the lower blocks stay as they are. Leave prefix_cache None."
        )
    if processes > 1 or config.deepspeed is not None:
        raise InputError(
            "prefix_cache: it works in one process without deepspeed. Leave it None here."
        )


def open_prefix_cache(
    folder: Path, job: Job, drawn: np.ndarray, measured: Sequence[tuple[str, np.ndarray]]
) -> PrefixCache:
    """Return the cache of a run, and say how large it may grow.

    It holds all that the steps may draw, `drawn` of the retain set, and of the `measured` sets as
    many, the first ones first, as there is room for.

    Raises:
        InputError: nothing is frozen; there are several processes; another read gives another view
            of a pair; it may grow beyond `config.prefix_cache`; or the towers cannot be split.
    """
    size_gb = job.config.prefix_cache
    assert size_gb is not None
    check_prefix_cache(job.config, job.ranks.world_size)
    for source in (job.forget, job.retain):
        if not source.stable:
            raise InputError(
                f"prefix_cache: {source.name} gives another view of a pair each time it is read, "
                "so there is nothing to cache. Leave prefix_cache None."
            )
    cache = PrefixCache(folder, job)
    needed = training_bytes(
        cache.row_bytes, forget=len(job.forget), retain=len(drawn), views=cache.views
    )
    if needed > size_gb * 1e9:
        raise InputError(
            f"prefix_cache={size_gb:g}: the outputs of the frozen blocks may take "
            f"{needed / 1e9:.3g} GB. Give prefix_cache={math.ceil(needed / 1e8) / 10:g} or more, "
            "fewer pairs, or leave it None."
        )
    check_writable(folder.parent, argument="reference_cache")
    cache.admit(job.forget, np.arange(len(job.forget)))
    cache.admit(job.retain, drawn)
    for name, rows in measured:
        if job.sets[name].stable:
            needed += cache.admit(job.sets[name], rows, limit_bytes=size_gb * 1e9 - needed)
    say(f"outputs of frozen blocks: at most {needed / 1e9:.3g} GB on disk")
    return cache
