"""Copies between the host and a device, after which neither waits for the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T", bound=Any)  # a tensor, or what has a `to` that brings its own tensors by this


def to_device(given: T, device: torch.device | str) -> T:
    """Return a tensor, or what consists of some, on `device`, as its `to` does.

    To a GPU a tensor goes through pinned memory: from other memory, the copy would begin when all
    that was queued is done, and the host would wait for its end.
    """
    is_upload = torch.device(device).type == "cuda" and given.device.type == "cpu"
    if is_upload and isinstance(given, Tensor):
        moved: Any = given.pin_memory().to(device, non_blocking=True)
    else:
        moved = given.to(device)
    return moved


def read_numbers(numbers: Sequence[Tensor]) -> list[float]:
    """Return the values of 0-d tensors on one device, in one copy: the host waits once."""
    return torch.stack([each.detach() for each in numbers]).tolist()
