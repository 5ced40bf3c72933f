"""Gradients of a loss over a whole batch in the memory of one micro-batch (GradCache).

A contrastive loss couples all pairs of a batch, so accumulating the losses of micro-batches would
optimise something else. GradCache (Gao et al., 2021, "Scaling Deep Contrastive Learning Batch Size
under Memory Limited Setup") encodes without a graph, takes the gradient of the loss with respect
to the features, and encodes again, one micro-batch at a time, to send it on to the weights. A
batch of one micro-batch keeps the graph of its only encoding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fasterase.engine.feature_loss import FeatureGradients
from fasterase.models.forward import Features
from fasterase.models.prefix import Halfway
from fasterase.models.preprocessing import Tokens
from fasterase.objective import EraseLoss
from fasterase.pairs.batches import MicroBatch
from fasterase.parallel.engine import Engine

LossOfFeatures = Callable[[Tensor, Tensor, Tensor], FeatureGradients]


class _Part(NamedTuple):
    """What the towers encode at a time; where there is nothing to encode, a row of zeros."""

    pixels: Tensor | Halfway
    tokens: Tokens | Halfway
    n_rows: int  # rows that count: all or none
    seed: int


def backpropagate(
    engine: Engine,
    micro_batches: Sequence[MicroBatch],
    loss_of: LossOfFeatures,
    *,
    device: torch.device,
    seed_of: Callable[[MicroBatch], int],
    passes: int | None = None,
    halfway: Callable[[MicroBatch], tuple[Halfway, Halfway]] | None = None,
) -> EraseLoss:
    """Add the gradient of the loss over all micro-batches to the parameters' `.grad`.

    Args:
        engine: runs the towers.
        micro_batches: the batch in parts, at least one.
        loss_of: maps image features (n, D), text features (n, D) and scale of the whole batch to
            the loss and its gradients. If all gradients are None there is no backward pass.
        device: where the towers run.
        seed_of: seed of the generators while a micro-batch is encoded; both encodings of it then
            have the same Dropout masks.
        passes: how often the towers are called, if more often than there are micro-batches; the
            calls beyond them encode a row of zeros, whose gradient is zero.
        halfway: takes a micro-batch through the frozen blocks (`PrefixCache`); the towers then run
            the others. None: they run whole.

    Returns:
        The loss, detached.
    """
    parts = [
        _prepare(part, seed_of(part))
        if halfway is None or not part.ids
        else _Part(*halfway(part), len(part.ids), seed_of(part))
        for part in micro_batches
    ]
    if passes is not None and passes > len(parts):
        parts += [_without_rows(parts[0])] * (passes - len(parts))
    keep_graph = len(parts) == 1
    module = engine.module

    def encode(part: _Part, *, graph: bool, image: bool = True, text: bool = True) -> Features:
        torch.manual_seed(part.seed)
        pixels = part.pixels.to(device) if image else None
        tokens = part.tokens.to(device) if text else None
        with torch.set_grad_enabled(graph):
            return engine(pixels, tokens)

    buffers = buffers_in_train_mode(module)
    encoded = [encode(part, graph=keep_graph) for part in parts]
    kept = list(zip(parts, encoded, strict=True))
    image = torch.cat([found.image[: p.n_rows] for p, found in kept if found.image is not None])
    text = torch.cat([found.text[: p.n_rows] for p, found in kept if found.text is not None])
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
    for number, (part, first) in enumerate(kept):
        features = first if keep_graph else encode(part, graph=True, **needs)
        rows = slice(start, start + part.n_rows)
        # The scale is the same in every part: its gradient is applied once.
        of_part = (
            _gradient_of(part, gradients.image, rows),
            _gradient_of(part, gradients.text, rows),
            gradients.scale if number == 0 else None,
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


def _prepare(part: MicroBatch, seed: int) -> _Part:
    prepared = _Part(part.pixels, part.tokens, len(part.ids), seed)
    return prepared if part.ids else _without_rows(prepared)


def _without_rows(part: _Part) -> _Part:
    assert isinstance(part.pixels, Tensor)
    assert isinstance(part.tokens, Tokens)
    blank = Tokens(part.tokens.ids.new_zeros(1, part.tokens.ids.shape[1]), None)
    return _Part(part.pixels.new_zeros(1, *part.pixels.shape[1:]), blank, 0, part.seed)


def _gradient_of(part: _Part, gradient: Tensor | None, rows: slice) -> Tensor | None:
    """Return the gradient of a part's features, which is zero for a row that does not count."""
    if gradient is None or part.n_rows:
        return None if gradient is None else gradient[rows]
    return gradient.new_zeros(1, gradient.shape[1])


def buffers_in_train_mode(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return the buffers that a forward pass in train mode changes, with a copy of each."""
    if not module.training:
        return []
    return [(buffer, buffer.clone()) for buffer in module.buffers()]


def restore_buffers(buffers: list[tuple[Tensor, Tensor]]) -> None:
    """Undo what forward passes did to the buffers since `buffers_in_train_mode`."""
    for buffer, value in buffers:
        buffer.copy_(value)
