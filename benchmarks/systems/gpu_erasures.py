"""Erasures by models with random weights: against the plan, and by the engines of several GPUs.

    python -m benchmarks.systems.gpu_erasures plan|ranks

"plan" runs a few steps of `unlearn` with a ViT-B/32 and a ViT-L/14, each in a process of its own,
and compares peak memory and the time of a step with what `fasterase.plan` says. "ranks" runs the
same steps plainly, over NCCL and with DeepSpeed at each stage, all on one rank, and compares the
last loss: these paths must work before there are several GPUs. Each run becomes a row of
benchmarks/results/gpu_erasures.csv at once, and is not repeated for the same version and GPU,
unless it failed or --fresh is given. Without a GPU the model is the demo's, and NCCL is gloo.
"""

from __future__ import annotations

import os
import time
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

import fasterase
from benchmarks.command import exit_with, mode_parser
from benchmarks.processes import MeasurementError, call_in_process
from benchmarks.result_files import forget_rows, measure_once
from benchmarks.systems.plan_memory import erase_random, random_pairs
from fasterase.demo import emoji
from fasterase.models.load import load_architecture
from fasterase.planner.count import PeakMemory

# Without a GPU.
_SMALL = "demo"
_LIMIT_SECONDS = 300
# How far the last losses of two engines may be apart, relative: sums of half precision in another
# order, over all steps.
_TOLERANCE = 0.02


class Case(NamedTuple):
    """A run."""

    model: str
    retain: int  # pairs of a step
    forget: int
    steps: int
    micro_batch_size: int | None = None
    kind: str = "plain"  # "plain", "nccl" or the name of a DeepSpeed configuration
    device: str = "cuda"

    @property
    def where(self) -> str:
        """The model, as `load_architecture` takes it."""
        return str(emoji.BASE_MODEL) if self.model == _SMALL else self.model

    @property
    def settings(self) -> dict[str, Any]:
        sizes: dict[str, Any] = {"batch_size": self.retain, "forget_batch_size": self.forget}
        sizes |= {"micro_batch_size": self.micro_batch_size, "device": self.device}
        return sizes | ({"deepspeed": self.kind} if self.kind.startswith("zero") else {})


def cases(mode: str, device: str) -> list[Case]:
    """Return the runs of a mode."""
    if mode == "plan":
        if device == "cpu":
            return [Case(_SMALL, 5, 2, 3, device=device)]
        sizes = [("ViT-B-32", 512, 128, None), ("ViT-B-32", 2048, 256, 512)]
        sizes += [("ViT-L-14", 64, 16, None), ("ViT-L-14", 512, 64, 64)]
        return [Case(model, n, m, 8, micro) for model, n, m, micro in sizes]
    model, retain, forget = ("ViT-B-32", 64, 16) if device == "cuda" else (_SMALL, 5, 2)
    stages = ("zero1", "zero2", "zero3") if device == "cuda" else ("zero2",)
    kinds = ("plain", "nccl", *stages)
    return [Case(model, retain, forget, 3, None, kind, device) for kind in kinds]


def run(case: Case) -> dict[str, Any]:
    """Erase, in this process; return the measured peak, time of a step, and last loss."""
    if case.kind != "plain":
        os.environ |= {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
        backend = "cpu:gloo,cuda:nccl" if case.device == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    meta = load_architecture(case.where)
    pairs = random_pairs(meta, case.retain + case.forget)
    memory = PeakMemory(case.device)
    history = erase_random(meta, pairs, steps=case.steps, num_workers=0, **case.settings).history
    # The first steps compile, and choose algorithms.
    seconds = [record.seconds for record in history][case.steps // 3 :]
    return {
        "peak_mb": memory.bytes() / 1e6,
        "step_ms": 1e3 * float(np.median(seconds)),
        "loss": float(history[-1].total),
        "applied": all(record.applied for record in history),
    }


def planned(case: Case) -> dict[str, float]:
    """Return what the plan says of a run's peak and of the time of a step."""
    plan = fasterase.plan(
        case.where, case.retain, forget=case.forget, gpu_memory=1000, **case.settings
    )
    pairs = case.retain + case.forget
    speed = plan.tflops * 1e12 * plan.efficiency / plan.flops_per_pair
    return {"planned_mb": plan.setup.peak_bytes / 1e6, "planned_ms": 1e3 * pairs / speed}


def measure(case: Case, mode: str, expected: float | None) -> list[dict[str, Any]]:
    """Return the row of a run; where it failed, or ends far from the expected loss, with why."""
    started = time.monotonic()
    row: dict[str, Any] = {}
    try:
        row = call_in_process(run, case, seconds=_LIMIT_SECONDS, preload=["fasterase.api"])
        row |= planned(case) if mode == "plan" else {}
        if expected is not None and not abs(row["loss"] - expected) <= _TOLERANCE * abs(expected):
            row["why"] = f"its last loss, {row['loss']:.4g}, is not the plain run's, {expected:.4g}"
    except MeasurementError as error:
        row["why"] = str(error)
    return [{**row, "seconds": time.monotonic() - started}]


def main(argv: list[str] | None = None) -> int:
    modes = ("plan", "ranks")
    parser = mode_parser(__doc__, "benchmarks.systems.gpu_erasures", modes, "gpu_erasures.csv")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.fresh:
        forget_rows(args.output, args.mode)
    expected: float | None = None
    is_good = True
    for case in cases(args.mode, device):
        thing = {"check": args.mode, **case._asdict()}
        measured = partial(measure, case, args.mode, expected)
        (row,) = measure_once(args.output, thing, device, measured)
        print(row, flush=True)
        if args.mode == "ranks" and expected is None:
            expected = float(row.get("loss") or "nan")
        is_good &= not row.get("why")
    return int(not is_good)


if __name__ == "__main__":
    exit_with(main)
