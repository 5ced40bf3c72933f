"""Pairs of a few concepts, and the tiny two-tower model after it has learned them."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from fasterase.losses import ClipLoss
from fasterase.models.dual_encoder import Tokens
from tests.tiny_model import LENGTH, SIZE, VOCABULARY, TinyModel

CONCEPTS = 8
FORGOTTEN, KEPT = 0, range(1, CONCEPTS)


def concept_pairs(concepts: Iterable[int], count: int, *, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Return `count` pairs of each concept, pixels [3, SIZE, SIZE] and token ids [LENGTH].

    An image is the concept's prototype and noise; a caption its two tokens and random others.
    """
    numbers = torch.Generator().manual_seed(seed)
    shape = (CONCEPTS, 3, SIZE, SIZE)
    prototypes = torch.randn(shape, generator=torch.Generator().manual_seed(99))
    items = []
    for concept in concepts:
        for _ in range(count):
            noise = torch.randn(shape[1:], generator=numbers)
            ids = torch.randint(2 * CONCEPTS + 1, VOCABULARY, (LENGTH,), generator=numbers)
            ids[:2] = torch.tensor([2 * concept + 1, 2 * concept + 2])
            items.append((prototypes[concept] + 0.3 * noise, ids))
    return items


FORGET, RETAIN = concept_pairs([FORGOTTEN], 24, seed=1), concept_pairs(KEPT, 20, seed=2)

# `lr` and the steps are chosen by the run itself, which forgets the concept.
AUTOMATIC = {
    "lr": "auto",
    "max_steps": None,
    "batch_size": 32,
    "forget_batch_size": 12,
    "progress": False,
}


def knowing_model(concepts: Iterable[int] = range(CONCEPTS)) -> TinyModel:
    """A model that knows all concepts, or only the given ones."""
    model = TinyModel()
    model.module.load_state_dict(_learned_weights(tuple(concepts)))
    return model


@functools.cache
def _learned_weights(concepts: tuple[int, ...]) -> dict[str, Tensor]:
    model = TinyModel()
    pixels, ids = map(torch.stack, zip(*concept_pairs(concepts, 40, seed=7), strict=True))
    optimizer = torch.optim.Adam(model.module.parameters(), lr=3e-3)
    loss = ClipLoss()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(150):
            rows = torch.randperm(len(pixels))[:64]
            image = model.encode_image(pixels[rows])
            text = model.encode_text(Tokens(ids[rows]))
            loss(image, text, model.scale()).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.weights()
