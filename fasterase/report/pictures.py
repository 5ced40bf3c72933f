"""Picture sheets: with top captions before and after erasing, or in titled strips."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw
from torch import Tensor

from fasterase.errors import InputError
from fasterase.files import replace_file
from fasterase.report.lettering import Pen

# Pixels.
PICTURE, LINE, GAP, TEXT_WIDTH = 96, 20, 12, 190
MARGIN = 20

COLUMNS = 2  # pictures side by side

INK, FAINT, ERASED, OWN, RULE = "#202020", "#808080", "#c8102e", "#1a7f37", "#d0d0d0"


@dataclass(frozen=True)
class SheetRow:
    """One picture of a sheet.

    Attributes:
        section: the name of its set; consecutive pictures of a section share one heading.
        image: the picture, of any size; it is scaled to a square thumbnail.
        caption: what it shows.
        before: the top captions of the original model, best first.
        after: the top captions of the erased model.
    """

    section: str
    image: Image.Image
    caption: str
    before: Sequence[str]
    after: Sequence[str]


def top_captions(
    image: Tensor,  # [n, D] unit rows
    text: Tensor,  # [m, D] unit rows
    captions: Sequence[str],  # [m]
    k: int = 3,
) -> list[list[str]]:
    """Return the `k` captions closest to each image, best first. Materialises [n, m] scores."""
    best = (image @ text.T).topk(min(k, len(captions)), dim=1).indices
    return [[captions[i] for i in row] for row in best.tolist()]


def picture_sheet(
    rows: Sequence[SheetRow],
    path: str | PathLike[str],
    *,
    erased: Collection[str] = (),
    text_width: int = TEXT_WIDTH,
) -> Path:
    """Draw pictures with their top captions before and after erasing, and write an image file.

    Args:
        rows: pictures in order.
        path: file to write, preferably `.png`.
        erased: captions of the erased concept, drawn in red. The caption of a picture itself is
            drawn in green.
        text_width: pixels of each of a picture's two columns of captions.

    Raises:
        InputError: `rows` is empty.
    """
    if not rows:
        raise InputError("rows is empty: there is no picture to draw.")
    sections: list[tuple[str, list[SheetRow]]] = []
    for row in rows:
        if not sections or sections[-1][0] != row.section:
            sections.append((row.section, []))
        sections[-1][1].append(row)
    depth = max(len(names) for row in rows for names in (row.before, row.after))
    cell_height = max(PICTURE, LINE * (2 + depth)) + GAP
    heading_height = 2 * LINE + GAP
    grid_rows = [-(-len(members) // COLUMNS) for _, members in sections]
    cell_width = PICTURE + 2 * text_width + 3 * GAP
    width = 2 * MARGIN + COLUMNS * cell_width + (COLUMNS - 1) * GAP
    height = 2 * MARGIN + LINE + len(sections) * heading_height + sum(grid_rows) * cell_height
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    written = ((row.section, row.caption, *row.before, *row.after) for row in rows)
    pen = Pen(draw, chain.from_iterable(written))
    _write_legend(pen, MARGIN, MARGIN)
    top = MARGIN + LINE
    for (name, members), lines in zip(sections, grid_rows, strict=True):
        draw.line((MARGIN, top + GAP, width - MARGIN, top + GAP), fill=RULE)
        pen.write((MARGIN, top + GAP + 6), name, size=18, fill=INK)
        top += heading_height
        for index, row in enumerate(members):
            left = MARGIN + (index % COLUMNS) * (cell_width + GAP)
            place = left, top + index // COLUMNS * cell_height
            _draw_row(sheet, pen, place, text_width, row, frozenset(erased))
        top += lines * cell_height
    path = Path(path)
    with replace_file(path) as temporary:
        sheet.save(temporary)
    return path


class Strip(NamedTuple):
    """A row of pictures.

    Attributes:
        title: stands above them.
        pictures: of any size; they are scaled to square thumbnails.
        marked: which of them get a frame.
        colour: of the frames.
    """

    title: str
    pictures: Sequence[Image.Image]
    marked: Sequence[bool]
    colour: str


def contact_sheet(strips: Sequence[Strip], path: Path) -> Path:
    """Draw strips below each other, each under its title, and write an image file."""
    columns = max(len(strip.pictures) for strip in strips)
    cell, height = PICTURE + GAP, LINE + PICTURE + GAP
    size = 2 * MARGIN + columns * cell - GAP, 2 * MARGIN + len(strips) * height
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    pen = Pen(draw, [strip.title for strip in strips])
    for number, strip in enumerate(strips):
        top = MARGIN + number * height
        pen.write((MARGIN, top - 2), strip.title, size=14, fill=INK)
        for place, (picture, marked) in enumerate(zip(strip.pictures, strip.marked, strict=True)):
            corner = MARGIN + place * cell, top + LINE
            sheet.paste(_make_thumbnail(picture), corner)
            if marked:
                outside = (
                    corner[0] - 3,
                    corner[1] - 3,
                    corner[0] + PICTURE + 2,
                    corner[1] + PICTURE + 2,
                )
                draw.rectangle(outside, outline=strip.colour, width=3)
    with replace_file(path) as temporary:
        sheet.save(temporary)
    return path


def _write_legend(pen: Pen, left: float, top: int) -> None:
    words = (
        ("Top captions before and after.", INK),
        ("red: a caption of the erased concept", ERASED),
        ("green: the picture's own caption, to be kept", OWN),
    )
    for text, colour in words:
        pen.write((left, top), text, size=14, fill=colour)
        left += pen.length(text, 14) + 2 * GAP


def _draw_row(
    sheet: Image.Image,
    pen: Pen,
    place: tuple[int, int],
    text_width: int,
    row: SheetRow,
    erased: frozenset[str],
) -> None:
    left, top = place
    sheet.paste(_make_thumbnail(row.image), (left, top))
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


def _make_thumbnail(image: Image.Image) -> Image.Image:
    """Scale the picture to fit a square of `PICTURE` pixels, centred on white."""
    layer = image.convert("RGBA")
    scale = PICTURE / max(layer.size)
    size = (max(1, round(layer.width * scale)), max(1, round(layer.height * scale)))
    layer = layer.resize(size, Image.Resampling.BICUBIC)
    square = Image.new("RGB", (PICTURE, PICTURE), "white")
    square.paste(layer, ((PICTURE - size[0]) // 2, (PICTURE - size[1]) // 2), layer)
    return square
