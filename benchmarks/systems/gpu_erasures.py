"""Erasures by models with random weights: against the plan, and by the engines of several GPUs.

    python -m benchmarks.systems.gpu_erasures plan
    python -m benchmarks.systems.gpu_erasures ranks

"plan" runs a few steps of `unlearn` with a ViT-B/32 and a ViT-L/14, each in a process of its own,
and compares peak memory and the time of a step with what `fasterase.plan` says. "ranks" runs the
same steps plainly, over NCCL and with DeepSpeed at each stage, all on one rank, and compares the
last loss: these paths must work before there are several GPUs. Each run becomes a row of
benchmarks/results/gpu_erasures.csv at once, and is not repeated for the same version and GPU.
Without a GPU the models are small, and NCCL is gloo.
"""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

import fasterase
from benchmarks.command import exit_with, new_parser
from benchmarks.processes import MeasurementError, call_in_process
from benchmarks.result_files import RESULTS, code_version, device_name, read_csv, write_csv
from benchmarks.systems.plan_memory import random_pairs
from fasterase.models.load import load_architecture
from fasterase.planner.count import PeakMemory, with_random_weights

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
    def settings(self) -> dict[str, Any]:
        sizes: dict[str, Any] = {"batch_size": self.retain, "forget_batch_size": self.forget}
        sizes |= {"micro_batch_size": self.micro_batch_size, "device": self.device}
        return sizes | ({"deepspeed": self.kind} if self.kind.startswith("zero") else {})


def cases(mode: str, device: str) -> list[Case]:
    """Return the runs of a mode."""
    if mode == "plan":
        if device == "cpu":
            return [Case("ViT-S-32-alt", 5, 2, 3, device=device)]
        sizes = [("ViT-B-32", 512, 128, None), ("ViT-B-32", 2048, 256, 512)]
        sizes += [("ViT-L-14", 64, 16, None), ("ViT-L-14", 512, 64, 64)]
        return [Case(model, n, m, 8, micro) for model, n, m, micro in sizes]
    model, retain, forget = ("ViT-B-32", 64, 16) if device == "cuda" else ("ViT-S-32-alt", 5, 2)
    stages = ("zero1", "zero2", "zero3") if device == "cuda" else ("zero2",)
    kinds = ("plain", "nccl", *stages)
    return [Case(model, retain, forget, 3, None, kind, device) for kind in kinds]


def run(case: Case) -> dict[str, Any]:
    """Erase, in this process; return the measured peak, time of a step, and last loss."""
    if case.kind != "plain":
        os.environ |= {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
        backend = "cpu:gloo,cuda:nccl" if case.device == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    meta = load_architecture(case.model)
    pairs = random_pairs(meta, case.retain + case.forget)
    memory = PeakMemory(case.device)
    model = with_random_weights(meta, device=case.device).module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = fasterase.unlearn(
            model,
            pairs[: case.forget],
            pairs[case.forget :],
            max_steps=case.steps,
            lr=1e-6,
            evaluation=None,
            progress=False,
            num_workers=0,
            **case.settings,
        )
    # The first steps compile, and choose algorithms.
    seconds = [record.seconds for record in result.history][case.steps // 3 :]
    return {
        "peak_mb": memory.bytes() / 1e6,
        "step_ms": 1e3 * float(np.median(seconds)),
        "loss": float(result.history[-1].total),
        "applied": all(record.applied for record in result.history),
    }


def planned(case: Case) -> dict[str, float]:
    """Return what the plan says of a run's peak and of the time of a step."""
    plan = fasterase.plan(
        case.model, case.retain, forget=case.forget, gpu_memory=1000, **case.settings
    )
    pairs = case.retain + case.forget
    speed = plan.tflops * 1e12 * plan.efficiency / plan.flops_per_pair
    return {"planned_mb": plan.setup.peak_bytes / 1e6, "planned_ms": 1e3 * pairs / speed}


def main(argv: list[str] | None = None) -> int:
    parser = new_parser(__doc__, prog="python -m benchmarks.systems.gpu_erasures")
    parser.add_argument("mode", choices=("plan", "ranks"))
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu_erasures.csv")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    here = {"gpu_name": device_name(device), "torch": torch.__version__, "version": code_version()}
    rows: list[dict[str, Any]] = list(read_csv(args.output))
    expected: float | None = None
    is_good = True
    for case in cases(args.mode, device):
        named = {name: str(value) for name, value in case._asdict().items()}
        row: dict[str, Any] = {"check": args.mode, **named, **here}
        known = [each for each in rows if all(each.get(k) == v for k, v in row.items())]
        if not known:
            started = time.monotonic()
            try:
                row |= call_in_process(run, case, seconds=_LIMIT_SECONDS, preload=["fasterase.api"])
                row |= planned(case) if args.mode == "plan" else {}
            except MeasurementError as error:
                row["why"] = str(error)
            row["seconds"] = time.monotonic() - started
            rows.append(row)
            write_csv(args.output, rows, decimals=4)
            known = [row]
        print(known[0], flush=True)
        loss = float(known[0].get("loss") or "nan")
        expected = loss if expected is None else expected
        is_far = args.mode == "ranks" and not abs(loss - expected) <= _TOLERANCE * abs(expected)
        is_good &= not known[0].get("why") and not is_far
    return int(not is_good)


if __name__ == "__main__":
    exit_with(main)
