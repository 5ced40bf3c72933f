"""What the training loop needs of whatever holds the weights, on one process or many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fasterase.models.forward import Features, Halfway
from fasterase.models.preprocessing import Tokens


class TrainingState(NamedTuple):
    """What a checkpoint holds of an engine.

    Attributes:
        tensors: weights, moving buffers and optimiser states by name; each is written by one rank.
        scalars: numbers, ready for JSON; the same on all ranks.
        layout: what a resumed run must share with this one; empty if states can be laid out anew.
    """

    tensors: Mapping[str, Tensor]
    scalars: dict[str, Any]
    layout: str = ""


class Step(NamedTuple):
    """What came of a step, the same on all ranks.

    Attributes:
        loss: its terms.
        grad_norm: the global norm before clipping, without the loss scaling.
        applied: whether the weights were updated, which they are not if a number is not finite.
    """

    loss: list[float]
    grad_norm: float
    applied: bool


class Engine(Protocol):
    """Holds the weights and the optimiser, and keeps the weights of all ranks alike.

    Attributes:
        module: the model's own module, with the trained parameters.
        device: where it runs.
        in_lockstep: whether every rank must call the towers equally often, because a call gathers
            weights from all of them.
    """

    module: nn.Module
    device: torch.device
    in_lockstep: bool

    def __call__(
        self, pixels: Tensor | Halfway | None = None, tokens: Tokens | Halfway | None = None
    ) -> Features:
        """Encode as `TowerForward` does."""

    def upstream(self) -> Tensor:
        """Return [] what the loss is multiplied by before the backward pass."""

    def one_reduction(self) -> AbstractContextManager[None]:
        """Hold the backward passes of a step; afterwards the ranks' gradients are averaged once."""

    def step(self, lr: float, *, max_grad_norm: float, loss: Sequence[Tensor]) -> Step:
        """Clip, update and clear the gradients; leave the step out if a number is not finite.

        The terms of the `loss` are read from the device here, together with the norm: the host
        waits once, when the whole step but its update is queued.
        """

    def weights(self) -> dict[str, Tensor]:
        """Return a copy on the CPU of all that training changes; empty on other ranks than 0."""

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Put back what `weights` returned, on all ranks; no step follows."""

    def state(self) -> TrainingState:
        """Return what a checkpoint keeps."""

    def restore(self, state: TrainingState) -> None:
        """Continue from a state whose tensors are complete, those of all ranks."""

    def export(self) -> None:
        """Put the trained weights into the caller's model, where they are not there already."""
