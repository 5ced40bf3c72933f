"""`fasterase plan`: what an erasure costs, before paying for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import fasterase
from fasterase.cli.command import Command
from fasterase.config import PLAN, UnlearnConfig, field_names


@dataclass(frozen=True)
class Plan(Command):
    """Tell memory, time and disk of an erasure beforehand, and how to run it.

    > Job

    Args:
        model: as for `fasterase unlearn`, or an open_clip name alone. No weights are read.
        pairs: number of pairs to keep.
        forget: number of pairs to forget. `none`: a hundredth of `pairs`.
        find: also tell what `fasterase find` costs, which encodes all pairs once.

    > Machine

    Args:
        gpus: number of GPUs.
        gpu_memory: memory of each in GB (10^9 bytes).
        tflops: dense peak of a GPU in TFLOP/s. `none`: an H100's.
        efficiency: share of that peak that training reaches.
        images_per_second: pictures that one process decodes. `none`: measured here on photographs.
        measure: correct the memory of activations by a micro-batch with random weights run here.

    Examples:
      fasterase plan --model ViT-B-32 --pairs 1_000_000
      fasterase plan --model ViT-bigG-14 --pairs 12_000_000 --forget 100_000 --gpus 8

    The numbers come from the architecture alone: the training code runs on tensors without storage,
    and its FLOPs and live memory are counted, in half a minute, or minutes for the largest models.
    Only decoding is measured, in a second. docs/planning.md explains each of them.
    """

    needs = ("model", "pairs")
    config_fields = field_names(PLAN)
    basics = (
        *("model", "pairs", "forget", "gpus", "gpu_memory", "num_workers", "measure", "find"),
        *("max_steps", "batch_size", "tune", "precision", "device"),
    )
    model: str | None = None
    pairs: int | None = None
    forget: int | None = None
    find: bool = False
    gpus: int = 1
    gpu_memory: float = 80.0
    tflops: float | None = None
    efficiency: float = 0.4
    images_per_second: float | None = None
    measure: bool = False

    def run(self, **fields: Any) -> None:
        print(fasterase.plan(**vars(self), config=UnlearnConfig(**fields)))
