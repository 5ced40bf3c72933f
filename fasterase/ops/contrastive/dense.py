"""The definition of the contrastive operator, on whole matrices: every backend must match it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Contrastive(NamedTuple):
    """Per-sample losses of a batch; the KLs are None without a reference."""

    ce_row: Tensor  # [N] InfoNCE image -> text
    ce_col: Tensor  # [N] InfoNCE text -> image
    kl_row: Tensor | None  # [N] KL(original || current) image -> text
    kl_col: Tensor | None  # [N] KL(original || current) text -> image


def contrastive_dense(
    image: Tensor,  # [N, D] current features
    text: Tensor,  # [N, D]
    scale: Tensor,  # [] exp(logit_scale), in the dtype of the computation
    ref_image: Tensor | None,  # [N, D0] features of the frozen original
    ref_text: Tensor | None,  # [N, D0]
    ref_scale: Tensor | None,  # []
    groups: tuple[int, ...],  # rows of each independent square problem, none empty; sums to N
    labels: Tensor | None = None,  # [N]
) -> Contrastive:
    """Plain autograd over S; the positives of a row are all of its label. Memory O(max n^2)."""
    parts: list[tuple[Tensor, ...]] = []
    for k, n in enumerate(groups):
        rows = slice(sum(groups[:k]), sum(groups[:k]) + n)
        logits = _compute_logits(image[rows], text[rows], scale)
        part: tuple[Tensor, ...] = (_cross_entropy(logits), _cross_entropy(logits.T))
        if labels is not None:
            same = _compare(labels[rows].to(logits.device))
            sides = zip(part, (logits, logits.T), strict=True)
            part = tuple(ce - _mean_gap(s, same) for ce, s in sides)
        if ref_image is not None and ref_text is not None and ref_scale is not None:
            ref = _compute_logits(ref_image[rows], ref_text[rows], ref_scale)
            part += (_kl_divergence(ref, logits), _kl_divergence(ref.T, logits.T))
        parts.append(part)
    ce_row, ce_col, *kl = (torch.cat(column) for column in zip(*parts, strict=True))
    return Contrastive(ce_row, ce_col, *(kl or (None, None)))


def _compute_logits(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    with torch.autocast(image.device.type, enabled=False):
        return scale * image.to(scale.dtype) @ text.to(scale.dtype).T


def _subtract_diagonal(logits: Tensor) -> Tensor:
    """Each logit minus the diagonal of its row: log-softmax up to the row's cross-entropy."""
    # Not `diagonal()`: inductor of torch 2.13 then makes gradients that are off by 1e6.
    index = torch.arange(len(logits), device=logits.device).unsqueeze(1)
    return logits - logits.gather(1, index)


def _cross_entropy(logits: Tensor) -> Tensor:
    """`logits.logsumexp(1) - logits.diagonal()`, also accurate at 1e-12 (scale 100, matched pair).

    There the difference of the two is rounding noise in fp32; with the diagonal out of the sum it
    is `log(1 + sum over j != i of exp(gap_ij))`.
    """
    gaps = _subtract_diagonal(logits)
    peak = gaps.detach().amax(1)  # at least 0, the diagonal's own gap
    is_diagonal = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    others = (gaps - peak.unsqueeze(1)).exp().masked_fill(is_diagonal, 0.0).sum(1)
    return peak + torch.log1p(others + torch.expm1(-peak))


def _compare(labels: Tensor) -> Tensor:
    """[n, n] whether two pairs share a label: any integers, of which only equality counts."""
    labels = labels.long()  # a bijection for uint64 too
    return labels.unsqueeze(1) == labels


def _mean_gap(logits: Tensor, same: Tensor) -> Tensor:
    """The mean of s_ij over the positives of row i, from its own partner's: exactly 0 for one."""
    return _subtract_diagonal(logits).masked_fill(~same, 0.0).sum(1) / same.sum(1)


def _kl_divergence(ref: Tensor, logits: Tensor) -> Tensor:
    """`(p0 * (log p0 - log p)).sum(1)` with `log p = gap - cross-entropy`."""
    gap = (ref.softmax(1) * (_subtract_diagonal(ref) - _subtract_diagonal(logits))).sum(1)
    return gap + _cross_entropy(logits) - _cross_entropy(ref)
