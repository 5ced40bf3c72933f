"""Rows of evidence_models.csv: a model each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.evidence.attacks import attacks_of
from benchmarks.evidence.cells import Measured
from benchmarks.evidence.table import ATTACKED, HIT, RECALL
from benchmarks.evidence.task import FORGET_SETS, KEEP_SETS
from benchmarks.result_files import read_csv

VERDICT, RESIDUE = " verdict", " residue"


def flatten(each: Measured) -> dict[str, Any]:
    """Return a row."""
    columns = ("method", "setting", "subgroup", "seed", "seconds")
    row: dict[str, Any] = {name: getattr(each, name) for name in columns}
    for name, scores in each.scores.items():
        row |= {f"{name} {metric}": scores[metric] for metric in (HIT, RECALL) if metric in scores}
    for name, verdict in each.verdicts.items():
        row |= {f"{name}{VERDICT}": verdict, f"{name}{RESIDUE}": each.residues.get(name)}
    for attack, figures in each.attacks.items():
        row |= {f"{attack} {key}": value for key, value in figures.items()}
    return row


def read_models(file: Path) -> list[Measured]:
    """Return what the rows of a file have kept of each model."""
    return [_unflatten({key: v for key, v in row.items() if v}) for row in read_csv(file)]


def _unflatten(row: Mapping[str, str]) -> Measured:
    def under(start: str) -> dict[str, float | str]:
        """Return the columns that start with a word and a space."""
        found = {key: v for key, v in row.items() if key.startswith(f"{start} ")}
        return {key.removeprefix(f"{start} "): _read(value) for key, value in found.items()}

    return Measured(
        row["method"],
        row["setting"],
        row["subgroup"],
        int(row["seed"]),
        scores={
            name: {key: float(v) for key, v in under(name).items() if key in (HIT, RECALL)}
            for name in (*FORGET_SETS, *KEEP_SETS)
        },
        chance={},
        verdicts={name: row[f"{name}{VERDICT}"] for name in FORGET_SETS},
        residues={name: float(row[f"{name}{RESIDUE}"]) for name in FORGET_SETS},
        attacks={attack: under(attack) for attack in attacks_of(ATTACKED)},
        seconds=float(row["seconds"]),
    )


def _read(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
