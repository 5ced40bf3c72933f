"""The matrix of erasures that must all end within the margins."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import robustness
from benchmarks.robustness import Case, distance, faults, table
from tests import digits
from tests.marks import SHORT_RUN

CASE = Case("vit", 0, 1, None)


def row(residue: float, *, verdict: str = "forgotten", **fields: Any) -> dict[str, Any]:
    found = {"model": "vit", "start": 0, "threads": 1, "capability": None, "seed": 0}
    found |= {"verdict": verdict, "steps": 90}
    for name in ("forget", "unseen"):
        found |= {f"{name} image_to_text": residue, f"{name} text_to_image": 0.5}
    return found | fields


def test_rows_outside_the_margins_are_faults() -> None:
    rows = [row(0.5), row(0.72, seed=1), row(0.6, verdict="over-erased", seed=2)]
    assert faults(rows) == [
        "vit_0_own_1 seed 1: forgotten, -0.020",
        "vit_0_own_1 seed 2: over-erased, +0.100",
    ]
    unseen = row(0.5, **{"unseen text_to_image": 0.1})
    assert faults([unseen]) == [], "only sets that were trained on have margins"


def test_the_table_has_the_least_distance_of_each_model() -> None:
    rows = [row(0.5), row(0.7, steps=120, **{"unseen text_to_image": 0.28}), row(0.4, model="b")]
    assert distance(rows[0], 0.25, 0.75, ["forget"]) == 0.25
    assert table(rows).splitlines()[2:] == [
        "| vit | 2 | 2 | 90-120 | 0.050 | 0.030 |",
        "| b | 1 | 1 | 90-90 | 0.150 | 0.150 |",
    ]


def test_a_case_runs_in_its_setting_and_once(tmp_path: Path, monkeypatch: Any) -> None:
    calls = []

    def run(command: list[str], **options: Any) -> Any:
        calls.append((json.loads(command[-1]), options["env"]))
        return subprocess.CompletedProcess(command, 0, stdout=json.dumps([row(0.5)] * 2).encode())

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    case = Case("vit", 1, 2, "avx2")
    assert case.run(2, tmp_path) == case.run(2, tmp_path) == [row(0.5)] * 2
    assert len(case.run(1, tmp_path)) == len(calls) == 1
    asked, environment = calls[0]
    assert asked == {"model": "vit", "start": 1, "threads": 2, "capability": "avx2", "seeds": 2}
    assert (environment["OMP_NUM_THREADS"], environment["ATEN_CPU_CAPABILITY"]) == ("2", "avx2")
    CASE.run(2, tmp_path)
    assert "ATEN_CPU_CAPABILITY" not in calls[1][1]
    assert environment["PATH"] == os.environ["PATH"]


@pytest.mark.slow
@SHORT_RUN
def test_every_seed_is_a_row_and_what_is_not_forgotten_a_fault(monkeypatch: Any) -> None:
    model = digits.pinned_model("vit")
    monkeypatch.setattr(digits, "trained_model", lambda kind, trained, *, seed: model)
    monkeypatch.setattr(digits, "OPTIONS", digits.OPTIONS | {"max_steps": 4})
    rows = list(robustness.erase(CASE, 2))
    assert [each["seed"] for each in rows] == [0, 1]
    assert [line.partition(",")[0] for line in faults(rows)] == [
        f"vit_0_own_1 seed {seed}: remembered" for seed in (0, 1)
    ]
    assert all(abs(each["kept"]) < 0.1 for each in rows)
    assert rows[0]["forget text_to_image"] != rows[1]["forget text_to_image"]
