"""Erasures of a small real model on any number of processes: what the tests launch and compare.

    python -m torch.distributed.run --nproc-per-node 2 -m tests.parallel.job CASES FOLDER

runs the named cases one after the other; rank R writes each outcome to FOLDER/CASE-R.pt.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from open_clip import get_model_config
from open_clip.model import CLIP
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fasterase
from fasterase.engine import optim
from fasterase.errors import ResumeError
from fasterase.models.forward import Features
from fasterase.parallel.engine import Engine
from fasterase.progress import launched_rank
from tests import tiny_concepts
from tests.small_models import CONTEXT_LENGTH, IMAGE_SIZE, open_clip_vit

STEPS = 5
VOCABULARY = 64


def make_model(seed: int = 0) -> nn.Module:
    return open_clip_vit(seed=seed, vocab_size=VOCABULARY)


def make_big_model() -> nn.Module:
    """Make ViT-bigG-14 with every number but its widths, and so at a thousandth of its size."""
    config = get_model_config("ViT-bigG-14") | {"embed_dim": 16}
    config["vision_cfg"] |= {"width": 64, "head_width": 4, "image_size": IMAGE_SIZE}
    config["vision_cfg"] |= {"patch_size": 8}
    config["text_cfg"] |= {"width": 80, "vocab_size": VOCABULARY, "context_length": CONTEXT_LENGTH}
    torch.manual_seed(0)
    return CLIP(**config).eval()


def make_pairs(count: int, *, seed: int, captions: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Make pairs of which several share a caption, wherever they are drawn."""
    numbers = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=numbers)
    texts = torch.randint(1, VOCABULARY - 1, (captions, CONTEXT_LENGTH), generator=numbers)
    return [(image, texts[i % captions]) for i, image in enumerate(images)]


PLAIN = {"lr": 0.02}
CACHED = {"lr": 0.02, "micro_batch_size": 3}  # 4 parts on one of two ranks, 3 on the other
ADAM = {"lr": 1e-3, "micro_batch_size": 3}
EIGHT = {**ADAM, "optimizer": "adamw8bit"}
BIG = {"lr": 1e-4, "micro_batch_size": 4, "activation_checkpointing": True}
BIG |= {"optimizer": "paged_adamw8bit"}
FIRST = {"max_steps": 3, "save_every": 3}
# Settings by name of a case, to which "-zero2" adds ZeRO of stage 2. "sgd" and "nan" are handed
# plain SGD, "nan" gets a NaN in the second step, "automatic" erases a concept from a model that
# knows it, "big" has the depth, heads and MLP ratio of ViT-bigG-14, but is narrow.
CASES: dict[str, dict[str, Any]] = {
    "sgd": CACHED,
    "sgd-plain": PLAIN,
    "sgd-cached": CACHED,
    "sgd-concepts": CACHED,
    "sgd-link": {**CACHED, "erase": "link", "floor": "auto"},
    "adam": ADAM,
    "adam-cached": ADAM,
    "nan": CACHED,
    "automatic": {},
    "save": ADAM | FIRST,
    "resume": ADAM,
    "whole8": EIGHT,
    "save8": EIGHT | FIRST,
    "resume8": EIGHT,
    "big-whole": BIG | {"max_steps": 3},
    "big-save": BIG | {"max_steps": 2, "save_every": 1},
    "big-resume": BIG | {"max_steps": 3},
}
# Names of output folders, to which the stage is added.
FOLDERS = {"save": "states", "save8": "eight", "big-save": "big"}
FOLDERS |= {"resume": "states", "resume8": "eight", "big-resume": "big"}
# These are trained in fp64, where the order of sums does not show. ZeRO cannot.
IN_FP64 = ("sgd-plain", "sgd-cached", "sgd-concepts", "sgd-link", "adam-cached")
STAGES = (1, 2, 3)


def _zero(stage: str) -> dict[str, Any]:
    zero = {"stage": int(stage), "stage3_param_persistence_threshold": 0}
    return {"deepspeed": {"zero_optimization": zero}}


def _tokenize(texts: list[str]) -> torch.Tensor:
    """Make a token of each digit, and one of the rest."""
    ids = torch.zeros(len(texts), CONTEXT_LENGTH, dtype=torch.long)
    for row, text in enumerate(texts):
        digits = [10 + int(each) for each in text if each in "0123456789"][: CONTEXT_LENGTH - 2]
        ids[row, : len(digits) + 2] = torch.tensor([1 + len(text) % 8, *digits, VOCABULARY - 1])
    return ids


def _sgd(module: nn.Module, trained: Any, **_: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(trained.parameters(module).values(), lr=0.0)


def run_case(name: str, folder: Path = Path()) -> dict[str, Any]:
    """Run a case in this process, and return its records, weights and reductions."""
    kind, _, stage = name.partition("-zero")
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "forget_batch_size": 5,
        "batch_size": 16,
        "optimizer": "adam",
        "evaluation": None,
        "progress": False,
        "floor": 0.0,
    }
    model: Any = make_big_model() if kind.startswith("big") else make_model()
    sets: Any = make_pairs(13, seed=1, captions=5), make_pairs(40, seed=2, captions=24)
    if kind == "sgd-concepts":
        sets = {"few": sets[0][:4], "many": sets[0][4:]}, sets[1]
    if kind == "sgd-link":
        sets = tuple([(image, f"call {ids[1:4].sum()}") for image, ids in each] for each in sets)
        settings["tokenizer"] = _tokenize
    if kind == "automatic":
        settings, model = tiny_concepts.AUTOMATIC, tiny_concepts.knowing_model()
        sets = tiny_concepts.FORGET, tiny_concepts.RETAIN
    settings = settings | CASES[kind] | (_zero(stage) if stage else {})
    if kind in FOLDERS:
        settings["output_dir"] = str(folder / (FOLDERS[kind] + stage))
    handed = _sgd if kind.startswith(("sgd", "nan")) else optim.build_optimizer
    found: dict[str, Any] = {"error": ""}
    with (
        patch.object(optim, "build_optimizer", handed),
        _in_fp64(model) if name in IN_FP64 else nullcontext(),
        _broken_on_rank_1() if kind == "nan" else nullcontext(),
        _Reductions() as reductions,
    ):
        try:
            result = fasterase.unlearn(model, *sets, **settings)
            found["history"] = [dict(record) for record in result.history]
            found["verdict"] = result.verdict
        except ResumeError as refused:
            found["error"] = str(refused)
    state = getattr(model, "module", model).state_dict()
    found["weights"] = {name: value.detach().clone() for name, value in state.items()}
    return found | {"reductions": reductions.count}


@contextmanager
def _in_fp64(model: nn.Module) -> Iterator[None]:
    """Make a model of fp64, whose features no training step rounds to fp32."""
    model.double().visual.register_forward_pre_hook(lambda _, inputs: inputs[0].double())
    encode = Engine.__call__

    def unrounded(*given: Any) -> Features:
        with patch.object(torch.Tensor, "float", torch.Tensor.double):
            return encode(*given)

    with patch.object(Engine, "__call__", unrounded):
        yield


def _broken_on_rank_1() -> Any:
    """Make the first gradient that rank 1 sends back in the second step NaN."""
    backward = torch.autograd.backward
    calls = itertools.count(1)

    def broken(outputs: Any, gradients: Any) -> None:
        if next(calls) == 5 and launched_rank() == 1:
            gradients = [torch.full_like(each, float("nan")) for each in gradients]
        backward(outputs, gradients)

    return patch.object(torch.autograd, "backward", broken)


class _Reductions(TorchDispatchMode):
    """Counts the collectives that add up gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and "reduce" in func.__name__:
            # Only where gradients travel, not flags or norms.
            tensors = [each for each in tree_leaves(args) if torch.is_tensor(each)]
            self.count += sum(each.numel() for each in tensors) > 1000
        return func(*args, **(kwargs or {}))


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
