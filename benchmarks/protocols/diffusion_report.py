"""What the diffusion check found: figures of each object, the table, and the sheet of pictures."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.protocols.diffusion_check import (
    ARMS,
    CONCEPT,
    DRAWN,
    DiffusionCheck,
    Scores,
    open_picture,
    place,
    read_record,
)
from benchmarks.protocols.protocol import Reported
from fasterase.evaluation.metrics import bootstrap_intervals, format_value, wilson_interval
from fasterase.files import replace_file
from fasterase.report.lettering import Pen
from fasterase.report.pictures import (
    ERASED,
    GAP,
    INK,
    LINE,
    MARGIN,
    OWN,
    PICTURE,
    make_thumbnail,
    spread,
)
from fasterase.report.tables import Section, markdown_table

RESAMPLES = 1000
SHOWN = 10  # pictures of each object and arm on the sheet

COLUMNS = ["object", "wanted", "pictures", "original, %", "erased, %", "change, points"]
COLUMNS += ["elsewhere, %", "moved, %", "paper: original", "paper: CLIPErase"]
NOTES = (
    "Share of pictures in which the detector finds the object that the prompt names, with 95 % "
    "intervals (Wilson's; of the change the bootstrap's, over pairs of pictures that began as the "
    "same latents). elsewhere: how often the detector finds the object in the original's pictures "
    "of other prompts; forgetting need not go below that. moved: how far the prompts' hidden "
    "states moved, in percent of their distance to those of the empty prompt. The paper's figures "
    "are from third-party notes, for an apple; its pipeline, prompts and detector are not known to "
    "be these."
)
REPORTED = Reported(100.0, 2.0)  # of CONCEPT


def measure_object(
    check: DiffusionCheck, name: str, scores: Scores, output: Path
) -> dict[str, Any]:
    """Return what was found of one object; shares are 0 to 1, intervals [low, high]."""

    def detected(arm: str, prompts: Sequence[str]) -> np.ndarray:  # [n] 0 or 1
        every = [each[name] for prompt in prompts for each in scores[arm, prompt]]
        return (np.array(every) >= check.threshold).astype(float)

    own = check.prompts(name)
    before, after = (detected(arm, own) for arm in ARMS)
    others = detected("original", [each for each in check.all_prompts if each not in own])
    change = after - before
    interval = bootstrap_intervals({"change": change}, resamples=RESAMPLES, seed=check.seed)
    moved = [read_record(place(output, "erased", prompt) / DRAWN)["moved"] for prompt in own]
    row: dict[str, Any] = {"object": name, "forget": name in check.concepts}
    row["pictures"] = len(before)
    for arm, found in zip(ARMS, (before, after), strict=True):
        share = float(found.mean())
        row |= {arm: share, f"{arm}_interval": wilson_interval(share, len(found))}
    row |= {"change": float(change.mean()), "change_interval": interval["change"]}
    row["elsewhere"] = float(others.mean()) if len(others) else None
    return {**row, "moved": float(np.mean(moved))}


def format_table(figures: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table of `measure_object`s: what was erased, and what should stay."""

    def percent(value: float | None) -> str:
        return "-" if value is None else format_value("share", value)

    def with_interval(figure: Mapping[str, Any], key: str) -> str:
        low, high = figure[f"{key}_interval"]
        return f"{percent(figure[key])} ({percent(low)} to {percent(high)})"

    def row(figure: Mapping[str, Any]) -> list[str]:
        known = figure["forget"] and figure["object"] == CONCEPT
        reported = REPORTED if known else Reported()
        return [
            figure["object"],
            "↓" if figure["forget"] else "↑",
            str(figure["pictures"]),
            *(with_interval(figure, key) for key in (*ARMS, "change")),
            percent(figure["elsewhere"]),
            percent(figure["moved"]),
            *("-" if each is None else f"{each:.2f}" for each in reported),
        ]

    titles = {True: "Erased: should not be drawn", False: "Controls: should still be drawn"}
    sections = [
        Section(title, [row(figure) for figure in figures if figure["forget"] is forget])
        for forget, title in titles.items()
    ]
    shown = [section for section in sections if section.rows]
    return f"{markdown_table(COLUMNS, shown)}\n\n{NOTES}\n"


class Strip(NamedTuple):
    """A row of pictures."""

    title: str  # stands above them
    pictures: Sequence[Image.Image]  # of any size; they are scaled to square thumbnails
    marked: Sequence[bool]  # which of them get a frame
    colour: str  # of the frames


def strips(
    check: DiffusionCheck, figures: Sequence[Mapping[str, Any]], scores: Scores, output: Path
) -> Iterator[Strip]:
    """Yield a strip per object and arm; pictures of the same latents stand below each other."""
    for figure, arm in itertools.product(figures, ARMS):
        name = figure["object"]
        places = [(p, i) for p in check.prompts(name) for i in range(check.images)]
        chosen = [places[i] for i in spread(range(len(places)), SHOWN)]
        yield Strip(
            f"{name}, {arm}: found in {format_value('share', figure[arm])} %",
            [open_picture(place(output, arm, prompt) / f"{i:04d}.png") for prompt, i in chosen],
            [scores[arm, prompt][i][name] >= check.threshold for prompt, i in chosen],
            ERASED if figure["forget"] else OWN,
        )


def contact_sheet(strips: Sequence[Strip], path: Path) -> None:
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
        for column, (picture, marked) in enumerate(zip(strip.pictures, strip.marked, strict=True)):
            left, above = MARGIN + column * cell, top + LINE
            sheet.paste(make_thumbnail(picture), (left, above))
            if marked:
                outside = (left - 3, above - 3, left + PICTURE + 2, above + PICTURE + 2)
                draw.rectangle(outside, outline=strip.colour, width=3)
    with replace_file(path) as temporary:
        sheet.save(temporary)
