"""Autograd nodes around an operator: a batch with repeated labels, a step that knows its weights.

Each is one node, whatever it adds up: in a step of 64 pairs a node costs as much as a product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fasterase.ops.contrastive.dense import Contrastive
from fasterase.ops.contrastive.operator import (
    Batch,
    Groups,
    Operator,
    Wanted,
    differentiate_once,
    keep_wanted,
    refuse_second_derivative,
    unpack_losses,
)


def compute_native_losses(
    operator: Operator, batch: Batch, groups: Groups, products: str, labels: Tensor | None
) -> Contrastive:
    """The losses with the terms of repeated labels, for eager calls, where C++ computes both."""
    assert operator.native is not None
    options = operator.options(batch, groups, any(batch.requires_grad()), products)
    losses = operator.native(*batch, groups, labels, *options)
    return Contrastive(*losses, *(None,) * (4 - len(losses)))


def compute_labelled_losses(
    operator: Operator, batch: Batch, groups: Groups, products: str, kinds: Tensor
) -> Contrastive:
    """The operator's losses with the terms of repeated labels; kinds: `label_kinds` made them."""
    options = operator.options(batch, groups, any(batch.requires_grad()), products)
    return unpack_losses(_LabelledLosses.apply(*batch, operator, groups, options, kinds))


class _LabelledLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, ctx.operator, ctx.groups, ctx.options, kinds = arguments
        batch = Batch(*tensors)
        with torch._C._AutoDispatchBelowAutograd():
            losses, *saved = ctx.operator.forward(*batch, ctx.groups, *ctx.options)
            terms = _add_terms(losses, batch, kinds)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(kinds, terms, *batch, *saved)
        return losses

    @staticmethod
    @differentiate_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        kinds, terms, *tensors = ctx.saved_tensors
        wanted = Wanted._make((*ctx.needs_input_grad[:3], True))
        made = ctx.operator.differentiate(upstream, tensors, ctx.groups, wanted, ctx.options)
        _add_gradients_of_terms(made, upstream, Batch(*tensors[:6]), kinds, terms, wanted)
        return keep_wanted(ctx, made)


def _add_terms(losses: Tensor, batch: Batch, kinds: Tensor) -> Tensor:
    """Add the terms of repeated labels to the cross-entropies in `losses`; return terms / scale."""
    image, text, scale, *_ = batch
    terms = torch.ops.fasterase.label_terms.default(image, text, kinds, scale.dtype)
    losses[:2].addcmul_(scale, terms)
    return terms


def _add_gradients_of_terms(
    made: tuple[Tensor, Tensor, Tensor],
    upstream: Tensor,  # [2 or 4, N]
    batch: Batch,
    kinds: Tensor,
    terms: Tensor,
    wanted: Wanted,
) -> None:
    image, text, scale, *_ = batch
    d_image, d_text, d_scale = made
    upstream = upstream[:2]
    of_image, of_text = torch.ops.fasterase.label_terms_backward.default(
        upstream * scale, image, text, kinds, wanted.image, wanted.text
    )
    if wanted.image:
        d_image.add_(of_image)
    if wanted.text:
        d_text.add_(of_text)
    if wanted.scale:
        d_scale.add_((upstream * terms).sum())


def sum_weighted_losses(
    operator: Operator,
    batch: Batch,
    weights: Tensor,  # [2 or 4, N]
    groups: Groups,
    products: str,
    kinds: Tensor | None,
) -> tuple[Tensor, Contrastive]:
    """(total, losses): `(weights * losses).sum()`, whose gradients are made here, and constants."""
    wants = batch.requires_grad()
    options = operator.options(batch, groups, any(wants), products)
    if any(wants):
        total, losses = _GradientsInForward.apply(
            *batch, operator, groups, options, kinds, wants, weights
        )
    else:
        losses = operator.forward(*batch, groups, *options)[0]
        if kinds is not None:
            _add_terms(losses, batch, kinds)
        total = (weights * losses).sum()
    return total, unpack_losses(losses)


class _GradientsInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, operator, groups, options, kinds, wants, weights = arguments
        batch = Batch(*tensors)
        wanted = Wanted._make((*wants, False))
        losses, *made = operator.take_step(weights, batch, groups, wanted, options)
        if kinds is not None:
            terms = _add_terms(losses, batch, kinds)
            _add_gradients_of_terms(tuple(made), weights, batch, kinds, terms, wanted)
        ctx.save_for_backward(*made)
        ctx.wants = wants
        ctx.dtypes = batch.image.dtype, batch.text.dtype, batch.scale.dtype
        ctx.mark_non_differentiable(losses)
        return (weights * losses).sum(), losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return _multiply_saved_gradients(ctx, refuse_second_derivative(upstream))


@once_differentiable
def _multiply_saved_gradients(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    gradients = (
        (gradient * upstream).to(dtype) if is_wanted else None
        for gradient, dtype, is_wanted in zip(ctx.saved_tensors, ctx.dtypes, ctx.wants, strict=True)
    )
    return (*gradients, *(None,) * 9)
