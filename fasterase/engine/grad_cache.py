"""Gradients of a loss over a whole batch in the memory of one micro-batch (GradCache).

A contrastive loss couples all pairs of a batch, so accumulating micro-batch losses optimises
something else. GradCache (Gao et al., 2021, "Scaling Deep Contrastive Learning Batch Size under
Memory Limited Setup") encodes without a graph, takes the loss's gradient with respect to the
features, and encodes again, one micro-batch at a time, to send that gradient on to the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fasterase.engine.random_state import RandomState
from fasterase.models.dual_encoder import DualEncoder, Tokens
from fasterase.objective import EraseLoss

LossFunction = Callable[[Tensor, Tensor], EraseLoss]


@dataclass(frozen=True)
class TowerPass:
    """How the towers are run.

    Attributes:
        tower: the model.
        autocast: makes the context of a tower's forward (mixed precision).
        image_trained, text_trained: whether each tower has trained parameters; one that has none
            is encoded once, without a graph.
        micro_batch_size: pairs encoded at a time, None for all.
    """

    tower: DualEncoder
    autocast: Callable[[], AbstractContextManager[object]]
    image_trained: bool
    text_trained: bool
    micro_batch_size: int | None

    def encode_image(self, pixels: Tensor, *, graph: bool) -> Tensor:
        """Unit image features (n, D) fp32, with a graph where asked and the tower is trained."""
        with torch.set_grad_enabled(graph and self.image_trained), self.autocast():
            return self.tower.encode_image(pixels).float()

    def encode_text(self, tokens: Tokens, *, graph: bool) -> Tensor:
        """Unit text features (n, D) fp32, with a graph where asked and the tower is trained."""
        with torch.set_grad_enabled(graph and self.text_trained), self.autocast():
            return self.tower.encode_text(tokens).float()


def backward(
    towers: TowerPass,
    pixels: Tensor,
    tokens: Tokens,
    loss_of: LossFunction,
    scaler: torch.amp.GradScaler,
) -> EraseLoss:
    """Add the gradient of `loss_of(image, text).total` to the parameters' `.grad`.

    A loss that is not finite is returned without a backward pass.

    Args:
        towers: the model and how to run it.
        pixels: (n, 3, H, W).
        tokens: of the n captions.
        loss_of: the loss of features (n, D), (n, D); its own parameters (logit_scale) receive
            their gradient too.
        scaler: loss scaling; gradients come out scaled by it.
    """
    size = towers.micro_batch_size
    if size is None or size >= len(pixels):
        features = towers.encode_image(pixels, graph=True), towers.encode_text(tokens, graph=True)
        loss = loss_of(*features)
        if bool(loss.total.isfinite()) and loss.total.requires_grad:
            scaler.scale(loss.total).backward()
        return loss

    generators: list[RandomState] = []
    buffers = buffers_in_train_mode(towers.tower.module)
    images, texts = [], []
    for rows in _micro_batches(len(pixels), size):
        generators.append(RandomState(pixels.device))
        images.append(towers.encode_image(pixels[rows], graph=False))
        texts.append(towers.encode_text(tokens.index(rows), graph=False))
    image = torch.cat(images).requires_grad_(towers.image_trained)
    text = torch.cat(texts).requires_grad_(towers.text_trained)

    loss = loss_of(image, text)
    if not (bool(loss.total.isfinite()) and loss.total.requires_grad):
        return loss
    scaler.scale(loss.total).backward()

    # The second pass must be the first one again: the same Dropout masks, and BatchNorm statistics
    # that move once, not twice.
    put_back(buffers)
    with RandomState(pixels.device).restored_after():
        for rows, generator in zip(_micro_batches(len(pixels), size), generators, strict=True):
            generator.restore()
            _second_pass(
                towers, pixels[rows], tokens.index(rows), _grad(image, rows), _grad(text, rows)
            )
    return loss


def _second_pass(
    towers: TowerPass,
    pixels: Tensor,
    tokens: Tokens,
    image_grad: Tensor | None,
    text_grad: Tensor | None,
) -> None:
    """Send the features' gradients on to the weights; a tower without one is not encoded again,
    unless its Dropout stands between the other's and the generator.
    """
    if image_grad is not None:
        image = towers.encode_image(pixels, graph=True)
        image.backward(image_grad)
    elif towers.tower.module.training and text_grad is not None:
        towers.encode_image(pixels, graph=False)
    if text_grad is not None:
        towers.encode_text(tokens, graph=True).backward(text_grad)


def _grad(leaf: Tensor, rows: slice) -> Tensor | None:
    return None if leaf.grad is None else leaf.grad[rows]


def _micro_batches(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def buffers_in_train_mode(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Buffers that a forward in train mode changes, with a copy of each; none in eval mode."""
    if not module.training:
        return []
    return [(buffer, buffer.clone()) for buffer in module.buffers()]


def put_back(buffers: list[tuple[Tensor, Tensor]]) -> None:
    """Undo what forwards did to the buffers since `buffers_in_train_mode`."""
    for buffer, value in buffers:
        buffer.copy_(value)
