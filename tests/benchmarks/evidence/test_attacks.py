"""The models that the benchmark of the attacks is given, and its rows."""

from __future__ import annotations

import pytest

from benchmarks.evidence import attacks
from fasterase.errors import InputError
from fasterase.evaluation.findings import Finding
from fasterase.report.evaluation import Evaluation


def test_models_have_names() -> None:
    assert attacks.parse_models(["a=b", "c=d=e"]) == {"a": "b", "c": "d=e"}
    with pytest.raises(InputError, match=r"--erased retrained .*: this is another model"):
        attacks.parse_models([f"{attacks.RETRAINED}=b"])


def test_each_model_has_a_row_with_its_interval() -> None:
    others = {"references": {"other": 0.7}, "other_intervals": {"original": [0.9, 1.0]}}
    figure = Finding("auc", "", "AUC", "share", "↓", 0.5, 0.4, 0.6, original=1.0, **others)
    evaluation = Evaluation({}, {}, {}, {}, {}, attacks={"probe": {"auc": figure}})
    found = [
        (row["model"], row["value"], row["low"], row["high"], row["code"])
        for row in attacks.rows_of(evaluation, "erased", code="abc")
    ]
    assert found == [
        ("erased", 0.5, 0.4, 0.6, "abc"),
        (attacks.ORIGINAL, 1.0, 0.9, 1.0, "abc"),
        ("other", 0.7, None, None, "abc"),
    ]
