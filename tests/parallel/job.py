"""Erasures of a small real model on any number of processes: what the tests launch and compare.

    python -m torch.distributed.run --nproc-per-node 2 -m tests.parallel.job CASES FOLDER

runs the named cases one after the other; rank 0 writes each outcome to FOLDER/CASE.pt.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

import fasterase
from fasterase.parallel import build
from fasterase.parallel.ranks import launched_rank
from tests.small_models import CONTEXT_LENGTH, IMAGE_SIZE, open_clip_vit

STEPS = 5
VOCABULARY = 64


def make_model(seed: int = 0) -> nn.Module:
    return open_clip_vit(seed=seed, vocab_size=VOCABULARY)


def make_pairs(count: int, *, seed: int, captions: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Make pairs of which several share a caption, wherever they are drawn."""
    numbers = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=numbers)
    texts = torch.randint(1, VOCABULARY - 1, (captions, CONTEXT_LENGTH), generator=numbers)
    return [(image, texts[i % captions]) for i, image in enumerate(images)]


@dataclass(frozen=True)
class Case:
    """A run: its settings, and which optimiser it is handed (None: its own)."""

    settings: dict[str, Any] = field(default_factory=dict)
    optimizer: Callable[..., torch.optim.Optimizer] | None = None


def _sgd(module: nn.Module, trained: Any, **_: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(trained.parameters(module).values(), lr=0.0)


GRAD_CACHE = {"micro_batch_size": 3}  # 3 or 4 parts on two ranks
ZERO = {
    stage: {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
    for stage in (1, 2, 3)
}
CASES = {
    "sgd-plain": Case({"lr": 0.05}, _sgd),
    "sgd-cached": Case({"lr": 0.05, **GRAD_CACHE}, _sgd),
    "adam-cached": Case({"lr": 1e-3, **GRAD_CACHE}),
    **{
        f"sgd-zero{stage}": Case({"lr": 0.05, **GRAD_CACHE, "deepspeed": ZERO[stage]}, _sgd)
        for stage in ZERO
    },
    **{
        f"adam-zero{stage}": Case({"lr": 1e-3, **GRAD_CACHE, "deepspeed": ZERO[stage]})
        for stage in ZERO
    },
}


def run_case(name: str, **overrides: Any) -> dict[str, Any]:
    """Run a case in this process, and return its records and weights."""
    case = CASES[name]
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "forget_batch_size": 5,
        "batch_size": 16,
        "optimizer": "adam",
        "evaluation": None,
        "progress": False,
        "floor": 0.0,
    }
    settings |= case.settings | overrides
    model = make_model()
    handed = case.optimizer or build.build_optimizer
    with patch.object(build, "build_optimizer", handed):
        result = fasterase.unlearn(
            model,
            make_pairs(13, seed=1, captions=5),
            make_pairs(40, seed=2, captions=24),
            **settings,
        )
    return {
        "history": [dict(record) for record in result.history],
        "weights": {name: value.detach().clone() for name, value in model.state_dict().items()},
    }


def main() -> None:
    torch.set_num_threads(1)
    names, folder = sys.argv[1].split(","), Path(sys.argv[2])
    torch.distributed.init_process_group("gloo")
    for name in names:
        outcome = run_case(name)
        if launched_rank() == 0:
            torch.save(outcome, folder / f"{name}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
