"""A batch as the Triton kernels take it, and the compile-time arguments that follow from it."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fasterase.kernels.contrastive_sweep import sweep
from fasterase.ops.contrastive.triton_tiles import Tile, choose_tile

# Kernels defined under TRITON_INTERPRET=1 run in numpy, on CPU tensors.
INTERPRETED = not isinstance(sweep, triton.JITFunction)


class Features(NamedTuple):
    """A batch as the kernels take it: pairs of one dtype, rows of contiguous numbers."""

    image: Tensor  # [N, D]
    text: Tensor  # [N, D]
    scale: Tensor  # [] fp32
    ref_image: Tensor  # [N, D0]; without a reference, image, text and scale once more
    ref_text: Tensor
    ref_scale: Tensor
    has_ref: bool

    @classmethod
    def of(
        cls,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        ref_image: Tensor | None,
        ref_text: Tensor | None,
        ref_scale: Tensor | None,
    ) -> Features:
        image, text = _pair(image, text)
        if ref_image is None or ref_text is None or ref_scale is None:
            return cls(image, text, scale, image, text, scale, False)
        return cls(image, text, scale, *_pair(ref_image, ref_text), ref_scale, True)

    @property
    def is_half(self) -> bool:
        return torch.float32 not in (self.image.dtype, self.ref_image.dtype)

    def strides(self) -> tuple[int, int, int, int]:
        return (
            self.image.stride(0),
            self.text.stride(0),
            self.ref_image.stride(0),
            self.ref_text.stride(0),
        )

    def tile(self, kernel: str) -> Tile:
        return choose_tile(
            kernel,
            self.has_ref,
            self.is_half,
            (self.image.shape[1], self.ref_image.shape[1]),
            _architecture(self.image.device),
        )

    def meta(self, tile: Tile) -> dict[str, object]:
        """Compile-time arguments of the kernels that multiply image and text."""
        return {
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "EVEN_K": self.image.shape[1] % tile.block_k == 0,
            "PRECISION": "tf32" if _allows_tf32() else "ieee",
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }

    def ref_meta(self, tile: Tile) -> dict[str, object]:
        """Of those that multiply their originals too."""
        return self.meta(tile) | {"EVEN_REF_K": self.ref_image.shape[1] % tile.block_k == 0}


def _pair(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(image.dtype, text.dtype)
    dtype = torch.float32 if dtype == torch.float64 else dtype
    image, text = (
        (x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()).to(dtype)
        for x in (image, text)
    )
    return image, text


def _allows_tf32() -> bool:
    """As cuBLAS decides: torch 2.9 has settings a backend, which older functions fail to read."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32


@functools.cache
def _architecture(device: torch.device) -> str:
    """As in `triton_tiles`: "sm_90" and its like, "gfx" for AMD's."""
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
