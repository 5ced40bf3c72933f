"""Format tables with titled sections, as aligned plain text, as Markdown and as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, zip_longest
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
    rows = [row for section in sections for row in section.rows]
    lines = [f"  {line}" for line in align([*header_rows, *rows])]
    rule = "-" * max(map(len, lines))
    table, body = lines[: len(header_rows)], iter(lines[len(header_rows) :])
    for section in sections:
        table += [rule, section.title, *islice(body, len(section.rows))]
    return "\n".join(table)


def align(rows: Sequence[Sequence[str]], *, words: int = WORDS) -> list[str]:
    """Return rows as lines: the first `words` columns are aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place < words else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


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
