"""Cells of the comparison: a method with a setting on one concept, carried out once and kept."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.evidence import closed_form, salient, trained
from benchmarks.evidence.task import Method, Setting, Task
from benchmarks.processes import call_all
from fasterase.demo import emoji
from fasterase.demo.run import evaluate_sets
from fasterase.demo.sets import DemoSets, build_sets
from fasterase.errors import InputError
from fasterase.evaluation.findings import Findings
from fasterase.files import write_text
from fasterase.models.dual_encoder import DualEncoder
from fasterase.models.load import load_model
from fasterase.report.evaluation import Evaluation

METHODS: dict[str, Method] = {
    method.title: method for method in (*trained.METHODS, *salient.METHODS, *closed_form.METHODS)
}
# Models that no method made, measured in the same way.
ORIGINAL, RETRAINED = "original", "retrained"
# Attacks that train. The original undergoes them in cells of its own, not beside every model.
COSTLY = ("relearn",)


@dataclass(frozen=True)
class Measured:
    """A model after an erasure."""

    method: str  # title of the method, or `ORIGINAL` or `RETRAINED`
    setting: str  # as JSON, with the `steps` at which this model was measured
    subgroup: str  # what was erased
    seed: int  # of the run
    scores: dict[str, dict[str, float]]  # set -> metric -> value
    chance: dict[str, dict[str, float]]  # set -> metric -> value of a random order
    verdicts: dict[str, str]  # set to forget -> verdict
    residues: dict[str, float]  # set to forget -> mean residue
    # attack -> figure -> value
    attacks: dict[str, dict[str, float | str]] = field(default_factory=dict)
    seconds: float = 0.0  # from the start of the erasure, measurements included


@dataclass(frozen=True)
class Cell:
    """One erasure: a method, its setting as JSON, a subgroup, a seed, and the attacks to follow."""

    method: str
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


def run_cell(cell: Cell, work: Path) -> list[Measured]:
    """Carry out a cell and measure its model, or read what an earlier command measured."""
    path = work / cell.file_name
    if path.is_file():
        return [Measured(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    sets = build_sets(cell.subgroup, original=str(emoji.BASE_MODEL), seed=cell.seed)
    model = load_model(cell.model or str(emoji.BASE_MODEL))
    setting: dict[str, Any] = json.loads(cell.setting)
    found: list[Measured] = []
    start = time.perf_counter()

    def measure(steps: int) -> None:
        evaluation, attacks = _evaluate(model, sets, cell)
        residues = {name: evaluation.mean_residue(name) for name in ("forget", "forget-unseen")}
        found.append(
            Measured(
                cell.method,
                as_text({**setting, "steps": steps} if "steps" in setting else setting),
                cell.subgroup,
                cell.seed,
                scores=evaluation.scores,
                chance=evaluation.chance,
                verdicts=evaluation.set_verdicts["model"],
                residues={name: value for name, value in residues.items() if value is not None},
                attacks={
                    attack: {figure.key: figure.value for figure in figures.values()}
                    for attack, figures in attacks.items()
                },
                seconds=time.perf_counter() - start,
            )
        )

    if cell.method in (ORIGINAL, RETRAINED):
        measure(0)
    else:
        METHODS[cell.method].erase(Task(model, sets, cell.seed, measure), setting)
    write_text(path, json.dumps([asdict(each) for each in found]))
    return found


def _evaluate(
    model: DualEncoder, sets: DemoSets, cell: Cell
) -> tuple[Evaluation, dict[str, Findings]]:
    """Measure a model, with what the attacks find; costly ones are not run on the original too."""
    options: dict[str, Any] = {"seed": cell.seed, "progress": False}
    costly = tuple(attack for attack in cell.attacks if attack in COSTLY)
    cheap = tuple(attack for attack in cell.attacks if attack not in COSTLY)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "verdict: ")
        original = str(emoji.BASE_MODEL) if cheap else None
        evaluation = evaluate_sets(model, sets, original=original, attacks=cheap, **options)
        attacks = dict(evaluation.attacks)
        if costly:
            attacks |= evaluate_sets(model, sets, attacks=costly, **options).attacks
    return evaluation, attacks


def run_cells(cells: Iterable[Cell], work: Path, processes: int) -> list[Measured]:
    """Carry out cells in parallel, each with one thread, and print each as it ends."""
    done = call_all(run_cell, cells, work, processes=processes, describe=lambda cell: cell.title)
    found = [measured for those in done.values() for measured in those]
    return sorted(found, key=lambda each: (each.method, each.subgroup, each.seed, each.setting))


def check_methods(titles: Iterable[str]) -> list[Method]:
    """Look methods up by title."""
    unknown = [title for title in titles if title not in METHODS]
    if unknown:
        raise InputError(f"--methods: {unknown[0]!r} is none of {', '.join(METHODS)}.")
    return [METHODS[title] for title in titles]
