"""Gradients of a loss over a whole batch in the memory of one micro-batch (GradCache).

A contrastive loss couples all pairs of a batch, so accumulating the losses of micro-batches would
optimise something else. GradCache (Gao et al., 2021, "Scaling Deep Contrastive Learning Batch Size
under Memory Limited Setup") encodes without a graph, takes the gradient of the loss with respect
to the features, and encodes again, one micro-batch at a time, to send it on to the weights. A
batch of one micro-batch keeps the graph of its only encoding.

A caption that repeats in the batch is encoded once, with the first micro-batch that has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    seed_of: Callable[[MicroBatch], int],
    passes: int | None = None,
) -> EraseLoss:
    """Add the gradient of the loss over all micro-batches to the parameters' `.grad`.

    Args:
        engine: runs the towers.
        micro_batches: at least one.
        loss_of: maps image features (n, D), text features (n, D) and scale of the whole batch to
            the loss and its gradients. If all gradients are None there is no backward pass.
        seed_of: seed of the generators while a micro-batch is encoded; both encodings of it then
            have the same Dropout masks.
        passes: how often the towers are called, if more often than there are micro-batches; the
            calls beyond them encode a row of zeros, whose gradient is zero.

    Returns:
        The loss, detached.
    """
    module = engine.module
    # In train mode each pair has a Dropout mask of its own, and counts in BatchNorm's statistics.
    fresh, caption_of_pair = _distinct_captions(micro_batches, repeats=module.training)
    parts = [
        _prepare(part, captions, seed_of(part))
        for part, captions in zip(micro_batches, fresh, strict=True)
    ]
    if passes is not None and passes > len(parts):
        parts += [_without_rows(micro_batches[0], parts[0].seed)] * (passes - len(parts))
    keep_graph = len(parts) == 1

    def encode(part: _Part, *, graph: bool, image: bool = True, text: bool = True) -> Features:
        torch.manual_seed(part.seed)
        pixels = to_device(part.pixels, engine.device) if image else None
        tokens = part.tokens.to(engine.device) if text else None
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
    if len(text) == len(caption_of_pair):
        loss, *gradients = loss_of(image, text, encoded[0].scale)
    else:
        rows = to_device(torch.tensor(caption_of_pair), engine.device)
        loss, *gradients = loss_of(image, text[rows], encoded[0].scale)
        if gradients[1] is not None:
            gradients[1] = sum_rows(gradients[1], rows, len(text))
    if all(gradient is None for gradient in gradients):
        return loss
    if not keep_graph:
        # The second encoding moves BatchNorm's statistics again.
        restore_buffers(buffers)
    for number, of_part in enumerate(_split(gradients, parts)):
        again = encoded[number]
        if not keep_graph:
            # A tower without a gradient is encoded again only for its Dropout and BatchNorm.
            needs = [each is not None or module.training for each in gradients]
            again = encode(parts[number], graph=True, image=needs[0], text=needs[1])
        pairs = zip(again, of_part, strict=True)
        given = [(x, upstream) for x, upstream in pairs if x is not None and upstream is not None]
        if given:
            outputs, upstreams = zip(*given, strict=True)
            torch.autograd.backward(outputs, upstreams)
    return loss


def _distinct_captions(
    micro_batches: Sequence[MicroBatch], *, repeats: bool
) -> tuple[list[list[int]], list[int]]:
    """Return the places in each micro-batch of captions encoded with it, and each pair's caption.

    All are encoded if the batch `repeats` captions, else those that no earlier micro-batch has. A
    pair has the number of its caption among those encoded.
    """
    fresh: list[list[int]] = []
    of_pairs: list[int] = []
    numbers: dict[str, int] = {}
    count = 0
    for part in micro_batches:
        places = []
        for place, key in enumerate(part.keys):
            if repeats or key not in numbers:
                places.append(place)
                numbers[key] = count
                count += 1
            of_pairs.append(numbers[key])
        fresh.append(places)
    return fresh, of_pairs


def _split(
    gradients: Sequence[Tensor | None], parts: Sequence[_Part]
) -> Iterator[tuple[Tensor | None, ...]]:
    """Yield the gradients of each part; that of the scale, the same in all, with the first."""
    image, text, scale = gradients
    nothing = [None] * len(parts)
    images = nothing if image is None else image.split([part.images for part in parts])
    texts = nothing if text is None else text.split([part.texts for part in parts])
    return zip(images, texts, [scale, *nothing[1:]], strict=True)


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


def buffers_in_train_mode(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return the buffers that a forward pass in train mode changes, with a copy of each."""
    if not module.training:
        return []
    return [(buffer, buffer.clone()) for buffer in module.buffers()]


def restore_buffers(buffers: list[tuple[Tensor, Tensor]]) -> None:
    """Undo what forward passes did to the buffers since `buffers_in_train_mode`."""
    for buffer, value in buffers:
        buffer.copy_(value)
