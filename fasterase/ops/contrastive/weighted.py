"""The weighted sum of the losses with gradients made in the forward pass, for training steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fasterase.ops.contrastive.backends import choose, load
from fasterase.ops.contrastive.checks import check_call, check_weights
from fasterase.ops.contrastive.dense import Contrastive
from fasterase.ops.contrastive.operator import (
    Batch,
    Groups,
    Operator,
    Wanted,
    per_sample,
    refusing_second,
)
from fasterase.ops.contrastive.positives import label_terms


class Weighted(NamedTuple):
    """A differentiable total, and what it is a sum of."""

    total: Tensor  # []
    losses: Contrastive  # constants


def weighted_contrastive(
    image: Tensor,  # [N, D]
    text: Tensor,  # [N, D]
    scale: Tensor | float,
    weights: Tensor,  # [4, N], or [2, N] without a reference
    *,
    ref_image: Tensor | None = None,  # [N, D0]
    ref_text: Tensor | None = None,  # [N, D0]
    ref_scale: Tensor | float | None = None,
    labels: Tensor | None = None,  # [N]
    groups: tuple[int, ...] | None = None,
    backend: str = "auto",
) -> Weighted:
    """`(weights * losses).sum()` of `contrastive`'s losses, its gradients made at once.

    Between the passes nothing lives but the gradients, [N, D] in the dtype of the computation for
    each of image and text that requires one: no features, no reference, no kept logits. The
    backward pass multiplies them by the upstream gradient and only then rounds them to the
    features' dtype, so that a GradScaler's factor arrives before the rounding. FLOPs are those of
    `contrastive` and its backward pass. Where no input requires grad, no gradient is made.

    `backend="dense"` is plain autograd, and keeps what autograd keeps. The term of repeated labels
    is differentiated by autograd, on [N, D], whatever the backend.

    Args:
        weights: constants, of ce_row, ce_col and, with a reference, kl_row, kl_col.
        image, text, scale, ref_image, ref_text, ref_scale, labels, groups, backend: as in
            `contrastive`.

    Returns:
        `Weighted(total, losses)`: total 0-d, differentiable once in image, text and scale; losses
        as `contrastive` returns them, without gradients.

    Raises:
        InputError: where `contrastive` would, or weights of another shape, dtype or device, or that
            require grad.
    """
    sizes = check_call(image, text, scale, ref_image, ref_text, ref_scale, labels, groups)
    check_weights(weights, image, ref_image is not None)
    run = load(choose(backend, (image, text)).name)
    batch = Batch.of(image, text, scale, ref_image, ref_text, ref_scale)
    weights = weights.to(batch.scale.dtype)
    if sizes and isinstance(run, Operator):
        total, losses = _ahead(run, batch, weights, sizes)
    else:
        found = run(*batch, sizes) if sizes else batch.no_losses()
        total, losses = _plain(found, weights)
    if labels is None or not sizes:
        return Weighted(total, losses)
    row, col = label_terms(image, text, batch.scale, labels.to(image.device), sizes)
    losses = losses._replace(
        ce_row=losses.ce_row + row.detach(), ce_col=losses.ce_col + col.detach()
    )
    return Weighted(total + (weights[0] * row + weights[1] * col).sum(), losses)


def _plain(found: Contrastive, weights: Tensor) -> tuple[Tensor, Contrastive]:
    losses = torch.stack([loss for loss in found if loss is not None])
    return (weights * losses).sum(), per_sample(losses.detach())


def _ahead(
    operator: Operator, batch: Batch, weights: Tensor, groups: Groups
) -> tuple[Tensor, Contrastive]:
    wants = batch.requires_grad()
    if any(wants):
        total, losses = _GradientsAhead.apply(operator, groups, wants, weights, *batch)
    else:
        losses = operator.forward(*batch, groups, *operator.options(batch, groups, False))[0]
        total = (weights * losses).sum()
    return total, per_sample(losses)


class _GradientsAhead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        operator: Operator,
        groups: Groups,
        wants: tuple[bool, bool, bool],
        weights: Tensor,
        *tensors: Any,
    ) -> tuple[Tensor, Tensor]:
        batch = Batch(*tensors)
        options = operator.options(batch, groups, True)
        losses, *saved = operator.forward(*batch, groups, *options)
        wanted = Wanted(*wants, rounded=False)
        ctx.save_for_backward(*operator.backward(weights, *batch, *saved, groups, *wanted))
        ctx.wants = wants
        ctx.dtypes = batch.image.dtype, batch.text.dtype, batch.scale.dtype
        ctx.mark_non_differentiable(losses)
        return (weights * losses).sum(), losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return _scaled(ctx, refusing_second(upstream))


@once_differentiable
def _scaled(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    gradients = (
        (gradient * upstream).to(dtype) if is_wanted else None
        for gradient, dtype, is_wanted in zip(ctx.saved_tensors, ctx.dtypes, ctx.wants, strict=True)
    )
    return (*(None,) * 4, *gradients, *(None,) * 3)
