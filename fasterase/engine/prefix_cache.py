"""Outputs of the frozen lower blocks on disk: each pair runs through these once.

They are kept like the original's features, one row per image or caption, in bf16 where the towers
compute in bf16. Whatever the run encodes later, in steps and in checks, begins with these rows: of
a pair that is kept no image is read. Forget images are altered at random in each step, so of each a
few views are kept, of which each step draws one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fasterase.config import UnlearnConfig
from fasterase.errors import InputError
from fasterase.models.dual_encoder import DualEncoder
from fasterase.models.forward import autocast
from fasterase.models.prefix import Halfway, SplitTower
from fasterase.models.preprocessing import Tokens
from fasterase.original.store import FeatureStore
from fasterase.pairs.batches import MicroBatch, SweepBatch
from fasterase.pairs.kept import KnownPairs
from fasterase.pairs.prepare import hash_captions
from fasterase.pairs.table import PairTable
from fasterase.parallel.ranks import Ranks

# Views of a forget image that are kept, where forget images are altered.
VIEWS = 8
# Rows are collected up to this size before a file of them is written.
_FILE_BYTES = 1 << 26
# What a row takes on disk beside its numbers: key, checksum, and its share of a file's head.
_ROW_BYTES = 20


class PrefixCache:
    """Gives batches halfway through the towers, for the tuned blocks to finish.

    Args:
        folder: of the cache; one for each model, precision and `tune`.
        model: in eval mode, on its device.
        tune: what is trained.
        sources: the forget and the retain set, of which the steps draw.
        views: how many views of a forget image are kept; 0: the image itself alone.
        seed: of the views.
        precision: compute dtype of the towers, resolved.

    Attributes:
        known: the captions of the pairs that were read.
        views: as given.

    Raises:
        InputError: see `SplitTower`.
    """

    def __init__(
        self,
        folder: Path,
        model: DualEncoder,
        tune: str,
        sources: tuple[PairTable, PairTable],
        *,
        views: int,
        seed: int,
        precision: str,
    ) -> None:
        self.known = KnownPairs()
        self.views = views
        self._precision = precision
        self._device = model.device
        self._sources = sources
        self._towers = {tower: SplitTower(model, tower, tune) for tower in ("image", "text")}
        self._folder = folder
        self._seed = seed
        self._stores: dict[str, _Store] = {}
        self._names: dict[PairTable, str] = {}
        self._admitted: dict[str, np.ndarray] = {}
        self._pairs = self._captions = 0
        self.row_bytes = {
            tower: row_bytes(split.width, precision) for tower, split in self._towers.items()
        }

    def admit(self, source: PairTable, rows: np.ndarray, *, limit_bytes: float = math.inf) -> int:
        """Keep images of `rows`, and as many captions, if all of them fit; nothing is read yet.

        Returns:
            What they take at most, in bytes; 0 if they do not fit.
        """
        admitted = self._admitted_rows(source)
        fresh = np.unique(source.base_rows(rows))
        fresh = fresh[~admitted[fresh]]
        needed = len(fresh) * sum(self.row_bytes.values())
        if needed > limit_bytes:
            return 0
        admitted[fresh] = True
        self._pairs += len(fresh)
        return needed

    def has_images(self, source: PairTable, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Return of which views of images (n,) an output is kept, (n,) bool; 0 is no view."""
        found = np.zeros(len(rows), bool)
        for store, here, keys in self._places(source, rows, views):
            found[here] = store.has(keys)
        return found

    def halfway(self, part: MicroBatch, captions: Sequence[int]) -> tuple[Halfway, Halfway]:
        """Return images and some captions, by their places (m,), halfway through the towers."""
        assert part.views is not None
        is_forget = np.arange(len(part.ids)) < part.n_forget
        places = [
            (store, np.flatnonzero(chosen)[here], keys)
            for source, chosen in zip(self._sources, (is_forget, ~is_forget), strict=True)
            for store, here, keys in self._places(source, part.rows[chosen], part.views[chosen])
        ]
        texts = self.texts([part.keys[place] for place in captions], part.tokens.index(captions))
        return Halfway(self._towers["image"], self._image_rows(places, part)), texts

    def images(self, source: PairTable, batch: SweepBatch) -> Halfway:
        """Return the images of a sweep halfway through their tower."""
        places = list(self._places(source, batch.rows, np.zeros(len(batch.rows), np.int64)))
        return Halfway(self._towers["image"], self._image_rows(places, batch))

    def texts(self, keys: Sequence[str], tokens: Tokens) -> Halfway:
        """Return captions halfway through their tower, by identity (m,) and tokens [m, L]."""
        split = self._towers["text"]
        store = self._store("captions", split.width)
        numbers = hash_captions(keys)
        rows = torch.empty(len(keys), split.width)
        has = store.has(numbers)
        rows[torch.from_numpy(has)] = torch.from_numpy(store.get(numbers[has]))
        missing = np.flatnonzero(~has)
        if len(missing):
            computed = self._lower("text", tokens.index(torch.from_numpy(missing)))
            rows[torch.from_numpy(missing)] = computed
            room = max(0, self._pairs - self._captions)
            store.put(numbers[missing[:room]], computed[:room].numpy())
            self._captions += min(room, len(missing))
        return Halfway(split, rows, tokens)

    def flush(self) -> None:
        """Write what was collected for the next files."""
        for store in self._stores.values():
            store.flush()

    def _image_rows(self, places: Sequence[_Place], batch: MicroBatch | SweepBatch) -> Tensor:
        """Return [n, width] outputs for a batch; those of images that came are kept."""
        assert batch.fresh is not None
        came = np.zeros(len(batch.rows), bool)
        came[batch.fresh] = True
        rows = torch.empty(len(batch.rows), self._towers["image"].width)
        for store, here, keys in places:
            # Workers read ahead: meanwhile, an image that came may be kept.
            has = store.has(keys) | ~came[here]
            came[here[has]] = False
            rows[torch.from_numpy(here[has])] = torch.from_numpy(store.get(keys[has]))
        if came.any():
            at = torch.from_numpy(np.searchsorted(batch.fresh, np.flatnonzero(came)))
            rows[torch.from_numpy(came)] = self._lower("image", batch.pixels[at])
        for store, here, keys in places:
            new = came[here] & store.keeps(keys)
            store.put(keys[new], rows[torch.from_numpy(here[new])].numpy())
        return rows

    def _lower(self, tower: str, given: Tensor | Tokens) -> Tensor:
        with autocast(self._precision, self._device):
            rows = self._towers[tower].lower(given.to(self._device)).cpu()
        # What comes from disk is rounded: so is what has not been there.
        return rows.bfloat16().float() if self._precision == "bf16" else rows

    def _places(self, source: PairTable, rows: np.ndarray, views: np.ndarray) -> Iterator[_Place]:
        """Yield where outputs for views of images (n,) are kept."""
        keys = source.base_rows(rows)
        name = self._name(source)
        width = self._towers["image"].width
        altered = views > 0
        admitted = self._admitted_rows(source)
        yield self._store(name, width, admitted), np.flatnonzero(~altered), keys[~altered]
        if altered.any():
            store = self._store(f"{name}-{self.views}-views-{self._seed}", width)
            yield store, np.flatnonzero(altered), (keys * self.views + views - 1)[altered]

    def _admitted_rows(self, source: PairTable) -> np.ndarray:
        name = self._name(source)
        if name not in self._admitted:
            base = source.base
            self._admitted[name] = np.zeros(len(base), bool)
        return self._admitted[name]

    def _name(self, source: PairTable) -> str:
        base = source.base
        # Looked up once, since it may take a digest of all captions.
        if base not in self._names:
            self._names[base] = f"images-{base.digest()[:16]}"
        return self._names[base]

    def _store(self, name: str, width: int, admitted: np.ndarray | None = None) -> _Store:
        if name not in self._stores:
            dtype = "bf16" if self._precision == "bf16" else "fp32"
            self._stores[name] = _Store(
                FeatureStore(self._folder / name, width, dtype=dtype), admitted
            )
        return self._stores[name]


class _Store:
    """A store whose rows are collected for a while, so that few files are written.

    Args:
        kept: what is on disk.
        admitted: [n] bool, which keys may be put; None: all.
    """

    def __init__(self, kept: FeatureStore, admitted: np.ndarray | None) -> None:
        self._kept = kept
        self._admitted = admitted
        self._keys = np.empty(0, np.int64)
        self._rows: list[np.ndarray] = []

    def has(self, keys: np.ndarray) -> np.ndarray:
        """Return which of `keys` (n,) have a row, (n,) bool."""
        return self._kept.has(keys) | np.isin(keys, self._keys)

    def keeps(self, keys: np.ndarray) -> np.ndarray:
        """Return which of `keys` (n,) may be put, (n,) bool."""
        return np.ones(len(keys), bool) if self._admitted is None else self._admitted[keys]

    def get(self, keys: np.ndarray) -> np.ndarray:
        """Return rows [n, width] fp32."""
        if np.isin(keys, self._keys).any():
            self.flush()
        return self._kept.get(keys)

    def put(self, keys: np.ndarray, rows: np.ndarray) -> None:
        """Keep rows [n, width]."""
        if len(keys):
            self._keys = np.concatenate([self._keys, keys])
            self._rows.append(rows)
            if sum(each.nbytes for each in self._rows) >= _FILE_BYTES:
                self.flush()

    def flush(self) -> None:
        """Write a file of what was put since the last one."""
        if self._rows:
            self._kept.put(self._keys, np.concatenate(self._rows))
            self._kept.refresh()
            self._keys, self._rows = np.empty(0, np.int64), []


# A store, which pairs of a batch have their images there, and their keys.
_Place = tuple[_Store, np.ndarray, np.ndarray]


def row_bytes(width: int, precision: str) -> int:
    """Return what an output of `width` numbers takes on disk."""
    return (2 if precision == "bf16" else 4) * width + _ROW_BYTES


def training_bytes(row_bytes: Mapping[str, int], *, forget: int, retain: int, views: int) -> int:
    """Return what the pairs that training draws take on disk at most, with a caption of each.

    Args:
        row_bytes: tower -> `row_bytes` of its outputs.
        forget, retain: how many pairs.
        views: of each forget image, beside the image itself.
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
    folder: Path,
    model: DualEncoder,
    sets: Mapping[str, PairTable],
    drawn: np.ndarray,
    measured: Sequence[tuple[str, np.ndarray]],
    config: UnlearnConfig,
    precision: str,
    ranks: Ranks,
) -> PrefixCache:
    """Return the cache of a run, and say how large it may grow.

    Args:
        folder: of a model and precision.
        model: see `PrefixCache`.
        sets: `"forget"`, `"retain"` and others.
        drawn: rows of the retain set that the steps may draw.
        measured: rows of sets that are encoded before and after, and in checks; kept as far as
            there is room, the first ones first.
        config: the run's settings.
        precision: compute dtype of the towers, resolved.
        ranks: who takes part.

    Raises:
        InputError: nothing is frozen; there are several processes; another read gives another view
            of a pair; it may grow beyond `config.prefix_cache`; or the towers cannot be split.
    """
    assert config.prefix_cache is not None
    check_prefix_cache(config, ranks.world_size)
    forget, retain = sets["forget"], sets["retain"]
    for source in (forget, retain):
        if not source.stable:
            raise InputError(
                f"prefix_cache: {source.name} gives another view of a pair each time it is read, "
                "so there is nothing to keep. Leave prefix_cache None."
            )
    cache = PrefixCache(
        folder.with_name(f"{folder.name}-below-{config.tune.replace(':', '-')}"),
        model,
        config.tune,
        (forget, retain),
        views=VIEWS if config.forget_augment else 0,
        seed=config.seed,
        precision=precision,
    )
    limit = config.prefix_cache * 1e9
    needed = training_bytes(
        cache.row_bytes, forget=len(forget), retain=len(drawn), views=cache.views
    )
    if needed > limit:
        raise InputError(
            f"prefix_cache={config.prefix_cache:g}: the outputs of the frozen blocks may take "
            f"{needed / 1e9:.3g} GB. Give prefix_cache={math.ceil(needed / 1e8) / 10:g} or more, "
            "fewer pairs, or leave it None."
        )
    cache.admit(forget, np.arange(len(forget)))
    cache.admit(retain, drawn)
    for name, rows in measured:
        if sets[name].stable:
            needed += cache.admit(sets[name], rows, limit_bytes=limit - needed)
    if config.progress:
        tqdm.write(f"fasterase: outputs of frozen blocks: at most {needed / 1e9:.3g} GB on disk")
    return cache
