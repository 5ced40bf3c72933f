"""The contrastive operator on Triton kernels, as torch operators.

`fasterase::contrastive_triton` runs on CUDA tensors. Under TRITON_INTERPRET=1 the same code runs on
CPU tensors as `fasterase::contrastive_triton_interpreted`.

Memory O(N D) and a workspace of `triton_launch.WORKSPACE_BYTES`. FLOPs, forward and backward:
12 n^2 D a group with the KL, 8 n^2 D without. fp16 and bf16 features are multiplied as they are,
into fp32 logits, and G is rounded to their dtype beside its diagonal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fasterase.errors import InputError
from fasterase.ops.contrastive.operator import Batch, Gradients, Groups, Wanted, register
from fasterase.ops.contrastive.triton_launch import (
    INTERPRETED,
    Features,
    backward,
    forward,
    is_fused_faster,
)


def _check(batch: Batch, groups: Groups, is_differentiable: bool) -> tuple[int, ...]:
    """No options: only what the kernels cannot take."""
    if not batch.image.is_cuda and not INTERPRETED:
        raise InputError(
            f"backend='triton' needs CUDA tensors; image is on {batch.image.device}. Move the "
            f"batch to a GPU, or use backend='auto'."
        )
    if batch.scale.dtype == torch.float64:
        raise InputError(
            "backend='triton' computes in fp32; got float64 features. Convert them with .float(), "
            "or use backend='chunked'."
        )
    return ()


def _forward(batch: Batch, groups: Groups) -> tuple[Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(batch.image):
        return forward(Features.of(*batch), groups)


def _backward(
    upstream: Tensor, batch: Batch, saved: tuple[Tensor, ...], groups: Groups, wanted: Wanted
) -> Gradients:
    features = Features.of(*batch)
    softmaxes, flags = saved
    device = batch.image.device.type
    with torch.cuda.device_of(batch.image), torch.autocast(device, enabled=False):
        d_image, d_text, d_scale = backward(
            upstream,
            features,
            softmaxes,
            flags,
            groups,
            wants_image=wanted.image,
            wants_text=wanted.text,
            is_rounded=wanted.rounded,
            is_fused=is_fused_faster(features),
        )
    if wanted.rounded:  # what the kernels rounded to is one dtype for both
        d_image = None if d_image is None else d_image.to(batch.image.dtype)
        d_text = None if d_text is None else d_text.to(batch.text.dtype)
    return d_image, d_text, d_scale


contrastive_triton = register(
    "contrastive_triton_interpreted" if INTERPRETED else "contrastive_triton",
    {"flags": lambda batch, groups: batch.scale.new_empty(len(groups), dtype=torch.int32)},
    key="CPU" if INTERPRETED else "CUDA",
    forward=_forward,
    backward=_backward,
    options=_check,
    # torch.compile(mode="reduce-overhead") would take a first call's tables for leaked outputs.
    tags=(torch.Tag.cudagraph_unsafe,),
)
