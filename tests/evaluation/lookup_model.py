"""A two-tower model whose features are looked up, so that a test chooses every similarity."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import fasterase
from fasterase.encode import PairFeatures
from fasterase.models.dual_encoder import DualEncoder, TowerParts
from fasterase.models.preprocessing import ImageTransform, Tokens
from fasterase.pairs.open import open_pairs
from fasterase.pairs.table import PairTable
from fasterase.report.evaluation import Evaluation


class LookupTokenizer:
    """A text's token ids are its number in `texts`."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.number = {text: i for i, text in enumerate(texts)}

    def __call__(self, texts: Sequence[str]) -> Tokens:
        return Tokens(torch.tensor([[self.number[text]] for text in texts]))


class LookupModel(DualEncoder):
    """Image number i (see `picture`) and text number i have the given features."""

    def __init__(self, image: Tensor, text: Tensor, texts: Sequence[str], name: str) -> None:
        self.module = nn.Module()
        self.module.image = nn.Parameter(image.clone())
        self.module.text = nn.Parameter(text.clone())
        self.module.logit_scale = nn.Parameter(torch.zeros(()))
        self.module.dropout = nn.Dropout(0.5)
        self.name = name
        self.embed_dim = image.shape[1]
        self.image_size = (1, 1)
        self.context_length = 1
        self.vocab_size = 1 << 31
        self.image_transform = ImageTransform(_no_transform)
        self.text_tokenizer = LookupTokenizer(texts)

    def _image_features(self, pixels: Tensor) -> Tensor:
        return self.module.dropout(self.module.image[pixels[:, 0, 0, 0].long()])

    def _text_features(self, tokens: Tokens) -> Tensor:
        return self.module.dropout(self.module.text[tokens.ids[:, 0]])

    def image_parts(self) -> TowerParts:
        raise NotImplementedError

    def text_parts(self) -> TowerParts:
        raise NotImplementedError

    def _write_model(self, folder: Path) -> None:
        raise NotImplementedError


def _no_transform(image: object) -> Tensor:
    raise AssertionError("the pictures of these tests are preprocessed")


def attack(name: str, model: DualEncoder, forget: Any, retain: Any, **options: Any) -> Evaluation:
    """Evaluate a model under one attack."""
    return fasterase.evaluate(model, forget, retain, attacks=[name], progress=False, **options)


def picture(number: int) -> Tensor:
    """[3, 1, 1] pixels that stand for image `number`."""
    return torch.full((3, 1, 1), float(number))


def open_sets(captions: Mapping[str, Sequence[Any]]) -> dict[str, PairTable]:
    """Sets of pairs with these captions; their pictures are numbered on through all sets."""
    numbers = itertools.count()
    return {
        name: open_pairs([(picture(next(numbers)), each) for each in those], name=name)
        for name, those in captions.items()
    }


def pair_features(
    image: Tensor, text: Tensor, captions: Sequence[str] | None = None
) -> PairFeatures:
    """Features of pairs with these images [n, D]; pair i has caption i mod m of text [m, D]."""
    count = len(text)
    return PairFeatures(
        np.arange(len(image)),
        normalize(image, dim=1),
        normalize(text, dim=1),
        [f"caption {i}" for i in range(count)] if captions is None else [*captions],
        [[i % count] for i in range(len(image))],
        [],
    )
