"""The report of a run as a folder: Markdown, the loss plot and the picture sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fasterase.errors import MissingExtraError
from fasterase.files import write_text
from fasterase.report.pictures import TEXT_WIDTH, Examples, picture_sheet
from fasterase.report.plots import plot_history

# Captions of more characters than a name are given more pixels.
NAME_LENGTH, SENTENCE_WIDTH = 30, 290

REPORT, PLOT, SHEET = "report.md", "losses.png", "pictures.png"


def write_report_folder(
    folder: Path, text: str, *, history: Sequence[Mapping[str, Any]], examples: Examples
) -> Path:
    """Write `REPORT` with `text`, and `PLOT` and `SHEET` where there is something to show.

    Raises:
        MissingExtraError: matplotlib is missing; all but the plot is written.
    """
    missing: MissingExtraError | None = None
    shown = []
    if history:
        try:
            plot_history(history, folder / PLOT)
            shown.append(("Losses over the steps", PLOT))
        except MissingExtraError as error:
            missing = error
    if examples.rows:
        longest = max(len(name) for row in examples.rows for name in (*row.before, *row.after))
        picture_sheet(
            examples.rows,
            folder / SHEET,
            erased=examples.erased,
            text_width=SENTENCE_WIDTH if longest > NAME_LENGTH else TEXT_WIDTH,
        )
        shown.append(("Closest captions before and after", SHEET))
    sections = [f"\n## {title}\n\n![{title}]({file})\n" for title, file in shown]
    write_text(folder / REPORT, text + "".join(sections))
    if missing is not None:
        raise missing
    return folder
