"""Forward, last step: the losses from the sums, and what a backward pass needs of each softmax."""

from __future__ import annotations

import triton
import triton.language as tl

from fasterase.kernels.contrastive_gradients import store_factors
from fasterase.kernels.contrastive_layout import (
    GROUP_SHIFT,
    MISS_PROBABILITY,
    MISS_RATIO,
    PART_STATS,
    PART_STATS_WITH_REF,
    SHIFT,
    count_slots,
    softmax_field,
    stat_stride,
)
from fasterase.kernels.contrastive_sums_online import merge_slots
from fasterase.kernels.contrastive_tiles import sigmoid, softplus

_TINY = tl.constexpr(2.0**-126)


@triton.jit(do_not_specialize=["flag", "upstream", "n", "num_sums"])
def losses_and_softmaxes(
    parts,  # [2, PART_STATS(_WITH_REF), SLOTS, N] of the online kernel, read if flagged
    sums,  # [2, num_sums, N] read otherwise
    scalars,
    flag,  # []
    diagonals,  # [matrices, N]
    losses,  # [4 or 2, N] out: ce row, ce column, kl row, kl column
    softmaxes,  # [matrices, SOFTMAX_FIELDS, 2, N] out
    upstream,  # as in `gradient_factors`, and the next; used if HAS_UPSTREAM
    factors,
    n,
    num_sums,  # e; e0; e0 * (s0 - s)
    HAS_REF: tl.constexpr,
    HAS_UPSTREAM: tl.constexpr,
    BLOCK_M: tl.constexpr,  # of the online kernel
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Losses, the fields of `softmaxes`, and of a step that knows its weights G's factors.

    Every logit is measured from its own diagonal (lse - diagonal is ce), so that a matched pair's
    KL is made of small numbers, not of differences of large ones. Where the sums of e0 * (s0 - s)
    are still to come, the KL is stored without their part.
    """
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = rows < n
    part_stats: tl.constexpr = PART_STATS_WITH_REF if HAS_REF else PART_STATS
    total_rows = tl.cast(n, tl.int64)
    stride = stat_stride(n)
    is_online = tl.load(flag) != 0
    group_shift = tl.load(scalars + GROUP_SHIFT)
    diagonal = tl.load(diagonals + rows, mask=exists, other=0.0)
    for direction in tl.static_range(2):  # rows, columns
        num_slots = count_slots(n, BLOCK_N) if direction == 0 else count_slots(n, BLOCK_M)
        part = parts + direction * part_stats * stride + rows
        shift = tl.zeros((BLOCK_R,), dtype=tl.float32) + group_shift
        mass = tl.zeros((BLOCK_R,), dtype=tl.float32)
        if is_online:
            shift, mass, _ = merge_slots(part, num_slots, n, exists, False, BLOCK_R)
        else:
            mass = tl.load(sums + direction * num_sums * total_rows + rows, mask=exists, other=1.0)
        gap = tl.log(mass) + shift - diagonal
        ce = softplus(gap)
        tl.store(losses + direction * total_rows + rows, ce, mask=exists)
        _store_softmax(softmaxes, 0, direction, rows, exists, shift, mass, sigmoid(gap), n)
        if HAS_REF:
            ref_diagonal = tl.load(diagonals + total_rows + rows, mask=exists, other=0.0)
            ref_group_shift = tl.load(scalars + GROUP_SHIFT + 1)
            ref_shift = tl.zeros((BLOCK_R,), dtype=tl.float32) + ref_group_shift
            ref_mass = tl.zeros((BLOCK_R,), dtype=tl.float32)
            cross = tl.zeros((BLOCK_R,), dtype=tl.float32)
            if is_online:
                ref_shift, ref_mass, cross = merge_slots(
                    part + 2 * stride, num_slots, n, exists, True, BLOCK_R
                )
            else:
                ref_sum = sums + (direction * num_sums + 1) * total_rows + rows
                ref_mass = tl.load(ref_sum, mask=exists, other=1.0)
                if num_sums == 3:
                    cross = tl.load(ref_sum + total_rows, mask=exists, other=0.0)
            ref_gap = tl.log(ref_mass) + ref_shift - ref_diagonal
            ref_miss_probability = sigmoid(ref_gap)
            # A group of one pair has no sums: 0 / tiny.
            mean_gap = cross / tl.maximum(ref_mass, _TINY) - (ref_diagonal - diagonal)
            kl = ref_miss_probability * mean_gap + ce - softplus(ref_gap)
            tl.store(losses + (2 + direction) * total_rows + rows, kl, mask=exists)
            _store_softmax(
                softmaxes, 1, direction, rows, exists, ref_shift, ref_mass, ref_miss_probability, n
            )
    if HAS_UPSTREAM:
        store_factors(upstream, scalars, softmaxes, factors, rows, exists, n, HAS_REF, BLOCK_R)


@triton.jit
def _store_softmax(
    softmaxes,
    MATRIX: tl.constexpr,
    DIRECTION: tl.constexpr,
    rows,
    exists,
    shift,
    mass,
    miss_probability,
    n,
):
    """Store the fields of one matrix and direction."""
    ratio = tl.where(mass == 0, 0.0, miss_probability / mass)
    shift_at = softmax_field(softmaxes, MATRIX, SHIFT, DIRECTION, n) + rows
    ratio_at = softmax_field(softmaxes, MATRIX, MISS_RATIO, DIRECTION, n) + rows
    miss_at = softmax_field(softmaxes, MATRIX, MISS_PROBABILITY, DIRECTION, n) + rows
    tl.store(shift_at, shift, mask=exists)
    tl.store(ratio_at, ratio, mask=exists)
    tl.store(miss_at, miss_probability, mask=exists)
