"""What a run changes of the user's model for a while: device, dtype, modes, what is trained."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fasterase.engine.grad_cache import buffers_in_train_mode, restore_buffers
from fasterase.errors import InputError
from fasterase.models.dual_encoder import DualEncoder
from fasterase.models.forward import replaced_forward

log = logging.getLogger(__name__)


@contextmanager
def borrowed(
    model: DualEncoder, *, device: torch.device, activation_checkpointing: bool = False
) -> Iterator[Callable[[], None]]:
    """Lend the model to a run: on `device`, in fp32 and eval mode; later only its weights differ.

    An lr of 1e-6 is below the resolution of a bf16 weight, so half-precision models are trained in
    fp32 and rounded once, at the end. Yields a function that rounds them as they will be returned.

    Raises:
        InputError: `activation_checkpointing` of a model whose blocks are not known.
    """
    module, home = model.module, model.device
    modes = [(part, part.training) for part in module.modules()]
    # By name: another device gives a module other buffers.
    half = [
        (part, name, tensor.dtype)
        for part in module.modules()
        for own in (part.named_parameters(recurse=False), part.named_buffers(recurse=False))
        for name, tensor in own
        # 8 bits are quantised values, which mean nothing without their scales.
        if tensor.is_floating_point() and tensor.dtype.itemsize == 2
    ]

    def round_weights() -> None:
        for part, name, dtype in half:
            tensor = getattr(part, name)
            tensor.data = tensor.data.to(dtype).float()

    try:
        with checkpointed_activations(model) if activation_checkpointing else nullcontext():
            module.zero_grad(set_to_none=True)
            round_weights()
            module.to(device).eval()
            yield round_weights
    finally:
        module.to(home)
        for part, name, dtype in half:
            tensor = getattr(part, name)
            tensor.data = tensor.data.to(dtype)
        module.zero_grad(set_to_none=True)
        for part, mode in modes:
            part.training = mode


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


@contextmanager
def checkpointed_activations(model: DualEncoder) -> Iterator[None]:
    """Run the blocks of both towers (stages of a ResNet) checkpointed; afterwards as before.

    Only the input of each block is stored for the backward pass, which runs the block again (Chen
    et al., 2016, "Training Deep Nets with Sublinear Memory Cost"). Dropout draws the same masks
    again, and BatchNorm's statistics move once. transformers ignores its own switch in eval mode,
    in which towers are trained by default, and open_clip has none for a ResNet.

    Raises:
        InputError: the blocks of a tower are not known.
    """
    blocks: list[Any] = []
    for tower, parts in (("image", model.image_parts()), ("text", model.text_parts())):
        if not parts.blocks:
            raise InputError(
                f"activation_checkpointing: the blocks of the {tower} tower of {model.name} are "
                "not known, so there is nothing to checkpoint. Leave it False; a smaller "
                "micro_batch_size needs less memory too"
            )
        blocks += parts.blocks
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(replaced_forward(block, _CheckpointedForward(block)))
        yield


class _CheckpointedForward:
    """Stands in for `block.forward`; a deep copy of the block has one of its own."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._forward: Callable[..., Any] = block.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        return checkpoint(
            self._forward,
            *args,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), self._unmoved_buffers()),
            **kwargs,
        )

    @contextmanager
    def _unmoved_buffers(self) -> Iterator[None]:
        """Leave BatchNorm's statistics, which have seen this input already, as they are."""
        buffers = buffers_in_train_mode(self._block)
        try:
            yield
        finally:
            with torch.no_grad():
                restore_buffers(buffers)


@contextmanager
def placed(model: DualEncoder, *, device: torch.device) -> Iterator[None]:
    """Move the model to `device`, and back afterwards."""
    home = model.device
    # Quantised models refuse to be moved, even to where they are.
    if device == home:
        yield
        return
    model.module.to(device)
    try:
        yield
    finally:
        model.module.to(home)


@contextmanager
def usual_defaults() -> Iterator[None]:
    """Make new tensors fp32 on the CPU in the block, whatever defaults the caller has set."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    if dtype == torch.float32 and device.type == "cpu":
        yield
        return
    log.warning("torch's defaults, %s on %s, are set aside during this call.", dtype, device)
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


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
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
