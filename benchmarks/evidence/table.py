"""Choose settings by the validation concepts, and sum up what the test concepts show."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.evidence.attacks import PROBED, RELEARNED, SWAPPED
from benchmarks.evidence.cells import ORIGINAL, Measured
from benchmarks.evidence.task import FORGET_SETS, KEEP_SETS
from benchmarks.result_files import count_words, markdown_table

HIT, RECALL = "concept_hit@1", "image_to_text_recall@1"
ATTACKED = (*SWAPPED, *PROBED, *RELEARNED)
RESAMPLES = 10_000
Originals = Mapping[tuple[str, int], Measured]  # (subgroup, seed) -> the original there


def by_place(found: Iterable[Measured], method: str = ORIGINAL) -> dict[tuple[str, int], Measured]:
    """Return the models of one method by subgroup and seed."""
    return {(each.subgroup, each.seed): each for each in found if each.method == method}


def changes(measured: Measured, original: Measured) -> dict[str, float]:
    """Return recall@1 of each kept set after erasing minus before."""
    return {
        name: measured.scores[name][RECALL] - original.scores[name][RECALL] for name in KEEP_SETS
    }


def damage(measured: Measured, original: Measured) -> float:
    """What tuning minimises: hit@1 beyond chance of both sets to forget, and recall@1 lost."""
    trace = (
        max(measured.scores[name][HIT] - measured.chance[name][HIT], 0.0) for name in FORGET_SETS
    )
    return sum(trace) + sum(max(-change, 0.0) for change in changes(measured, original).values())


def choose(found: Sequence[Measured], originals: Originals) -> dict[str, tuple[str, float]]:
    """Return method -> (setting, its mean damage): the least, over the validation concepts."""
    tried: dict[tuple[str, str], list[float]] = {}
    for each in found:
        if each.method != ORIGINAL:
            loss = damage(each, originals[each.subgroup, each.seed])
            tried.setdefault((each.method, each.setting), []).append(loss)
    chosen: dict[str, tuple[str, float]] = {}
    for (method, setting), losses in sorted(tried.items()):
        mean = float(np.mean(losses))
        if method not in chosen or mean < chosen[method][1]:
            chosen[method] = setting, mean
    return chosen


def summarise(found: Sequence[Measured], originals: Originals) -> list[dict[str, Any]]:
    """Return a row per method: means over concepts and seeds, with 95 % intervals where useful."""
    rows = []
    for method in dict.fromkeys(each.method for each in found):
        those = [each for each in found if each.method == method]
        concepts = np.array([each.subgroup for each in those])
        row: dict[str, Any] = {"method": method, "setting": those[0].setting}
        row |= {"concepts": len(set(concepts)), "models": len(those)}
        for name in FORGET_SETS:
            hits = [each.scores[name][HIT] for each in those]
            row |= _spread(f"{name} hit@1", hits, concepts)
            row |= _spread(f"{name} residue", [each.residues[name] for each in those], concepts)
            row[f"{name} verdicts"] = count_words(each.verdicts[name] for each in those)
        moved = [changes(each, originals[each.subgroup, each.seed]) for each in those]
        for name in KEEP_SETS:
            row |= _spread(f"{name} change", [change[name] for change in moved], concepts)
        for figure in ATTACKED:
            attacks = [each.attacks.get(figure.attack, {}).get(figure.key) for each in those]
            known = {place: v for place, v in enumerate(attacks) if isinstance(v, float)}
            if known:
                row |= _spread(figure.title, [*known.values()], concepts[[*known]])
        row["seconds"] = float(np.median([each.seconds for each in those]))
        rows.append(row)
    return rows


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
        **{each.title: f"{each.title} ↓" for each in ATTACKED},
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


def describe_choice(chosen: Mapping[str, tuple[str, float]]) -> str:
    """Return a line per tuned method: what was chosen, and its damage on validation concepts."""
    return "\n".join(
        f"- {method}: {_say(setting)}; damage {loss:.2f}"
        for method, (setting, loss) in chosen.items()
    )


def _say(setting: str) -> str:
    values = json.loads(setting)
    return ", ".join(f"{name} {value}" for name, value in values.items()) or "nothing to choose"
