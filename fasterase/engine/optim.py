"""Optimiser, parameter groups and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import ModuleType

import torch
from torch import nn

from fasterase.errors import import_extra

# Classes of bitsandbytes behind the names of the setting.
EIGHT_BIT = {
    "adamw8bit": "AdamW8bit",
    "paged_adamw8bit": "PagedAdamW8bit",
    "lion8bit": "Lion8bit",
}


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    name: str,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.Optimizer:
    """The optimiser over `parameters` (name, parameter): matrices decay, the rest does not.

    Raises:
        MissingExtraError: an 8-bit optimiser without bitsandbytes.
    """
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter_name, parameter in parameters:
        # Gains, biases, class tokens and logit_scale (which some libraries keep as a vector) stay
        # where the data puts them; pulling them to zero changes the function, not its complexity.
        is_matrix = parameter.ndim >= 2 and not parameter_name.endswith("logit_scale")
        (matrices if is_matrix else vectors).append(parameter)
    groups = [
        {"params": group, "weight_decay": decay}
        for group, decay in ((matrices, weight_decay), (vectors, 0.0))
        if group
    ]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas)
    if name == "adam":
        return torch.optim.Adam(groups, lr=lr, betas=betas)
    return getattr(bitsandbytes_for(name).optim, EIGHT_BIT[name])(groups, lr=lr, betas=betas)


def bitsandbytes_for(optimizer: str) -> ModuleType:
    """The library behind the 8-bit optimisers, or `MissingExtraError`."""
    return import_extra("bitsandbytes", "scale", f"optimizer={optimizer!r}")


def lr_at(step: int, *, lr: float, warmup_steps: int, total_steps: int, schedule: str) -> float:
    """Learning rate of `step` (from 0): linear warm-up to `lr`, then constant or a cosine to 0."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule == "constant":
        return lr
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return lr * 0.5 * (1 + math.cos(math.pi * done))
