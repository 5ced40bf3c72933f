"""Format tables with titled sections, as aligned plain text, as Markdown and as HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest


@dataclass(frozen=True)
class Section:
    """Table rows under one title."""

    title: str
    rows: list[list[str]]


def text_table(columns: Sequence[str], sections: Sequence[Section], *, left: int = 2) -> str:
    """Format a table as aligned plain text.

    Args:
        columns: headers; a line break makes the header taller instead of wider.
        sections: the rows, each with one cell per column.
        left: number of leading columns of words, aligned left; the others are aligned right.
    """
    # Headers stand on the bottom line of the tallest.
    upwards = zip_longest(*(reversed(column.split("\n")) for column in columns), fillvalue="")
    header_rows = [*upwards][::-1]
    rows = [*header_rows, *(row for section in sections for row in section.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        aligned = [cell.ljust(width) for cell, width in zip(cells[:left], widths, strict=False)]
        numbers = zip(cells[left:], widths[left:], strict=True)
        aligned += [cell.rjust(width) for cell, width in numbers]
        return ("  " + "  ".join(aligned)).rstrip()

    lines = [line(row) for row in header_rows]
    rule = "-" * (2 + sum(widths) + 2 * (len(widths) - 1))
    for section in sections:
        lines += [rule, section.title, *(line(row) for row in section.rows)]
    return "\n".join(lines)


def markdown_table(columns: Sequence[str], sections: Sequence[Section], *, left: int = 2) -> str:
    """Format one Markdown table per section, with its title as a heading."""
    rule = ["---" if i < left else "---:" for i in range(len(columns))]
    blocks = []
    for section in sections:
        rows = [list(columns), rule, *section.rows]
        escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        table = "\n".join(f"| {' | '.join(row)} |" for row in escaped)
        blocks.append(f"## {section.title}\n\n{table}")
    return "\n\n".join(blocks)


def html_table(columns: Sequence[str], sections: Sequence[Section]) -> str:
    """Format a table as HTML, for notebooks; each title is a row of its own."""

    def line(cells: Sequence[str], tag: str) -> str:
        sides = ["left"] * 2 + ["right"] * (len(cells) - 2)
        styled = [
            f'<{tag} style="text-align: {side}">{html.escape(cell)}</{tag}>'
            for cell, side in zip(cells, sides, strict=True)
        ]
        return f"<tr>{''.join(styled)}</tr>"

    lines = []
    for section in sections:
        if section.title:
            title = html.escape(section.title)
            heading = f'<th colspan="{len(columns)}" style="text-align: left">{title}</th>'
            lines.append(f"<tr>{heading}</tr>")
        lines += [line(row, "td") for row in section.rows]
    head = f"<thead>{line(columns, 'th')}</thead>"
    return f"<table>{head}<tbody>{''.join(lines)}</tbody></table>"
