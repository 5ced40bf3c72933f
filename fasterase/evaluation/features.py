"""A set's image and caption features under one model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasterase.errors import InputError
from fasterase.models.dual_encoder import DualEncoder
from fasterase.pairs.batches import sweep
from fasterase.pairs.prepare import Preparer, caption_key
from fasterase.pairs.skips import BrokenPair, Skip
from fasterase.pairs.source import PairSource


@dataclass(frozen=True)
class SetFeatures:
    """Features of n pairs with m distinct first captions, on the CPU in fp32, rows of length 1.

    A pair with several captions stands for its first one; the others only count as right too.

    Attributes:
        image: [n, D].
        text: [m, D], a row a distinct first caption.
        captions: [m] those captions; token ids are spelled out.
        pair_text: [n] row in `text` of each pair's first caption.
        pair_captions: [n] all captions of each pair, the first one first.
        ids, meta: [n] of the pairs, as the source gives them.
        skipped: pairs that could not be read; they are in none of the above.
    """

    image: Tensor
    text: Tensor
    captions: list[str]
    pair_text: np.ndarray
    pair_captions: list[list[str]]
    ids: list[str]
    meta: list[dict[str, Any]]
    skipped: list[Skip]


def encode_set(
    tower: DualEncoder,
    source: PairSource,
    *,
    max_pairs: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    num_workers: int = 0,
) -> SetFeatures:
    """Encode the pairs of a set, or a seeded sample of `max_pairs` of them, without gradients.

    Raises:
        InputError: no pair can be read, or features are not finite.
    """
    rows = sampled_rows(len(source), max_pairs, seed=seed)
    first_captions = np.stack([rows, np.zeros_like(rows)], axis=1)
    prepare = Preparer(
        tower.image_transform,
        tower.text_tokenizer,
        tower.image_size,
        tower.context_length,
        tower.vocab_size,
    )
    image, text = [], []
    captions: list[str] = []
    key_of: dict[int, str] = {}
    skipped: list[Skip] = []
    with evaluating(tower):
        for batch in sweep(
            source,
            rows,
            first_captions,
            prepare,
            batch_size=batch_size,
            num_workers=num_workers,
        ):
            skipped += batch.skipped
            key_of.update((row, key) for row, _, key in batch.captions)
            if batch.ids:
                image.append(tower.encode_image(batch.pixels.to(tower.device)).cpu())
            if batch.new_keys:
                captions += batch.new_keys
                text.append(tower.encode_text(batch.tokens.to(tower.device)).cpu())
    if not key_of:
        first = f" The first: {skipped[0].id}: {skipped[0].reason}." if skipped else ""
        raise InputError(f"`{source.name}`: none of its {len(rows)} pairs can be read.{first}")
    place = {caption: i for i, caption in enumerate(captions)}
    found = SetFeatures(
        image=torch.cat(image),
        text=torch.cat(text),
        captions=captions,
        pair_text=np.array([place[key] for key in key_of.values()]),
        pair_captions=[caption_keys(source, row) for row in key_of],
        ids=[source.id(row) for row in key_of],
        meta=[source.meta(row) for row in key_of],
        skipped=skipped,
    )
    _check_finite(found.image, found.ids, tower)
    _check_finite(found.text, captions, tower)
    return found


def encode_texts(tower: DualEncoder, texts: Sequence[str], *, batch_size: int = 64) -> Tensor:
    """[len(texts), D] unit rows on the CPU."""
    parts = []
    with evaluating(tower):
        for start in range(0, len(texts), batch_size):
            tokens = tower.tokenize(texts[start : start + batch_size]).to(tower.device)
            parts.append(tower.encode_text(tokens).cpu())
    return torch.cat(parts)


def sampled_rows(length: int, max_pairs: int | None, *, seed: int) -> np.ndarray:
    """Ascending rows, at most `max_pairs`; the same for every set of that length, so that sets
    which list the same concepts in the same order stay comparable.
    """
    if max_pairs is None or length <= max_pairs:
        return np.arange(length)
    return np.sort(np.random.default_rng(seed).choice(length, size=max_pairs, replace=False))


def caption_keys(source: PairSource, row: int) -> list[str]:
    """All captions of a pair as text, the first one first."""
    texts = source.texts(row)
    return [caption_key(texts)] if isinstance(texts, Tensor) else list(map(caption_key, texts))


def all_captions(source: PairSource) -> set[str]:
    """Every caption of every readable pair of a set."""
    found: set[str] = set()
    for row in range(len(source)):
        try:
            found.update(caption_keys(source, row))
        except BrokenPair:  # counted and named when the pair is encoded
            continue
    return found


@contextmanager
def evaluating(tower: DualEncoder) -> Iterator[None]:
    """No gradients, and eval mode; each part of the module gets its own mode back."""
    modes = [(part, part.training) for part in tower.module.modules()]
    tower.module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


def _check_finite(features: Tensor, names: Sequence[str], tower: DualEncoder) -> None:
    broken = (~features.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if broken:
        raise InputError(
            f"model: {tower.name} gives features that are not finite for {len(broken)} of "
            f"{len(names)} inputs, the first {names[broken[0]]!r}. Its weights may hold NaN."
        )
