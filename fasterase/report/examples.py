"""Example pictures of a run, with their closest captions before and after erasing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fasterase.encode import PairEncoder
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.table import PairTable
from fasterase.report.pictures import SheetRow, top_captions
from fasterase.seeds import Stream, generator

PICTURES = 8  # of each section
CAPTIONS = 3  # per picture, before and after
# Captions that compete, at most.
FORGET_CANDIDATES, RETAIN_CANDIDATES = 100, 400


class Examples(NamedTuple):
    """Pictures for a sheet.

    Attributes:
        rows: the pictures with their captions.
        erased: the captions to forget among those that competed.
    """

    rows: list[SheetRow]
    erased: list[str]


class CaptionRanking:
    """Finds the captions closest to pictures, by the original and by the erased model.

    Args:
        candidates: the captions that compete, distinct.
        before: the original model.
        after: the erased model.
    """

    def __init__(self, candidates: list[str], before: PairEncoder, after: PairEncoder) -> None:
        self._candidates = candidates
        self._encoders = before, after
        self.text = [encoder.texts(candidates) for encoder in self._encoders]  # [m, D] each

    def rows(
        self, section: str, source: PairTable, rows: Sequence[int], count: int = CAPTIONS
    ) -> list[SheetRow]:
        """Return the readable pictures among `rows`, each with its `count` closest captions."""
        if not rows:
            return []
        wanted = np.unique(np.asarray(rows, dtype=np.int64))
        closest: list[dict[int, list[str]]] = []
        for encoder, text in zip(self._encoders, self.text, strict=True):
            images = encoder.pairs(source, wanted, description=f"pictures ({section})")
            found = top_captions(images.image, text, self._candidates, count)
            closest.append(dict(zip(images.rows.tolist(), found, strict=True)))
        before, after = closest
        return [
            SheetRow(section, _picture(source[row].image), caption, before[row], after[row])
            for row in map(int, rows)
            if row in before and (caption := first_caption(source, row)) is not None
        ]


def example_rows(
    forget: PairTable, retain: PairTable, before: PairEncoder, after: PairEncoder, *, seed: int
) -> Examples:
    """Choose pictures to forget, their neighbours and others, and rank captions for them.

    Neighbours are the retain pairs with the captions closest to those to forget, by the original's
    text features. Captions compete that belong to a random sample of both sets.

    There are none if the captions are token ids, which cannot be shown.
    """
    random = generator(seed, Stream.EXAMPLES)
    to_forget = _captions(forget, FORGET_CANDIDATES, random)
    to_keep = _captions(retain, RETAIN_CANDIDATES, random)
    to_keep = {text: row for text, row in to_keep.items() if text not in to_forget}
    if not to_forget or not to_keep:
        return Examples([], [])
    ranking = CaptionRanking([*to_forget, *to_keep], before, after)
    text = ranking.text[0]
    closeness = (text[len(to_forget) :] @ text[: len(to_forget)].T).amax(dim=1)
    nearest = closeness.argsort(descending=True).tolist()
    kept = list(to_keep.values())
    sections = (
        ("To forget", forget, spread(list(to_forget.values()), PICTURES)),
        ("Neighbours: kept, with similar captions", retain, [kept[i] for i in nearest[:PICTURES]]),
        ("Kept", retain, spread([kept[i] for i in nearest[PICTURES:]], PICTURES)),
    )
    rows = [
        row for title, source, chosen in sections for row in ranking.rows(title, source, chosen)
    ]
    return Examples(rows, list(to_forget))


def first_caption(source: PairTable, row: int) -> str | None:
    """Return the first caption of a pair; None if it is token ids or cannot be read."""
    try:
        texts = source.texts(row)
    except BrokenPair:
        return None
    return None if isinstance(texts, Tensor) else texts[0]


def spread(items: Sequence[int], count: int) -> list[int]:
    """Choose at most `count` items, spread evenly."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)
    return [items[i] for i in places]


def _captions(source: PairTable, count: int, random: np.random.Generator) -> dict[str, int]:
    """Return distinct captions of at most `count` pairs drawn at random, each with its row."""
    captions: dict[str, int] = {}
    drawn = random.choice(len(source), min(count, len(source)), replace=False)
    for row in np.sort(drawn).tolist():
        text = first_caption(source, row)
        if text is not None:
            captions.setdefault(text, row)
    return captions


def _picture(image: Image.Image | Tensor) -> Image.Image:
    """Return a PIL image; a preprocessed tensor is stretched from black to white."""
    if isinstance(image, Image.Image):
        return image
    if image.is_floating_point():
        low, high = image.min(), image.max()
        image = ((image - low) / (high - low).clamp_min(1e-9) * 255).round().to(torch.uint8)
    return Image.fromarray(image.permute(1, 2, 0).cpu().contiguous().numpy())
