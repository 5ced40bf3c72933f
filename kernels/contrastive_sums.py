"""Forward: row and column sums of exp(S - shift), and of the KL's terms, over all tiles.

A program computes one rectangle of tiles of one group, strip x chunk, which has its own slots in
`parts`: of its chunk for row sums and of its strip for column sums. `add_partial_sums` adds them
up. There are no atomics and no barrier between programs; the results depend on the shapes and tiles
alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fasterase.kernels.contrastive_layout import (
    PART_STATS,
    PART_STATS_WITH_REF,
    count_slots,
    locate_rectangle,
    locate_rows,
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


@triton.jit
def row_and_column_sums(
    image,
    text,
    scales,  # [matrices]
    shifts,  # [matrices, 2]
    parts,  # [2, PART_STATS(_WITH_REF), SLOTS, N] out: slots of e, or of e0
    image_stride,
    text_stride,
    split,
    num_rows,
    width,
    MATRIX: tl.constexpr,  # 0: S, 1: the reference's S0, whose features then are image and text
    HAS_REF: tl.constexpr,
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
    num_stats: tl.constexpr = PART_STATS_WITH_REF if HAS_REF else PART_STATS
    group, start, n, strip, chunk = locate_rectangle(
        tl.program_id(0), split, num_rows, BLOCK_M, BLOCK_N
    )
    first_row, end_row = slot_range(strip, n, BLOCK_M)
    first_col, end_col = slot_range(chunk, n, BLOCK_N)
    row_slot, col_slot = sweep_slots(parts, start, strip, chunk, num_rows, num_stats)
    row_slot += MATRIX * stat_stride(num_rows)
    col_slot += MATRIX * stat_stride(num_rows)
    scale_value = tl.load(scales + MATRIX)
    shift = tl.load(shifts + MATRIX * 2 + group)
    first = start.to(tl.int64)
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
            tile = (first, n, row_start, col_start)
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


@triton.jit
def row_and_column_sums_with_reference(
    image,
    text,
    ref_image,
    ref_text,
    scales,  # [2]
    shifts,  # [2, 2]
    parts,  # [2, PART_STATS_WITH_REF, SLOTS, N] out: slots of e, e0, e0 * (s0 - s)
    image_stride,
    text_stride,
    ref_image_stride,
    ref_text_stride,
    split,
    num_rows,
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
    stride = stat_stride(num_rows)
    features = (image, text, image_stride, text_stride, width)
    ref_features = (ref_image, ref_text, ref_image_stride, ref_text_stride, ref_width)
    group, start, n, strip, chunk = locate_rectangle(
        tl.program_id(0), split, num_rows, BLOCK_M, BLOCK_N
    )
    first_row, end_row = slot_range(strip, n, BLOCK_M)
    first_col, end_col = slot_range(chunk, n, BLOCK_N)
    row_slot, col_slot = sweep_slots(parts, start, strip, chunk, num_rows, PART_STATS_WITH_REF)
    scale_value, ref_scale_value = tl.load(scales), tl.load(scales + 1)
    shift, ref_shift = tl.load(shifts + group), tl.load(shifts + 2 + group)
    first = start.to(tl.int64)
    for row_block in range(first_row, end_row):
        rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
        row_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
        ref_row_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
        cross_row_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
        # disable_licm: hoisted values would occupy registers throughout the loop, and spill.
        for col_block in tl.range(first_col, end_col, disable_licm=True):
            row_start, col_start = row_block * BLOCK_M, col_block * BLOCK_N
            cols = col_start + tl.arange(0, BLOCK_N)
            tile = (first, n, row_start, col_start)
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


@triton.jit
def add_partial_sums(
    parts,  # [2, PART_STATS or PART_STATS_WITH_REF, SLOTS, N]
    sums,  # [2, NUM_SUMS, N] out
    flags,  # [2] out: 1 if the fixed shift failed for the group
    split,
    num_rows,
    NUM_SUMS: tl.constexpr,  # e; e0; e0 * (s0 - s)
    HAS_REF: tl.constexpr,
    BLOCK_M: tl.constexpr,  # of the sweep
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Add the slots in order, and flag groups with sums that underflowed or overflowed.

    Sums of features that are not finite count as overflowed: such groups only take longer.
    """
    num_stats: tl.constexpr = PART_STATS_WITH_REF if HAS_REF else PART_STATS
    group, start, n, block = locate_rows(tl.program_id(0), split, num_rows, BLOCK_R)
    rows = start + block * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = rows < start + n
    total_rows = tl.cast(num_rows, tl.int64)
    failed = tl.zeros((BLOCK_R,), dtype=tl.int32)
    for direction in tl.static_range(2):  # rows, columns
        num_slots = count_slots(n, BLOCK_N) if direction == 0 else count_slots(n, BLOCK_M)
        for stat in tl.static_range(NUM_SUMS):
            total = tl.zeros((BLOCK_R,), dtype=tl.float32)
            part = parts + (direction * num_stats + stat) * stat_stride(num_rows) + rows
            for k in range(num_slots):
                total += tl.load(part + k * total_rows, mask=exists, other=0.0)
            tl.store(sums + (direction * NUM_SUMS + stat) * total_rows + rows, total, exists)
            is_sound = tl.abs(total) < float("inf")
            if stat < 2:  # sums of exponentials
                is_sound &= total >= UNDERFLOW
            failed |= tl.where(exists & (is_sound == 0), 1, 0)
    if (tl.max(failed, 0) > 0) & (n > 1):
        tl.store(flags + group, 1)
