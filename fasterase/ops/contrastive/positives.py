"""Repeated labels: pairs that share a label are each other's positives, at O(N D)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def label_terms(
    image: Tensor,  # [N, D]
    text: Tensor,  # [N, D]
    scale: Tensor,  # []
    labels: Tensor,  # [N] integers
    groups: tuple[int, ...],
) -> tuple[Tensor, Tensor] | None:
    """What labels add to the (row, column) cross-entropies, each [N]; None where no label repeats.

    The operator yields `lse_i - s_ii`; the positive of row i is the mean of s_ij over its label,
    `s * <I_i, mean text of the label>`, so the row gains `s * <I_i, T_i - mean text>`, which is
    exactly 0 for a label that occurs once in its group. Memory O(N D).
    """
    group = torch.repeat_interleave(
        torch.arange(len(groups), device=labels.device),
        torch.tensor(groups, dtype=torch.long, device=labels.device),
    )
    kinds, label = torch.unique(labels, return_inverse=True)
    _, kind, count = torch.unique(
        group * len(kinds) + label, return_inverse=True, return_counts=True
    )
    rows = torch.nonzero(count[kind] > 1).squeeze(1)
    if len(rows) == 0:
        return None
    kind = kind[rows]
    own_image, own_text = image[rows].to(scale.dtype), text[rows].to(scale.dtype)
    row = scale * (own_image * (own_text - _KindMean.apply(own_text, kind, count))).sum(1)
    col = scale * (own_text * (own_image - _KindMean.apply(own_image, kind, count))).sum(1)
    nothing = row.new_zeros(len(image))
    return nothing.index_copy(0, rows, row), nothing.index_copy(0, rows, col)


class _KindMean(torch.autograd.Function):
    """Each row replaced by the mean of the rows of its kind: a symmetric map, its own transpose."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, kind: Tensor, count: Tensor) -> Tensor:
        ctx.save_for_backward(kind, count)
        return _kind_mean(rows, kind, count)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _KindMean.apply(grad, *ctx.saved_tensors), None, None


def _kind_mean(rows: Tensor, kind: Tensor, count: Tensor) -> Tensor:
    sums = rows.new_zeros(len(count), rows.shape[1])
    # Sums in a fixed order: index_put_ sorts on CUDA, where index_add_ is atomic; on the CPU it is
    # index_add_ that runs in order.
    if rows.is_cuda:
        sums.index_put_((kind,), rows, accumulate=True)
    else:
        sums.index_add_(0, kind, rows)
    return (sums / count.to(rows.dtype).unsqueeze(1))[kind]
