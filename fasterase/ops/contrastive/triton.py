"""The contrastive operator on Triton kernels, as torch operators with fakes and autograd.

`fasterase::contrastive_triton` runs on CUDA tensors. Under TRITON_INTERPRET=1 the same code runs on
CPU tensors as `fasterase::contrastive_triton_interpreted`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fasterase.errors import InputError
from fasterase.ops.contrastive.dense import Contrastive
from fasterase.ops.contrastive.triton_launch import (
    INTERPRETED,
    Features,
    backward,
    forward,
    is_fused_faster,
)

_NAME = "contrastive_triton_interpreted" if INTERPRETED else "contrastive_triton"
_KEY = "CPU" if INTERPRETED else "CUDA"
_FEATURES = (
    "Tensor image, Tensor text, Tensor scale, "
    "Tensor? ref_image, Tensor? ref_text, Tensor? ref_scale"
)
_LIBRARY = torch.library.Library("fasterase", "FRAGMENT")
# torch.compile(mode="reduce-overhead") would take the tables of a first call for leaked outputs.
_TAGS = (torch.Tag.cudagraph_unsafe,)
_LIBRARY.define(f"{_NAME}({_FEATURES}, SymInt[] groups) -> (Tensor, Tensor, Tensor)", tags=_TAGS)
_LIBRARY.define(
    f"{_NAME}_backward(Tensor upstream, {_FEATURES}, Tensor softmaxes, Tensor flags, "
    "SymInt[] groups, bool wants_image, bool wants_text) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def contrastive_triton(
    image: Tensor,  # [N, D]
    text: Tensor,  # [N, D]
    scale: Tensor,  # [] in the dtype of the computation
    ref_image: Tensor | None,  # [N, D0]
    ref_text: Tensor | None,  # [N, D0]
    ref_scale: Tensor | None,  # []
    groups: tuple[int, ...],  # none empty
) -> Contrastive:
    """Same numbers as `contrastive_dense`; differentiable once, bitwise repeatable.

    Memory O(N D) and a workspace of `triton_launch.WORKSPACE_BYTES`. FLOPs, forward and backward:
    12 n^2 D a group with the KL, 8 n^2 D without. fp16 and bf16 features are multiplied as they
    are, into fp32 logits, and G is rounded to their dtype beside its diagonal.

    Raises:
        InputError: fp64 features, or tensors that are not on a CUDA device.
    """
    if not image.is_cuda and not INTERPRETED:
        raise InputError(
            f"backend='triton' needs CUDA tensors; image is on {image.device}. Move the batch to a "
            f"GPU, or use backend='auto'."
        )
    if scale.dtype == torch.float64:
        raise InputError(
            "backend='triton' computes in fp32; got float64 features. Convert them with .float(), "
            "or use backend='chunked'."
        )
    operator = getattr(torch.ops.fasterase, _NAME).default
    losses = operator(image, text, scale, ref_image, ref_text, ref_scale, groups)[0].unbind()
    return Contrastive(*losses, *(None,) * (4 - len(losses)))


def _forward(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    ref_image: Tensor | None,
    ref_text: Tensor | None,
    ref_scale: Tensor | None,
    groups: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    features = Features.of(image, text, scale, ref_image, ref_text, ref_scale)
    with torch.cuda.device_of(image):
        return forward(features, tuple(groups))


def _forward_fake(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    ref_image: Tensor | None,
    ref_text: Tensor | None,
    ref_scale: Tensor | None,
    groups: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    matrices, n = 1 if ref_image is None else 2, image.shape[0]
    return (
        scale.new_empty(2 * matrices, n),
        scale.new_empty(matrices, 3, 2, n),
        scale.new_empty(len(groups), dtype=torch.int32),
    )


def _backward(
    upstream: Tensor,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    ref_image: Tensor | None,
    ref_text: Tensor | None,
    ref_scale: Tensor | None,
    softmaxes: Tensor,
    flags: Tensor,
    groups: list[int],
    wants_image: bool,
    wants_text: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    features = Features.of(image, text, scale, ref_image, ref_text, ref_scale)
    with torch.cuda.device_of(image), torch.autocast(image.device.type, enabled=False):
        d_image, d_text, d_scale = backward(
            upstream,
            features,
            softmaxes,
            flags,
            tuple(groups),
            wants_image=wants_image,
            wants_text=wants_text,
            is_fused=is_fused_faster(features),
        )
    return (
        image.new_empty(0) if d_image is None else d_image.to(image.dtype),
        text.new_empty(0) if d_text is None else d_text.to(text.dtype),
        d_scale,
    )


def _backward_fake(
    upstream: Tensor,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    ref_image: Tensor | None,
    ref_text: Tensor | None,
    ref_scale: Tensor | None,
    softmaxes: Tensor,
    flags: Tensor,
    groups: list[int],
    wants_image: bool,
    wants_text: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        image.new_empty(image.shape if wants_image else (0,)),
        text.new_empty(text.shape if wants_text else (0,)),
        scale.new_empty(()),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *features, groups = inputs
    _, softmaxes, flags = output
    ctx.save_for_backward(*features, softmaxes, flags)
    ctx.groups = groups
    ctx.mark_non_differentiable(softmaxes, flags)
    ctx.set_materialize_grads(False)


@once_differentiable
def _autograd(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 7
    *features, softmaxes, flags = ctx.saved_tensors
    wants_image, wants_text, wants_scale = ctx.needs_input_grad[:3]
    operator = getattr(torch.ops.fasterase, f"{_NAME}_backward").default
    d_image, d_text, d_scale = operator(
        upstream, *features, softmaxes, flags, ctx.groups, wants_image, wants_text
    )
    return (
        d_image if wants_image else None,
        d_text if wants_text else None,
        d_scale if wants_scale else None,
        *(None,) * 4,
    )


_LIBRARY.impl(_NAME, _forward, _KEY)
_LIBRARY.impl(f"{_NAME}_backward", _backward, _KEY)
torch.library.register_fake(f"fasterase::{_NAME}", _forward_fake, lib=_LIBRARY)
torch.library.register_fake(f"fasterase::{_NAME}_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd(
    f"fasterase::{_NAME}", _autograd, setup_context=_setup_context, lib=_LIBRARY
)
