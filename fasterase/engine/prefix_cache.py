"""Outputs of the frozen lower blocks on disk: each pair runs through these once.

They are kept like the original's features, in fp32 and one row per image or caption. Forget images
are altered at random in each step, so of each a few views are kept, of which each step draws one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fasterase.config import UnlearnConfig
from fasterase.engine.baseline import POOL_BATCHES
from fasterase.errors import InputError
from fasterase.models.dual_encoder import DualEncoder
from fasterase.models.forward import autocast
from fasterase.models.prefix import Halfway, SplitTower
from fasterase.models.preprocessing import Tokens
from fasterase.pairs.batches import MicroBatch
from fasterase.pairs.prepare import hash_captions
from fasterase.pairs.source import PairSource, Subset
from fasterase.parallel.ranks import Ranks
from fasterase.reference.cache import image_keys
from fasterase.reference.feature_store import FeatureStore

# Views of a forget image that are kept, where forget images are altered.
VIEWS = 8


class PrefixCache:
    """Gives the parts of a step to the tuned blocks, halfway through the towers.

    Args:
        folder: of the cache; one for each model, precision and `tune`.
        model: in eval mode, on its device.
        tune: what is trained.
        sources: `"forget"` and `"retain"`.
        views: how many views of a forget image are kept; None: the image itself alone.
        seed: of the views.
        precision: compute dtype of the towers, resolved.

    Raises:
        InputError: see `SplitTower`.
    """

    def __init__(
        self,
        folder: Path,
        model: DualEncoder,
        tune: str,
        sources: Mapping[str, PairSource],
        *,
        views: int | None,
        seed: int,
        precision: str,
    ) -> None:
        self._precision = precision
        self._device = model.device
        self._sources = dict(sources)
        self._views = views
        self._towers = {tower: SplitTower(model, tower, tune) for tower in ("image", "text")}
        self._folder = folder
        self._seed = seed
        self._stores: dict[str, FeatureStore] = {}

    def largest_bytes(self, forget: int, retain: int) -> int:
        """Return what so many pairs may take on disk: images, and a caption of each."""
        images = forget * (self._views or 1) + retain
        sizes = {tower: 4 * split.width + 20 for tower, split in self._towers.items()}
        return images * sizes["image"] + (forget + retain) * sizes["text"]

    def halfway(self, part: MicroBatch) -> tuple[Halfway, Halfway]:
        """Return a micro-batch halfway through both towers; a caption that repeats comes once."""
        n = part.n_forget
        images = [
            self._images("forget", part, slice(0, n)),
            self._images("retain", part, slice(n, len(part.ids))),
        ]
        keys, first, places = np.unique(
            hash_captions(part.keys), return_index=True, return_inverse=True
        )
        # In the order of the batch, so that distinct captions stay in their places.
        order = np.argsort(first)
        tokens = part.tokens.index(torch.from_numpy(first[order]))
        captions = self._rows("text", "captions", keys[order].astype(np.int64), tokens)
        repeats = len(keys) < len(part.keys)
        rank = torch.from_numpy(np.argsort(order)[places]) if repeats else None
        return (
            Halfway(self._towers["image"], torch.cat(images)),
            Halfway(self._towers["text"], captions, tokens, rank),
        )

    def _images(self, name: str, part: MicroBatch, rows: slice) -> Tensor:
        source = self._sources[name]
        keys = image_keys(source, part.rows[rows]).astype(np.int64)
        store = f"images-{(source.base if isinstance(source, Subset) else source).manifest()[:16]}"
        if name == "forget" and self._views is not None:
            assert part.views is not None
            keys = keys * self._views + part.views[rows]
            store += f"-{self._views}-views-{self._seed}"
        return self._rows("image", store, keys, part.pixels[rows])

    def _rows(self, tower: str, name: str, keys: np.ndarray, given: Tensor | Tokens) -> Tensor:
        """Return the rows of `keys`; those that are missing are computed from `given`, and kept."""
        split = self._towers[tower]
        if not len(keys):
            return torch.empty(0, split.width)
        if name not in self._stores:
            self._stores[name] = FeatureStore(self._folder / name, split.width)
        store = self._stores[name]
        _, first = np.unique(keys, return_index=True)
        missing = np.sort(first[~store.has(keys[first])])
        if len(missing):
            at = torch.from_numpy(missing)
            some = given[at] if isinstance(given, Tensor) else given.index(at)
            with autocast(self._precision, self._device):
                rows = split.lower(some.to(self._device))
            store.put(keys[missing], rows.cpu().numpy())
            store.refresh()
        return torch.from_numpy(store.get(keys))


def open_prefix_cache(
    folder: Path,
    model: DualEncoder,
    sets: Mapping[str, PairSource],
    total_steps: int,
    config: UnlearnConfig,
    precision: str,
    ranks: Ranks,
) -> PrefixCache:
    """Return the cache of a run, and say how large it may grow.

    Args:
        folder: of a model and precision.
        model: see `PrefixCache`.
        sets: `"forget"`, `"retain"` and others.
        total_steps: at most.
        config: the run's settings.
        precision: compute dtype of the towers, resolved.
        ranks: who takes part.

    Raises:
        InputError: nothing is frozen; there are several processes; another read gives another view
            of a pair; it may grow beyond `config.prefix_cache`; or the towers cannot be split.
    """
    assert config.prefix_cache is not None
    if not re.fullmatch(r"projections|last:\d+", config.tune) or config.train_mode:
        found = "train_mode" if config.train_mode else f"tune={config.tune!r}"
        raise InputError(
            f"prefix_cache with {found}: only with tune='last:N' or 'projections', and in eval "
            "mode, do the lower blocks stay as they are. Leave prefix_cache None."
        )
    if ranks.world_size > 1 or config.deepspeed is not None:
        raise InputError(
            "prefix_cache: it works in one process without deepspeed. Leave it None here."
        )
    for name in ("forget", "retain"):
        if not sets[name].stable:
            raise InputError(
                f"prefix_cache: {name} gives another view of a pair each time it is read, so there "
                "is nothing to keep. Leave prefix_cache None."
            )
    cache = PrefixCache(
        folder.with_name(f"{folder.name}-below-{config.tune.replace(':', '-')}"),
        model,
        config.tune,
        sets,
        views=VIEWS if config.forget_augment else None,
        seed=config.seed,
        precision=precision,
    )
    steps = POOL_BATCHES if config.runs_until_forgotten else total_steps
    drawn = min(len(sets["retain"]), steps * config.batch_size)
    needed = cache.largest_bytes(len(sets["forget"]), drawn)
    if needed > config.prefix_cache * 1e9:
        raise InputError(
            f"prefix_cache={config.prefix_cache:g}: the outputs of the frozen blocks may take "
            f"{needed / 1e9:.3g} GB. Give prefix_cache={math.ceil(needed / 1e8) / 10:g} or more, "
            "fewer pairs, or leave it None."
        )
    if config.progress:
        tqdm.write(f"fasterase: outputs of frozen blocks: at most {needed / 1e9:.3g} GB on disk")
    return cache
