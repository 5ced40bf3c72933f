"""The demo's picture sheet: a dozen drawings of each set with their top captions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fasterase.demo.sets import DemoSets, Drawings
from fasterase.models.dual_encoder import DualEncoder
from fasterase.models.load import load_model
from fasterase.report.pictures import SheetRow, picture_sheet, top_captions

PICTURES = 12


def draw_sheet(sets: DemoSets, original: str, erased: Path, path: Path) -> None:
    """Write the sheet of `PICTURES` drawings each of forget, neighbour and retain to `path`."""
    before, after = load_model(original), load_model(erased)
    names = sorted(
        {name for pairs in (sets.forget, sets.retain, sets.holdout) for name in pairs.names}
    )
    rows: list[SheetRow] = []
    sections = {"forget": sets.forget, "neighbour": sets.sets["neighbour"], "retain": sets.retain}
    for section, pairs in sections.items():
        drawn = _spread(pairs)
        pictures = [pairs.picture(row) for row in drawn]
        top = [_top(tower, pictures, names) for tower in (before, after)]
        rows += [
            SheetRow(section, picture, pairs.names[row], *captions)
            for row, picture, *captions in zip(drawn, pictures, *top, strict=True)
        ]
    picture_sheet(rows, path, erased=sets.concepts)


def _spread(pairs: Drawings) -> list[int]:
    """Rows spread evenly over the set, so that no two show the same concept where avoidable."""
    count = min(PICTURES, len(pairs))
    first_of = {name: row for row, name in reversed(list(enumerate(pairs.names)))}
    rows = sorted(first_of.values())
    return [rows[i] for i in np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]


@torch.no_grad()
def _top(tower: DualEncoder, pictures: list[Image.Image], names: list[str]) -> list[list[str]]:
    image = tower.encode_image(torch.stack([tower.preprocess(picture) for picture in pictures]))
    text = tower.encode_text(tower.tokenize(names))
    return top_captions(image, text, names)
