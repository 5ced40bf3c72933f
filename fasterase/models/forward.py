"""The forward pass of both towers as one module, and the precision it runs in.

Training calls this module only, so that a wrapper around it sees every use of a parameter,
`logit_scale` included.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fasterase.models.dual_encoder import DualEncoder, Tokens
from fasterase.models.prefix import Halfway

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Features(NamedTuple):
    """Features of a batch, and the scale to compare them with."""

    image: Tensor | None  # [n, D] fp32 unit rows; None without pixels
    text: Tensor | None  # [n, D] fp32 unit rows; None without tokens
    scale: Tensor  # [] exp(logit_scale), differentiable


class TowerForward(nn.Module):
    """Run the image tower, the text tower or both, and return unit features and the scale.

    Args:
        model: the model; its module becomes the submodule `module`, not a copy.
        precision: `"bf16"`, `"fp16"` or `"fp32"`, for the matrix products; weights stay fp32.
        image_trained, text_trained: whether a tower has trained parameters. A tower without any is
            run without a graph, even in grad mode.
    """

    def __init__(
        self,
        model: DualEncoder,
        *,
        precision: str,
        image_trained: bool = True,
        text_trained: bool = True,
    ) -> None:
        super().__init__()
        self.module = model.module
        self.precision = precision
        self.image_trained = image_trained
        self.text_trained = text_trained
        self._model = model  # knows how to call `module`; holds no parameter of its own

    def forward(
        self,
        pixels: Tensor | Halfway | None = None,  # [n, 3, H, W] uint8 or preprocessed floats
        tokens: Tokens | Halfway | None = None,  # [n, L]
    ) -> Features:
        """Encode what is given, on the device of the inputs."""
        image = text = None
        if pixels is not None:
            with self._context(pixels.device, self.image_trained):
                if isinstance(pixels, Halfway):
                    image = pixels.finish().float()
                else:
                    image = self._model.encode_image(pixels).float()
        if tokens is not None:
            with self._context(tokens.device, self.text_trained):
                if isinstance(tokens, Halfway):
                    text = tokens.finish().float()
                else:
                    text = self._model.encode_text(tokens).float()
        return Features(image, text, self._model.scale())

    @contextlib.contextmanager
    def _context(self, device: torch.device, trained: bool) -> Iterator[None]:
        grad = torch.is_grad_enabled() and trained
        with torch.set_grad_enabled(grad), autocast(self.precision, device):
            yield


def resolve_precision(precision: str, device: torch.device) -> str:
    """Resolve `"auto"`: bf16 on CUDA devices that have it, else fp16; fp32 on other devices."""
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return a context that runs matrix products in `precision`; the weights stay fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=_DTYPES[precision])
