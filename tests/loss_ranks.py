"""What each process of `test_losses.py` runs: our losses and open_clip's, side by side."""

from __future__ import annotations

import itertools
from typing import Any

import open_clip.loss
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fasterase
from fasterase.errors import InputError

WIDTH = 12
SIZES = (5, 5, 7)  # pairs of a rank; labels are cached between equal sizes


def run_rank(rank: int, world_size: int, file: str) -> None:
    """Compare values and gradients on this rank, for every combination of the options."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world_size)
    for local_loss, with_grad in itertools.product([False, True], repeat=2):
        options = {"local_loss": local_loss, "gather_with_grad": with_grad, "cache_labels": True}
        for name in ("ClipLoss", "DistillClipLoss"):
            ours, theirs = (
                getattr(library, name)(**options, rank=rank, world_size=world_size)
                for library in (fasterase, open_clip.loss)
            )
            for step, size in enumerate(SIZES):
                found = loss_and_gradients(ours, step, size)
                expected = loss_and_gradients(theirs, step, size)
                assert_close(found, expected, case=f"{name}, {options}")
    check_wrong_group(rank, world_size)
    dist.destroy_process_group()


def assert_close(found: list[Tensor], expected: list[Tensor], *, case: str) -> None:
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=2e-5, atol=2e-6, msg=lambda m: f"{case}: {m}")


def loss_and_gradients(loss: Any, step: int, size: int) -> list[Tensor]:
    """The losses, and the gradients of features and scale where ranks weigh theirs differently."""
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    shared = torch.randn(size, WIDTH, generator=generator)
    noise = torch.randn(4, size, WIDTH, generator=generator)
    sides = torch.nn.functional.normalize(shared + 0.7 * noise, dim=-1)
    image, text = (side.clone().requires_grad_() for side in sides[:2])
    scale = torch.tensor(15.0, requires_grad=True)
    arguments = [image, text, scale]
    if "Distill" in type(loss).__name__:
        arguments += [*sides[2:], torch.tensor(9.0)]
    made = loss(*arguments)
    losses = made if isinstance(made, tuple) else (made,)
    total = sum((1 + k) * each for k, each in enumerate(losses)) * (1.0 + dist.get_rank())
    return [*(each.detach() for each in losses), *torch.autograd.grad(total, arguments[:3])]


def check_wrong_group(rank: int, world_size: int) -> None:
    """A constructor that does not fit the process group is named before anything is exchanged."""
    features = torch.eye(3)
    for options, named in (
        ({"rank": (rank + 1) % world_size, "world_size": world_size}, "rank="),
        ({"rank": rank, "world_size": world_size + 1}, "world_size="),
    ):
        with pytest.raises(InputError, match=f"^{named}"):
            fasterase.ClipLoss(**options)(features, features, 1.0)
