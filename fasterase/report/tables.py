"""Format tables with titled sections, as aligned plain text, as Markdown and as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

from fasterase.report.templating import inline, render

WORDS = 2  # leading columns, aligned left; the others are numbers, aligned right


class Section(NamedTuple):
    """Table rows under one title."""

    title: str
    rows: list[list[str]]


def text_table(columns: Sequence[str], sections: Sequence[Section]) -> str:
    """Format a table as aligned text; a line break makes a header taller instead of wider."""
    # Headers stand on the bottom line of the tallest.
    upwards = zip_longest(*(reversed(column.split("\n")) for column in columns), fillvalue="")
    header_rows = [*upwards][::-1]
    rows = [*header_rows, *(row for section in sections for row in section.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            cell.ljust(width) if place < WORDS else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return ("  " + "  ".join(aligned)).rstrip()

    lines = [line(row) for row in header_rows]
    rule = "-" * (2 + sum(widths) + 2 * (len(widths) - 1))
    for section in sections:
        lines += [rule, section.title, *(line(row) for row in section.rows)]
    return "\n".join(lines)


def markdown_table(columns: Sequence[str], sections: Sequence[Section]) -> str:
    """Format one Markdown table per section, with its title as a heading."""
    rule = ["---" if place < WORDS else "---:" for place in range(len(columns))]
    blocks = []
    for section in sections:
        rows = [list(columns), rule, *section.rows]
        escaped = [[cell.replace("|", "\\|").replace("<", "\\<") for cell in row] for row in rows]
        table = "\n".join(f"| {' | '.join(row)} |" for row in escaped)
        blocks.append(f"## {inline(section.title)}\n\n{table}")
    return "\n\n".join(blocks)


def html_table(columns: Sequence[str], sections: Sequence[Section]) -> str:
    """Format a table as HTML; each title is a row of its own."""
    return render("table.html", columns=columns, sections=sections, words=WORDS)
