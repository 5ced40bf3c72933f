"""The forward's passes over all tiles: row and column sums of exp(S - shift), and of the KL.

An *item* is a rectangle of tiles of one group: strip x chunk. A program takes whole items. What it
adds up lies in private slots of `parts`, [2 (row, column), statistics, SLOTS, N]; a slot is a chunk
for row sums, a strip for column sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fasterase.kernels.contrastive_tiles import (
    ITEM_FIELDS,
    SLOTS,
    exp_gap,
    is_edge,
    off_diagonal,
    tile_product,
)


@triton.jit
def sweep(
    image,
    text,
    scale,
    shift,  # [num_groups]
    items,  # [num_items, ITEM_FIELDS]
    parts,  # [2, 2, SLOTS, N] out: slots of e, the first of each two
    image_stride,
    text_stride,
    num_items,
    num_rows,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    LANES: tl.constexpr,  # rows of a tile that different threads hold; at most BLOCK_M / 2
):
    """Row and column sums of e = exp(s - shift), the diagonal left out, in one pass over tiles.

    The tiles of a column of an item are one loop over depth: the next tile's features arrive while
    this one's exponentials are taken. Column sums stay in registers down that column, a sum a
    thread, and meet only at its end; row sums, whose terms few threads hold, are added up in
    `parts`, column after column.
    """
    slot = SLOTS * tl.cast(num_rows, tl.int64)
    by = tl.load(scale)
    steps = tl.cdiv(width, BLOCK_K)
    depth = tl.arange(0, BLOCK_K)
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        entry = items + item * ITEM_FIELDS
        start, n = tl.load(entry), tl.load(entry + 1)
        first_row, last_row = tl.load(entry + 2), tl.load(entry + 3)
        first_col, last_col = tl.load(entry + 5), tl.load(entry + 6)
        row_parts = parts + tl.load(entry + 7).to(tl.int64) * num_rows + start
        col_parts = parts + 2 * slot + tl.load(entry + 4).to(tl.int64) * num_rows + start
        first = start.to(tl.int64)
        c = tl.load(shift + tl.load(entry + 8))
        # What is hoisted out of the loops would be held in registers through them, and spill.
        for col_block in tl.range(first_col, last_col, disable_licm=True):
            cols = col_block * BLOCK_N + tl.arange(0, BLOCK_N)
            col_sum = tl.zeros((LANES // 8, 8, BLOCK_N), dtype=tl.float32)
            product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            row_block = first_row
            step = 0
            for _ in tl.range(0, (last_row - first_row) * steps, disable_licm=True):
                # As in `tile_product`: rows past the end repeat the last one.
                left_at = tl.minimum(tl.arange(0, BLOCK_M), n - 1 - row_block * BLOCK_M)
                right_at = tl.minimum(tl.arange(0, BLOCK_N), n - 1 - col_block * BLOCK_N)
                left = image + (first + row_block * BLOCK_M) * image_stride + step * BLOCK_K
                right = text + (first + col_block * BLOCK_N) * text_stride + step * BLOCK_K
                left += left_at[:, None] * image_stride + depth[None, :]
                right += right_at[None, :] * text_stride + depth[:, None]
                if EVEN_K:
                    a = tl.load(left)
                    b = tl.load(right)
                else:
                    inside = depth < width - step * BLOCK_K
                    a = tl.load(left, mask=inside[None, :], other=0.0)
                    b = tl.load(right, mask=inside[:, None], other=0.0)
                product = tl.dot(a, b, product, input_precision=PRECISION)
                is_last = step == steps - 1
                if is_last:
                    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
                    # Stored a column of tiles earlier: each step since had a barrier for its loads,
                    # and an explicit one would keep the loop from being pipelined.
                    has_earlier = rows < tl.where(col_block > first_col, n, 0)
                    earlier = tl.load(row_parts + rows, mask=has_earlier, other=0.0)
                    s = by * product
                    if is_edge(row_block * BLOCK_M, col_block * BLOCK_N, n, BLOCK_M, BLOCK_N):
                        s = tl.where(off_diagonal(rows, cols, n), s, -float("inf"))
                    e = exp_gap(s, c)
                    tl.store(row_parts + rows, earlier + tl.sum(e, 1), mask=rows < n)
                    col_sum += _sum_of_thread(e, BLOCK_M, BLOCK_N, LANES)
                    product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
                step = tl.where(is_last, 0, step + 1)
                row_block += tl.where(is_last, 1, 0)
            tl.store(col_parts + cols, tl.sum(tl.sum(col_sum, 1), 0), mask=cols < n)


@triton.jit
def _sum_of_thread(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LANES: tl.constexpr):
    """[LANES / 8, 8, BLOCK_N] sums over the rows that one thread holds, without a shuffle.

    Of a tensor core's result, where a warp has 16 rows of every 2 * LANES, a thread holds those
    that differ by 8 and by multiples of 2 * LANES. The sums are right on any layout.
    """
    x = tl.reshape(x, (BLOCK_M // (2 * LANES), LANES // 8, 2, 8, BLOCK_N))
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def sweep_reference(
    image,
    text,
    ref_image,
    ref_text,
    scale,
    ref_scale,
    shift,  # [2, num_groups]
    items,  # [num_items, ITEM_FIELDS]
    parts,  # [2, 5, SLOTS, N] out: slots of e, e0, e0 * (s0 - s)
    image_stride,
    text_stride,
    ref_image_stride,
    ref_text_stride,
    num_items,
    num_groups,
    num_rows,
    width,
    ref_width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_REF_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`sweep`, with e0 = exp(s0 - its shift) and e0 * (s0 - s) beside e.

    Row sums stay in registers along a row of an item, column sums are added up in `parts`.
    """
    slot = SLOTS * tl.cast(num_rows, tl.int64)
    by = tl.load(scale)
    ref_by = tl.load(ref_scale)
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        entry = items + item * ITEM_FIELDS
        start, n = tl.load(entry), tl.load(entry + 1)
        first_row, last_row = tl.load(entry + 2), tl.load(entry + 3)
        first_col, last_col = tl.load(entry + 5), tl.load(entry + 6)
        group = tl.load(entry + 8)
        row_parts = parts + tl.load(entry + 7).to(tl.int64) * num_rows + start
        col_parts = parts + 5 * slot + tl.load(entry + 4).to(tl.int64) * num_rows + start
        first = start.to(tl.int64)
        c = tl.load(shift + group)
        ref_c = tl.load(shift + num_groups + group)
        for row_block in range(first_row, last_row):
            rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
            row_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
            ref_row_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
            cross_row_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
            # What is hoisted out of the loop would be held in registers through it, and spill.
            for col_block in tl.range(first_col, last_col, disable_licm=True):
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
                # What is no element beside the diagonal becomes -inf: no mask to carry in registers
                # through the second product.
                edge = is_edge(row_block * BLOCK_M, col_block * BLOCK_N, n, BLOCK_M, BLOCK_N)
                if edge:
                    s = tl.where(off_diagonal(rows, cols, n), s, -float("inf"))
                has_earlier = cols < tl.where(row_block > first_row, n, 0)
                e = exp_gap(s, c)
                row_sum += tl.sum(e, 1)
                col = col_parts + cols
                earlier = tl.load(col, mask=has_earlier, other=0.0)
                tl.store(col, earlier + tl.sum(e, 0), mask=cols < n)
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
                # In an order that needs no third tile of registers: the gap replaces s, e0
                # replaces s0, and their product the gap.
                gap = s0 - s
                if edge:
                    gap = tl.where(s == -float("inf"), 0.0, gap)
                    s0 = tl.where(s == -float("inf"), s, s0)
                e0 = exp_gap(s0, ref_c)
                ref_row_sum += tl.sum(e0, 1)
                earlier = tl.load(col + slot, mask=has_earlier, other=0.0)
                tl.store(col + slot, earlier + tl.sum(e0, 0), mask=cols < n)
                cross = e0 * gap
                cross_row_sum += tl.sum(cross, 1)
                earlier = tl.load(col + 2 * slot, mask=has_earlier, other=0.0)
                tl.store(col + 2 * slot, earlier + tl.sum(cross, 0), mask=cols < n)
                # The next row block reads these slots from other threads.
                tl.debug_barrier()
            tl.store(row_parts + rows, row_sum, mask=rows < n)
            tl.store(row_parts + slot + rows, ref_row_sum, mask=rows < n)
            tl.store(row_parts + 2 * slot + rows, cross_row_sum, mask=rows < n)
