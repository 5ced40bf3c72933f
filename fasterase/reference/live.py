"""The original model run in every step: for data that changes from one read to the next."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fasterase.models.dual_encoder import DualEncoder, frozen_copy
from fasterase.models.forward import TowerForward
from fasterase.pairs.batches import StepBatch


class Reference(Protocol):
    """The frozen original, as a step needs it.

    Attributes:
        scale: 0-d, exp(logit_scale) of the original.
    """

    scale: Tensor

    def features(self, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """Return unit features (n, D0), (n, D0) fp32 of the batch's images and captions."""
        ...


class LiveReference:
    """A frozen copy of the model, which encodes each batch beside the trained one.

    It costs a second set of weights and one more forward pass per step. A cached row would belong
    to another view of the image, and a wrong reference corrupts consistency and anchor silently.
    """

    def __init__(self, model: DualEncoder, *, precision: str) -> None:
        original = frozen_copy(model)
        self._forward = TowerForward(original, precision=precision)
        self._device = original.device
        self.scale = original.scale().detach()

    @torch.no_grad()
    def features(self, batch: StepBatch) -> tuple[Tensor, Tensor]:
        images, texts = [], []
        for part in batch.micro_batches:
            found = self._forward(part.pixels.to(self._device), part.tokens.to(self._device))
            images.append(found.image)
            texts.append(found.text)
        return torch.cat(images), torch.cat(texts)
