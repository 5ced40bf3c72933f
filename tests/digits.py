"""Small CLIP models of every kind of tower, trained to name handwritten digits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from fasterase.models import load_model
from tests import small_models

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = ("the digit {}", "a written {}")
CONTEXT_LENGTH = 24
TRAINED = 1200  # of 1,797 images; the others are only measured
WEIGHTS = Path(__file__).parent / "data"


class Kind(NamedTuple):
    """How a model of a kind is built and trained, and the digit that is erased from it."""

    build: Callable[..., nn.Module]
    steps: int
    erased: int


SIZES = {"context_length": CONTEXT_LENGTH, "vocab_size": len(small_models.HF_VOCABULARY)}
KINDS = {
    "vit": Kind(partial(small_models.open_clip_vit, **SIZES), 400, 3),
    "resnet": Kind(partial(small_models.open_clip_resnet, **SIZES), 200, 7),
    "siglip": Kind(partial(small_models.hf_siglip, context_length=CONTEXT_LENGTH), 400, 7),
}
# Settings of an erasure of one digit.
OPTIONS: dict[str, Any] = {"batch_size": 64, "forget_batch_size": 32}
OPTIONS |= {"progress": False, "evaluation": None}


class Digits(NamedTuple):
    """Images [n, 3, 32, 32], ready for the models, and labels [n]."""

    pixels: Tensor
    labels: Tensor

    @classmethod
    def load(cls) -> tuple[Digits, Digits]:
        """Return the images that the models are trained on, and the others."""
        from sklearn.datasets import load_digits

        data = load_digits()
        order = np.random.default_rng(0).permutation(len(data.target))
        small = torch.from_numpy(data.images[order]).float() / 8 - 1  # [n, 8, 8]
        pixels = interpolate(small[:, None], size=small_models.IMAGE_SIZE, mode="bilinear")
        pixels = pixels.repeat(1, 3, 1, 1)
        labels = torch.from_numpy(data.target[order])
        return cls(pixels[:TRAINED], labels[:TRAINED]), cls(pixels[TRAINED:], labels[TRAINED:])

    def pairs(self, digits: set[int]) -> list[tuple[Tensor, list[str]]]:
        """Return (image, captions) of some digits."""
        return [
            (image, [template.format(NAMES[label]) for template in TEMPLATES])
            for image, label in zip(self.pixels, self.labels.tolist(), strict=True)
            if label in digits
        ]


def tokenizer() -> Any:
    return small_models.hf_tokenizer(CONTEXT_LENGTH)


def trained_model(kind: str, digits: Digits, *, seed: int = 0) -> nn.Module:
    """Train a model of a kind from an initialisation."""
    model = KINDS[kind].build(seed=seed)
    train(model, digits, steps=KINDS[kind].steps, lr=3e-3)
    return model


def pinned_model(kind: str) -> nn.Module:
    """Load the model of a kind that `tools/train_digits.py` trained: it is the same everywhere."""
    model = KINDS[kind].build()
    model.load_state_dict(load_file(WEIGHTS / f"digits_{kind}.safetensors"))
    return model


def train(module: nn.Module, digits: Digits, *, steps: int, lr: float) -> None:
    """Teach a model the digits' names, one of the templates in each step."""
    model = load_model(module, tokenizer=tokenizer())
    wordings = [model.tokenize([template.format(name) for name in NAMES]) for template in TEMPLATES]
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    numbers = torch.Generator().manual_seed(0)
    module.train()
    for step in range(steps):
        rows = torch.randint(len(digits.labels), (64,), generator=numbers)
        image = model.encode_image(digits.pixels[rows])
        text = model.encode_text(wordings[step % len(wordings)])
        loss = cross_entropy(20 * image @ text.T, digits.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    module.eval()


def accuracy(module: nn.Module, digits: Digits) -> np.ndarray:
    """Return the zero-shot accuracy on each digit, [10]."""
    model = load_model(module, tokenizer=tokenizer())
    with torch.no_grad():
        text = model.encode_text(model.tokenize([TEMPLATES[0].format(name) for name in NAMES]))
        right = (model.encode_image(digits.pixels) @ text.T).argmax(1) == digits.labels
    return np.array([float(right[digits.labels == digit].float().mean()) for digit in range(10)])
