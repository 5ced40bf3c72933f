"""Activation checkpointing of both towers: memory of one block, for a second forward pass.

Only the input of each block is kept for the backward pass, which runs the block again (Chen et al.,
2016, "Training Deep Nets with Sublinear Memory Cost"). The libraries' own switches are not used:
transformers ignores its own in eval mode, in which towers are trained by default, and open_clip has
none for a ResNet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fasterase.engine.grad_cache import buffers_in_train_mode, restore_buffers
from fasterase.errors import InputError
from fasterase.models.dual_encoder import DualEncoder


@contextlib.contextmanager
def checkpointed_activations(model: DualEncoder) -> Iterator[None]:
    """Run the blocks of both towers (stages of a ResNet) checkpointed; afterwards as before.

    Values and gradients are the same: Dropout draws the same masks again, and BatchNorm's
    statistics move once. Passes without a graph are not affected.

    Raises:
        InputError: the blocks of a tower are not known.
    """
    blocks = [
        block
        for tower, parts in (("image", model.image_parts()), ("text", model.text_parts()))
        for block in _blocks_of(tower, parts.blocks, model.name)
    ]
    own = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.forward = _CheckpointedForward(block)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


class _CheckpointedForward:
    """Stands in for `block.forward`; a deep copy of the block has one of its own."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._forward: Callable[..., Any] = block.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        return checkpoint(
            self._forward, *args, use_reentrant=False, context_fn=self._contexts, **kwargs
        )

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return contextlib.nullcontext(), self._buffers_kept()

    @contextlib.contextmanager
    def _buffers_kept(self) -> Iterator[None]:
        """BatchNorm's statistics have seen this input already."""
        buffers = buffers_in_train_mode(self._block)
        try:
            yield
        finally:
            with torch.no_grad():
                restore_buffers(buffers)


def _blocks_of(tower: str, blocks: Any, name: str) -> list[nn.Module]:
    if not blocks:
        raise InputError(
            f"activation_checkpointing: the blocks of the {tower} tower of {name} are not known, "
            "so there is nothing to checkpoint. Leave it False; a smaller micro_batch_size needs "
            "less memory too"
        )
    return list(blocks)
