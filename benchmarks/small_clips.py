"""Train a small CLIP that a concept or a link is to be erased from."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

import fasterase

WARM_UP, MAX_SCALE = 20, 100.0

# Image features [n, D], text features [n, D], scale [], labels [n] that equal pairs share.
Features = tuple[Tensor, Tensor, Tensor, Tensor]


def train(
    batches: Iterable[Features],
    optimizer: Optimizer,
    logit_scale: Tensor,
    *,
    steps: int,
    learning_rate: float,
) -> None:
    """Take a step of InfoNCE for each batch; the rate warms up, then falls as a cosine does."""
    for step, (image, text, scale, labels) in enumerate(batches):
        rate = 0.5 * (1 + math.cos(math.pi * step / steps)) * min(1.0, (step + 1) / WARM_UP)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate
        found = fasterase.contrastive(image, text, scale, labels=labels)
        loss = (found.ce_row.mean() + found.ce_col.mean()) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            logit_scale.clamp_(max=math.log(MAX_SCALE))
