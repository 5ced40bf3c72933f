"""Forward: row and column sums of exp(S - shift), and of the KL's terms, over all tiles.

A program computes one rectangle of tiles, strip x chunk, which has its own slots in `parts`: of its
chunk for row sums and of its strip for column sums. `add_partial_sums` adds them up. There are no
atomics and no barrier between programs; the results depend on the shapes and tiles alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fasterase.kernels.contrastive_layout import (
    GROUP_SHIFT,
    PART_STATS_WITH_REF,
    SCALE,
    count_slots,
    locate_rectangle,
    slot_range,
    stat_stride,
    sweep_slots,
)
from fasterase.kernels.contrastive_tiles import (
    UNDERFLOW,
    add_depth_step,
    exp_gap,
    is_edge,
    off_diagonal,
    tile_product,
)


@triton.jit(do_not_specialize=["n", "num_stats", "matrix"])
def row_and_column_sums(
    image,
    text,
    scalars,
    parts,  # [2, num_stats, SLOTS, N] out: slots of e, or of e0
    image_stride,
    text_stride,
    n,
    width,
    num_stats,  # PART_STATS(_WITH_REF)
    matrix,  # 0: S, 1: the reference's S0, whose features then are image and text
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    LANES: tl.constexpr,  # rows of a tile that different threads hold; at most BLOCK_M / 2
):
    """Row and column sums of e = exp(s - shift) without the diagonal, in one pass over tiles.

    All tiles in one column of a rectangle share one loop over depth, so that the next tile's
    features load while this tile's exponentials are computed. Column sums stay in registers down
    that column, one per thread, and are combined at its end. Row sums are added up in `parts`,
    column after column, because the terms of one row are spread over few threads.
    """
    strip, chunk = locate_rectangle(n, BLOCK_M, BLOCK_N)
    first_row, end_row = slot_range(strip, n, BLOCK_M)
    first_col, end_col = slot_range(chunk, n, BLOCK_N)
    row_slot, col_slot = sweep_slots(parts, strip, chunk, n, num_stats)
    row_slot += matrix * stat_stride(n)
    col_slot += matrix * stat_stride(n)
    scale_value = tl.load(scalars + SCALE + matrix)
    shift = tl.load(scalars + GROUP_SHIFT + matrix)
    steps = tl.cdiv(width, BLOCK_K)
    depth = tl.arange(0, BLOCK_K)
    features = (image, text, image_stride, text_stride, width)
    # disable_licm: hoisted values would occupy registers throughout the loops, and spill.
    for col_block in tl.range(first_col, end_col, disable_licm=True):
        cols = col_block * BLOCK_N + tl.arange(0, BLOCK_N)
        col_sum = tl.zeros((LANES // 8, 8, BLOCK_N), dtype=tl.float32)
        product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        row_block = first_row
        step = 0
        for _ in tl.range(0, (end_row - first_row) * steps, disable_licm=True):
            row_start, col_start = row_block * BLOCK_M, col_block * BLOCK_N
            tile = (n, row_start, col_start)
            product = add_depth_step(
                product, features, tile, depth, step, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
            )
            is_last = step == steps - 1
            if is_last:
                rows = row_start + tl.arange(0, BLOCK_M)
                # Stored a column of tiles earlier. Each step since had a barrier for its loads; an
                # explicit barrier would prevent pipelining of the loop.
                has_earlier = rows < tl.where(col_block > first_col, n, 0)
                earlier = tl.load(row_slot + rows, mask=has_earlier, other=0.0)
                s = scale_value * product
                if is_edge(row_start, col_start, n, BLOCK_M, BLOCK_N):
                    s = tl.where(off_diagonal(rows, cols, n), s, -float("inf"))
                e = exp_gap(s, shift)
                tl.store(row_slot + rows, earlier + tl.sum(e, 1), mask=rows < n)
                col_sum += _sum_within_thread(e, BLOCK_M, BLOCK_N, LANES)
                product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            step = tl.where(is_last, 0, step + 1)
            row_block += tl.where(is_last, 1, 0)
        tl.store(col_slot + cols, tl.sum(tl.sum(col_sum, 1), 0), mask=cols < n)


@triton.jit
def _sum_within_thread(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LANES: tl.constexpr):
    """[LANES / 8, 8, BLOCK_N] sums over the rows that one thread holds, without a shuffle.

    In a tensor core's result a warp has 16 rows of every 2 * LANES, and a thread holds the rows
    that differ by 8 and by multiples of 2 * LANES. The sums are right on any layout.
    """
    x = tl.reshape(x, (BLOCK_M // (2 * LANES), LANES // 8, 2, 8, BLOCK_N))
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit(do_not_specialize=["n"])
def row_and_column_sums_with_reference(
    image,
    text,
    ref_image,
    ref_text,
    scalars,
    parts,  # [2, PART_STATS_WITH_REF, SLOTS, N] out: slots of e, e0, e0 * (s0 - s)
    image_stride,
    text_stride,
    ref_image_stride,
    ref_text_stride,
    n,
    width,
    ref_width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Row and column sums of e, e0 = exp(s0 - its shift), and e0 * (s0 - s).

    For losses without gradients. Row sums stay in registers along a row of a rectangle; column sums
    are added up in `parts`. A loop over the depth of several tiles, as without reference, does not
    fit both products.
    """
    stride = stat_stride(n)
    features = (image, text, image_stride, text_stride, width)
    ref_features = (ref_image, ref_text, ref_image_stride, ref_text_stride, ref_width)
    strip, chunk = locate_rectangle(n, BLOCK_M, BLOCK_N)
    first_row, end_row = slot_range(strip, n, BLOCK_M)
    first_col, end_col = slot_range(chunk, n, BLOCK_N)
    row_slot, col_slot = sweep_slots(parts, strip, chunk, n, PART_STATS_WITH_REF)
    scale_value, ref_scale_value = tl.load(scalars + SCALE), tl.load(scalars + SCALE + 1)
    shift, ref_shift = tl.load(scalars + GROUP_SHIFT), tl.load(scalars + GROUP_SHIFT + 1)
    for row_block in range(first_row, end_row):
        rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
        row_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
        ref_row_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
        cross_row_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
        # disable_licm: hoisted values would occupy registers throughout the loop, and spill.
        for col_block in tl.range(first_col, end_col, disable_licm=True):
            row_start, col_start = row_block * BLOCK_M, col_block * BLOCK_N
            cols = col_start + tl.arange(0, BLOCK_N)
            tile = (n, row_start, col_start)
            s = scale_value * tile_product(
                features, tile, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
            )
            # Elements outside the group or on the diagonal become -inf, so that no mask occupies
            # registers during the second product.
            edge = is_edge(row_start, col_start, n, BLOCK_M, BLOCK_N)
            if edge:
                s = tl.where(off_diagonal(rows, cols, n), s, -float("inf"))
            has_earlier = cols < tl.where(row_block > first_row, n, 0)
            e = exp_gap(s, shift)
            row_sum += tl.sum(e, 1)
            col = col_slot + cols
            _add_column_sums(col, e, has_earlier, cols < n)
            s0 = ref_scale_value * tile_product(
                ref_features, tile, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
            )
            # This order needs no third tile of registers: the gap replaces s, e0 replaces s0, and
            # their product replaces the gap.
            gap = s0 - s
            if edge:
                gap = tl.where(s == -float("inf"), 0.0, gap)
                s0 = tl.where(s == -float("inf"), s, s0)
            e0 = exp_gap(s0, ref_shift)
            ref_row_sum += tl.sum(e0, 1)
            _add_column_sums(col + stride, e0, has_earlier, cols < n)
            cross = e0 * gap
            cross_row_sum += tl.sum(cross, 1)
            _add_column_sums(col + 2 * stride, cross, has_earlier, cols < n)
            # Other threads read these slots in the next row block.
            tl.debug_barrier()
        in_group = rows < n
        tl.store(row_slot + rows, row_sum, mask=in_group)
        tl.store(row_slot + stride + rows, ref_row_sum, mask=in_group)
        tl.store(row_slot + 2 * stride + rows, cross_row_sum, mask=in_group)


@triton.jit
def _add_column_sums(slot, tile, has_earlier, in_group):
    """Add a tile's column sums to those in `slot`, or begin them where there are none yet."""
    earlier = tl.load(slot, mask=has_earlier, other=0.0)
    tl.store(slot, earlier + tl.sum(tile, 0), mask=in_group)


@triton.jit(do_not_specialize=["flag", "n", "num_stats", "num_sums"])
def add_partial_sums(
    parts,  # [2, num_stats, SLOTS, N]
    sums,  # [2, num_sums, N] out
    flag,  # [] out: 1 if the fixed shift failed
    n,
    num_stats,  # PART_STATS(_WITH_REF)
    num_sums,  # e; e0; e0 * (s0 - s)
    BLOCK_M: tl.constexpr,  # of the sweep
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Add the slots in order, and raise the flag over sums that underflowed or overflowed.

    Sums of features that are not finite count as overflowed: such groups only take longer.
    """
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = rows < n
    total_rows = tl.cast(n, tl.int64)
    failed = tl.zeros((BLOCK_R,), dtype=tl.int32)
    for direction in tl.static_range(2):  # rows, columns
        num_slots = count_slots(n, BLOCK_N) if direction == 0 else count_slots(n, BLOCK_M)
        for stat in range(num_sums):
            total = tl.zeros((BLOCK_R,), dtype=tl.float32)
            part = parts + (direction * num_stats + stat) * stat_stride(n) + rows
            for k in range(num_slots):
                total += tl.load(part + k * total_rows, mask=exists, other=0.0)
            tl.store(sums + (direction * num_sums + stat) * total_rows + rows, total, exists)
            is_sound = tl.abs(total) < float("inf")
            is_sound &= (total >= UNDERFLOW) | (stat == 2)  # the others are of exponentials
            failed |= tl.where(exists & (is_sound == 0), 1, 0)
    if (tl.max(failed, 0) > 0) & (n > 1):
        tl.store(flag, 1)
