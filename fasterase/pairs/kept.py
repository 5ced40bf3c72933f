"""Pairs of which something is kept, so that they need not be read again.

Where the frozen lower blocks of a model run once per pair, their outputs take the place of pixels:
of a pair that is kept no image is opened, and no caption tokenised a second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from fasterase.models.preprocessing import Tokens
from fasterase.pairs.augment import is_plain
from fasterase.pairs.prepare import stack_tokens
from fasterase.pairs.skips import Skip
from fasterase.pairs.table import PairTable
from fasterase.seeds import Stream, generator


class KnownText(NamedTuple):
    """One caption.

    Attributes:
        key: see `caption_key`.
        ids: [L] int32.
        mask: [L] uint8, or None.
    """

    key: str
    ids: np.ndarray
    mask: np.ndarray | None


class KnownPairs:
    """The captions of pairs that were read, and which pairs are broken; some 2 KB for each pair.

    Views of one table share its pairs.
    """

    def __init__(self) -> None:
        self._texts: dict[str, KnownText] = {}
        self._pairs: dict[PairTable, dict[int, tuple[KnownText, ...] | Skip]] = {}

    def has(self, source: PairTable, rows: np.ndarray) -> np.ndarray:
        """Return which of `rows` (n,) were read, (n,) bool."""
        pairs = self._of(source)
        keys = source.base_rows(rows).tolist()
        return np.fromiter((key in pairs for key in keys), bool, len(keys))

    def are_broken(self, source: PairTable, rows: np.ndarray) -> np.ndarray:
        """Return which of `rows` (n,) were read and are broken, (n,) bool."""
        pairs = self._of(source)
        keys = source.base_rows(rows).tolist()
        return np.fromiter((isinstance(pairs.get(key), Skip) for key in keys), bool, len(keys))

    def learn(self, source: PairTable, row: int, found: Sequence[KnownText] | Skip) -> None:
        """Take note of all captions of a pair, or of what is wrong with it."""
        if not isinstance(found, Skip):
            found = tuple(self._texts.setdefault(text.key, text) for text in found)
        self._of(source)[int(source.base_rows(np.array([row]))[0])] = found

    def get(self, source: PairTable, rows: np.ndarray) -> list[tuple[KnownText, ...] | Skip]:
        """Return what `learn` was told of `rows` (n,)."""
        pairs = self._of(source)
        return [pairs[key] for key in source.base_rows(rows).tolist()]

    def _of(self, source: PairTable) -> dict[int, tuple[KnownText, ...] | Skip]:
        return self._pairs.setdefault(source.base, {})


class Keeper(Protocol):
    """Keeps outputs for images.

    Attributes:
        known: the captions of the pairs that were read.
        views: of an image that is altered at random, how many are made and kept.
    """

    known: KnownPairs
    views: int

    def has_images(self, source: PairTable, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Return for which images (n,) an output is kept, (n,) bool; see `Drawn`."""
        ...


def draw_views(
    source: PairTable, rows: np.ndarray, numbers: Sequence[np.random.Generator], count: int, *,
    seed: int,
) -> np.ndarray:  # fmt: skip
    """Return which view of each image a step takes, [n] int64, 0 for the image itself.

    Args:
        source: of the images.
        rows: [n].
        numbers: [n] which draw one of the views.
        count: views of each image, seeded by its row.
        seed: of the views.
    """
    views = np.array([int(each.integers(count)) for each in numbers], np.int64)
    plain = [
        is_plain(generator(seed, Stream.AUGMENTATION, row, view))
        for row, view in zip(source.base_rows(rows).tolist(), views.tolist(), strict=True)
    ]
    return np.where(np.array(plain, bool), 0, views + 1)


def stack_known(texts: Sequence[KnownText], context_length: int) -> Tokens:
    """Return the tokens of captions, as `stack_tokens` does."""
    rows = [
        Tokens(
            torch.from_numpy(text.ids).long(),
            None if text.mask is None else torch.from_numpy(text.mask).long(),
        )
        for text in texts
    ]
    return stack_tokens(rows, context_length)
