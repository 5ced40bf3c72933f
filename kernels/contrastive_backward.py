"""Backward kernels of the contrastive operator: strips of the coefficient matrix G.

G is the gradient of the weighted losses with respect to S; then d_image = scale * G @ text and
d_text = scale * G.T @ image, which the launcher leaves to cuBLAS, a strip of rows at a time. In
order of launch: `coefficients`, then `strip` (fused: makes S and S0 itself) or `strip_of_logits`
(takes them from cuBLAS) a strip, then `gradients` a tower.

The diagonal stays out of the strips: rounded to bf16, its -1 beside off-diagonal 1/N would be the
largest error of all; `gradients` adds it in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fasterase.kernels.contrastive_tiles import (
    exp_below,
    exp_gap,
    is_edge,
    off_diagonal,
    tile_product,
)

# start, n, first row in group, rows, offset in the workspace, row stride there, last tile, group
SEGMENT_FIELDS = tl.constexpr(8)
# Tiles are walked in columns of this many row blocks, whose rows of `image` then stay in L2.
_GROUPED_ROWS = tl.constexpr(8)


@triton.jit
def coefficients(
    upstream,  # [4 or 2, N] gradients: ce row, ce column, kl row, kl column
    unit,  # [] their largest finite magnitude: weights near 1 keep 1/N out of factors near 1e-34
    softmaxes,  # [matrices, 3, 2, N]
    factors,  # [matrices, 2, N] out: what turns exp(s - shift) into weight * p, or into -kl * p0
    own,  # [N] out: G's diagonal
    num_rows,
    HAS_REF: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """G = e * (factor_i + factor_j) + e0 * (ref_factor_i + ref_factor_j) beside the diagonal.

    Factors are off / sum and not exp(shift - lse): then a row of p adds up to `off` to the last
    bit, where an lse near 100, rounded, would tilt the whole row by 4e-6.
    """
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = rows < num_rows
    total = tl.cast(num_rows, tl.int64)
    by = tl.load(unit)
    diagonal = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for side in tl.static_range(2):
        at = side * total + rows
        weight = tl.load(upstream + at, mask=exists, other=0.0) / by
        if HAS_REF:
            kl = tl.load(upstream + 2 * total + at, mask=exists, other=0.0) / by
            weight += kl
            ref_ratio = tl.load(softmaxes + 8 * total + at, mask=exists, other=0.0)
            tl.store(factors + 2 * total + at, -kl * ref_ratio, mask=exists)
            diagonal += kl * tl.load(softmaxes + 10 * total + at, mask=exists, other=0.0)
        ratio = tl.load(softmaxes + 2 * total + at, mask=exists, other=0.0)
        tl.store(factors + at, weight * ratio, mask=exists)
        diagonal -= weight * tl.load(softmaxes + 4 * total + at, mask=exists, other=0.0)
    tl.store(own + rows, diagonal, mask=exists)


@triton.jit
def _add_weighted_exp(
    g,
    s,
    shift,  # [2, N]
    factors,  # [2, N]
    start,  # the group's first row
    rows,  # in the group, in bounds
    cols,
    num_rows,
    is_online,
):
    """g + factor * exp(s - shift) by rows and by columns: one exp where both have one shift.

    Added to g term by term, so that no third tile of registers is needed.
    """
    shift += start
    factors += start
    row_shift = tl.load(shift + rows)[:, None]
    row_factor = tl.load(factors + rows)[:, None]
    col_factor = tl.load(factors + num_rows + cols)[None, :]
    if is_online:  # known when `strip` compiles, read by `strip_of_logits`
        g += exp_below(s, row_shift) * row_factor
        col_shift = tl.load(shift + num_rows + cols)[None, :]
        g += exp_below(s, col_shift) * col_factor
    else:
        g += exp_gap(s, row_shift) * (row_factor + col_factor)
    return g


@triton.jit
def strip(
    image,
    text,
    ref_image,
    ref_text,
    scale,
    ref_scale,
    softmaxes,  # [matrices, 3, 2, N]
    factors,  # [matrices, 2, N]
    flags,  # [num_groups]
    segments,  # [segments of this launch, SEGMENT_FIELDS]
    workspace,  # out: a strip of G a segment, in the features' dtype
    image_stride,
    text_stride,
    ref_image_stride,
    ref_text_stride,
    num_tiles,
    num_rows,
    width,
    ref_width,
    gain,  # G is multiplied by it, so that fp16 holds small probabilities
    IS_ONLINE: tl.constexpr,  # for the groups whose flag is set, or for the others
    HAS_REF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_REF_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Tiles of G from the features, over the segments of all groups.

    Launched for either kind of group, because both kinds in one kernel take registers of both.
    """
    total = tl.cast(num_rows, tl.int64)
    # What is hoisted out of the loop would be held in registers through the products.
    for index in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), disable_licm=True):
        entry = segments
        first_tile = index * 0
        while tl.load(entry + 6) <= index:
            first_tile = tl.load(entry + 6).to(tl.int32)
            entry += SEGMENT_FIELDS
        if (tl.load(flags + tl.load(entry + 7)) != 0) == IS_ONLINE:
            start, n = tl.load(entry), tl.load(entry + 1).to(tl.int32)
            first = tl.load(entry + 2).to(tl.int32)
            num_strip_rows = tl.load(entry + 3).to(tl.int32)
            num_col_blocks = tl.cdiv(n, BLOCK_N)
            tile = index - first_tile
            band = tile // (_GROUPED_ROWS * num_col_blocks) * _GROUPED_ROWS
            band_rows = tl.minimum(tl.cdiv(num_strip_rows, BLOCK_M) - band, _GROUPED_ROWS)
            inside = tile % (_GROUPED_ROWS * num_col_blocks)
            row_start = first + (band + inside % band_rows) * BLOCK_M
            col_start = inside // band_rows * BLOCK_N
            s = tl.load(scale) * tile_product(
                image + start * image_stride,
                text + start * text_stride,
                image_stride,
                text_stride,
                row_start,
                col_start,
                n,
                width,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                EVEN_K,
                PRECISION,
            )
            # Indices are made after the product: none is held in registers through its loop.
            rows = row_start + tl.arange(0, BLOCK_M)
            cols = col_start + tl.arange(0, BLOCK_N)
            held_rows = tl.minimum(rows, n - 1)
            held_cols = tl.minimum(cols, n - 1)
            g = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            g = _add_weighted_exp(
                g, s, softmaxes, factors, start, held_rows, held_cols, total, IS_ONLINE
            )
            if HAS_REF:
                s0 = tl.load(ref_scale) * tile_product(
                    ref_image + start * ref_image_stride,
                    ref_text + start * ref_text_stride,
                    ref_image_stride,
                    ref_text_stride,
                    row_start,
                    col_start,
                    n,
                    ref_width,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_K,
                    EVEN_REF_K,
                    PRECISION,
                )
                g = _add_weighted_exp(
                    g,
                    s0,
                    softmaxes + 6 * total,
                    factors + 2 * total,
                    start,
                    held_rows,
                    held_cols,
                    total,
                    IS_ONLINE,
                )
            g *= gain
            if is_edge(row_start, col_start, n, BLOCK_M, BLOCK_N):
                g = tl.where(off_diagonal(rows, cols, n), g, 0.0)
            # Whole cache lines, padding and all: vector stores need a mask even over 16 bytes.
            offset = tl.multiple_of(tl.load(entry + 4), 64)
            stride = tl.multiple_of(tl.load(entry + 5), 64)
            corner = workspace + offset + (row_start - first).to(tl.int64) * stride
            at = tl.arange(0, BLOCK_M)[:, None] * stride.to(tl.int32) + cols[None, :]
            inside_strip = (rows < first + num_strip_rows)[:, None] & (cols < stride)[None, :]
            tl.store(corner + at, g.to(workspace.dtype.element_ty), mask=inside_strip)


@triton.jit
def strip_of_logits(
    cosines,  # [rows, n] fp32, of image and text
    ref_cosines,  # [rows, n] fp32, of their originals
    scale,
    ref_scale,
    softmaxes,  # [matrices, 3, 2, N]
    factors,  # [matrices, 2, N]
    flags,  # [num_groups]
    workspace,  # [rows, n] out: G in the features' dtype
    cosines_stride,
    workspace_stride,
    start,  # the group's first row
    n,
    first,  # the strip's first row in the group
    num_strip_rows,
    group,
    num_rows,
    gain,
    HAS_REF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`strip` where matrix products of cuBLAS have made the cosines of one strip."""
    row_start = tl.program_id(0).to(tl.int64) * BLOCK_M
    col_start = tl.program_id(1) * BLOCK_N
    strip_rows = row_start + tl.arange(0, BLOCK_M)
    rows = first + strip_rows
    cols = col_start + tl.arange(0, BLOCK_N)
    inside_strip = (strip_rows < num_strip_rows)[:, None] & (cols < n)[None, :]
    is_online = tl.load(flags + group) != 0
    held_rows = tl.minimum(rows, n - 1)
    held_cols = tl.minimum(cols, n - 1)
    total = tl.cast(num_rows, tl.int64)
    at = strip_rows[:, None] * cosines_stride + cols[None, :]
    s = tl.load(scale) * tl.load(cosines + at, mask=inside_strip, other=0.0)
    g = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    g = _add_weighted_exp(g, s, softmaxes, factors, start, held_rows, held_cols, total, is_online)
    if HAS_REF:
        s0 = tl.load(ref_scale) * tl.load(ref_cosines + at, mask=inside_strip, other=0.0)
        softmaxes += 6 * total
        factors += 2 * total
        g = _add_weighted_exp(
            g, s0, softmaxes, factors, start, held_rows, held_cols, total, is_online
        )
    g = tl.where(off_diagonal(rows, cols, n), g * gain, 0.0)
    at = strip_rows[:, None] * workspace_stride + cols[None, :]
    tl.store(workspace + at, g.to(workspace.dtype.element_ty), mask=inside_strip)


@triton.jit
def gradients(
    products,  # [N, width] fp32: G @ other, times gain, without the diagonal
    own,  # [N] G's diagonal
    side,  # [N, width] the tower whose gradient this is
    other,  # [N, width]
    scale,
    unit,
    out,  # [N, width] gradient, in the tower's dtype; may be `products`
    d_scale,  # [N] out: what each row adds to the gradient of scale
    side_stride,
    other_stride,
    num_rows,
    width,
    gain,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Restore the diagonal in fp32, take out the gain, and round once."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = rows < num_rows
    at = rows[:, None].to(tl.int64)
    weight = tl.load(own + rows, mask=exists, other=0.0)[:, None]
    unit_by = tl.load(unit)
    by = tl.load(scale) * unit_by
    total = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for begin in range(0, width, BLOCK_K):
        depth = begin + tl.arange(0, BLOCK_K)[None, :]
        mask = exists[:, None] & (depth < width)
        mine = tl.load(side + at * side_stride + depth, mask=mask, other=0.0).to(tl.float32)
        partner = tl.load(other + at * other_stride + depth, mask=mask, other=0.0).to(tl.float32)
        gradient = tl.load(products + at * width + depth, mask=mask, other=0.0) / gain
        gradient += weight * partner
        total += tl.sum(mine * gradient, 1)
        tl.store(out + at * width + depth, (gradient * by).to(out.dtype.element_ty), mask=mask)
    tl.store(d_scale + rows, total * unit_by, mask=exists)
