"""The benchmark of the attacks on few pairs."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks import attacks
from benchmarks.result_files import RESULTS
from fasterase.errors import InputError


def test_every_figure_is_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attacks.main(["--max_pairs", "12", "--output", str(tmp_path)])
    assert "attack quantise: 4-bit weights" in capsys.readouterr().out
    with (tmp_path / "attacks.csv").open(encoding="utf-8") as written:
        found = {(row["attack"], row["figure"]): row for row in csv.DictReader(written)}
    with (RESULTS / "attacks.csv").open(encoding="utf-8") as committed:
        assert {(row["attack"], row["figure"]) for row in csv.DictReader(committed)} == set(found)
    row = found["swap", "forget/original_images/contest_hit@1"]
    assert row["model"] == attacks.RETRAINED
    assert 0 <= float(row["low"]) <= float(row["value"]) <= float(row["high"]) <= 1


def test_models_have_names() -> None:
    assert attacks.parse_models(["a=b", "c=d=e"]) == {"a": "b", "c": "d=e"}
    for entry in ("a", "=b", "a=", f"{attacks.RETRAINED}=b"):
        with pytest.raises(InputError, match=r"--erased .*: expected NAME=FOLDER"):
            attacks.parse_models([entry])
