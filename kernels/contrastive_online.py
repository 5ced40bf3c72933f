"""The sums under running maxima, for groups whose fixed shift failed: always launched, seldom run.

Batches at scale 100 whose logits all lie far below the bound (a forget set pushed away, images in
one cone and texts in the opposite one) leave sums of exp(s - shift) that underflow. Here each row
and each column has its own shift, the largest logit beside the diagonal, at twice the exponentials.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fasterase.kernels.contrastive_tiles import (
    ITEM_FIELDS,
    SLOTS,
    exp_below,
    off_diagonal,
    tile_product,
)


@triton.jit
def sweep_online(
    image,
    text,
    ref_image,
    ref_text,
    scale,
    ref_scale,
    flags,  # [num_groups]
    items,  # [num_items, ITEM_FIELDS]
    parts,  # [2, 5 or 2, SLOTS, N] out: slots of peak, mass, and the reference's peak, mass, cross
    image_stride,
    text_stride,
    ref_image_stride,
    ref_text_stride,
    num_items,
    num_rows,
    width,
    ref_width,
    HAS_REF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_REF_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`sweep` with the maxima of what each item has seen instead of a shift known beforehand."""
    slot = SLOTS * tl.cast(num_rows, tl.int64)
    stats: tl.constexpr = 5 if HAS_REF else 2
    by = tl.load(scale)
    ref_by = tl.load(ref_scale) if HAS_REF else by
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        entry = items + item * ITEM_FIELDS
        if tl.load(flags + tl.load(entry + 8)) != 0:
            start, n = tl.load(entry), tl.load(entry + 1)
            first_row, last_row = tl.load(entry + 2), tl.load(entry + 3)
            first_col, last_col = tl.load(entry + 5), tl.load(entry + 6)
            row_parts = parts + tl.load(entry + 7).to(tl.int64) * num_rows + start
            col_parts = parts + stats * slot + tl.load(entry + 4).to(tl.int64) * num_rows + start
            first = start.to(tl.int64)
            for row_block in range(first_row, last_row):
                rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
                peak = tl.full((BLOCK_M,), -float("inf"), dtype=tl.float32)
                mass = tl.zeros((BLOCK_M,), dtype=tl.float32)
                ref_peak = tl.full((BLOCK_M,), -float("inf"), dtype=tl.float32)
                ref_mass = tl.zeros((BLOCK_M,), dtype=tl.float32)
                cross = tl.zeros((BLOCK_M,), dtype=tl.float32)
                for col_block in range(first_col, last_col):
                    cols = col_block * BLOCK_N + tl.arange(0, BLOCK_N)
                    s = by * tile_product(
                        image + first * image_stride,
                        text + first * text_stride,
                        image_stride,
                        text_stride,
                        row_block * BLOCK_M,
                        col_block * BLOCK_N,
                        n,
                        width,
                        BLOCK_M,
                        BLOCK_N,
                        BLOCK_K,
                        EVEN_K,
                        PRECISION,
                    )
                    exists = off_diagonal(rows, cols, n)
                    in_group = cols < n
                    has_earlier = cols < tl.where(row_block > first_row, n, 0)
                    peak, mass, _ = _fold(peak, mass, mass, s, s, exists, 1, False)
                    col = col_parts + cols
                    col_peak = tl.load(col, mask=has_earlier, other=-float("inf"))
                    col_mass = tl.load(col + slot, mask=has_earlier, other=0.0)
                    col_peak, col_mass, _ = _fold(
                        col_peak, col_mass, col_mass, s, s, exists, 0, False
                    )
                    tl.store(col, col_peak, mask=in_group)
                    tl.store(col + slot, col_mass, mask=in_group)
                    if HAS_REF:
                        s0 = ref_by * tile_product(
                            ref_image + first * ref_image_stride,
                            ref_text + first * ref_text_stride,
                            ref_image_stride,
                            ref_text_stride,
                            row_block * BLOCK_M,
                            col_block * BLOCK_N,
                            n,
                            ref_width,
                            BLOCK_M,
                            BLOCK_N,
                            BLOCK_K,
                            EVEN_REF_K,
                            PRECISION,
                        )
                        gap = s0 - s
                        ref_peak, ref_mass, cross = _fold(
                            ref_peak, ref_mass, cross, s0, gap, exists, 1, True
                        )
                        col_peak = tl.load(col + 2 * slot, mask=has_earlier, other=-float("inf"))
                        col_mass = tl.load(col + 3 * slot, mask=has_earlier, other=0.0)
                        col_cross = tl.load(col + 4 * slot, mask=has_earlier, other=0.0)
                        col_peak, col_mass, col_cross = _fold(
                            col_peak, col_mass, col_cross, s0, gap, exists, 0, True
                        )
                        tl.store(col + 2 * slot, col_peak, mask=in_group)
                        tl.store(col + 3 * slot, col_mass, mask=in_group)
                        tl.store(col + 4 * slot, col_cross, mask=in_group)
                    # The next row block reads these slots from other threads.
                    tl.debug_barrier()
                in_group = rows < n
                tl.store(row_parts + rows, peak, mask=in_group)
                tl.store(row_parts + slot + rows, mass, mask=in_group)
                if HAS_REF:
                    tl.store(row_parts + 2 * slot + rows, ref_peak, mask=in_group)
                    tl.store(row_parts + 3 * slot + rows, ref_mass, mask=in_group)
                    tl.store(row_parts + 4 * slot + rows, cross, mask=in_group)


@triton.jit
def _fold(peak, mass, cross, x, gap, exists, AXIS: tl.constexpr, HAS_CROSS: tl.constexpr):
    """Take a tile along AXIS into (largest x, sum of exp(x - it), sum of exp(x - it) * gap)."""
    top = tl.maximum(peak, tl.max(tl.where(exists, x, -float("inf")), AXIS))
    # Nothing seen yet: any finite number serves.
    level = tl.where(top == -float("inf"), 0.0, top)
    decay = exp_below(peak, level)
    e = tl.where(exists, exp_below(x, tl.expand_dims(level, AXIS)), 0.0)
    mass = mass * decay + tl.sum(e, AXIS)
    if HAS_CROSS:
        cross = cross * decay + tl.sum(tl.where(exists, e * gap, 0.0), AXIS)
    return top, mass, cross


@triton.jit
def merge_slots(
    peaks,
    masses,
    crosses,
    num_slots,
    stride,
    exists,
    HAS_CROSS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """(level, mass, cross) of rows over their slots, each of which has its own peak."""
    level = tl.full((BLOCK_R,), -float("inf"), dtype=tl.float32)
    for k in range(num_slots):
        peak = tl.load(peaks + k * stride, mask=exists, other=-float("inf"))
        level = tl.maximum(level, peak)
    level = tl.where(level == -float("inf"), 0.0, level)
    mass = tl.zeros((BLOCK_R,), dtype=tl.float32)
    cross = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for k in range(num_slots):
        peak = tl.load(peaks + k * stride, mask=exists, other=-float("inf"))
        decay = exp_below(peak, level)
        mass += decay * tl.load(masses + k * stride, mask=exists, other=0.0)
        if HAS_CROSS:
            cross += decay * tl.load(crosses + k * stride, mask=exists, other=0.0)
    return level, mass, cross
