"""Forward kernels of the contrastive operator around its sweep: what is O(N D) or O(N).

In order of launch: `row_statistics` (a matrix), `bounds`, `sweep` or `sweep_reference`,
`reduce_sums`, `sweep_online`, `finalise`. No atomics, no barrier between programs, no host sync;
results depend on the shapes and tiles alone, not on the number of programs.

The sweeps leave their sums in `parts`, [2 (row, column), statistics, SLOTS, N], which the kernels
here add up; `fasterase.ops.contrastive.triton_schedule` makes the tables of who writes which slot.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fasterase.kernels.contrastive_online import merge_slots
from fasterase.kernels.contrastive_tiles import (
    SLOTS,
    SPAN_FIELDS,
    sigmoid,
    softplus,
)

# exp(66) times 2^20 columns, also times the KL's (s0 - s), still fits fp32.
_HEADROOM = tl.constexpr(66.0)
# A smaller sum may have lost terms to underflow: fp32 is normal down to 2^-126.
_UNDERFLOW = tl.constexpr(2.0**-80)
_TINY = tl.constexpr(2.0**-126)


@triton.jit
def row_statistics(
    image,  # [N, width]
    text,  # [N, width]
    scale,  # []
    norms,  # [2, N] out: length of image and text rows
    own,  # [N] out: logit of the pair
    image_stride,
    text_stride,
    num_rows,
    width,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Row lengths, and the diagonal of S in fp32."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = rows < num_rows
    image += rows[:, None].to(tl.int64) * image_stride
    text += rows[:, None].to(tl.int64) * text_stride
    image_square = tl.zeros((BLOCK_R,), dtype=tl.float32)
    text_square = tl.zeros((BLOCK_R,), dtype=tl.float32)
    product = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for start in range(0, width, BLOCK_K):
        depth = start + tl.arange(0, BLOCK_K)[None, :]
        mask = exists[:, None] & (depth < width)
        a = tl.load(image + depth, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(text + depth, mask=mask, other=0.0).to(tl.float32)
        image_square += tl.sum(a * a, 1)
        text_square += tl.sum(b * b, 1)
        product += tl.sum(a * b, 1)
    by = tl.load(scale)
    tl.store(norms + rows, tl.sqrt(image_square), mask=exists)
    tl.store(norms + num_rows + rows, tl.sqrt(text_square), mask=exists)
    # An infinite scale must not yield numbers: by - by is then NaN, else 0.
    tl.store(own + rows, by * product + (by - by), mask=exists)


@triton.jit
def bounds(
    norms,  # [matrices, 2, N]
    scale,  # []
    ref_scale,  # [] read where there are two matrices
    starts,  # [num_groups + 1] first row of each group
    shift,  # [matrices, num_groups] out
    flags,  # [num_groups] out: 0
    num_rows,
    BLOCK: tl.constexpr,
):
    """max(0, B - 66) of each group and matrix, B >= |S|. One program a group and matrix."""
    group, matrix = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(starts + group), tl.load(starts + group + 1)
    norms += matrix.to(tl.int64) * 2 * num_rows
    image_peak = tl.zeros((BLOCK,), dtype=tl.float32)
    text_peak = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(start, end, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        image = tl.load(norms + rows, mask=rows < end, other=0.0)
        text = tl.load(norms + num_rows + rows, mask=rows < end, other=0.0)
        # Rows that are not finite are left out: they must not reach the others. False for NaN.
        image_peak = tl.maximum(image_peak, tl.where(image < float("inf"), image, 0.0))
        text_peak = tl.maximum(text_peak, tl.where(text < float("inf"), text, 0.0))
    by = tl.load(scale)
    if matrix == 1:
        by = tl.load(ref_scale)
    bound = tl.abs(by) * tl.max(image_peak, 0) * tl.max(text_peak, 0)
    tl.store(shift + matrix * tl.num_programs(0) + group, tl.maximum(bound - _HEADROOM, 0.0))
    if matrix == 0:
        tl.store(flags + group, 0)


@triton.jit
def reduce_sums(
    parts,  # [2, 5 or 2, SLOTS, N]
    spans,  # [num_spans, SPAN_FIELDS]
    sums,  # [2, 3 or 1, N] out
    flags,  # [num_groups] out: 1 where the fixed shift failed the group
    num_rows,
    HAS_REF: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Add the slots in order, and look for sums that underflowed or overflowed.

    Sums of features that are not finite count as overflowed: those groups only take the slow way.
    """
    entry = spans + tl.program_id(0) * SPAN_FIELDS
    rows = tl.load(entry) + tl.arange(0, BLOCK_R)
    exists = tl.arange(0, BLOCK_R) < tl.load(entry + 1)
    stats: tl.constexpr = 3 if HAS_REF else 1
    part_stats: tl.constexpr = 5 if HAS_REF else 2
    slot = SLOTS * tl.cast(num_rows, tl.int64)
    failed = tl.zeros((BLOCK_R,), dtype=tl.int32)
    for side in tl.static_range(2):
        num_slots = tl.load(entry + 3 - side)
        for stat in tl.static_range(stats):
            total = tl.zeros((BLOCK_R,), dtype=tl.float32)
            part = parts + (side * part_stats + stat) * slot + rows
            for k in range(num_slots):
                total += tl.load(part + k * tl.cast(num_rows, tl.int64), mask=exists, other=0.0)
            tl.store(
                sums + (side * stats + stat) * tl.cast(num_rows, tl.int64) + rows, total, exists
            )
            sound = tl.abs(total) < float("inf")
            if stat < 2:
                sound &= total >= _UNDERFLOW
            failed |= tl.where(exists & (sound == 0), 1, 0)
    if (tl.max(failed, 0) > 0) & (tl.load(entry + 5) > 0):
        tl.store(flags + tl.load(entry + 4), 1)


@triton.jit
def finalise(
    parts,  # [2, 5 or 2, SLOTS, N] of `sweep_online`, read where the group is flagged
    sums,  # [2, 3 or 1, N] read where it is not
    spans,  # [num_spans, SPAN_FIELDS]
    shift,  # [matrices, num_groups]
    flags,  # [num_groups]
    own,  # [matrices, N]
    losses,  # [4 or 2, N] out: ce row, ce column, kl row, kl column
    softmaxes,  # [matrices, 3, 2, N] out: shift, off / sum, off
    num_groups,
    num_rows,
    HAS_REF: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Losses, and what a backward needs of each softmax; `off` is the mass beside the diagonal.

    Every logit is measured from its own diagonal (lse - own is ce), so that a matched pair's KL is
    made of small numbers, not of differences of large ones.
    """
    entry = spans + tl.program_id(0) * SPAN_FIELDS
    rows = tl.load(entry) + tl.arange(0, BLOCK_R)
    exists = tl.arange(0, BLOCK_R) < tl.load(entry + 1)
    group = tl.load(entry + 4)
    stats: tl.constexpr = 3 if HAS_REF else 1
    part_stats: tl.constexpr = 5 if HAS_REF else 2
    total = tl.cast(num_rows, tl.int64)
    slot = SLOTS * total
    is_online = tl.load(flags + group) != 0
    c = tl.load(shift + group)
    diagonal = tl.load(own + rows, mask=exists, other=0.0)
    for side in tl.static_range(2):
        num_slots = tl.load(entry + 3 - side)
        part = parts + side * part_stats * slot + rows
        by = tl.zeros((BLOCK_R,), dtype=tl.float32) + c
        mass = tl.zeros((BLOCK_R,), dtype=tl.float32)
        if is_online:
            by, mass, _ = merge_slots(
                part, part + slot, part, num_slots, total, exists, False, BLOCK_R
            )
        else:
            mass = tl.load(sums + side * stats * total + rows, mask=exists, other=1.0)
        gap = tl.log(mass) + by - diagonal
        ce = softplus(gap)
        off = sigmoid(gap)
        tl.store(losses + side * total + rows, ce, mask=exists)
        out = softmaxes + side * total + rows
        tl.store(out, by, mask=exists)
        tl.store(out + 2 * total, tl.where(mass == 0, 0.0, off / mass), mask=exists)
        tl.store(out + 4 * total, off, mask=exists)
        if HAS_REF:
            ref_diagonal = tl.load(own + total + rows, mask=exists, other=0.0)
            ref_by = tl.zeros((BLOCK_R,), dtype=tl.float32) + tl.load(shift + num_groups + group)
            ref_mass = tl.zeros((BLOCK_R,), dtype=tl.float32)
            cross = tl.zeros((BLOCK_R,), dtype=tl.float32)
            if is_online:
                ref_by, ref_mass, cross = merge_slots(
                    part + 2 * slot,
                    part + 3 * slot,
                    part + 4 * slot,
                    num_slots,
                    total,
                    exists,
                    True,
                    BLOCK_R,
                )
            else:
                ref_sum = sums + (side * stats + 1) * total + rows
                ref_mass = tl.load(ref_sum, mask=exists, other=1.0)
                cross = tl.load(ref_sum + total, mask=exists, other=0.0)
            ref_gap = tl.log(ref_mass) + ref_by - ref_diagonal
            ref_off = sigmoid(ref_gap)
            # A lone pair has no sums: 0 / tiny.
            mean_gap = cross / tl.maximum(ref_mass, _TINY) - (ref_diagonal - diagonal)
            kl = ref_off * mean_gap + ce - softplus(ref_gap)
            tl.store(losses + (2 + side) * total + rows, kl, mask=exists)
            out += 6 * total
            tl.store(out, ref_by, mask=exists)
            tl.store(out + 2 * total, tl.where(ref_mass == 0, 0.0, ref_off / ref_mass), mask=exists)
            tl.store(out + 4 * total, ref_off, mask=exists)
