"""The contrastive operator in C++ (csrc/), registered with torch: autograd and fake tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fasterase.ops.contrastive.dense import Contrastive

# Edge of a tile: two fp32 tiles of 512 x 512 (S and S0) are 2 MB.
_TILE = 512
# Logits that the forward pass may keep for the backward pass, which else computes them again: both
# fp32 matrices of N = 4096. Keeping all takes 8 instead of 12 N^2 D FLOPs with the KL.
_KEPT_BYTES = 128 * 2**20

_LIBRARY = torch.library.Library("fasterase", "FRAGMENT")
_LIBRARY.define(
    "contrastive_cpu(Tensor image, Tensor text, Tensor scale, Tensor? ref_image, Tensor? ref_text, "
    "Tensor? ref_scale, SymInt[] groups, int tile, SymInt kept) "
    "-> (Tensor losses, Tensor statistics, Tensor logits, Tensor plan)"
)
_LIBRARY.define(
    "contrastive_cpu_backward(Tensor upstream, Tensor image, Tensor text, Tensor scale, "
    "Tensor? ref_image, Tensor? ref_text, Tensor? ref_scale, Tensor statistics, Tensor logits, "
    "Tensor plan, SymInt[] groups, bool wants_image, bool wants_text, bool wants_scale) "
    "-> (Tensor, Tensor, Tensor)"
)


def contrastive_cpu(
    image: Tensor,  # [N, D]
    text: Tensor,  # [N, D]
    scale: Tensor,  # [] in the dtype of the computation
    ref_image: Tensor | None,  # [N, D0]
    ref_text: Tensor | None,  # [N, D0]
    ref_scale: Tensor | None,  # []
    groups: tuple[int, ...],  # none empty
) -> Contrastive:
    """Same numbers as `contrastive_dense`; differentiable once, the same bits every time.

    Memory O(N D) for the gradients, `_KEPT_BYTES` of logits between the passes at most (one such
    block stays for the next call; the system may take its pages meanwhile), and two tiles a thread.
    FLOPs, forward and backward: 8 n^2 D a group with the KL where its logits are kept, 12 where
    they are not (6 and 8 without the KL).
    """
    differentiable = torch.is_grad_enabled() and (
        image.requires_grad or text.requires_grad or scale.requires_grad
    )
    kept = 0
    if differentiable:
        matrices = 1 if ref_image is None else 2
        kept = min(_KEPT_BYTES // scale.itemsize, matrices * sum(n * n for n in groups))
    losses = torch.ops.fasterase.contrastive_cpu(
        image, text, scale, ref_image, ref_text, ref_scale, groups, _TILE, kept
    )[0].unbind(0)
    return Contrastive(*(*losses, None, None)[:4])


@torch.library.register_fake("fasterase::contrastive_cpu", lib=_LIBRARY)
def _fake(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    ref_image: Tensor | None,
    ref_text: Tensor | None,
    ref_scale: Tensor | None,
    groups: Any,
    tile: int,
    kept: int,
) -> tuple[Tensor, ...]:
    matrices = 1 if ref_image is None else 2
    return (
        scale.new_empty(2 * matrices, len(image)),
        scale.new_empty(matrices, 3, 2, len(image)),
        scale.new_empty(kept),
        scale.new_empty(len(groups), 2, dtype=torch.long),
    )


@torch.library.register_fake("fasterase::contrastive_cpu_backward", lib=_LIBRARY)
def _fake_backward(
    upstream: Tensor,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    ref_image: Tensor | None,
    ref_text: Tensor | None,
    ref_scale: Tensor | None,
    statistics: Tensor,
    logits: Tensor,
    plan: Tensor,
    groups: Any,
    wants_image: bool,
    wants_text: bool,
    wants_scale: bool,
) -> tuple[Tensor, ...]:
    return (
        image.new_empty(image.shape if wants_image else (0,)),
        text.new_empty(text.shape if wants_text else (0,)),
        scale.new_empty(()),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *features, groups, _, _ = inputs
    _, *found = output
    ctx.groups = groups
    ctx.mark_non_differentiable(*found)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*features, *found)


@once_differentiable
def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None] * 9
    wants = ctx.needs_input_grad[:3]
    if upstream is not None:
        found = torch.ops.fasterase.contrastive_cpu_backward(
            upstream, *ctx.saved_tensors, ctx.groups, *wants
        )
        gradients[:3] = [g if wanted else None for g, wanted in zip(found, wants, strict=True)]
    return tuple(gradients)


torch.library.register_autograd(
    "fasterase::contrastive_cpu", _backward, setup_context=_setup, lib=_LIBRARY
)
