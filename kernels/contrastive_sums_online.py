"""Forward: the sums with running maxima, for a group flagged by `add_partial_sums`.

Always launched, seldom has work. In batches at scale 100 whose logits are all far below the bound
(a forget set pushed away, images in one cone and texts in the opposite one) sums of exp(s - shift)
underflow. Here each row and each column has its own shift, its largest logit beside the diagonal,
at the cost of twice as many exponentials.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fasterase.kernels.contrastive_layout import (
    PART_STATS,
    PART_STATS_WITH_REF,
    SCALE,
    locate_rectangle,
    slot_range,
    stat_stride,
    sweep_slots,
)
from fasterase.kernels.contrastive_tiles import exp_below, off_diagonal, tile_product


@triton.jit(do_not_specialize=["flag", "n"])
def row_and_column_sums_online(
    image,
    text,
    ref_image,
    ref_text,
    scalars,
    flag,  # []
    parts,  # [2, PART_STATS(_WITH_REF), SLOTS, N] out: peak, mass; reference's peak, mass, cross
    image_stride,
    text_stride,
    ref_image_stride,
    ref_text_stride,
    n,
    width,
    ref_width,
    HAS_REF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The sums relative to the largest logit that each program has seen, not to a fixed shift."""
    stride = stat_stride(n)
    part_stats: tl.constexpr = PART_STATS_WITH_REF if HAS_REF else PART_STATS
    strip, chunk = locate_rectangle(n, BLOCK_M, BLOCK_N)
    if tl.load(flag) != 0:
        first_row, end_row = slot_range(strip, n, BLOCK_M)
        first_col, end_col = slot_range(chunk, n, BLOCK_N)
        scale_value = tl.load(scalars + SCALE)
        features = (image, text, image_stride, text_stride, width)
        ref_features = (ref_image, ref_text, ref_image_stride, ref_text_stride, ref_width)
        row_slot, col_slot = sweep_slots(parts, strip, chunk, n, part_stats)
        for row_block in range(first_row, end_row):
            rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
            peak = tl.full((BLOCK_M,), -float("inf"), dtype=tl.float32)
            mass = tl.zeros((BLOCK_M,), dtype=tl.float32)
            ref_peak = tl.full((BLOCK_M,), -float("inf"), dtype=tl.float32)
            ref_mass = tl.zeros((BLOCK_M,), dtype=tl.float32)
            cross = tl.zeros((BLOCK_M,), dtype=tl.float32)
            for col_block in range(first_col, end_col):
                row_start, col_start = row_block * BLOCK_M, col_block * BLOCK_N
                cols = col_start + tl.arange(0, BLOCK_N)
                tile = (n, row_start, col_start)
                s = scale_value * tile_product(
                    features, tile, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
                )
                exists = off_diagonal(rows, cols, n)
                in_group = cols < n
                has_earlier = cols < tl.where(row_block > first_row, n, 0)
                peak, mass, _ = _fold(peak, mass, mass, s, s, exists, 1, False)
                col = col_slot + cols
                _fold_into_slots(col, s, s, exists, has_earlier, in_group, stride, False)
                if HAS_REF:
                    s0 = tl.load(scalars + SCALE + 1) * tile_product(
                        ref_features, tile, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
                    )
                    gap = s0 - s
                    ref_peak, ref_mass, cross = _fold(
                        ref_peak, ref_mass, cross, s0, gap, exists, 1, True
                    )
                    _fold_into_slots(
                        col + 2 * stride, s0, gap, exists, has_earlier, in_group, stride, True
                    )
                # Other threads read these slots in the next row block.
                tl.debug_barrier()
            in_group = rows < n
            tl.store(row_slot + rows, peak, mask=in_group)
            tl.store(row_slot + stride + rows, mass, mask=in_group)
            if HAS_REF:
                tl.store(row_slot + 2 * stride + rows, ref_peak, mask=in_group)
                tl.store(row_slot + 3 * stride + rows, ref_mass, mask=in_group)
                tl.store(row_slot + 4 * stride + rows, cross, mask=in_group)


@triton.jit
def _fold(peak, mass, cross, x, gap, exists, AXIS: tl.constexpr, HAS_CROSS: tl.constexpr):
    """Update (peak, mass, cross) along AXIS with the elements of a tile that exist.

    peak: the largest x; mass: the sum of exp(x - peak); cross: the sum of exp(x - peak) * gap.
    """
    top = tl.maximum(peak, tl.max(tl.where(exists, x, -float("inf")), AXIS))
    # Any finite level serves as long as no element was seen.
    level = tl.where(top == -float("inf"), 0.0, top)
    decay = exp_below(peak, level)
    e = tl.where(exists, exp_below(x, tl.expand_dims(level, AXIS)), 0.0)
    mass = mass * decay + tl.sum(e, AXIS)
    if HAS_CROSS:
        cross = cross * decay + tl.sum(tl.where(exists, e * gap, 0.0), AXIS)
    return top, mass, cross


@triton.jit
def _fold_into_slots(slot, x, gap, exists, has_earlier, in_group, stride, HAS_CROSS: tl.constexpr):
    """Update an item's column statistics in `parts`, or begin them where there are no earlier."""
    peak = tl.load(slot, mask=has_earlier, other=-float("inf"))
    mass = tl.load(slot + stride, mask=has_earlier, other=0.0)
    cross = mass
    if HAS_CROSS:
        cross = tl.load(slot + 2 * stride, mask=has_earlier, other=0.0)
    peak, mass, cross = _fold(peak, mass, cross, x, gap, exists, 0, HAS_CROSS)
    tl.store(slot, peak, mask=in_group)
    tl.store(slot + stride, mass, mask=in_group)
    if HAS_CROSS:
        tl.store(slot + 2 * stride, cross, mask=in_group)


@triton.jit
def merge_slots(
    slots,  # pointer to the peaks; masses and crosses follow at `stat_stride`
    num_slots,
    n,
    exists,
    HAS_CROSS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """(level, mass, cross) of rows over their slots, each of which has its own peak."""
    stride = stat_stride(n)
    total_rows = tl.cast(n, tl.int64)
    level = tl.full((BLOCK_R,), -float("inf"), dtype=tl.float32)
    for k in range(num_slots):
        peak = tl.load(slots + k * total_rows, mask=exists, other=-float("inf"))
        level = tl.maximum(level, peak)
    level = tl.where(level == -float("inf"), 0.0, level)
    mass = tl.zeros((BLOCK_R,), dtype=tl.float32)
    cross = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for k in range(num_slots):
        slot = slots + k * total_rows
        decay = exp_below(tl.load(slot, mask=exists, other=-float("inf")), level)
        mass += decay * tl.load(slot + stride, mask=exists, other=0.0)
        if HAS_CROSS:
            cross += decay * tl.load(slot + 2 * stride, mask=exists, other=0.0)
    return level, mass, cross
