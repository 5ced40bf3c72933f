"""A two-tower model of a few hundred weights with Dropout and BatchNorm, and short runs of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

import fasterase
from fasterase.models.dual_encoder import DualEncoder, Tokens, TowerParts
from fasterase.pairs.batches import MicroBatch

SIZE = 4
VOCABULARY = 50
LENGTH = 5
STEPS = {
    "lr": 1e-3,
    "batch_size": 8,
    "forget_batch_size": 4,
    "max_steps": 3,
    "progress": False,
    "evaluation": None,
}


class TinyModule(nn.Module):
    def __init__(self, *, dropout: float, batch_norm: bool) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Flatten(),
            nn.Linear(3 * SIZE * SIZE, 24),
            nn.BatchNorm1d(24) if batch_norm else nn.LayerNorm(24),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(24, 12),
        )
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.text = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Dropout(dropout))
        self.text_projection = nn.Linear(16, 12)
        self.logit_scale = nn.Parameter(torch.tensor(2.5))


class TinyModel(DualEncoder):
    library = "none"
    name = "tiny"
    embed_dim = 12
    image_size = (SIZE, SIZE)
    context_length = LENGTH
    vocab_size = VOCABULARY
    text_tokenizer = None

    def __init__(self, *, seed: int = 0, dropout: float = 0.0, batch_norm: bool = False) -> None:
        torch.manual_seed(seed)
        self.module = TinyModule(dropout=dropout, batch_norm=batch_norm).eval()
        self.image_transform = None  # type: ignore[assignment]

    def _image_features(self, pixels: Tensor) -> Tensor:
        return self.module.image(pixels)

    def _text_features(self, tokens: Tokens) -> Tensor:
        return self.module.text_projection(
            self.module.text(self.module.embedding(tokens.ids).mean(1))
        )

    def image_parts(self) -> TowerParts:
        layers = list(self.module.image)
        return TowerParts([self.module.image], [layers[1]], layers[2:], [layers[5]])

    def text_parts(self) -> TowerParts:
        module = self.module
        every = [module.embedding, module.text, module.text_projection]
        return TowerParts(every, [module.text], [module.text_projection], [module.text_projection])

    def _write_model(self, folder: Path) -> None:
        save_file(self.module.state_dict(), folder / "model.safetensors")

    def weights(self) -> dict[str, Tensor]:
        """A copy of all parameters and buffers."""
        return {name: tensor.clone() for name, tensor in self.module.state_dict().items()}


def pairs(count: int, *, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs of pixels [3, SIZE, SIZE] and token ids [LENGTH]."""
    pixels, tokens = batch(count, seed=seed)
    return list(zip(pixels, tokens.ids, strict=True))


class Noisy(Dataset):
    """Pairs whose pixels and token ids differ on every read."""

    def __init__(self, items: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pixels, ids = self.items[index]
        return pixels + 0.1 * torch.randn_like(pixels), ids.roll(int(torch.randint(5, ())))


def same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def watch(model: DualEncoder, side: str, see: Callable[[Any, Tensor], Tensor | None]) -> None:
    """Call `see` with input and features of each encoding; what it returns takes their place."""
    plain = getattr(model, f"encode_{side}")

    def encode(given: Any) -> Tensor:
        features = plain(given)
        other = see(given, features)
        return features if other is None else other

    setattr(model, f"encode_{side}", encode)


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Weights, modes and what is trained are after the block what they were, whatever it raises."""

    def switches() -> list[bool]:
        parameters = (parameter.requires_grad for parameter in module.parameters())
        return [*(part.training for part in module.modules()), *parameters]

    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}, switches()
    try:
        yield
    finally:
        assert same_weights(before[0], module.state_dict())
        assert before[1] == switches()


def erase(
    model: Any = None, forget: Any = None, retain: Any = None, **settings: Any
) -> fasterase.UnlearnResult:
    """A run of a few steps; the model and the pairs are tiny ones unless they are given."""
    forget, retain = (FORGET if forget is None else forget), (RETAIN if retain is None else retain)
    given = TinyModel() if model is None else model
    return fasterase.unlearn(given, forget, retain, **{**STEPS, **settings})


def batch(count: int, *, seed: int = 1) -> tuple[Tensor, Tokens]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 3, SIZE, SIZE, generator=generator)
    ids = torch.randint(1, VOCABULARY, (count, LENGTH), generator=generator)
    return pixels, Tokens(ids)


FORGET, RETAIN = pairs(6, seed=1), pairs(20, seed=2)


def micro_batches(
    pixels: Tensor,
    tokens: Tokens,
    size: int | None,
    *,
    n_forget: int,
    keys: Sequence[str] | None = None,
) -> list[MicroBatch]:
    """A batch cut into micro-batches of `size` pairs; without `keys`, no caption repeats."""
    size = size or len(pixels)
    keys = [str(row) for row in range(len(pixels))] if keys is None else list(keys)
    parts = []
    for start in range(0, len(pixels), size):
        rows = np.arange(start, min(start + size, len(pixels)))
        parts.append(
            MicroBatch(
                which=(rows >= n_forget).astype(int),
                rows=rows,
                ids=[str(row) for row in rows],
                views=np.zeros(len(rows), np.int64),
                captions=[(row, keys[row]) for row in rows],
                pixels=pixels[start : start + size],
                fresh=np.arange(len(rows)),
                tokens=tokens.index(slice(start, start + size)),
                skipped=[],
                step=0,
                offset=start,
            )
        )
    return parts
