"""Peak memory of real runs on a CPU, beside what `fasterase.plan` says of them.

    python -m benchmarks.systems.plan_memory [--output benchmarks/results/plan_memory.csv]

Each run has a process of its own: random weights of a real architecture, two steps of
`fasterase.unlearn`. The peak is that of resident memory, above what the process had in use before
the model was built. Freed blocks of 1 MiB or more are given back to the system at once.
"""

from __future__ import annotations

import ctypes
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fasterase
from benchmarks.command import exit_with, new_parser
from benchmarks.processes import call_in_process
from benchmarks.result_files import RESULTS, write_csv
from fasterase.models.dual_encoder import DualEncoder
from fasterase.models.load import load_architecture
from fasterase.planner.count import PeakMemory, with_random_weights

RETAIN, FORGET = 5, 2
_M_MMAP_THRESHOLD = -3  # of mallopt, <malloc.h>


class Case(NamedTuple):
    """A run: an architecture, and settings of `UnlearnConfig`."""

    model: str
    settings: dict[str, Any]


CASES = [
    Case("ViT-S-16", {}),
    Case("RN50", {}),
    Case("convnext_tiny", {}),
    Case("ViT-S-16", {"micro_batch_size": 3}),
    Case("ViT-S-16", {"activation_checkpointing": True}),
    Case("ViT-S-16", {"tune": "last:3"}),
]


def measure_peak(model: str, settings: dict[str, Any]) -> int:
    """Return the peak memory of a run, above what was in use before the model was built."""
    # A large block goes back to the system as soon as it is freed: what is measured is what is in
    # use, without what glibc would keep for itself.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)
    # Whatever the first run in a process brings.
    small = load_architecture("ViT-S-32-alt")
    _erase(small, random_pairs(small, FORGET + RETAIN), {})
    meta = load_architecture(model)
    pairs = random_pairs(meta, FORGET + RETAIN)
    memory = PeakMemory("cpu")
    _erase(meta, pairs, settings)
    return memory.bytes()


def random_pairs(model: DualEncoder, count: int) -> list[tuple[Tensor, Tensor]]:
    """Return pairs of normalised pixels and token ids, as the model takes them."""
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(3, *model.image_size, generator=generator),
            torch.randint(1, model.vocab_size - 1, (model.context_length,), generator=generator),
        )
        for _ in range(count)
    ]


def _erase(
    model: DualEncoder, pairs: list[tuple[Tensor, Tensor]], settings: dict[str, Any]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fasterase.unlearn(
            with_random_weights(model, device="cpu").module,
            pairs[:FORGET],
            pairs[FORGET:],
            max_steps=2,
            lr=1e-6,
            batch_size=RETAIN,
            forget_batch_size=FORGET,
            evaluation=None,
            progress=False,
            **settings,
        )


def planned_peak(model: str, settings: dict[str, Any]) -> int:
    """Return what the plan says."""
    plan = fasterase.plan(
        model,
        RETAIN,
        forget=FORGET,
        device="cpu",
        gpu_memory=1000,
        batch_size=RETAIN,
        forget_batch_size=FORGET,
        **settings,
    )
    return plan.setup.peak_bytes


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / "plan_memory.csv")
    parser.add_argument("--only", help="a model", choices=sorted({each.model for each in CASES}))
    arguments = parser.parse_args()
    rows = []
    for case in CASES:
        if arguments.only not in (None, case.model):
            continue
        measured = call_in_process(measure_peak, *case, seconds=3600, preload=["fasterase.api"])
        planned = planned_peak(*case)
        named = " ".join(f"{name}={value}" for name, value in case.settings.items())
        row = {"model": case.model, "settings": named, "planned_mb": f"{planned / 1e6:.0f}"}
        row |= {"measured_mb": f"{measured / 1e6:.0f}"}
        rows.append({**row, "planned/measured": f"{planned / measured:.3f}"})
        print(*rows[-1].values(), sep="\t", flush=True)
    write_csv(arguments.output, rows)


if __name__ == "__main__":
    exit_with(main)
