"""Erasures of a small real model on any number of processes: what the tests launch and compare.

    python -m torch.distributed.run --nproc-per-node 2 -m tests.parallel.job CASES FOLDER

runs the named cases one after the other; rank R writes each outcome to FOLDER/CASE-R.pt.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from open_clip import get_model_config
from open_clip.model import CLIP
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fasterase
from fasterase.engine import optim
from fasterase.errors import ResumeError
from fasterase.models.forward import Features
from fasterase.parallel.local import LocalEngine
from fasterase.parallel.ranks import launched_rank
from tests.small_models import CONTEXT_LENGTH, IMAGE_SIZE, open_clip_vit
from tests.tiny_concepts import FORGOTTEN, KEPT, concept_pairs, knowing_model

STEPS = 5
VOCABULARY = 64


def make_model(seed: int = 0) -> nn.Module:
    return open_clip_vit(seed=seed, vocab_size=VOCABULARY)


def make_big_model() -> nn.Module:
    """Make ViT-bigG-14 with every number but its widths, and so at a thousandth of its size."""
    config = get_model_config("ViT-bigG-14")
    config |= {"embed_dim": 16}
    config["vision_cfg"] |= {
        "width": 64,
        "head_width": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
    }
    config["text_cfg"] |= {"width": 80, "vocab_size": VOCABULARY, "context_length": CONTEXT_LENGTH}
    torch.manual_seed(0)
    return CLIP(**config).eval()


def make_pairs(count: int, *, seed: int, captions: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Make pairs of which several share a caption, wherever they are drawn."""
    numbers = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=numbers)
    texts = torch.randint(1, VOCABULARY - 1, (captions, CONTEXT_LENGTH), generator=numbers)
    return [(image, texts[i % captions]) for i, image in enumerate(images)]


@dataclass(frozen=True)
class Case:
    """A run: its settings, and which optimiser it is handed (None: its own).

    Attributes:
        automatic: erase a concept from a model that knows it, by the automatic recipe.
        big: a model with the depth, heads and MLP ratio of ViT-bigG-14, but narrow.
        folder: name of an output folder, which other cases resume from.
        broken: the rank whose gradient is NaN in the second step.
        in_fp64: train in fp64, where the order of sums does not show. ZeRO cannot.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    optimizer: Callable[..., torch.optim.Optimizer] | None = None
    automatic: bool = False
    big: bool = False
    folder: str | None = None
    broken: int | None = None
    in_fp64: bool = False


def _sgd(module: nn.Module, trained: Any, **_: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(trained.parameters(module).values(), lr=0.0)


PLAIN = {"lr": 0.02}
CACHED = {"lr": 0.02, "micro_batch_size": 3}  # 4 parts on one of two ranks, 3 on the other
ADAM = {"lr": 1e-3, "micro_batch_size": 3}
ZERO = {
    stage: {
        "deepspeed": {
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}
        }
    }
    for stage in (1, 2, 3)
}
BIG = {
    "lr": 1e-4,
    "micro_batch_size": 4,
    "optimizer": "paged_adamw8bit",
    "activation_checkpointing": True,
}
FIRST, WHOLE = {"max_steps": 3, "save_every": 3}, {"max_steps": 5}
CASES = {
    "sgd-plain": Case(PLAIN, _sgd, in_fp64=True),
    "sgd-cached": Case(CACHED, _sgd, in_fp64=True),
    "adam-cached": Case(ADAM, in_fp64=True),
    "nan": Case(CACHED, _sgd, broken=1),
    "automatic": Case(automatic=True),
    "save": Case(ADAM | FIRST, folder="plain"),
    "resume": Case(ADAM | WHOLE, folder="plain"),
    "big-whole": Case(BIG | {"max_steps": 3} | ZERO[3], big=True),
    "big-save": Case(BIG | {"max_steps": 2, "save_every": 1} | ZERO[3], big=True, folder="big"),
    "big-resume": Case(BIG | {"max_steps": 3} | ZERO[3], big=True, folder="big"),
    **{
        f"{name}-zero{stage}": case
        for stage in ZERO
        for name, case in {
            "sgd": Case(CACHED | ZERO[stage], _sgd),
            "sgd-plain": Case(PLAIN | ZERO[stage], _sgd),
            "adam": Case(ADAM | ZERO[stage]),
            "nan": Case(CACHED | ZERO[stage], _sgd, broken=1),
            "automatic": Case(ZERO[stage], automatic=True),
            "save": Case(ADAM | FIRST | ZERO[stage], folder=f"zero{stage}"),
            "resume": Case(ADAM | WHOLE | ZERO[stage], folder=f"zero{stage}"),
            "whole8": Case(ADAM | WHOLE | ZERO[stage] | {"optimizer": "adamw8bit"}),
            "save8": Case(
                ADAM | FIRST | ZERO[stage] | {"optimizer": "adamw8bit"}, folder=f"eight{stage}"
            ),
            "resume8": Case(
                ADAM | WHOLE | ZERO[stage] | {"optimizer": "adamw8bit"}, folder=f"eight{stage}"
            ),
        }.items()
    },
}


def run_case(name: str, folder: Path | None = None, **overrides: Any) -> dict[str, Any]:
    """Run a case in this process, and return its records, weights and reductions."""
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
    model: Any = make_big_model() if case.big else make_model()
    sets: tuple[Any, Any] = (
        make_pairs(13, seed=1, captions=5),
        make_pairs(40, seed=2, captions=24),
    )
    if case.automatic:
        settings = {"batch_size": 32, "forget_batch_size": 12, "progress": False}
        model = knowing_model()
        sets = (
            concept_pairs([FORGOTTEN], 24, seed=1),
            concept_pairs(KEPT, 20, seed=2),
        )
    settings |= case.settings | overrides
    if case.folder is not None:
        assert folder is not None
        settings["output_dir"] = str(folder / case.folder)
    module = model.module if case.automatic else model
    handed = case.optimizer or optim.build_optimizer
    verdict = None
    history: list[dict[str, Any]] = []
    error = ""
    try:
        with (
            patch.object(optim, "build_optimizer", handed),
            _in_fp64(model) if case.in_fp64 else nullcontext(),
            _breaking(case.broken),
            _Reductions() as reductions,
        ):
            result = fasterase.unlearn(model, *sets, **settings)
        history, verdict = [dict(record) for record in result.history], result.verdict
    except ResumeError as refused:
        error = str(refused)
    return {
        "history": history,
        "weights": {name: value.detach().clone() for name, value in module.state_dict().items()},
        "verdict": verdict,
        "reductions": reductions.count,
        "error": error,
    }


@contextmanager
def _in_fp64(model: nn.Module) -> Iterator[None]:
    """Make a model of fp64, whose features no training step rounds to fp32."""
    model.double().visual.register_forward_pre_hook(lambda _, inputs: inputs[0].double())
    encode = LocalEngine.__call__

    def unrounded(*given: Any) -> Features:
        with patch.object(torch.Tensor, "float", torch.Tensor.double):
            return encode(*given)

    with patch.object(LocalEngine, "__call__", unrounded):
        yield


@contextmanager
def _breaking(rank: int | None) -> Iterator[None]:
    """Make the first gradient that a rank sends back in the second step NaN."""
    backward = torch.autograd.backward
    calls = Counter[str]()

    def broken(outputs: Any, gradients: Any) -> None:
        calls["backward"] += 1
        if calls["backward"] == 5 and launched_rank() == rank:
            gradients = [torch.full_like(each, float("nan")) for each in gradients]
        backward(outputs, gradients)

    with patch.object(torch.autograd, "backward", backward if rank is None else broken):
        yield


class _Reductions(TorchDispatchMode):
    """Counts the collectives that add up gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0].strip("_")
        if func.namespace == "c10d" and ("reduce" in name) and _is_large(args):
            self.count += 1
        return func(*args, **(kwargs or {}))


def _is_large(args: Any) -> bool:
    """Whether gradients travel, not flags or norms."""
    tensors: list[torch.Tensor] = []
    for each in args:
        tensors += [t for t in (each if isinstance(each, list) else [each]) if torch.is_tensor(t)]
    return sum(t.numel() for t in tensors) > 1000


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    names, folder = sys.argv[1].split(","), Path(sys.argv[2])
    torch.distributed.init_process_group("gloo")
    for name in names:
        torch.save(run_case(name, folder), folder / f"{name}-{launched_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
