"""Temporary changes to the user's model during a run, and their reversal.

These are device, dtype, train or eval mode, requires_grad, and activation checkpointing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from fasterase.engine.activation_checkpointing import checkpointed_activations
from fasterase.errors import InputError
from fasterase.models.dual_encoder import DualEncoder


class Borrowed:
    """A model lent to a run, in fp32."""

    def __init__(self, model: DualEncoder) -> None:
        module = model.module
        self._module = module
        self._home = model.device
        self._modes = [(part, part.training) for part in module.modules()]
        # 8 bits are quantised values, which mean nothing without their scales.
        self._half = [(t, t.dtype) for t in _floating(module) if t.dtype.itemsize == 2]

    def take(self, device: torch.device) -> None:
        """Move to `device`, to fp32 and eval mode, without gradients."""
        self._module.zero_grad(set_to_none=True)
        for tensor, _ in self._half:
            tensor.data = tensor.data.float()
        self._module.to(device)
        self._module.eval()

    def round_to_own_dtype(self) -> None:
        """Round half-precision weights as they will be returned, so that those are measured."""
        for tensor, dtype in self._half:
            tensor.data = tensor.data.to(dtype).float()

    def give_back(self) -> None:
        """Restore device, dtypes and modes."""
        self._module.to(self._home)
        for tensor, dtype in self._half:
            tensor.data = tensor.data.to(dtype)
        self._module.zero_grad(set_to_none=True)
        for part, mode in self._modes:
            part.training = mode


@contextmanager
def borrowed(
    model: DualEncoder, *, device: torch.device, activation_checkpointing: bool = False
) -> Iterator[Borrowed]:
    """Lend the model to a run: on `device` and in fp32; afterwards only its weights differ.

    An lr of 1e-6 is below the resolution of a bf16 weight, so half-precision models are trained in
    fp32 and rounded once, at the end.

    Raises:
        InputError: `activation_checkpointing` of a model whose blocks are not known.
    """
    state = Borrowed(model)
    try:
        with checkpointed_activations(model) if activation_checkpointing else nullcontext():
            state.take(device)
            yield state
    finally:
        state.give_back()


@contextmanager
def training(
    module: nn.Module, trained: Collection[nn.Parameter], *, train_mode: bool
) -> Iterator[None]:
    """Let only `trained` require a gradient, and switch to train mode if asked.

    Parts without a trained parameter stay in eval mode: the BatchNorm statistics of a frozen tower
    are as frozen as its weights. Afterwards every `requires_grad` is as the caller left it.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    module.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    module.train(train_mode)
    for part in module.modules():
        own = list(part.parameters())
        if own and not any(parameter.requires_grad for parameter in own):
            part.eval()
    try:
        yield
    finally:
        module.eval()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _floating(module: nn.Module) -> Iterator[torch.Tensor]:
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            yield tensor


@contextmanager
def placed(model: DualEncoder, *, device: torch.device) -> Iterator[None]:
    """Move the model to `device`, and back afterwards."""
    home = model.device
    # Quantised models refuse to be moved, even to where they are.
    moves = device != home
    if moves:
        model.module.to(device)
    try:
        yield
    finally:
        if moves:
            model.module.to(home)


def resolve_device(device: str | None, *, default: torch.device) -> torch.device:
    """Return `device`, or `default` if it is None.

    Raises:
        InputError: torch cannot use it here.
    """
    if device is None:
        return default
    try:
        resolved = torch.device(device)
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"device={device!r} cannot be used here ({reason}). "
            "Give 'cpu', 'cuda', 'cuda:N' or 'mps' as this machine has it, or None."
        ) from error
    return resolved


def best_device() -> torch.device:
    """Return the accelerator of this machine, else the CPU: for models given by name."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")
