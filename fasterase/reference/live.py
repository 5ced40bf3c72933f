"""The original model run in every step: for data whose items differ from one read to the next."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from fasterase.models.dual_encoder import DualEncoder, frozen_copy
from fasterase.pairs.batches import StepBatch


class Reference(Protocol):
    """The frozen original, as a step needs it.

    Attributes:
        scale: 0-d, exp(logit_scale) of the original.
    """

    scale: Tensor

    def features(self, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """Unit features (n, D0), (n, D0) fp32 of the batch's images and captions."""
        ...


class LiveReference:
    """A frozen copy of the model, which encodes each batch beside the trained one.

    Costs a second set of weights and a forward pass a step; a cached row would belong to another
    view of the image, and a wrong reference corrupts consistency and anchor silently.
    """

    def __init__(
        self,
        tower: DualEncoder,
        *,
        autocast: Callable[[], AbstractContextManager[object]],
        micro_batch_size: int | None,
    ) -> None:
        self._original = frozen_copy(tower)
        self._autocast = autocast
        self._micro_batch_size = micro_batch_size
        self.scale = self._original.scale().detach()

    @torch.no_grad()
    def features(self, batch: StepBatch) -> tuple[Tensor, Tensor]:
        device = self._original.device
        size = self._micro_batch_size or max(1, len(batch.pixels))
        images, texts = [], []
        with self._autocast():
            for start in range(0, len(batch.pixels), size):
                rows = slice(start, start + size)
                images.append(self._original.encode_image(batch.pixels[rows].to(device)))
                tokens = batch.tokens.index(rows).to(device)
                texts.append(self._original.encode_text(tokens))
        return torch.cat(images).float(), torch.cat(texts).float()
