"""CLIPErase as a short loop in plain open_clip and PyTorch: what the library is measured against.

The original model runs in every step, and the loss is that of `examples/the_method.py`: dense and
eager, with each similarity matrix multiplied once. Everything else is as in `fasterase.unlearn`:
objective, pairs, optimiser.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from examples.the_method import encode, erase_loss
from fasterase.config import UnlearnConfig
from fasterase.pairs.sampler import Draw


class Pairs(Protocol):
    """Pairs `{"image", "text"}`; a text is a string or several, of which one is drawn."""

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


def erase_naively(
    model: nn.Module,
    forget: Pairs,
    retain: Pairs,
    draws: Iterable[Draw],
    *,
    config: UnlearnConfig,
    preprocess: Callable[[Any], Tensor],
    tokenizer: Callable[[list[str]], Tensor],
    after_step: Callable[[], object],
) -> None:
    """Train an open_clip model in place, on its device, one step per draw of pairs.

    Of the config it takes weights, lr and betas; `preprocess` and `tokenizer` are the model's own.
    """
    assert config.lr != "auto"
    model.eval()
    original = copy.deepcopy(model).requires_grad_(False)
    model.logit_scale.requires_grad_(False)
    device = next(model.parameters()).device
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = (config.forget_weight, config.retain_weight, config.consistency_weight)
    optimizer = torch.optim.Adam(trained, lr=config.lr, betas=config.betas)
    for draw in draws:
        pairs = [forget[int(row)] for row in draw.forget]
        pairs += [retain[int(row)] for row in draw.retain]
        numbers = draw.captions
        captions = [_caption(pair, int(k)) for pair, k in zip(pairs, numbers, strict=True)]
        images = torch.stack([preprocess(pair["image"]) for pair in pairs]).to(device)
        tokens = tokenizer(captions).to(device)
        places = {caption: place for place, caption in enumerate(captions)}
        labels = torch.tensor([places[caption] for caption in captions], device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            features = encode(model, images, tokens)
            with torch.no_grad():
                reference = encode(original, images, tokens)
        optimizer.zero_grad()
        erase_loss(features, reference, labels, len(draw.forget), weights).backward()
        optimizer.step()
        after_step()


def _caption(pair: dict[str, Any], number: int) -> str:
    texts = [pair["text"]] if isinstance(pair["text"], str) else pair["text"]
    return texts[number % len(texts)]
