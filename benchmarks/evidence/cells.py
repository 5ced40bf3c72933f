"""Cells of the comparison: a method with a setting on one concept, carried out once and kept."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.evidence import attacks, closed_form, salient, trained
from benchmarks.evidence.task import FORGET_SETS, HIT, RECALL, Method, Setting, Task
from benchmarks.processes import call_all
from benchmarks.result_files import keep_json, read_csv
from fasterase.demo import emoji
from fasterase.demo.run import evaluate_sets
from fasterase.demo.sets import DemoSets, build_sets
from fasterase.errors import InputError
from fasterase.models.dual_encoder import DualEncoder
from fasterase.models.load import load_model

METHODS: dict[str, Method] = {
    method.title: method for method in (*trained.METHODS, *salient.METHODS, *closed_form.METHODS)
}
# Models that no method made, measured in the same way.
ORIGINAL, RETRAINED = "original", "retrained"
# Attacks that train. The original undergoes them in cells of its own, not beside every model.
COSTLY = ("relearn",)
# In no file: how much of the forgotten sets is named correctly, beyond chance.
TRACE = "trace"

# A model after an erasure, as in evidence_models.csv; further columns are of attacks.
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One erasure: a method, its setting as JSON, a subgroup, a seed, and the attacks to follow."""

    method: str  # a title of `METHODS`, or `ORIGINAL` or `RETRAINED`
    setting: str
    subgroup: str
    seed: int
    attacks: tuple[str, ...] = ()
    model: str | None = None  # folder of a model to measure in place of erasing

    @property
    def title(self) -> str:
        return f"{self.method}, {self.subgroup}, seed {self.seed} {self.setting}"

    @property
    def file_name(self) -> str:
        digest = hashlib.sha256(repr(self).encode()).hexdigest()[:8]
        return f"{self.method}_{self.subgroup}_{self.seed}_{digest}.json".replace(" ", "-")


def as_text(setting: Setting) -> str:
    return json.dumps(setting, sort_keys=True)


def place_of(row: Row) -> tuple[str, str, int]:
    return row["method"], row["subgroup"], row["seed"]


def run_cells(cells: Iterable[Cell], work: Path, processes: int) -> list[Row]:
    """Carry out cells in parallel, each with one thread, and print each as it ends."""
    done = call_all(run_cell, cells, work, processes=processes, describe=lambda cell: cell.title)
    rows = [row for those in done.values() for row in those]
    return sorted(rows, key=lambda row: (*place_of(row), row["setting"]))


def run_cell(cell: Cell, work: Path) -> list[Row]:
    """Return a row per model of a cell, measured now or by an earlier command."""
    kept = keep_json(work / cell.file_name, lambda: _measure_cell(cell))
    return [flatten(each) for each in kept]


def _measure_cell(cell: Cell) -> list[dict[str, Any]]:
    """Carry out a cell; return what was measured wherever its method asked for it."""
    sets = build_sets(cell.subgroup, original=str(emoji.BASE_MODEL), seed=cell.seed)
    model = load_model(cell.model or str(emoji.BASE_MODEL))
    setting: dict[str, Any] = json.loads(cell.setting)
    found: list[dict[str, Any]] = []
    start = time.perf_counter()

    def measure(steps: int) -> None:
        here = {**setting, "steps": steps} if "steps" in setting else setting
        names = {"method": cell.method, "setting": as_text(here), "subgroup": cell.subgroup}
        figures = _evaluate(model, sets, cell)
        seconds = time.perf_counter() - start  # measurements included
        found.append({**names, "seed": cell.seed, **figures, "seconds": seconds})

    if cell.method in (ORIGINAL, RETRAINED):
        measure(0)
    else:
        METHODS[cell.method].erase(Task(model, sets, cell.seed, measure), setting)
    return found


def _evaluate(model: DualEncoder, sets: DemoSets, cell: Cell) -> dict[str, Any]:
    """Measure a model, with what the attacks find; costly ones are not run on the original too."""
    options: dict[str, Any] = {"seed": cell.seed, "progress": False}
    costly = tuple(attack for attack in cell.attacks if attack in COSTLY)
    cheap = tuple(attack for attack in cell.attacks if attack not in COSTLY)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "verdict: ")
        original = str(emoji.BASE_MODEL) if cheap else None
        others = attacks.non_members() if "membership" in cheap else None
        evaluation = evaluate_sets(
            model, sets, original=original, attacks=cheap, non_members=others, **options
        )
        found = dict(evaluation.attacks)
        if costly:
            found |= evaluate_sets(model, sets, attacks=costly, **options).attacks
    residues = {name: evaluation.mean_residue(name) for name in FORGET_SETS}
    return {
        "scores": evaluation.scores,  # set -> metric -> value
        "chance": evaluation.chance,  # set -> metric -> value of a random order
        "verdicts": evaluation.set_verdicts["model"],  # set to forget -> verdict
        "residues": {name: value for name, value in residues.items() if value is not None},
        "attacks": {
            attack: {figure.key: figure.value for figure in figures.values()}
            for attack, figures in found.items()
        },
    }


def flatten(measured: Mapping[str, Any]) -> Row:
    """Return the row of a measured model."""
    row = {key: measured[key] for key in ("method", "setting", "subgroup", "seed", "seconds")}
    scores, chance = measured["scores"], measured["chance"]
    for name, values in scores.items():
        row |= {f"{name} {metric}": values[metric] for metric in (HIT, RECALL) if metric in values}
    for name, verdict in measured["verdicts"].items():
        row |= {f"{name} verdict": verdict, f"{name} residue": measured["residues"].get(name)}
    for attack, figures in measured["attacks"].items():
        row |= {f"{attack} {key}": value for key, value in figures.items()}
    row[TRACE] = sum(max(scores[name][HIT] - chance[name][HIT], 0.0) for name in FORGET_SETS)
    return row


def read_models(file: Path) -> list[Row]:
    """Return the rows of a file of models, their figures as numbers."""
    return [{key: _read(value) for key, value in row.items() if value} for row in read_csv(file)]


def _read(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def check_methods(titles: Iterable[str]) -> list[Method]:
    """Look methods up by title."""
    unknown = [title for title in titles if title not in METHODS]
    if unknown:
        raise InputError(f"--methods: {unknown[0]!r} is none of {', '.join(METHODS)}.")
    return [METHODS[title] for title in titles]
