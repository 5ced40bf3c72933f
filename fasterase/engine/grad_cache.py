"""Gradients of a loss over a whole batch in the memory of one micro-batch (GradCache).

A contrastive loss couples all pairs of a batch, so accumulating the losses of micro-batches would
optimise something else. GradCache (Gao et al., 2021, "Scaling Deep Contrastive Learning Batch Size
under Memory Limited Setup") encodes without a graph, takes the gradient of the loss with respect
to the features, and encodes again, one micro-batch at a time, to send it on to the weights. A
batch of one micro-batch keeps the graph of its only encoding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fasterase.engine.feature_loss import FeatureGradients
from fasterase.models.forward import Features, TowerForward
from fasterase.objective import EraseLoss
from fasterase.pairs.batches import MicroBatch

LossOfFeatures = Callable[[Tensor, Tensor, Tensor], FeatureGradients]


def backpropagate(
    forward: TowerForward,
    micro_batches: Sequence[MicroBatch],
    loss_of: LossOfFeatures,
    *,
    device: torch.device,
    seed_of: Callable[[MicroBatch], int],
) -> EraseLoss:
    """Add the gradient of the loss over all micro-batches to the parameters' `.grad`.

    Args:
        forward: the towers.
        micro_batches: the batch in parts.
        loss_of: maps image features (n, D), text features (n, D) and scale of the whole batch to
            the loss and its gradients. If all gradients are None there is no backward pass.
        device: where the towers run.
        seed_of: seed of the generators while a micro-batch is encoded; both encodings of it then
            have the same Dropout masks.

    Returns:
        The loss, detached.
    """
    keep_graph = len(micro_batches) == 1
    module = forward.module

    def encode(part: MicroBatch, *, graph: bool, image: bool = True, text: bool = True) -> Features:
        torch.manual_seed(seed_of(part))
        pixels = part.pixels.to(device) if image else None
        tokens = part.tokens.to(device) if text else None
        with torch.set_grad_enabled(graph):
            return forward(pixels, tokens)

    buffers = buffers_in_train_mode(module)
    encoded = [encode(part, graph=keep_graph) for part in micro_batches]
    image = torch.cat([features.image for features in encoded if features.image is not None])
    text = torch.cat([features.text for features in encoded if features.text is not None])
    gradients = loss_of(image, text, encoded[0].scale)
    if gradients.image is None and gradients.text is None and gradients.scale is None:
        return gradients.loss
    if not keep_graph:
        # The second encoding moves BatchNorm's statistics again.
        restore_buffers(buffers)
    # A tower without a gradient is encoded again only for its Dropout and BatchNorm.
    needs = {
        "image": gradients.image is not None or module.training,
        "text": gradients.text is not None or module.training,
    }
    start = 0
    for part, kept in zip(micro_batches, encoded, strict=True):
        features = kept if keep_graph else encode(part, graph=True, **needs)
        rows = slice(start, start + len(part.ids))
        # The scale is the same in every part: its gradient is applied once.
        of_part = (
            None if gradients.image is None else gradients.image[rows],
            None if gradients.text is None else gradients.text[rows],
            gradients.scale if start == 0 else None,
        )
        outputs: list[Tensor] = []
        upstream: list[Tensor] = []
        for output, gradient in zip(features, of_part, strict=True):
            if output is not None and gradient is not None:
                outputs.append(output)
                upstream.append(gradient)
        if outputs:
            torch.autograd.backward(outputs, upstream)
        start = rows.stop
    return gradients.loss


def buffers_in_train_mode(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return the buffers that a forward pass in train mode changes, with a copy of each."""
    if not module.training:
        return []
    return [(buffer, buffer.clone()) for buffer in module.buffers()]


def restore_buffers(buffers: list[tuple[Tensor, Tensor]]) -> None:
    """Undo what forward passes did to the buffers since `buffers_in_train_mode`."""
    for buffer, value in buffers:
        buffer.copy_(value)
