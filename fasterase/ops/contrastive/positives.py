"""Repeated labels: pairs that share a label are each other's positives, at O(N D).

Every shape is that of the inputs and nothing is read back to the host, so that a step with labels
compiles to one graph and can be captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Rows of one label that are added up one after the other; longer runs go by such pieces. The mean
# of 24576 equal rows is then off by 5e-6 of it in fp32 and not by 4e-4, and a GPU, which gives a
# run to one warp, walks 64 + 384 rows.
_PIECE = 64

# Columns are taken in blocks of these bytes: on a CPU what stays in the L2, on an accelerator what
# keeps the launches few. Means of 32 columns and less cost more in overhead than they save.
_BLOCK_CPU, _BLOCK_ACCELERATOR = 2**20, 2**26
_LEAST_COLUMNS = 32

# Operators of their own, for a compiler would put atomic additions in the place of ordered ones.
_LIBRARY = torch.library.Library("fasterase", "FRAGMENT")
_LIBRARY.define("label_terms(Tensor image, Tensor text, Tensor kinds, ScalarType dtype) -> Tensor")
_LIBRARY.define(
    "label_terms_backward(Tensor upstream, Tensor image, Tensor text, Tensor kinds, "
    "bool wants_image, bool wants_text) -> (Tensor, Tensor)"
)


def label_terms(
    image: Tensor,  # [N, D]
    text: Tensor,  # [N, D]
    scale: Tensor,  # []
    labels: Tensor,  # [N] integers
    groups: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """What labels add to the (row, column) cross-entropies, each [N].

    The operator yields `lse_i - s_ii`; the positive of row i is the mean of s_ij over its label,
    `s * <I_i, mean text of the label>`, so the row gains `s * <I_i, T_i - mean text>`, which is
    exactly 0 for a label that occurs once in its group. Memory: the gradients, [N, D] each.
    """
    row, col = scale * _terms(image, text, _kinds(labels, groups), scale.dtype)
    return row, col


def _kinds(labels: Tensor, groups: tuple[int, ...]) -> Tensor:
    """[4, N]: a row's kind, the piece it is added to, its kind's number of rows; a piece's kind.

    A kind is a label in its group, a piece up to `_PIECE` rows of one kind. Both are numbered from
    0. Of N numbers the last may go to no row: those are pieces, and kinds, without rows.
    """
    labels = labels.long()  # of uint64 a bijection, and only equality counts
    place = torch.arange(len(labels), device=labels.device)
    order = labels.argsort(stable=True)
    if len(groups) > 1:
        group = torch.cat([labels.new_full((n,), k) for k, n in enumerate(groups)])
        order = order[group[order].argsort(stable=True)]
        keys = torch.stack((labels, group))[:, order]
    else:
        keys = labels[order].unsqueeze(0)
    is_first = torch.cat((place[:1] == 0, (keys[:, 1:] != keys[:, :-1]).any(0)))
    start = torch.where(is_first, place, 0).cummax(0).values
    kind = is_first.cumsum(0) - 1
    piece = ((place - start) % _PIECE == 0).cumsum(0) - 1
    count = torch.zeros_like(place).scatter_add(0, kind, torch.ones_like(place))[kind]
    rank = torch.empty_like(place).scatter(0, order, place)
    return torch.stack((kind[rank], piece[rank], count[rank], place.scatter(0, piece, kind)))


def _terms(image: Tensor, text: Tensor, kinds: Tensor, dtype: torch.dtype) -> Tensor:
    """[2, N]: `<I_i, gap of T_i>` and `<T_i, gap of I_i>`, linear in image and in text."""
    return torch.ops.fasterase.label_terms.default(image, text, kinds, dtype)


def _gradients(
    upstream: Tensor, image: Tensor, text: Tensor, kinds: Tensor, wants: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Of `(upstream * terms).sum()` in image and text; empty where not wanted."""
    return torch.ops.fasterase.label_terms_backward.default(upstream, image, text, kinds, *wants)


def _forward(image: Tensor, text: Tensor, kinds: Tensor, dtype: torch.dtype) -> Tensor:
    terms = image.new_zeros(2, len(image), dtype=dtype)
    for _, own_image, own_text in _blocks(image, text, dtype):
        terms[0] += _gaps(own_text, kinds).mul_(own_image).sum(1)
        terms[1] += _gaps(own_image, kinds).mul_(own_text).sum(1)
    return terms.masked_fill_(_alone(kinds), 0.0)


def _backward(
    upstream: Tensor,
    image: Tensor,
    text: Tensor,
    kinds: Tensor,
    wants_image: bool,
    wants_text: bool,
) -> tuple[Tensor, Tensor]:
    gradients = _gradients_fake(upstream, image, text, kinds, wants_image, wants_text)
    row, col, alone = (x.unsqueeze(1) for x in (*upstream, _alone(kinds)))
    for columns, own_image, own_text in _blocks(image, text, upstream.dtype):
        for gradient, wanted, weight, other, other_weight in (
            (gradients[0], wants_image, row, own_text, col),
            (gradients[1], wants_text, col, own_image, row),
        ):
            if wanted:  # the gap of a row is a symmetric map, its own transpose
                block = _gaps(other * other_weight, kinds).addcmul_(weight, _gaps(other, kinds))
                gradient[:, columns] = block.masked_fill_(alone, 0.0)
    return gradients


def _blocks(
    image: Tensor, text: Tensor, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    n, width = image.shape
    block = _BLOCK_CPU if image.device.type == "cpu" else _BLOCK_ACCELERATOR
    step = max(_LEAST_COLUMNS, block // (n * dtype.itemsize))
    for start in range(0, width, step):
        columns = slice(start, start + step)
        own_image, own_text = (side[:, columns].to(dtype).contiguous() for side in (image, text))
        yield columns, own_image, own_text


def _gaps(rows: Tensor, kinds: Tensor) -> Tensor:
    """Each row minus the mean of its kind."""
    kind, piece, count, kind_of_piece = kinds
    sums = _sums(_sums(rows, piece), kind_of_piece).index_select(0, kind)
    share = count.to(rows.dtype).reciprocal().unsqueeze(1)
    return torch.addcmul(rows, sums, share, value=-1, out=sums)


def _alone(kinds: Tensor) -> Tensor:
    """[N] whether a row is the only one of its kind: it has no gap, also where it is NaN."""
    return kinds[2] == 1


def _sums(rows: Tensor, target: Tensor) -> Tensor:
    """The rows that go to each target, added up in a fixed order."""
    sums = torch.zeros_like(rows)
    # index_put_ sorts on CUDA, where index_add_ is atomic; on the CPU it is index_add_ that runs
    # in order.
    if rows.is_cuda:
        return sums.index_put_((target,), rows, accumulate=True)
    return sums.index_add_(0, target, rows)


def _forward_fake(image: Tensor, text: Tensor, kinds: Tensor, dtype: torch.dtype) -> Tensor:
    return image.new_empty(2, image.shape[0], dtype=dtype)


def _gradients_fake(
    upstream: Tensor,
    image: Tensor,
    text: Tensor,
    kinds: Tensor,
    wants_image: bool,
    wants_text: bool,
) -> tuple[Tensor, Tensor]:
    return (
        image.new_empty(image.shape if wants_image else (0,)),
        text.new_empty(text.shape if wants_text else (0,)),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _first_derivative(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    image, text, kinds = ctx.saved_tensors
    wants = ctx.needs_input_grad[:2]
    d_image, d_text = _gradients(upstream, image, text, kinds, wants)
    return d_image if wants[0] else None, d_text if wants[1] else None, None, None


def _keep_all(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, wants_image, wants_text = inputs
    ctx.save_for_backward(*tensors)
    ctx.wants = wants_image, wants_text


def _second_derivative(ctx: Any, g_image: Tensor, g_text: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients are linear in upstream, image and text, so that each swaps with its own."""
    upstream, image, text, kinds = ctx.saved_tensors
    d_upstream, d_image, d_text = torch.zeros_like(upstream), None, None
    if ctx.wants[0]:
        d_upstream = d_upstream + _terms(g_image, text, kinds, upstream.dtype)
        d_text = _gradients(upstream, g_image, text, kinds, (False, True))[1]
    if ctx.wants[1]:
        d_upstream = d_upstream + _terms(image, g_text, kinds, upstream.dtype)
        d_image = _gradients(upstream, image, g_text, kinds, (True, False))[0]
    return d_upstream, d_image, d_text, None, None, None


for _name, _kernel, _fake, _derivative, _context in (
    ("label_terms", _forward, _forward_fake, _first_derivative, _keep),
    ("label_terms_backward", _backward, _gradients_fake, _second_derivative, _keep_all),
):
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fasterase::{_name}", _fake, lib=_LIBRARY)
    torch.library.register_autograd(
        f"fasterase::{_name}", _derivative, setup_context=_context, lib=_LIBRARY
    )
