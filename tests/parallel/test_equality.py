"""Two processes against one on the same global batches."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.job import STEPS, make_model, run_case
from tests.parallel.launched import assert_equal_in_fp64, assert_near_in_fp32, outcome, run_cases
from tests.tiny_model import same_weights

pytest.importorskip("deepspeed")

CASES = {
    "quick": ["sgd-plain", "adam-cached", "sgd-zero1", "nan"],
    "slow": ["sgd-concepts", "sgd-link", "sgd-link-zero3", "sgd-zero3", "nan-zero3", "automatic"],
    "whole": [
        "sgd-cached",
        *(f"{name}-zero{z}" for name in ("sgd-plain", "adam", "automatic") for z in (1, 2, 3)),
        "sgd-zero2",
        "nan-zero1",
        "nan-zero2",
    ],
}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_cases(CASES["quick"], folder := tmp_path_factory.mktemp("two"))
    return folder


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_cases(CASES["slow"], folder := tmp_path_factory.mktemp("slow"))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_cases(CASES["whole"], folder := tmp_path_factory.mktemp("all"), timeout=1800)
    return folder


@pytest.fixture
def folder(case: str, request: pytest.FixtureRequest) -> Path:
    """Where the outcomes of a case are."""
    return request.getfixturevalue(next(speed for speed, names in CASES.items() if case in names))


def cases(kind: str) -> list[Any]:
    """All cases of a kind; those that take long are run with all others."""
    marks = {"slow": pytest.mark.slow, "whole": pytest.mark.scale}
    return [
        pytest.param(case, marks=marks.get(speed, ()))
        for speed, names in CASES.items()
        for case in names
        if case.startswith(kind)
    ]


@functools.cache
def one_process(plain: str) -> dict[str, Any]:
    return run_case(plain)


@pytest.mark.parametrize("case", [*cases("sgd"), *cases("adam")])
@pytest.mark.filterwarnings("ignore:verdict")
def test_two_processes_equal_one(case, folder):
    """The one runs without ZeRO and in fp64."""
    plain, _, stage = case.partition("-zero")
    expected = one_process(f"{plain}-cached" if stage and plain in ("sgd", "adam") else plain)
    found = outcome(folder, case)
    assert len(found["history"]) == STEPS
    assert_alike = assert_near_in_fp32 if "zero" in case else assert_equal_in_fp64
    assert_alike(found, expected)
    start = make_model().state_dict()
    moved = [float((v - start[k]).abs().max()) for k, v in expected["weights"].items()]
    assert max(moved) > 1e-3
    other = outcome(folder, case, rank=1)
    assert other["history"] == found["history"]
    assert same_weights(other["weights"], found["weights"])


def test_reductions_do_not_grow_with_micro_batches(quick):
    plain, cached = outcome(quick, "sgd-plain"), outcome(quick, "adam-cached")
    assert plain["reductions"] == cached["reductions"] == 5  # one a step


@pytest.mark.scale
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_reductions_of_zero_do_not_grow_with_micro_batches(stage, whole, quick, slow):
    folder = {1: quick, 2: whole, 3: slow}[stage]
    cached = outcome(folder, f"sgd-zero{stage}")["reductions"]
    assert outcome(whole, f"sgd-plain-zero{stage}")["reductions"] == cached > 0


@pytest.mark.parametrize("case", cases("nan"))
def test_the_nan_of_one_rank_leaves_all_weights_alone(case, folder):
    one, two = (outcome(folder, case, rank=rank) for rank in (0, 1))
    assert repr(one["history"]) == repr(two["history"])  # a NaN is not equal to itself
    assert [record["applied"] for record in one["history"]] == [True, False, True, True, True]
    assert same_weights(one["weights"], two["weights"])
    assert all(weight.isfinite().all() for weight in one["weights"].values())


@pytest.mark.parametrize("case", cases("automatic"))
def test_the_automatic_recipe_decides_alike_on_all_ranks(case, folder):
    one, two = (outcome(folder, case, rank=rank) for rank in (0, 1))
    assert one["verdict"] == two["verdict"] == "forgotten"
    assert one["history"] == two["history"]
    assert len({record["lr"] for record in one["history"]}) > 10
