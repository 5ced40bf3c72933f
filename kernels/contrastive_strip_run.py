"""Strips of G without a reference: the tiles of a run share one loop over depth, as in `sweep`."""

from __future__ import annotations

import triton
import triton.language as tl

from fasterase.kernels.contrastive_backward import SEGMENT_FIELDS
from fasterase.kernels.contrastive_tiles import exp_gap, is_edge, off_diagonal


@triton.jit(do_not_specialize=["run"])
def strip_run(
    image,
    text,
    scale,
    softmaxes,  # [1, 3, 2, N]
    factors,  # [1, 2, N]
    flags,  # [num_groups]
    segments,  # [segments of this launch, SEGMENT_FIELDS]
    workspace,  # out: a strip of G a segment, in the features' dtype
    image_stride,
    text_stride,
    num_rows,
    width,
    run,  # row blocks of one column that a program makes, one after another
    gain,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`strip` for groups whose flag is not set; a program makes one run of tiles.

    Programs of one moment share few columns and all rows of a strip, which then stay in L2.
    """
    total = tl.cast(num_rows, tl.int64)
    unit = tl.program_id(0)
    entry = segments
    runs = tl.cdiv(tl.cdiv(tl.load(entry + 3).to(tl.int32), BLOCK_M), run)
    units = runs * tl.cdiv(tl.load(entry + 1).to(tl.int32), BLOCK_N)
    while units <= unit:
        unit -= units
        entry += SEGMENT_FIELDS
        runs = tl.cdiv(tl.cdiv(tl.load(entry + 3).to(tl.int32), BLOCK_M), run)
        units = runs * tl.cdiv(tl.load(entry + 1).to(tl.int32), BLOCK_N)
    if tl.load(flags + tl.load(entry + 7)) == 0:
        start, n = tl.load(entry), tl.load(entry + 1).to(tl.int32)
        first = tl.load(entry + 2).to(tl.int32)
        num_strip_rows = tl.load(entry + 3).to(tl.int32)
        # Whole cache lines, padding and all: vector stores need a mask even over 16 bytes.
        offset = tl.multiple_of(tl.load(entry + 4), 64)
        stride = tl.multiple_of(tl.load(entry + 5), 64)
        col_start = unit // runs * BLOCK_N
        row_block = unit % runs * run
        num_blocks = tl.minimum(tl.cdiv(num_strip_rows, BLOCK_M) - row_block, run)
        by = tl.load(scale)
        steps = tl.cdiv(width, BLOCK_K)
        depth = tl.arange(0, BLOCK_K)
        product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        step = 0
        # What is hoisted out of the loop would be held in registers through it, and spill.
        for _ in tl.range(0, num_blocks * steps, disable_licm=True):
            row_start = first + row_block * BLOCK_M
            # As in `tile_product`: rows past the end repeat the last one.
            left_at = tl.minimum(tl.arange(0, BLOCK_M), n - 1 - row_start)
            right_at = tl.minimum(tl.arange(0, BLOCK_N), n - 1 - col_start)
            left = image + (start + row_start) * image_stride + step * BLOCK_K
            right = text + (start + col_start) * text_stride + step * BLOCK_K
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
                rows = row_start + tl.arange(0, BLOCK_M)
                cols = col_start + tl.arange(0, BLOCK_N)
                held_rows = start + tl.minimum(rows, n - 1)
                held_cols = start + tl.minimum(cols, n - 1)
                shift = tl.load(softmaxes + held_rows)[:, None]
                row_factor = tl.load(factors + held_rows)[:, None]
                col_factor = tl.load(factors + total + held_cols)[None, :]
                g = exp_gap(by * product, shift) * (row_factor + col_factor) * gain
                if is_edge(row_start, col_start, n, BLOCK_M, BLOCK_N):
                    g = tl.where(off_diagonal(rows, cols, n), g, 0.0)
                corner = workspace + offset + (row_block * BLOCK_M).to(tl.int64) * stride
                at = tl.arange(0, BLOCK_M)[:, None] * stride.to(tl.int32) + cols[None, :]
                inside_strip = (rows < first + num_strip_rows)[:, None] & (cols < stride)[None, :]
                tl.store(corner + at, g.to(workspace.dtype.element_ty), mask=inside_strip)
                product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            step = tl.where(is_last, 0, step + 1)
            row_block += tl.where(is_last, 1, 0)
