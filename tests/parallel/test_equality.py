"""Two processes against one on the same global batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.job import STEPS, make_model, run_case
from tests.parallel.launched import (
    assert_equal_in_fp64,
    assert_near_in_fp32,
    outcome,
    run_cases,
)

pytest.importorskip("deepspeed")

QUICK = ["sgd-plain", "adam-cached", "sgd-zero1", "sgd-zero3", "nan", "nan-zero3", "automatic"]
WHOLE = [
    "sgd-cached",
    *(f"{name}-zero{stage}" for name in ("sgd-plain", "adam", "automatic") for stage in (1, 2, 3)),
    "sgd-zero2",
    "nan-zero1",
    "nan-zero2",
]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    run_cases(QUICK, folder)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("all")
    run_cases(WHOLE, folder, timeout=1800)
    return folder


@pytest.fixture
def folder(case: str, request: pytest.FixtureRequest) -> Path:
    """Where the outcomes of a case are."""
    return request.getfixturevalue("quick" if case in QUICK else "whole")


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    return {}


def cases(kind: str) -> list[Any]:
    """All cases of a kind; those that take long are run with all others."""
    slow = [pytest.param(case, marks=pytest.mark.scale) for case in WHOLE if case.startswith(kind)]
    return [*(case for case in QUICK if case.startswith(kind)), *slow]


def one_process(case: str, alone: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the outcome of the same run in this process, without ZeRO and in fp64."""
    plain, _, stage = case.partition("-zero")
    if stage and plain in ("sgd", "adam"):
        plain += "-cached"
    if plain not in alone:
        alone[plain] = run_case(plain)
    return alone[plain]


@pytest.mark.parametrize("case", [*cases("sgd"), *cases("adam")])
@pytest.mark.filterwarnings("ignore:verdict")
def test_two_processes_equal_one(case, folder, alone):
    expected = one_process(case, alone)
    found = outcome(folder, case)
    assert len(found["history"]) == STEPS
    assert_alike = assert_near_in_fp32 if "zero" in case else assert_equal_in_fp64
    assert_alike(found, expected)
    start = make_model().state_dict()
    moved = [float((v - start[k]).abs().max()) for k, v in expected["weights"].items()]
    assert max(moved) > 1e-3
    other = outcome(folder, case, rank=1)
    assert other["history"] == found["history"]
    for name, weight in found["weights"].items():
        assert torch.equal(other["weights"][name], weight), name


def test_reductions_do_not_grow_with_micro_batches(quick):
    plain, cached = outcome(quick, "sgd-plain"), outcome(quick, "adam-cached")
    assert plain["reductions"] == cached["reductions"] == 5  # one a step


@pytest.mark.scale
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_reductions_of_zero_do_not_grow_with_micro_batches(stage, whole, quick):
    folder = whole if stage == 2 else quick
    cached = outcome(folder, f"sgd-zero{stage}")["reductions"]
    assert outcome(whole, f"sgd-plain-zero{stage}")["reductions"] == cached > 0


@pytest.mark.parametrize("case", cases("nan"))
def test_the_nan_of_one_rank_leaves_all_weights_alone(case, folder):
    histories = [outcome(folder, case, rank=rank)["history"] for rank in (0, 1)]
    assert repr(histories[0]) == repr(histories[1])  # a NaN is not equal to itself
    assert [record["applied"] for record in histories[0]] == [True, False, True, True, True]
    weights = [outcome(folder, case, rank=rank)["weights"] for rank in (0, 1)]
    for name, weight in weights[0].items():
        assert weight.isfinite().all()
        assert torch.equal(weight, weights[1][name])


@pytest.mark.parametrize("case", cases("automatic"))
def test_the_automatic_recipe_decides_alike_on_all_ranks(case, folder):
    outcomes = [outcome(folder, case, rank=rank) for rank in (0, 1)]
    assert outcomes[0]["verdict"] == outcomes[1]["verdict"] == "forgotten"
    assert outcomes[0]["history"] == outcomes[1]["history"]
    assert len({record["lr"] for record in outcomes[0]["history"]}) > 10
