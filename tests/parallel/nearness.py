"""How near a run must be to the same run of one process in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.parallel.job import STEPS, make_model

TERMS = ("total", "forget", "retain", "consistency", "anchor")


def assert_equal_in_fp64(found: dict[str, Any], exact: dict[str, Any]) -> None:
    """Check a run in fp64: the order of sums shows from the 13th digit of the weights on."""
    for mine, theirs in zip(exact["history"], found["history"], strict=True):
        for term in (*TERMS, "grad_norm"):
            assert theirs[term] == pytest.approx(mine[term], rel=1e-9, abs=1e-9), term
    for name, weight in exact["weights"].items():
        assert float((found["weights"][name] - weight).abs().max()) <= 1e-10, name


def assert_near_in_fp32(found: dict[str, Any], exact: dict[str, Any]) -> None:
    """Check a run in fp32, which may be ten times as far off as one process is by rounding alone.

    That was measured with micro-batches of 1 to 21 pairs, with AVX2 and without. Of a tensor the
    norm counts: where Adam divides one small gradient by another, single weights move by chance.
    """
    for mine, theirs in zip(exact["history"], found["history"], strict=True):
        for term in TERMS:
            assert theirs[term] == pytest.approx(mine[term], abs=3e-5 * mine["total"]), term
        assert theirs["grad_norm"] == pytest.approx(mine["grad_norm"], rel=1e-4)
    start = make_model().state_dict()
    for name, weight in exact["weights"].items():
        apart = found["weights"][name] - weight
        if name.endswith("in_proj_bias"):
            # A key's bias shifts all of a query's scores alike: its gradient is rounding, which
            # Adam scales up.
            apart.chunk(3)[1].zero_()
        moved = weight - start[name]
        rounded = STEPS * torch.finfo(torch.float32).eps * weight  # once a step
        assert float(apart.norm()) <= float(0.01 * moved.norm() + rounded.norm()), name
