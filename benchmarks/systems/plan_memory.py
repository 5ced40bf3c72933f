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
from typing import Any

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
# Architectures and settings of `UnlearnConfig`.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("ViT-S-16", {}),
    ("RN50", {}),
    ("convnext_tiny", {}),
    ("ViT-S-16", {"micro_batch_size": 3}),
    ("ViT-S-16", {"activation_checkpointing": True}),
    ("ViT-S-16", {"tune": "last:3"}),
]
SIZES: dict[str, Any] = {"batch_size": RETAIN, "forget_batch_size": FORGET}


def measure_peak(model: str, settings: dict[str, Any]) -> int:
    """Return the peak memory of a run, above what was in use before the model was built."""
    # A large block goes back to the system as soon as it is freed: what is measured is what is in
    # use, without what glibc would keep for itself.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)
    # Whatever the first run in a process brings.
    small = load_architecture("ViT-S-32-alt")
    erase_random(small, random_pairs(small, FORGET + RETAIN), steps=2, **SIZES)
    meta = load_architecture(model)
    pairs = random_pairs(meta, FORGET + RETAIN)
    memory = PeakMemory("cpu")
    erase_random(meta, pairs, steps=2, **SIZES, **settings)
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


def erase_random(
    model: DualEncoder,
    pairs: list[tuple[Tensor, Tensor]],
    *,
    steps: int,
    forget_batch_size: int,
    device: str = "cpu",
    **settings: Any,
) -> fasterase.UnlearnResult:
    """Erase from an architecture with random weights; the first pairs are those to forget."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fasterase.unlearn(
            with_random_weights(model, device=device).module,
            pairs[:forget_batch_size],
            pairs[forget_batch_size:],
            max_steps=steps,
            lr=1e-6,
            forget_batch_size=forget_batch_size,
            device=device,
            evaluation=None,
            progress=False,
            **settings,
        )


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / "plan_memory.csv")
    known = sorted({model for model, _ in CASES})
    parser.add_argument("--only", help="a model", choices=known)
    arguments = parser.parse_args()
    rows = []
    for model, settings in CASES:
        if arguments.only not in (None, model):
            continue
        measured = call_in_process(
            measure_peak, model, settings, seconds=3600, preload=["fasterase.api"]
        )
        here: dict[str, Any] = {"device": "cpu", "gpu_memory": 1000, **SIZES, **settings}
        plan = fasterase.plan(model, RETAIN, forget=FORGET, **here)
        planned = plan.setup.peak_bytes
        named = " ".join(f"{name}={value}" for name, value in settings.items())
        row = {"model": model, "settings": named, "planned_mb": f"{planned / 1e6:.0f}"}
        row |= {"measured_mb": f"{measured / 1e6:.0f}"}
        rows.append({**row, "planned/measured": f"{planned / measured:.3f}"})
        print(*rows[-1].values(), sep="\t", flush=True)
    write_csv(arguments.output, rows)


if __name__ == "__main__":
    exit_with(main)
