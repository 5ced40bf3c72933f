"""Choose settings by the validation concepts, and sum up what the test concepts show."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.evidence.attacks import (
    MEMBERS,
    PROBED,
    PROMPTED,
    QUANTISED,
    RELEARNED,
    SWAPPED,
)
from benchmarks.evidence.cells import ORIGINAL, RETRAINED, TRACE, Row
from benchmarks.evidence.task import FORGET_SETS, HIT, KEEP_SETS, RECALL
from benchmarks.result_files import count_words, group_rows, group_table, markdown_table, sum_up

ATTACKED = (*SWAPPED, *PROBED, *RELEARNED, *QUANTISED, *PROMPTED, *MEMBERS)
RESAMPLES = 10_000
Originals = Mapping[tuple[str, int], Row]  # (subgroup, seed) -> the original there
Chosen = dict[str, tuple[str, float]]  # title -> (setting, damage on the validation concepts)


def originals_of(rows: Iterable[Row]) -> Originals:
    return {(row["subgroup"], row["seed"]): row for row in rows if row["method"] == ORIGINAL}


def changes(row: Row, original: Row) -> dict[str, float]:
    """Return recall@1 of each kept set after erasing minus before."""
    return {name: row[f"{name} {RECALL}"] - original[f"{name} {RECALL}"] for name in KEEP_SETS}


def damage(row: Row, original: Row) -> float:
    """What tuning minimises: hit@1 beyond chance of both sets to forget, and recall@1 lost."""
    return row[TRACE] + sum(max(-change, 0.0) for change in changes(row, original).values())


def choose(rows: Sequence[Row]) -> Chosen:
    """Return method -> (setting, its mean damage): the least, over the validation concepts."""
    originals = originals_of(rows)
    tried = group_rows((row for row in rows if row["method"] != ORIGINAL), "method", "setting")
    chosen: Chosen = {}
    for (method, setting), those in sorted(tried.items()):
        losses = [damage(row, originals[row["subgroup"], row["seed"]]) for row in those]
        mean = float(np.mean(losses))
        if method not in chosen or mean < chosen[method][1]:
            chosen[method] = setting, mean
    return chosen


def summarise(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return a row per method: means over concepts and seeds, with 95 % intervals where useful."""
    originals, found = originals_of(rows), []
    for (method,), those in group_rows(rows, "method").items():
        concepts = np.array([row["subgroup"] for row in those])
        total: dict[str, Any] = {"method": method, "setting": those[0]["setting"]}
        total |= {"concepts": len(set(concepts)), "models": len(those)}
        for name in FORGET_SETS:
            hits = [row[f"{name} {HIT}"] for row in those]
            total |= _spread(f"{name} hit@1", hits, concepts)
            residues = [row[f"{name} residue"] for row in those]
            total |= _spread(f"{name} residue", residues, concepts)
            total[f"{name} verdicts"] = count_words(row[f"{name} verdict"] for row in those)
        moved = [changes(row, originals[row["subgroup"], row["seed"]]) for row in those]
        for name in KEEP_SETS:
            total |= _spread(f"{name} change", [change[name] for change in moved], concepts)
        for figure in ATTACKED:
            values = [row.get(f"{figure.attack} {figure.key}") for row in those]
            known = {place: v for place, v in enumerate(values) if isinstance(v, float)}
            if known:
                total |= _spread(figure.title, [*known.values()], concepts[[*known]])
        total["seconds"] = float(np.median([row["seconds"] for row in those]))
        found.append(total)
    return found


def _spread(column: str, values: Sequence[float], concepts: np.ndarray) -> dict[str, float]:
    """Return the mean and its 95 % interval, bootstrapped over the concepts.

    Models of one concept are alike: another seed is no further concept.
    """
    known, place = np.unique(concepts, return_inverse=True)
    sums, counts = np.bincount(place, weights=np.array(values)), np.bincount(place)
    drawn = np.random.default_rng(0).integers(len(known), size=(RESAMPLES, len(known)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975]).tolist()
    return {column: float(np.mean(values)), f"{column} low": low, f"{column} high": high}


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format the summary as Markdown, in percent; the wanted direction stands in each heading."""
    headings = {
        "method": "method",
        "concepts": "concepts",
        "models": "models",
        "forget hit@1": "forget hit@1 ↓",
        "forget residue": "residue → 50",
        "forget-unseen hit@1": "unseen hit@1 ↓",
        "forget-unseen residue": "unseen residue → 50",
        **{f"{name} change": f"{name} R@1 change ↑" for name in KEEP_SETS},
        **{each.title: f"{each.title} {'→ 50' if each in MEMBERS else '↓'}" for each in ATTACKED},
        "seconds": "seconds",
    }
    shown = {
        column: title for column, title in headings.items() if any(column in row for row in rows)
    }
    return markdown_table([*shown.values()], [[_cell(row, each) for each in shown] for row in rows])


def _cell(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if column in ("concepts", "models", "seconds"):
        return f"{value:.0f}"
    sign = "+" if column.endswith("change") else ""
    spread = f"{100 * row[f'{column} low']:.0f} to {100 * row[f'{column} high']:.0f}"
    return f"{100 * value:{sign}.1f} ({spread})"


def beside_retrained(rows: Sequence[Row], method: str) -> str:
    """Return a table of a method beside models that never saw the concept, where there are some.

    In percent, means over the seeds of each concept, and over all. Empty if there is none.
    """
    known = {row["subgroup"] for row in rows if row["method"] == RETRAINED}
    shown = [row for row in rows if row["subgroup"] in known]
    shown = [row for row in shown if row["method"] in (ORIGINAL, RETRAINED, method)]
    if not shown:
        return ""
    originals = originals_of(rows)
    figures = [
        figure
        for figure in ATTACKED
        if figure not in PROBED
        and all(isinstance(row.get(f"{figure.attack} {figure.key}"), float) for row in shown)
    ]
    lines: list[dict[str, Any]] = []
    for row in shown:
        line: dict[str, Any] = {}
        for name in FORGET_SETS:
            line |= {
                f"{name} hit@1": row[f"{name} {HIT}"],
                f"{name} residue": row[f"{name} residue"],
            }
        moved = changes(row, originals[row["subgroup"], row["seed"]])
        line |= {f"{name} change": change for name, change in moved.items()}
        line |= {figure.title: row[f"{figure.attack} {figure.key}"] for figure in figures}
        for concept in (row["subgroup"], "mean"):
            lines.append({"concept": concept, "model": row["method"], **line})
    lines.sort(key=lambda line: (line["concept"] == "mean", line["concept"]))
    return group_table(
        lines,
        ("concept", "model"),
        [column for column in lines[0] if column not in ("concept", "model")],
        lambda those, column: sum_up(those, column, "+.1f" if column.endswith("change") else ".1f"),
    )


def describe_choice(chosen: Chosen) -> str:
    """Return a line per tuned method: what was chosen, and its damage on validation concepts."""
    lines = []
    for method, (setting, loss) in chosen.items():
        said = ", ".join(f"{name} {value}" for name, value in json.loads(setting).items())
        lines.append(f"- {method}: {said or 'nothing to choose'}; damage {loss:.2f}")
    return "\n".join(lines)
