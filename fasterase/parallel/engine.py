"""What holds the weights for the training loop, without sharding."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fasterase.models.forward import Features, Halfway, TowerForward
from fasterase.models.preprocessing import Tokens
from fasterase.parallel.ranks import ALONE, Ranks
from fasterase.transfers import read_numbers

# Gradients that travel together: enough to fill a network, few enough to copy (256 MB of fp32).
_BUCKET_NUMBERS = 1 << 26


class TrainingState(NamedTuple):
    """What a checkpoint holds of an engine."""

    # Weights, moving buffers and optimiser states by name; each is written by one rank.
    tensors: Mapping[str, Tensor]
    scalars: dict[str, Any]  # ready for JSON; the same on all ranks
    layout: str = ""  # what a resumed run must share; empty if states can be laid out anew


class Step(NamedTuple):
    """What came of a step, the same on all ranks."""

    loss: list[float]  # its terms
    grad_norm: float  # the global norm before clipping, without the loss scaling
    applied: bool  # whether the weights were updated: all numbers were finite


class Engine:
    """Holds the weights and the optimiser, and keeps the weights of all ranks alike.

    This one shards nothing: the caller's own module, its optimiser and the loss scaling. Several
    ranks average their gradients once a step. (The hooks of DistributedDataParallel would reduce in
    every backward pass of a micro-batch.)

    Attributes:
        module: the model's own module, with the trained parameters.
        device: where it runs.
    """

    # Whether all ranks must call the towers equally often: a call gathers weights from all of them.
    in_lockstep = False

    def __init__(
        self,
        forward: TowerForward,  # the towers, on their device
        parameters: Mapping[str, nn.Parameter],  # the trained ones, in the module's order
        optimizer: torch.optim.Optimizer,  # of those
        *,
        overwritten: Mapping[str, nn.Parameter] = MappingProxyType({}),  # not trained, but kept
        moves_buffers: bool = False,  # whether forward passes change BatchNorm statistics
        ranks: Ranks = ALONE,
    ) -> None:
        self.module = forward.module
        self._forward = forward
        self._parameters = dict(parameters)
        self.device = next(iter(self._parameters.values())).device
        self._optimizer: Any = optimizer
        # bf16 has fp32's range.
        is_scaled = forward.precision == "fp16"
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=is_scaled)
        self._overwritten = overwritten
        self._moves_buffers = moves_buffers
        self._ranks = ranks

    def __call__(
        self, pixels: Tensor | Halfway | None = None, tokens: Tokens | Halfway | None = None
    ) -> Features:
        """Encode as `TowerForward` does."""
        return self._forward(pixels, tokens)

    def upstream(self) -> Tensor:
        """Return [] what the loss is multiplied by before the backward pass."""
        return self._scaler.scale(torch.ones((), device=self.device))

    @contextlib.contextmanager
    def one_reduction(self) -> Iterator[None]:
        """Hold the backward passes of a step; afterwards the ranks' gradients are averaged once."""
        self._optimizer.zero_grad(set_to_none=True)
        yield
        bucket: list[Tensor] = []
        numbers = 0
        for gradient in (each.grad for each in self._parameters.values() if each.grad is not None):
            if bucket and numbers + gradient.numel() > _BUCKET_NUMBERS:
                self._ranks.average(bucket)
                bucket, numbers = [], 0
            bucket.append(gradient)
            numbers += gradient.numel()
        if bucket:
            self._ranks.average(bucket)

    def step(self, lr: float, *, max_grad_norm: float, loss: Sequence[Tensor]) -> Step:
        """Clip, update and clear the gradients; leave the step out if a number is not finite.

        The terms of the `loss` are read from the device here, together with the norm: the host
        waits once, when the whole step but its update is queued.
        """
        self._set_lr(lr)
        parameters = list(self._parameters.values())
        has_gradients = any(each.grad is not None for each in parameters)
        norm = torch.zeros((), device=self.device)
        if has_gradients:
            self._scaler.unscale_(self._optimizer)
            norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        terms, grad_norm = self._read(loss, norm)
        is_finite = all(map(math.isfinite, terms))
        applied = is_finite and math.isfinite(grad_norm)
        if applied:
            self._scaler.step(self._optimizer)
        if self._scaler.is_enabled() and has_gradients:
            # Only gradients that overflow tell of a scale that is too large.
            self._scaler.update(None if is_finite else self._scaler.get_scale())
        self._optimizer.zero_grad(set_to_none=True)
        return Step(terms, grad_norm, applied)

    def _set_lr(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def _read(self, loss: Sequence[Tensor], norm: Tensor) -> tuple[list[float], float]:
        """Return the terms of a loss and a norm, the same on all ranks."""
        # One rank speaks for all: the same sums may round differently on another processor.
        *terms, grad_norm = self._ranks.broadcast(read_numbers([*loss, norm]))
        return terms, grad_norm

    def weights(self) -> dict[str, Tensor]:
        """Return a copy on the CPU of all that training changes; empty on other ranks than 0."""
        if not self._ranks.is_first:
            return {}
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._trained()}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Put back what `weights` returned, on all ranks; no step follows."""
        with torch.no_grad():
            for name, tensor in self._trained():
                if self._ranks.is_first:
                    tensor.copy_(weights[name])
                self._ranks.broadcast_tensor(tensor)

    def state(self) -> TrainingState:
        """Return what a checkpoint keeps."""
        tensors = dict(self._trained())
        numbers: dict[str, dict[str, float]] = {}
        for name, parameter in self._parameters.items():
            for key, value in self._optimizer.state[parameter].items():
                if is_number(value):
                    numbers.setdefault(name, {})[key] = as_json(value)
                else:
                    tensors[f"{key} of {name}"] = value
        mine = dict(list(tensors.items())[self._ranks.rank :: self._ranks.world_size])
        scalars = {"optimizer": numbers, "scaler": self._scaler.state_dict()}
        return TrainingState(_unshared(mine), scalars)

    def restore(self, state: TrainingState) -> None:
        """Continue from a state whose tensors are complete, those of all ranks."""
        with torch.no_grad():
            for name, tensor in self._trained():
                tensor.copy_(state.tensors[name])
        if "scaler" in state.scalars:  # not in those of ZeRO
            self._scaler.load_state_dict(state.scalars["scaler"])
        numbers = state.scalars["optimizer"]
        by_parameter: dict[str, dict[str, Any]] = {
            name: {key: _from_json(value) for key, value in numbers.get(name, {}).items()}
            for name in self._parameters
        }
        for full_name in state.tensors:
            key, separator, name = full_name.partition(" of ")
            if separator:
                by_parameter[name][key] = state.tensors[full_name].to(self.device)
        for name, values in by_parameter.items():
            if values:
                self._optimizer.state[self._parameters[name]] = values

    def export(self) -> None:
        """Put the trained weights into the caller's model, where they are not there already."""

    def _trained(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights of a run: what it trains or has overwritten, and buffers that move."""
        yield from self._parameters.items()
        yield from self._overwritten.items()
        if self._moves_buffers:
            for name, buffer in self.module.named_buffers():
                yield f"buffer:{name}", buffer


def is_number(value: Any) -> bool:
    """Whether a state of an optimiser is one number, such as its steps, and not one a weight."""
    return not isinstance(value, Tensor) or value.ndim == 0


def as_json(value: Any) -> Any:
    """Return the number of a state: a float if PyTorch keeps it in a tensor, else as it is."""
    return float(value) if isinstance(value, Tensor) else value


def _from_json(value: Any) -> Any:
    # PyTorch counts steps on the CPU, whatever the device of the weights.
    return torch.tensor(value) if isinstance(value, float) else value


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with storage of their own, as files of safetensors need it.

    bitsandbytes keeps one table of quantised values for all parameters.
    """
    seen: set[int] = set()
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != plain.nbytes:
            plain = plain.clone()
        seen.add(storage.data_ptr())
        own[name] = plain
    return own
