"""An evaluation as people read it: one row per set and metric, and notes, in three formats."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from fasterase.evaluation.figures import Figure
from fasterase.evaluation.metrics import METRICS, OLD_INDEX, Metric
from fasterase.report.tables import Section, html_table, markdown_table, text_table

if TYPE_CHECKING:  # evaluation.py imports this file
    from fasterase.evaluation.evaluation import Evaluation, Scores

LEGEND = (
    "Sets to forget: ↓ should fall to chance or below; ↓ chance and ↑ chance should reach chance\n"
    "and not pass it. All other sets, against the original: ↑ should not fall, ↓ should not rise."
)
LEFT = 2  # leading columns of words; the others are numbers
REFERENCE_WIDTH = 10  # characters of a line of a reference's name


def format_text(evaluation: Evaluation) -> str:
    """Return plain text, 100 columns wide with two references."""
    references = [
        "\n".join(textwrap.wrap(name, width=REFERENCE_WIDTH) or [name])
        for name in evaluation.references
    ]
    table = text_table(_columns(evaluation, references), _sections(evaluation), left=LEFT)
    return "\n\n".join([table, *_notes(evaluation)])


def format_markdown(evaluation: Evaluation) -> str:
    """Return Markdown with a heading."""
    columns = _columns(evaluation, [*evaluation.references])
    table = markdown_table(columns, _sections(evaluation), left=LEFT)
    title = f"# Evaluation of {evaluation.settings['model']}"
    return "\n\n".join([title, table, *_notes(evaluation)]) + "\n"


def format_html(evaluation: Evaluation) -> str:
    """Return HTML without a heading, for notebooks."""
    columns = _columns(evaluation, [*evaluation.references])
    table = html_table(columns, _sections(evaluation), left=LEFT)
    return table + "".join(f"<p>{html.escape(note)}</p>" for note in _notes(evaluation))


def _columns(evaluation: Evaluation, references: Sequence[str]) -> list[str]:
    original = [] if evaluation.original is None else ["original"]
    return ["metric", "wanted", "chance", *original, "model", "95 % interval", *references]


def _sections(evaluation: Evaluation) -> list[Section]:
    """Return one section per set, then one per task or attack and group of its figures."""
    sections = [
        Section(
            _set_title(evaluation, name),
            [_metric_row(evaluation, name, metric) for metric in METRICS if metric.key in values],
        )
        for name, values in evaluation.scores.items()
    ]
    for kind, name, figures in evaluation.examined():
        for group, those in groupby(figures.values(), key=lambda figure: figure.group):
            rows = [_figure_row(evaluation, figure) for figure in those]
            sections.append(Section(f"{kind} {name}: {group}", rows))
    return sections


def _set_title(evaluation: Evaluation, name: str) -> str:
    count = evaluation.pairs[name]
    aim = "to forget" if name in evaluation.forget_sets else "to keep"
    return f"{name} ({count:,} pair{'' if count == 1 else 's'}, {aim})"


def _metric_row(evaluation: Evaluation, name: str, metric: Metric) -> list[str]:
    def cell(scores: Scores) -> str:
        value = scores.get(name, {}).get(metric.key)
        return "-" if value is None else metric.format(value)

    low, high = evaluation.intervals[name][metric.key]
    return [
        metric.title,
        metric.wanted(forget=name in evaluation.forget_sets),
        metric.format(evaluation.chance[name][metric.key]),
        *([] if evaluation.original is None else [cell(evaluation.original)]),
        cell(evaluation.scores),
        f"{metric.format(low)} to {metric.format(high)}",
        *map(cell, evaluation.references.values()),
    ]


def _figure_row(evaluation: Evaluation, figure: Figure) -> list[str]:
    return [
        figure.title,
        figure.wanted,
        figure.format(figure.chance),
        *([] if evaluation.original is None else [figure.format(figure.original)]),
        figure.format(figure.value),
        figure.interval,
        *(figure.format(figure.references.get(name)) for name in evaluation.references),
    ]


def _notes(evaluation: Evaluation) -> list[str]:
    """Return the verdicts, what the audit found, and how to read the table."""
    audit = [f"- {line}" for line in evaluation.audit]
    return [
        _describe_verdicts(evaluation),
        *(["\n".join(["Audit:", *audit])] if audit else []),
        _legend(evaluation),
    ]


def _describe_verdicts(evaluation: Evaluation) -> str:
    if not evaluation.verdicts:
        return (
            "Verdict: none. No retain pair has a caption that is not in a set to forget, so\n"
            "there is nothing to compare with."
        )
    listed = (
        f"{name} {verdict}{_by_set(evaluation.set_verdicts.get(name, {}))}"
        for name, verdict in evaluation.verdicts.items()
    )
    return f"Verdict: {', '.join(listed)}."


def _by_set(verdicts: dict[str, str]) -> str:
    """Say which set the verdict on a model comes from, where there are several."""
    if len(verdicts) < 2:
        return ""
    return f" ({', '.join(f'{verdict} by {name}' for name, verdict in verdicts.items())})"


def _legend(evaluation: Evaluation) -> str:
    old_index = (
        "\ntext->old image ranks the original's features of the images, an index not rebuilt."
        if any(OLD_INDEX in values for values in evaluation.scores.values())
        else ""
    )
    return (
        f"{LEGEND}\nimage->text ranks among {evaluation.settings['candidates']:,} captions, "
        "text->image among the set's images and the\nretain set's."
        f"{old_index}"
    )
