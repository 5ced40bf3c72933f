"""Backward: strips of G, the gradient with respect to S, and from them the features' gradients.

d_image = scale * G @ text and d_text = scale * G.T @ image, which the launcher leaves to cuBLAS, a
strip of rows at a time. In order of launch: `gradient_factors`; per strip one of the
`gradient_strip...` kernels; `feature_gradients` per tower.

The diagonal stays out of the strips: rounded to bf16, its -1 beside off-diagonal 1/N would be the
largest error of all. `feature_gradients` adds it in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fasterase.kernels.contrastive_tables import (
    MISS_PROBABILITY,
    MISS_RATIO,
    SEGMENT_FIELDS,
    SHIFT,
    load_segment,
    load_segment_group,
    load_segment_last_tile,
    load_segment_memory,
    softmax_field,
)
from fasterase.kernels.contrastive_tiles import (
    add_depth_step,
    exp_below,
    exp_gap,
    is_edge,
    off_diagonal,
    tile_product,
)

# Tiles are visited column by column in bands of this many row blocks, whose rows of `image` then
# stay in L2.
_BAND = tl.constexpr(8)


@triton.jit
def gradient_factors(
    upstream,  # [4 or 2, N] gradients: ce row, ce column, kl row, kl column
    upstream_peak,  # [] their largest finite magnitude; keeps 1/N out of factors near 1e-34
    softmaxes,  # [matrices, SOFTMAX_FIELDS, 2, N]
    factors,  # [matrices, 2, N] out: exp(s - shift) times these is weight * p, or -kl * p0
    diagonal,  # [N] out: G's diagonal
    num_rows,
    HAS_REF: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Beside the diagonal G = e * (factor_i + factor_j) + e0 * (ref_factor_i + ref_factor_j).

    Factors contain miss_probability / sum, not exp(shift - lse). A row of p then adds up to its
    miss probability to the last bit; a rounded lse near 100 would tilt the whole row by 4e-6.
    """
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = rows < num_rows
    total_rows = tl.cast(num_rows, tl.int64)
    peak = tl.load(upstream_peak)
    diagonal_value = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for direction in tl.static_range(2):  # rows, columns
        at = direction * total_rows + rows
        weight = tl.load(upstream + at, mask=exists, other=0.0) / peak
        if HAS_REF:
            kl_upstream = upstream + 2 * total_rows
            ref_factors = factors + 2 * total_rows
            ref_ratio = softmax_field(softmaxes, 1, MISS_RATIO, direction, num_rows)
            ref_miss = softmax_field(softmaxes, 1, MISS_PROBABILITY, direction, num_rows)
            kl = tl.load(kl_upstream + at, mask=exists, other=0.0) / peak
            weight += kl
            ref_factor = -kl * tl.load(ref_ratio + rows, mask=exists, other=0.0)
            tl.store(ref_factors + at, ref_factor, mask=exists)
            diagonal_value += kl * tl.load(ref_miss + rows, mask=exists, other=0.0)
        ratio = softmax_field(softmaxes, 0, MISS_RATIO, direction, num_rows)
        miss = softmax_field(softmaxes, 0, MISS_PROBABILITY, direction, num_rows)
        factor = weight * tl.load(ratio + rows, mask=exists, other=0.0)
        tl.store(factors + at, factor, mask=exists)
        diagonal_value -= weight * tl.load(miss + rows, mask=exists, other=0.0)
    tl.store(diagonal + rows, diagonal_value, mask=exists)


@triton.jit
def _add_weighted_exp(
    g,
    s,
    softmaxes,  # [matrices, SOFTMAX_FIELDS, 2, N]
    factors,  # [matrices, 2, N]
    MATRIX: tl.constexpr,
    start,  # the group's first row
    rows,  # in the group, in bounds
    cols,
    num_rows,
    is_online,
):
    """g + factor * exp(s - shift) by rows and by columns: one exp where both have one shift.

    Added to g term by term, so that no third tile of registers is needed.
    """
    total_rows = tl.cast(num_rows, tl.int64)
    row_shifts = softmax_field(softmaxes, MATRIX, SHIFT, 0, num_rows) + start
    row_factors = factors + MATRIX * 2 * total_rows + start
    row_shift = tl.load(row_shifts + rows)[:, None]
    row_factor = tl.load(row_factors + rows)[:, None]
    col_factor = tl.load(row_factors + total_rows + cols)[None, :]
    if is_online:  # a constant in `gradient_strip`, read by `gradient_strip_from_cosines`
        g += exp_below(s, row_shift) * row_factor
        col_shift = tl.load(row_shifts + total_rows + cols)[None, :]
        g += exp_below(s, col_shift) * col_factor
    else:
        g += exp_gap(s, row_shift) * (row_factor + col_factor)
    return g


@triton.jit
def _without_diagonal(g, n, row_start, col_start, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile of G with zeros on the diagonal and outside the group."""
    if is_edge(row_start, col_start, n, BLOCK_M, BLOCK_N):
        rows = row_start + tl.arange(0, BLOCK_M)
        cols = col_start + tl.arange(0, BLOCK_N)
        g = tl.where(off_diagonal(rows, cols, n), g, 0.0)
    return g


@triton.jit
def _store_tile(
    g,
    workspace,
    segment,  # (first, num_rows, offset, stride), fields of Segment
    row_start,
    col_start,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store a tile of G in the workspace's dtype."""
    first, num_segment_rows, offset, stride = segment
    rows = row_start + tl.arange(0, BLOCK_M)
    cols = col_start + tl.arange(0, BLOCK_N)
    # Writes whole cache lines, padding included: vector stores need one mask per 16 bytes.
    corner = workspace + offset + (row_start - first).to(tl.int64) * stride
    at = tl.arange(0, BLOCK_M)[:, None] * stride.to(tl.int32) + cols[None, :]
    in_segment = (rows < first + num_segment_rows)[:, None] & (cols < stride)[None, :]
    tl.store(corner + at, g.to(workspace.dtype.element_ty), mask=in_segment)


@triton.jit
def gradient_strip(
    image,
    text,
    ref_image,
    ref_text,
    scale,
    ref_scale,
    softmaxes,  # [matrices, SOFTMAX_FIELDS, 2, N]
    factors,  # [matrices, 2, N]
    flags,  # [num_groups]
    segments,  # [segments of this launch, SEGMENT_FIELDS]
    workspace,  # out: a strip of G per segment, in the features' dtype
    image_stride,
    text_stride,
    ref_image_stride,
    ref_text_stride,
    num_tiles,
    num_rows,
    width,
    ref_width,
    gain,  # G is multiplied by it, so that fp16 holds small probabilities
    IS_ONLINE: tl.constexpr,  # whether for the groups that are flagged, or for the others
    HAS_REF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_REF_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Tiles of G from the features, over the segments of all groups.

    Launched once per kind of group: one kernel for both would need the registers of both.
    """
    features = (image, text, image_stride, text_stride, width)
    ref_features = (ref_image, ref_text, ref_image_stride, ref_text_stride, ref_width)
    # disable_licm: hoisted values would occupy registers throughout the products.
    for index in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), disable_licm=True):
        entry = segments
        first_tile = index * 0
        while load_segment_last_tile(entry) <= index:
            first_tile = load_segment_last_tile(entry).to(tl.int32)
            entry += SEGMENT_FIELDS
        if (tl.load(flags + load_segment_group(entry)) != 0) == IS_ONLINE:
            start, n, first, num_segment_rows = load_segment(entry)
            num_col_blocks = tl.cdiv(n, BLOCK_N)
            in_segment = index - first_tile
            band = in_segment // (_BAND * num_col_blocks) * _BAND
            band_rows = tl.minimum(tl.cdiv(num_segment_rows, BLOCK_M) - band, _BAND)
            in_band = in_segment % (_BAND * num_col_blocks)
            row_start = first + (band + in_band % band_rows) * BLOCK_M
            col_start = in_band // band_rows * BLOCK_N
            tile = (start, n, row_start, col_start)
            s = tl.load(scale) * tile_product(
                features, tile, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
            )
            # Indices are made after the product, so that they occupy no registers in its loop.
            rows = tl.minimum(row_start + tl.arange(0, BLOCK_M), n - 1)
            cols = tl.minimum(col_start + tl.arange(0, BLOCK_N), n - 1)
            g = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            g = _add_weighted_exp(
                g, s, softmaxes, factors, 0, start, rows, cols, num_rows, IS_ONLINE
            )
            if HAS_REF:
                s0 = tl.load(ref_scale) * tile_product(
                    ref_features, tile, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_REF_K, PRECISION
                )
                g = _add_weighted_exp(
                    g, s0, softmaxes, factors, 1, start, rows, cols, num_rows, IS_ONLINE
                )
            g = _without_diagonal(g * gain, n, row_start, col_start, BLOCK_M, BLOCK_N)
            offset, stride = load_segment_memory(entry)
            segment = (first, num_segment_rows, offset, stride)
            _store_tile(g, workspace, segment, row_start, col_start, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["run_length"])
def gradient_strip_without_reference(
    image,
    text,
    scale,
    softmaxes,  # [1, SOFTMAX_FIELDS, 2, N]
    factors,  # [1, 2, N]
    flags,  # [num_groups]
    segments,  # [segments of this launch, SEGMENT_FIELDS]
    workspace,  # out: a strip of G per segment, in the features' dtype
    image_stride,
    text_stride,
    num_rows,
    width,
    run_length,  # row blocks of one column that a program computes, one after another
    gain,  # G is multiplied by it, so that fp16 holds small probabilities
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`gradient_strip` for groups that are not flagged, faster; one run of tiles per program.

    The tiles of a run share one loop over depth, as in `row_and_column_sums`. Programs that run at
    the same time share few columns and all rows of a strip, which then stay in L2.
    """
    total_rows = tl.cast(num_rows, tl.int64)
    run = tl.program_id(0)
    entry = segments
    _, n, _, num_segment_rows = load_segment(entry)
    runs_per_column = tl.cdiv(tl.cdiv(num_segment_rows, BLOCK_M), run_length)
    num_runs = runs_per_column * tl.cdiv(n, BLOCK_N)
    while num_runs <= run:
        run -= num_runs
        entry += SEGMENT_FIELDS
        _, n, _, num_segment_rows = load_segment(entry)
        runs_per_column = tl.cdiv(tl.cdiv(num_segment_rows, BLOCK_M), run_length)
        num_runs = runs_per_column * tl.cdiv(n, BLOCK_N)
    if tl.load(flags + load_segment_group(entry)) == 0:
        start, n, first, num_segment_rows = load_segment(entry)
        offset, stride = load_segment_memory(entry)
        col_start = run // runs_per_column * BLOCK_N
        row_block = run % runs_per_column * run_length
        num_blocks = tl.minimum(tl.cdiv(num_segment_rows, BLOCK_M) - row_block, run_length)
        scale_value = tl.load(scale)
        steps = tl.cdiv(width, BLOCK_K)
        depth = tl.arange(0, BLOCK_K)
        features = (image, text, image_stride, text_stride, width)
        product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        step = 0
        # disable_licm: hoisted values would occupy registers throughout the loop, and spill.
        for _ in tl.range(0, num_blocks * steps, disable_licm=True):
            row_start = first + row_block * BLOCK_M
            tile = (start, n, row_start, col_start)
            product = add_depth_step(
                product, features, tile, depth, step, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
            )
            is_last = step == steps - 1
            if is_last:
                rows = start + tl.minimum(row_start + tl.arange(0, BLOCK_M), n - 1)
                cols = start + tl.minimum(col_start + tl.arange(0, BLOCK_N), n - 1)
                row_shifts = softmax_field(softmaxes, 0, SHIFT, 0, num_rows)
                shift = tl.load(row_shifts + rows)[:, None]
                row_factor = tl.load(factors + rows)[:, None]
                col_factor = tl.load(factors + total_rows + cols)[None, :]
                g = exp_gap(scale_value * product, shift) * (row_factor + col_factor) * gain
                g = _without_diagonal(g, n, row_start, col_start, BLOCK_M, BLOCK_N)
                segment = (first, num_segment_rows, offset, stride)
                _store_tile(g, workspace, segment, row_start, col_start, BLOCK_M, BLOCK_N)
                product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            step = tl.where(is_last, 0, step + 1)
            row_block += tl.where(is_last, 1, 0)


@triton.jit
def gradient_strip_from_cosines(
    cosines,  # [rows, n] fp32, of image and text
    ref_cosines,  # [rows, n] fp32, of the reference
    scale,
    ref_scale,
    softmaxes,  # [matrices, SOFTMAX_FIELDS, 2, N]
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
    gain,  # G is multiplied by it, so that fp16 holds small probabilities
    HAS_REF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`gradient_strip` of one segment, from cosines that cuBLAS has computed."""
    row_start = tl.program_id(0).to(tl.int64) * BLOCK_M
    col_start = tl.program_id(1) * BLOCK_N
    strip_rows = row_start + tl.arange(0, BLOCK_M)
    rows = first + strip_rows
    cols = col_start + tl.arange(0, BLOCK_N)
    in_strip = (strip_rows < num_strip_rows)[:, None] & (cols < n)[None, :]
    is_online = tl.load(flags + group) != 0
    row_at = tl.minimum(rows, n - 1)
    col_at = tl.minimum(cols, n - 1)
    at = strip_rows[:, None] * cosines_stride + cols[None, :]
    s = tl.load(scale) * tl.load(cosines + at, mask=in_strip, other=0.0)
    g = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    g = _add_weighted_exp(g, s, softmaxes, factors, 0, start, row_at, col_at, num_rows, is_online)
    if HAS_REF:
        s0 = tl.load(ref_scale) * tl.load(ref_cosines + at, mask=in_strip, other=0.0)
        g = _add_weighted_exp(
            g, s0, softmaxes, factors, 1, start, row_at, col_at, num_rows, is_online
        )
    g = tl.where(off_diagonal(rows, cols, n), g * gain, 0.0)
    at = strip_rows[:, None] * workspace_stride + cols[None, :]
    tl.store(workspace + at, g.to(workspace.dtype.element_ty), mask=in_strip)


@triton.jit
def feature_gradients(
    products,  # [N, width] fp32: G @ partner, times gain, without the diagonal
    diagonal,  # [N] G's diagonal
    tower,  # [N, width] the features whose gradient this is
    partner,  # [N, width] the other tower's features
    scale,
    upstream_peak,  # [] as in gradient_factors
    stretch,  # [] as in round_features, of the partner in `products`; read if IS_STRETCHED
    gradients,  # [N, width] out: in the tower's dtype; may be `products`
    d_scale,  # [N] out: what each row adds to the gradient of scale
    tower_stride,
    partner_stride,
    num_rows,
    width,
    gain,  # as in gradient_strip
    IS_STRETCHED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add the diagonal in fp32, divide by the gain, multiply by scale, and round once."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = rows < num_rows
    at = rows[:, None].to(tl.int64)
    diagonal_value = tl.load(diagonal + rows, mask=exists, other=0.0)[:, None]
    peak = tl.load(upstream_peak)
    factor = tl.load(scale) * peak
    divisor = tl.cast(gain, tl.float32)
    if IS_STRETCHED:
        divisor *= tl.load(stretch)
    total = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for start in range(0, width, BLOCK_K):
        depth = start + tl.arange(0, BLOCK_K)[None, :]
        mask = exists[:, None] & (depth < width)
        own = tl.load(tower + at * tower_stride + depth, mask=mask, other=0.0).to(tl.float32)
        other = tl.load(partner + at * partner_stride + depth, mask=mask, other=0.0).to(tl.float32)
        gradient = tl.load(products + at * width + depth, mask=mask, other=0.0) / divisor
        gradient += diagonal_value * other
        total += tl.sum(own * gradient, 1)
        rounded = (gradient * factor).to(gradients.dtype.element_ty)
        tl.store(gradients + at * width + depth, rounded, mask=mask)
    tl.store(d_scale + rows, total * peak, mask=exists)
