"""Repeated labels: pairs that share a label are each other's positives, at O(N D).

Every shape follows from the shapes of the inputs and no value is read back to the host, so a step
with labels compiles to one graph and can be captured as a CUDA graph. `find_kinds` looks only
at labels that already are on the host. `dense` and `cpu` see labels beside their logits instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasterase.ops.contrastive.operator import add_autograd, define, differentiable_once
from fasterase.transfers import to_device

# Rows of one label that are added up one after the other; longer runs are split into such pieces.
# The mean of 24576 equal rows is then off by 5e-6 of it in fp32 and not by 4e-4, and a GPU, which
# gives a run to one warp, walks 64 + 384 rows.
_PIECE = 64

# Bytes of a block of columns: on a CPU it stays in the L2, on an accelerator it keeps the launches
# few. Means of 32 columns or fewer cost more in overhead than they save.
_BLOCK_CPU, _BLOCK_ACCELERATOR = 2**20, 2**26
_LEAST_COLUMNS = 32


class Kinds(NamedTuple):
    """Which rows share a label. The operators take the fields stacked, [4, N].

    A kind is a label in its group; a piece is up to `_PIECE` rows of one kind. Both are numbered
    from 0; numbers that no row needs come last.
    """

    of_row: Tensor  # [N] the kind of a row
    piece_of_row: Tensor  # [N] the piece that a row is added to
    rows_of_kind: Tensor  # [N] for each row, how many rows its kind has
    of_piece: Tensor  # [N] the kind of a piece

    def is_alone(self) -> Tensor:
        """[N] whether a row is the only one of its kind: it has no gap, even where it is NaN."""
        return self.rows_of_kind == 1


def find_kinds(
    labels: Tensor | None, groups: tuple[int, ...], device: torch.device
) -> Tensor | None:
    """`Kinds`, stacked, [4, N], on device; None if no label is known to occur twice in a group.

    The terms are then exactly 0. Labels on a device are not looked at, so nothing waits for it.
    """
    if labels is None or not groups:
        return None
    # There are no values to look at while torch.compile traces.
    is_tracing = torch.compiler.is_compiling() or type(labels) is not Tensor
    if labels.device.type != "cpu" or is_tracing:
        return _label_kinds(labels.to(device), groups)
    for group in labels.split(groups):
        ordered = np.sort(group.numpy())  # an eighth to a twentieth of the time of a set
        if (ordered[1:] == ordered[:-1]).any():
            return _label_kinds(to_device(labels, device), groups)
    return None


def _find_kinds(labels: Tensor, groups: Sequence[int]) -> Tensor:
    labels = labels.long()  # a bijection for uint64 too, and only equality counts
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
    return torch.stack(Kinds(kind[rank], piece[rank], count[rank], place.scatter(0, piece, kind)))


# The operators below: `<I_i, gap of T_i>` and `<T_i, gap of I_i>`, [2, N], linear in image and in
# text, and the gradients of `(upstream * terms).sum()` in both, empty where not wanted.
def _forward(image: Tensor, text: Tensor, stacked: Tensor, dtype: torch.dtype) -> Tensor:
    kinds = Kinds(*stacked)
    terms = image.new_zeros(2, len(image), dtype=dtype)
    for _, image_block, text_block in _iterate_blocks(image, text, dtype):
        terms[0] += _subtract_means(text_block, kinds).mul_(image_block).sum(1)
        terms[1] += _subtract_means(image_block, kinds).mul_(text_block).sum(1)
    return terms.masked_fill_(kinds.is_alone(), 0.0)


def _backward(
    upstream: Tensor, image: Tensor, text: Tensor, stacked: Tensor, *wants: bool
) -> tuple[Tensor, Tensor]:
    kinds = Kinds(*stacked)
    gradients = _make_empty_gradients(upstream, image, text, stacked, *wants)
    row, col, is_alone = (x.unsqueeze(1) for x in (*upstream, kinds.is_alone()))
    for columns, image_block, text_block in _iterate_blocks(image, text, upstream.dtype):
        for gradient, wanted, weight, other, other_weight in (
            (gradients[0], wants[0], row, text_block, col),
            (gradients[1], wants[1], col, image_block, row),
        ):
            if wanted:  # subtracting means is a symmetric map, its own transpose
                block = _subtract_means(other * other_weight, kinds)
                block.addcmul_(weight, _subtract_means(other, kinds))
                gradient[:, columns] = block.masked_fill_(is_alone, 0.0)
    return gradients


def _make_empty_gradients(
    upstream: Tensor, image: Tensor, text: Tensor, kinds: Tensor, *wants: bool
) -> tuple[Tensor, Tensor]:
    return (
        upstream.new_empty(image.shape if wants[0] else (0,)),
        upstream.new_empty(text.shape if wants[1] else (0,)),
    )


def _iterate_blocks(
    image: Tensor, text: Tensor, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(columns, block of image, block of text), contiguous and in `dtype`."""
    n, width = image.shape
    block_bytes = _BLOCK_CPU if image.device.type == "cpu" else _BLOCK_ACCELERATOR
    step = max(_LEAST_COLUMNS, block_bytes // (n * dtype.itemsize))
    for start in range(0, width, step):
        columns = slice(start, start + step)
        image_block, text_block = (
            side[:, columns].to(dtype).contiguous() for side in (image, text)
        )
        yield columns, image_block, text_block


def _subtract_means(rows: Tensor, kinds: Kinds) -> Tensor:
    """The gaps: each row minus the mean of its kind."""
    sums_of_pieces = sum_rows(rows, kinds.piece_of_row, len(rows))
    sums = sum_rows(sums_of_pieces, kinds.of_piece, len(rows)).index_select(0, kinds.of_row)
    share = kinds.rows_of_kind.to(rows.dtype).reciprocal().unsqueeze(1)
    return torch.addcmul(rows, sums, share, value=-1, out=sums)


def sum_rows(rows: Tensor, target: Tensor, count: int) -> Tensor:
    """[count, D], the sum of the rows [n, D] of each target, added up in a fixed order."""
    sums = rows.new_zeros(count, rows.shape[1])
    # index_put_ sorts on CUDA, where index_add_ is atomic; on the CPU, index_add_ is the one that
    # runs in order.
    if rows.is_cuda:
        return sums.index_put_((target,), rows, accumulate=True)
    return sums.index_add_(0, target, rows)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


@differentiable_once
def _differentiate(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    image, text, kinds = ctx.saved_tensors
    wants = ctx.needs_input_grad[:2]
    d_image, d_text = _label_terms_backward(upstream, image, text, kinds, *wants)
    return (
        d_image.to(image.dtype) if wants[0] else None,
        d_text.to(text.dtype) if wants[1] else None,
        None,
        None,
    )


# Separate operators, because a compiler would replace ordered additions by atomic ones.
_KEY = "CompositeExplicitAutograd"
_label_kinds = define(
    "label_kinds",
    "(Tensor labels, SymInt[] groups) -> Tensor",
    _find_kinds,
    _KEY,
    lambda labels, groups: labels.new_empty(4, labels.shape[0], dtype=torch.long),
)
# The terms, [2 (row, column), N] and times scale, that labels add to the cross-entropies. A backend
# yields `lse_i - s_ii`; the positive of row i is the mean of s_ij over its label, `s * <I_i, mean
# text of the label>`, so the row gains `s * <I_i, T_i - mean text>`, which is exactly 0 for a label
# that occurs once in its group. Memory: the gradients, [N, D] each.
multiply_gaps = add_autograd(
    define(
        "label_terms",
        "(Tensor image, Tensor text, Tensor kinds, ScalarType dtype) -> Tensor",
        _forward,
        _KEY,
        lambda image, text, kinds, dtype: image.new_empty(2, image.shape[0], dtype=dtype),
    ),
    _save_inputs,
    _differentiate,
)
_label_terms_backward = define(
    "label_terms_backward",
    "(Tensor upstream, Tensor image, Tensor text, Tensor kinds, bool wants_image, "
    "bool wants_text) -> (Tensor, Tensor)",
    _backward,
    _KEY,
    _make_empty_gradients,
)
