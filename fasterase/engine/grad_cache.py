"""Gradients of a loss over a whole batch in the memory of one micro-batch (GradCache).

A contrastive loss couples all pairs of a batch, so accumulating the losses of micro-batches would
optimise something else. GradCache (Gao et al., 2021, "Scaling Deep Contrastive Learning Batch Size
under Memory Limited Setup") encodes without a graph, takes the gradient of the loss with respect
to the features, and encodes again, one micro-batch at a time, to send it on to the weights. A
batch of one micro-batch keeps the graph of its only encoding.

A caption that repeats in the batch is encoded once, with the first micro-batch that has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fasterase.engine.loss import FeatureGradients
from fasterase.models.forward import Features, Halfway
from fasterase.models.preprocessing import Tokens
from fasterase.objective import EraseLoss
from fasterase.ops.contrastive.labels import sum_rows
from fasterase.pairs.batches import MicroBatch
from fasterase.parallel.engine import Engine
from fasterase.transfers import to_device

LossOfFeatures = Callable[[Tensor, Tensor, Tensor], FeatureGradients]

# Minimum number of captions encoded per micro-batch, if it has that many. Smaller products may
# round differently, and steps must be the same with and without a prefix cache, bit for bit.
_FEWEST_TEXTS = 4


class _Part(NamedTuple):
    """Input of one call of the towers; only the first `images` or `texts` rows are used."""

    pixels: Tensor | Halfway
    tokens: Tokens | Halfway
    images: int
    texts: int
    seed: int


def backpropagate(
    engine: Engine,
    micro_batches: Sequence[MicroBatch],
    loss_of: LossOfFeatures,
    *,
    device: torch.device,
    seed_of: Callable[[MicroBatch], int],
    passes: int | None = None,
) -> EraseLoss:
    """Add the gradient of the loss over all micro-batches to the parameters' `.grad`.

    Args:
        engine: runs the towers.
        micro_batches: at least one.
        loss_of: maps image features (n, D), text features (n, D) and scale of the whole batch to
            the loss and its gradients. If all gradients are None there is no backward pass.
        device: where the towers run.
        seed_of: seed of the generators while a micro-batch is encoded; both encodings of it then
            have the same Dropout masks.
        passes: how often the towers are called, if more often than there are micro-batches; the
            calls beyond them encode a row of zeros, whose gradient is zero.

    Returns:
        The loss, detached.
    """
    module = engine.module
    # In train mode each pair has a Dropout mask of its own, and counts in BatchNorm's statistics.
    texts = _Texts(micro_batches, repeats=module.training, device=device)
    parts = [
        _prepare(part, fresh, seed_of(part))
        for part, fresh in zip(micro_batches, texts.fresh, strict=True)
    ]
    if passes is not None and passes > len(parts):
        parts += [_without_rows(micro_batches[0], parts[0].seed)] * (passes - len(parts))
    keep_graph = len(parts) == 1

    def encode(part: _Part, *, graph: bool, image: bool = True, text: bool = True) -> Features:
        torch.manual_seed(part.seed)
        pixels = to_device(part.pixels, device) if image else None
        tokens = part.tokens.to(device) if text else None
        with torch.set_grad_enabled(graph):
            found = engine(pixels, tokens)
            return Features(
                None if found.image is None else found.image[: part.images],
                None if found.text is None else found.text[: part.texts],
                found.scale,
            )

    buffers = buffers_in_train_mode(module)
    encoded = [encode(part, graph=keep_graph) for part in parts]
    image = torch.cat([found.image for found in encoded if found.image is not None])
    text = torch.cat([found.text for found in encoded if found.text is not None])
    gradients = texts.summed(loss_of(image, texts.spread(text), encoded[0].scale))
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
    images = _rows_of_parts(gradients.image, [part.images for part in parts])
    captions = _rows_of_parts(gradients.text, [part.texts for part in parts])
    # The scale is the same in every part: its gradient is applied once.
    scales = [gradients.scale, *[None] * (len(parts) - 1)]
    for number, of_part in enumerate(zip(images, captions, scales, strict=True)):
        again = encoded[number] if keep_graph else encode(parts[number], graph=True, **needs)
        _send_back(again, of_part)
    return gradients.loss


class _Texts:
    """Tells which captions of a batch are encoded, and gives each pair the features of its own.

    Attributes:
        fresh: for each micro-batch, the places in it of captions that are encoded with it: all if
            the batch `repeats` captions, else those that no earlier one has.
    """

    def __init__(
        self, micro_batches: Sequence[MicroBatch], *, repeats: bool, device: torch.device
    ) -> None:
        self.fresh: list[list[int]] = []
        self._count = 0
        numbers: dict[str, int] = {}
        of_pairs: list[int] = []
        for part in micro_batches:
            fresh = []
            for place, key in enumerate(part.keys):
                if repeats or key not in numbers:
                    fresh.append(place)
                    numbers[key] = self._count
                    self._count += 1
                of_pairs.append(numbers[key])
            self.fresh.append(fresh)
        self._of_pairs: Tensor | None = None
        if self._count < len(of_pairs):
            self._of_pairs = to_device(torch.tensor(of_pairs), device)

    def spread(self, features: Tensor) -> Tensor:
        """Return the features of all pairs [n, D] from those of the encoded captions."""
        if self._of_pairs is None:
            return features
        return features[self._of_pairs]

    def summed(self, gradients: FeatureGradients) -> FeatureGradients:
        """Add up the gradients of a caption's pairs."""
        if self._of_pairs is None or gradients.text is None:
            return gradients
        return gradients._replace(text=sum_rows(gradients.text, self._of_pairs, self._count))


def _prepare(part: MicroBatch, fresh: Sequence[int], seed: int) -> _Part:
    """Return what the towers encode of a micro-batch, with the captions at `fresh` alone."""
    if not part.ids:
        return _without_rows(part, seed)
    captions = list(fresh)
    if len(fresh) < _FEWEST_TEXTS:
        known = [place for place in range(len(part.ids)) if place not in fresh]
        captions += known[: _FEWEST_TEXTS - len(fresh)]
    is_all = captions == list(range(len(part.ids)))
    tokens = part.tokens if is_all else part.tokens.index(captions)
    return _Part(part.pixels, tokens, len(part.ids), len(fresh), seed)


def _without_rows(part: MicroBatch, seed: int) -> _Part:
    """Return a row of zeros, which does not count."""
    assert isinstance(part.pixels, Tensor)
    assert isinstance(part.tokens, Tokens)
    pixels = part.pixels.new_zeros(1, *part.pixels.shape[1:])
    tokens = Tokens(part.tokens.ids.new_zeros(1, part.tokens.ids.shape[1]), None)
    return _Part(pixels, tokens, 0, 0, seed)


def _send_back(features: Features, gradients: Sequence[Tensor | None]) -> None:
    given = [
        (output, gradient)
        for output, gradient in zip(features, gradients, strict=True)
        if output is not None and gradient is not None
    ]
    if given:
        outputs, upstream = zip(*given, strict=True)
        torch.autograd.backward(outputs, upstream)


def _rows_of_parts(gradient: Tensor | None, counts: list[int]) -> Sequence[Tensor | None]:
    return [None] * len(counts) if gradient is None else gradient.split(counts)


def buffers_in_train_mode(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return the buffers that a forward pass in train mode changes, with a copy of each."""
    if not module.training:
        return []
    return [(buffer, buffer.clone()) for buffer in module.buffers()]


def restore_buffers(buffers: list[tuple[Tensor, Tensor]]) -> None:
    """Undo what forward passes did to the buffers since `buffers_in_train_mode`."""
    for buffer, value in buffers:
        buffer.copy_(value)
