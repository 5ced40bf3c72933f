"""Picture sheets: examples with their closest captions before and after erasing."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from fasterase.encode import PairEncoder
from fasterase.errors import InputError
from fasterase.files import replace_file
from fasterase.pairs.sampler import spread_indices
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.table import PairTable
from fasterase.report.lettering import Pen
from fasterase.seeds import Stream, generator

PICTURES = 8  # of each section
CAPTIONS = 3  # per picture, before and after
NEAREST = 0.1  # share of retain captions that are neighbours of those to forget
# Captions that compete, at most.
FORGET_CANDIDATES, RETAIN_CANDIDATES = 100, 400

# Pixels.
PICTURE, LINE, GAP, MARGIN = 96, 20, 12, 20
# Of a column of captions that are names, and where some have more characters.
TEXT_WIDTH, SENTENCE_WIDTH, NAME_LENGTH = 190, 290, 30

COLUMNS = 2  # pictures side by side

INK, FAINT, ERASED, OWN, RULE = "#202020", "#808080", "#c8102e", "#1a7f37", "#d0d0d0"
LEGEND = (
    ("Top captions before and after.", INK),
    ("red: a caption of the erased concept", ERASED),
    ("green: the picture's own caption, to be kept", OWN),
)


@dataclass(frozen=True)
class SheetRow:
    """One picture of a sheet."""

    section: str  # the name of its set; consecutive pictures of a section share one heading
    image: Image.Image  # of any size; it is scaled to a square thumbnail
    caption: str  # what it shows
    before: Sequence[str]  # the top captions of the original model, best first
    after: Sequence[str]  # of the erased model
    is_to_forget: bool = False

    def is_wrong(self, erased: Collection[str]) -> bool:
        """Whether it is still named by one of the `erased` captions; of a picture to keep, whether
        its own caption was the first and no longer is."""
        if self.is_to_forget:
            return self.after[0] in erased
        return self.before[0] == self.caption != self.after[0]


class Examples(NamedTuple):
    """Pictures for a sheet, and the captions to forget among those that competed."""

    rows: list[SheetRow]
    erased: list[str]


class CaptionRanking:
    """Finds the closest of distinct captions to pictures, before erasing and after."""

    def __init__(self, candidates: list[str], before: PairEncoder, after: PairEncoder) -> None:
        self._candidates = candidates
        self._encoders = before, after
        self.text = [encoder.texts(candidates) for encoder in self._encoders]  # [m, D] each

    def rows(
        self,
        section: str,
        source: PairTable,
        rows: Sequence[int],
        count: int = CAPTIONS,
        *,
        is_to_forget: bool = False,
    ) -> list[SheetRow]:
        """Return the readable pictures among `rows`, each with its `count` closest captions."""
        if not rows:
            return []
        wanted = np.unique(np.asarray(rows, dtype=np.int64))
        closest: list[dict[int, list[str]]] = []
        for encoder, text in zip(self._encoders, self.text, strict=True):
            images = encoder.pairs(source, wanted, description=f"pictures ({section})")
            best = (images.image @ text.T).topk(min(count, len(text)), dim=1).indices
            found = [[self._candidates[i] for i in row] for row in best.tolist()]
            closest.append(dict(zip(images.rows.tolist(), found, strict=True)))
        before, after = closest
        return [
            SheetRow(
                section, as_picture(source[row].image), own, before[row], after[row], is_to_forget
            )
            for row in map(int, rows)
            if row in before and (own := _first_caption(source, row)) is not None
        ]


def example_rows(
    forget: PairTable,
    retain: PairTable,
    before: PairEncoder,
    after: PairEncoder,
    *,
    seed: int,
    others: Mapping[str, PairTable] = MappingProxyType({}),
    forget_sets: Collection[str] = (),
) -> Examples:
    """Choose pictures to forget, their neighbours and others, and rank captions for them.

    Neighbours are the retain pairs with the captions closest to those to forget, by the original's
    text features. Captions compete that belong to a random sample of both sets, and those of the
    pictures of `others`, further sets, of which `forget_sets` are to be forgotten. In each section
    those stand first that went wrong (`SheetRow.is_wrong`).

    There are none if the captions are token ids, which cannot be shown.
    """
    random = generator(seed, Stream.EXAMPLES)
    to_forget = _captions(forget, FORGET_CANDIDATES, random)
    to_keep = _captions(retain, RETAIN_CANDIDATES, random)
    to_keep = {text: row for text, row in to_keep.items() if text not in to_forget}
    if not to_forget or not to_keep:
        return Examples([], [])
    further = {name: _captions(source, PICTURES, random) for name, source in others.items()}
    erased = dict.fromkeys([*to_forget, *chain(*(further[name] for name in forget_sets))])
    candidates = dict.fromkeys([*to_forget, *to_keep, *chain(*further.values())])
    ranking = CaptionRanking([*candidates], before, after)
    forget_texts, kept_texts, _ = ranking.text[0].tensor_split(
        (len(to_forget), len(to_forget) + len(to_keep))
    )
    closeness = (kept_texts @ forget_texts.T).amax(dim=1)
    kept_rows = [*to_keep.values()]
    kept = [kept_rows[i] for i in closeness.argsort(descending=True).tolist()]
    own = spread([*to_forget.values()], PICTURES)

    def show(name: str, title: str) -> list[SheetRow]:
        rows, to_go = [*further[name].values()], name in forget_sets
        return ranking.rows(f"{title}: {name}", others[name], rows, is_to_forget=to_go)

    sections = [
        ranking.rows("To forget", forget, own, is_to_forget=True),
        *(show(name, "To forget") for name in further if name in forget_sets),
        ranking.rows("Neighbours: kept, with similar captions", retain, kept[:PICTURES]),
        ranking.rows("Kept", retain, spread(kept[PICTURES:], PICTURES)),
        *(show(name, "To keep") for name in further if name not in forget_sets),
    ]
    for rows in sections:
        rows.sort(key=lambda row: not row.is_wrong(erased))
    return Examples([*chain(*sections)], [*erased])


def neighbours_among(
    names: Sequence[str], forget: PairTable, retain: PairTable, original: PairEncoder, *, seed: int
) -> list[str]:
    """Return the names that are as close to a caption to forget as the nearest of retain captions.

    Nearest are a tenth of them, by the original's text features.
    """
    random = generator(seed, Stream.EXAMPLES)
    to_forget = _captions(forget, FORGET_CANDIDATES, random)
    to_keep = _captions(retain, RETAIN_CANDIDATES, random)
    if not (names and to_forget and to_keep):
        return []
    erased, kept, named = (original.texts([*each]) for each in (to_forget, to_keep, names))
    limit = (kept @ erased.T).amax(dim=1).float().quantile(1 - NEAREST)
    closeness = (named @ erased.T).amax(dim=1).float()
    return [name for name, each in zip(names, closeness, strict=True) if each >= limit]


def spread(items: Sequence[int], count: int) -> list[int]:
    """Choose at most `count` items, spread evenly."""
    return [items[i] for i in spread_indices(len(items), count)]


def _first_caption(source: PairTable, row: int) -> str | None:
    """Return the first caption of a pair; None if it is token ids or cannot be read."""
    try:
        texts = source.texts(row)
    except BrokenPair:
        return None
    return None if isinstance(texts, Tensor) else texts[0]


def _captions(source: PairTable, count: int, random: np.random.Generator) -> dict[str, int]:
    """Return distinct captions of at most `count` pairs drawn at random, each with its row."""
    captions: dict[str, int] = {}
    drawn = random.choice(len(source), min(count, len(source)), replace=False)
    for row in np.sort(drawn).tolist():
        text = _first_caption(source, row)
        if text is not None:
            captions.setdefault(text, row)
    return captions


def as_picture(image: Image.Image | Tensor) -> Image.Image:
    """Return a PIL image; a preprocessed tensor is stretched from black to white."""
    if isinstance(image, Image.Image):
        return image
    if image.is_floating_point():
        low, high = image.min(), image.max()
        image = ((image - low) / (high - low).clamp_min(1e-9) * 255).round().to(torch.uint8)
    return Image.fromarray(image.permute(1, 2, 0).cpu().contiguous().numpy())


def picture_sheet(
    rows: Sequence[SheetRow],
    path: str | PathLike[str],
    *,
    erased: Collection[str] = (),
    text_width: int | None = None,
) -> Path:
    """Draw pictures with their top captions before and after erasing, and write an image file.

    Args:
        rows: pictures in order.
        path: file to write, preferably `.png`.
        erased: captions of the erased concept, drawn in red. The caption of a picture itself is
            drawn in green.
        text_width: pixels of each of a picture's two columns of captions; None: by their length.

    Raises:
        InputError: `rows` is empty.
    """
    if not rows:
        raise InputError("rows is empty: there is no picture to draw.")
    sections = [(name, [*members]) for name, members in groupby(rows, key=lambda row: row.section)]
    depth = max(len(names) for row in rows for names in (row.before, row.after))
    if text_width is None:
        longest = max(len(name) for row in rows for name in (*row.before, *row.after))
        text_width = SENTENCE_WIDTH if longest > NAME_LENGTH else TEXT_WIDTH
    cell_height = max(PICTURE, LINE * (2 + depth)) + GAP
    cell_width = PICTURE + 2 * text_width + 3 * GAP
    heading_height = 2 * LINE + GAP
    lines = sum(-(-len(members) // COLUMNS) for _, members in sections)
    width = 2 * MARGIN + COLUMNS * cell_width + (COLUMNS - 1) * GAP
    height = 2 * MARGIN + LINE + len(sections) * heading_height + lines * cell_height
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    written = ((row.section, row.caption, *row.before, *row.after) for row in rows)
    pen = Pen(draw, chain.from_iterable(written))
    left: float = MARGIN
    for text, colour in LEGEND:
        pen.write((left, MARGIN), text, size=14, fill=colour)
        left += pen.length(text, 14) + 2 * GAP
    top = MARGIN + LINE
    for name, members in sections:
        draw.line((MARGIN, top + GAP, width - MARGIN, top + GAP), fill=RULE)
        pen.write((MARGIN, top + GAP + 6), name, size=18, fill=INK)
        top += heading_height
        for index, row in enumerate(members):
            place = MARGIN + index % COLUMNS * (cell_width + GAP), top
            _draw_row(sheet, pen, place, text_width, row, frozenset(erased))
            if index % COLUMNS == COLUMNS - 1 or index == len(members) - 1:
                top += cell_height
    path = Path(path)
    with replace_file(path) as temporary:
        sheet.save(temporary)
    return path


def _draw_row(
    sheet: Image.Image,
    pen: Pen,
    place: tuple[int, int],
    text_width: int,
    row: SheetRow,
    erased: frozenset[str],
) -> None:
    left, top = place
    sheet.paste(make_thumbnail(row.image), (left, top))
    text_left = left + PICTURE + GAP
    own = pen.shorten(row.caption, 2 * text_width + GAP, 15)
    pen.write((text_left, top - 2), own, size=15, fill=INK)
    for title, names in (("before", row.before), ("after", row.after)):
        pen.write((text_left, top + LINE), title, size=12, fill=FAINT)
        for rank, name in enumerate(names):
            colour = ERASED if name in erased else OWN if name == row.caption else INK
            text = pen.shorten(name, text_width, 14)
            pen.write((text_left, top + (2 + rank) * LINE - 3), text, size=14, fill=colour)
        text_left += text_width + GAP


def make_thumbnail(image: Image.Image) -> Image.Image:
    """Scale the picture to fit a square of `PICTURE` pixels, centred on white."""
    layer = image.convert("RGBA")
    scale = PICTURE / max(layer.size)
    width, height = (max(1, round(side * scale)) for side in layer.size)
    layer = layer.resize((width, height), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (PICTURE, PICTURE), "white")
    square.paste(layer, ((PICTURE - width) // 2, (PICTURE - height) // 2), layer)
    return square
