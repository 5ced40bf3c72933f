"""The state of torch's generators, so that a second encoding repeats the first one's Dropout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class RandomState:
    """Snapshot of the generators of the CPU and of `device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._accelerator = None
        if device.type == "cuda":
            self._accelerator = torch.cuda.get_rng_state(device)
        elif device.type == "mps":
            self._accelerator = torch.mps.get_rng_state()

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._accelerator is None:
            return
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(self._accelerator, self._device)
        else:
            torch.mps.set_rng_state(self._accelerator)

    @contextmanager
    def restored_after(self) -> Iterator[None]:
        """Put this state back when the block ends, however it ends."""
        try:
            yield
        finally:
            self.restore()
