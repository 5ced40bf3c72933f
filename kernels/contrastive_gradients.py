"""Backward: strips of G, the gradient with respect to S, and from them the features' gradients.

d_image = scale * G @ text and d_text = scale * G.T @ image, which the launcher leaves to cuBLAS, a
strip of rows at a time. In order of launch: per strip one of the `gradient_strip...` kernels, then
`feature_gradients`. Beside the diagonal, with e = exp(s - shift) and e0 likewise,

    G = e * (factor_i + factor_j) + e0 * (ref_factor_i + ref_factor_j)

Factors are weight * miss_probability / sum, not weight * exp(shift - lse). A row of p then adds up
to its miss probability to the last bit; a rounded lse near 100 would tilt the whole row by 4e-6.
Weights are divided by their largest magnitude, which keeps 1/N out of factors near 1e-34.

The diagonal stays out of the strips: rounded to bf16, its -1 beside off-diagonal 1/N would be the
largest error of all. `feature_gradients` adds it in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fasterase.kernels.contrastive_layout import (
    MISS_PROBABILITY,
    MISS_RATIO,
    SHIFT,
    SLOTS,
    count_slots,
    locate_rows,
    locate_strip,
    slot_range,
    softmax_field,
    strip_stride,
)
from fasterase.kernels.contrastive_tiles import (
    add_depth_step,
    exp_below,
    exp_gap,
    is_edge,
    off_diagonal,
    tile_product,
)


@triton.jit
def gradient_factors(
    upstream,  # [4 or 2, N] gradients: ce row, ce column, kl row, kl column
    upstream_peak,  # [] their largest finite magnitude
    softmaxes,  # [matrices, SOFTMAX_FIELDS, 2, N]
    factors,  # [matrices, 2, N] out: exp(s - shift) times these is weight * p, or -kl * p0
    diagonal,  # [N] out: G's diagonal
    num_rows,
    HAS_REF: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Factors and diagonal of a backward pass."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    store_factors(
        upstream, upstream_peak, softmaxes, factors, diagonal, rows, rows < num_rows, num_rows,
        HAS_REF, BLOCK_R,
    )  # fmt: skip


@triton.jit
def store_factors(
    upstream, upstream_peak, softmaxes, factors, diagonal, rows, exists, num_rows,
    HAS_REF: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Store factors and diagonal of some rows, whose softmaxes this program may have stored."""
    total_rows = tl.cast(num_rows, tl.int64)
    peak = tl.load(upstream_peak)
    diagonal_value = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for direction in tl.static_range(2):  # rows, columns
        at = direction * total_rows + rows
        weight = tl.load(upstream + at, mask=exists, other=0.0) / peak
        if HAS_REF:
            ref_ratio = softmax_field(softmaxes, 1, MISS_RATIO, direction, num_rows)
            ref_miss = softmax_field(softmaxes, 1, MISS_PROBABILITY, direction, num_rows)
            kl = tl.load(upstream + 2 * total_rows + at, mask=exists, other=0.0) / peak
            weight += kl
            ref_factor = -kl * tl.load(ref_ratio + rows, mask=exists, other=0.0)
            tl.store(factors + 2 * total_rows + at, ref_factor, mask=exists)
            diagonal_value += kl * tl.load(ref_miss + rows, mask=exists, other=0.0)
        ratio = softmax_field(softmaxes, 0, MISS_RATIO, direction, num_rows)
        miss = softmax_field(softmaxes, 0, MISS_PROBABILITY, direction, num_rows)
        factor = weight * tl.load(ratio + rows, mask=exists, other=0.0)
        tl.store(factors + at, factor, mask=exists)
        diagonal_value -= weight * tl.load(miss + rows, mask=exists, other=0.0)
    tl.store(diagonal + rows, diagonal_value, mask=exists)


@triton.jit
def _weighted_exp(
    s,
    softmaxes,
    factors,
    MATRIX: tl.constexpr,
    rows,  # in the batch, in bounds
    cols,
    num_rows,
    IS_ONLINE: tl.constexpr,
):
    """exp(s - shift) times the factors: one exp where rows and columns have one shift."""
    row_factors = factors + MATRIX * 2 * tl.cast(num_rows, tl.int64)
    row_factor = tl.load(row_factors + rows)[:, None]
    col_factor = tl.load(row_factors + tl.cast(num_rows, tl.int64) + cols)[None, :]
    row_shift = tl.load(softmax_field(softmaxes, MATRIX, SHIFT, 0, num_rows) + rows)[:, None]
    if IS_ONLINE:
        col_shift = tl.load(softmax_field(softmaxes, MATRIX, SHIFT, 1, num_rows) + cols)[None, :]
        g = exp_below(s, row_shift) * row_factor + exp_below(s, col_shift) * col_factor
    else:
        g = exp_gap(s, row_shift) * (row_factor + col_factor)
    return g


@triton.jit
def _store_tile(
    g,
    workspace,
    strip,  # (n, first, num_strip_rows, offset)
    row_start,
    col_start,
    gain,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store a tile of G, times gain."""
    n, first, num_strip_rows, offset = strip
    rows = row_start + tl.arange(0, BLOCK_M)
    cols = col_start + tl.arange(0, BLOCK_N)
    g *= gain
    # Writes whole cache lines, padding included: vector stores need one mask per 16 bytes.
    stride = tl.multiple_of(strip_stride(n), 64)
    corner = workspace + tl.multiple_of(offset, 64) + (row_start - first).to(tl.int64) * stride
    at = tl.arange(0, BLOCK_M)[:, None] * stride + cols[None, :]
    in_strip = (rows < first + num_strip_rows)[:, None] & (cols < stride)[None, :]
    tl.store(corner + at, g.to(workspace.dtype.element_ty), mask=in_strip)


@triton.jit(do_not_specialize=["split", "first", "first_rows", "second_rows", "run_length"])
def gradient_strip_without_reference(
    image,
    text,
    scales,  # [1]
    softmaxes,  # [1, SOFTMAX_FIELDS, 2, N]
    factors,  # [1, 2, N]
    flags,  # [2]
    workspace,  # out: a strip of G per group, in the features' dtype
    image_stride,
    text_stride,
    split,
    num_rows,
    first,  # the strips' first row in their group
    first_rows,  # rows of the strip of the first group, and of the second
    second_rows,
    width,
    run_length,  # row blocks of one column that a program computes, one after another
    gain,  # G is multiplied by it, so that fp16 holds small probabilities
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Strips of G without a reference; one run of tiles per program.

    The tiles of a run share one loop over depth, as in `row_and_column_sums`. Programs that run at
    the same time share few columns and all rows of a strip, which then stay in L2.
    """
    num_first = tl.cdiv(tl.cdiv(first_rows, BLOCK_M), run_length) * tl.cdiv(split, BLOCK_N)
    group, start, n, num_strip_rows, offset, run = locate_strip(
        tl.program_id(0), split, num_rows, first_rows, second_rows, num_first
    )
    if tl.load(flags + group) == 0:
        num_row_blocks = tl.cdiv(num_strip_rows, BLOCK_M)
        runs_per_column = tl.cdiv(num_row_blocks, run_length)
        col_start = run // runs_per_column * BLOCK_N
        row_block = run % runs_per_column * run_length
        num_blocks = tl.minimum(num_row_blocks - row_block, run_length)
        scale_value = tl.load(scales)
        steps = tl.cdiv(width, BLOCK_K)
        depth = tl.arange(0, BLOCK_K)
        features = (image, text, image_stride, text_stride, width)
        product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        step = 0
        # disable_licm: hoisted values would occupy registers throughout the loop, and spill.
        for _ in tl.range(0, num_blocks * steps, disable_licm=True):
            row_start = first + row_block * BLOCK_M
            tile = (start.to(tl.int64), n, row_start, col_start)
            product = add_depth_step(
                product, features, tile, depth, step, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
            )
            is_last = step == steps - 1
            if is_last:
                rows = start + tl.minimum(row_start + tl.arange(0, BLOCK_M), n - 1)
                cols = start + tl.minimum(col_start + tl.arange(0, BLOCK_N), n - 1)
                s = scale_value * product
                if is_edge(row_start, col_start, n, BLOCK_M, BLOCK_N):
                    at_row, at_col = (
                        row_start + tl.arange(0, BLOCK_M),
                        col_start + tl.arange(0, BLOCK_N),
                    )
                    s = tl.where(off_diagonal(at_row, at_col, n), s, -float("inf"))
                g = _weighted_exp(s, softmaxes, factors, 0, rows, cols, num_rows, False)
                strip = (n, first, num_strip_rows, offset)
                _store_tile(g, workspace, strip, row_start, col_start, gain, BLOCK_M, BLOCK_N)
                product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            step = tl.where(is_last, 0, step + 1)
            row_block += tl.where(is_last, 1, 0)


@triton.jit(do_not_specialize=["split", "first", "first_rows", "second_rows"])
def gradient_strip(
    image,
    text,
    ref_image,
    ref_text,
    scales,  # [2]
    softmaxes,  # [2, SOFTMAX_FIELDS, 2, N]
    factors,  # [matrices, 2, N]
    flags,  # [2]
    workspace,  # out: a strip of G per group, in the features' dtype
    row_crosses,  # [SLOTS, N] out, if HAS_CROSS: sums of e0 * (s0 - s), a slot per chunk of columns
    col_crosses,  # [row blocks of the longest strip, N] out: likewise, added up over the strips
    image_stride,
    text_stride,
    ref_image_stride,
    ref_text_stride,
    split,
    num_rows,
    first,  # the strips' first row in their group
    first_rows,  # rows of the strip of the first group, and of the second
    second_rows,
    width,
    ref_width,
    gain,  # G is multiplied by it, so that fp16 holds small probabilities
    HAS_REF: tl.constexpr,
    HAS_CROSS: tl.constexpr,
    IS_ONLINE: tl.constexpr,  # whether for the groups that are flagged, or for the others
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Strips of G, and the sums that make the KL; one block of rows x chunk of columns per program.

    Launched once per kind of group: one kernel for both would need the registers of both. Crosses
    are left to `row_and_column_sums_online` where a group is flagged.
    """
    features = (image, text, image_stride, text_stride, width)
    ref_features = (ref_image, ref_text, ref_image_stride, ref_text_stride, ref_width)
    num_first = tl.cdiv(first_rows, BLOCK_M) * count_slots(split, BLOCK_N)
    group, start, n, num_strip_rows, offset, index = locate_strip(
        tl.program_id(0), split, num_rows, first_rows, second_rows, num_first
    )
    num_row_blocks = tl.cdiv(num_strip_rows, BLOCK_M)
    row_block, chunk = index % num_row_blocks, index // num_row_blocks
    first_col, end_col = slot_range(chunk, n, BLOCK_N)
    if (tl.load(flags + group) != 0) == IS_ONLINE:
        row_start = first + row_block * BLOCK_M
        total_rows = tl.cast(num_rows, tl.int64)
        row_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
        # disable_licm: hoisted values would occupy registers throughout the products.
        for col_block in tl.range(first_col, end_col, disable_licm=True):
            col_start = col_block * BLOCK_N
            tile = (start.to(tl.int64), n, row_start, col_start)
            s = tl.load(scales) * tile_product(
                features, tile, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
            )
            # Indices are made after the products, so that they occupy no registers in their loops.
            rows = start + tl.minimum(row_start + tl.arange(0, BLOCK_M), n - 1)
            cols = start + tl.minimum(col_start + tl.arange(0, BLOCK_N), n - 1)
            edge = is_edge(row_start, col_start, n, BLOCK_M, BLOCK_N)
            if edge:
                exists = off_diagonal(
                    row_start + tl.arange(0, BLOCK_M), col_start + tl.arange(0, BLOCK_N), n
                )
                s = tl.where(exists, s, -float("inf"))
            if HAS_REF:
                s0 = tl.load(scales + 1) * tile_product(
                    ref_features, tile, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
                )
                gap = s0 - s
                if edge:
                    gap = tl.where(s == -float("inf"), 0.0, gap)
                    s0 = tl.where(s == -float("inf"), s, s0)
                if HAS_CROSS:
                    shift = tl.load(softmax_field(softmaxes, 1, SHIFT, 0, num_rows) + rows)
                    cross = exp_gap(s0, shift[:, None]) * gap
                    row_sum += tl.sum(cross, 1)
                    at_col = col_start + tl.arange(0, BLOCK_N)
                    slot = col_crosses + row_block * total_rows + start + at_col
                    earlier = tl.load(slot, mask=at_col < tl.where(first > 0, n, 0), other=0.0)
                    tl.store(slot, earlier + tl.sum(cross, 0), mask=at_col < n)
                    # Keeps what follows, and its registers, behind the sums.
                    tl.debug_barrier()
                g = _weighted_exp(s0, softmaxes, factors, 1, rows, cols, num_rows, IS_ONLINE)
                g += _weighted_exp(s, softmaxes, factors, 0, rows, cols, num_rows, IS_ONLINE)
            else:
                g = _weighted_exp(s, softmaxes, factors, 0, rows, cols, num_rows, IS_ONLINE)
            strip = (n, first, num_strip_rows, offset)
            _store_tile(g, workspace, strip, row_start, col_start, gain, BLOCK_M, BLOCK_N)
        if HAS_CROSS:
            at_row = row_start + tl.arange(0, BLOCK_M)
            slot = row_crosses + chunk * total_rows + start + at_row
            tl.store(slot, row_sum, mask=at_row < tl.minimum(first + num_strip_rows, n))


@triton.jit
def feature_gradients(
    image_products,  # [N, width] fp32: G @ text, times gain, without the diagonal
    text_products,  # [N, width] fp32: G.T @ image, likewise
    image,  # [N, width] the features as given
    text,
    scale,  # []
    stretches,  # [matrices, 2] of the features in the products; 1 where they are not stretched
    softmaxes,  # [matrices, SOFTMAX_FIELDS, 2, N]
    upstream_peak,  # []
    diagonal,  # [N] G's diagonal
    row_crosses,  # as in gradient_strip, likewise the next
    col_crosses,
    flags,  # [2]
    d_image,  # [N, width] out: in image's dtype; may be `image_products`
    d_text,
    d_scale,  # [N] out: what each row adds to the gradient of scale
    losses,  # [4, N] in and out, if HAS_CROSS: kl row and kl column get the crosses' part
    image_stride,
    text_stride,
    split,
    num_rows,
    strip_rows,  # of the longest strip
    width,
    gain,  # as in gradient_strip
    WANTS_IMAGE: tl.constexpr,
    WANTS_TEXT: tl.constexpr,
    HAS_CROSS: tl.constexpr,
    BLOCK_M: tl.constexpr,  # of gradient_strip
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add the diagonal in fp32, divide by the gain, multiply by scale, and round once."""
    group, start, n, block = locate_rows(tl.program_id(0), split, num_rows, BLOCK_R)
    rows = start + block * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = rows < start + n
    peak = tl.load(upstream_peak)
    diagonal_value = tl.load(diagonal + rows, mask=exists, other=0.0)
    factor = tl.load(scale) * peak
    if tl.program_id(1) == 0:
        if HAS_CROSS:
            num_blocks = tl.cdiv(tl.minimum(strip_rows, n), BLOCK_M)
            if tl.load(flags + group) == 0:
                _add_crosses(
                    losses, row_crosses, softmaxes, 0, rows, exists, count_slots(n, BLOCK_N),
                    num_rows, BLOCK_R,
                )  # fmt: skip
                _add_crosses(
                    losses, col_crosses, softmaxes, 1, rows, exists, num_blocks, num_rows, BLOCK_R
                )
        if WANTS_IMAGE:
            total = _finish_gradient(
                image_products, diagonal_value, image, text, factor, gain * tl.load(stretches + 1),
                d_image, image_stride, text_stride, rows, exists, width, BLOCK_R, BLOCK_K,
            )  # fmt: skip
            tl.store(d_scale + rows, total * peak, mask=exists)
    elif WANTS_TEXT:
        total = _finish_gradient(
            text_products, diagonal_value, text, image, factor, gain * tl.load(stretches),
            d_text, text_stride, image_stride, rows, exists, width, BLOCK_R, BLOCK_K,
        )  # fmt: skip
        if not WANTS_IMAGE:
            tl.store(d_scale + rows, total * peak, mask=exists)


@triton.jit
def _add_crosses(
    losses,
    crosses,
    softmaxes,
    DIRECTION: tl.constexpr,
    rows,
    exists,
    num_slots,
    num_rows,
    BLOCK_R: tl.constexpr,
):
    """Add `miss probability / mass * cross` of the reference to the KL of one direction."""
    total_rows = tl.cast(num_rows, tl.int64)
    cross = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for first in range(0, num_slots, SLOTS):
        slot = first + tl.arange(0, SLOTS)[:, None]
        mask = (slot < num_slots) & exists[None, :]
        at = crosses + slot * total_rows + rows[None, :]
        cross += tl.sum(tl.load(at, mask=mask, other=0.0), 0)
    ratio = softmax_field(softmaxes, 1, MISS_RATIO, DIRECTION, num_rows)
    part = tl.load(ratio + rows, mask=exists, other=0.0) * cross
    loss = losses + (2 + DIRECTION) * total_rows + rows
    tl.store(loss, tl.load(loss, mask=exists, other=0.0) + part, mask=exists)


@triton.jit
def _finish_gradient(
    products,
    diagonal,  # [BLOCK_R] G's diagonal
    tower,  # [N, width] the features whose gradient this is
    partner,  # [N, width] the other tower's features
    factor,
    divisor,
    gradients,
    tower_stride,
    partner_stride,
    rows,
    exists,
    width,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Store one tower's gradient; return each row's <features, gradient / factor>."""
    at = rows[:, None].to(tl.int64)
    total = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for start in range(0, width, BLOCK_K):
        depth = start + tl.arange(0, BLOCK_K)[None, :]
        mask = exists[:, None] & (depth < width)
        own = tl.load(tower + at * tower_stride + depth, mask=mask, other=0.0).to(tl.float32)
        other = tl.load(partner + at * partner_stride + depth, mask=mask, other=0.0).to(tl.float32)
        gradient = tl.load(products + at * width + depth, mask=mask, other=0.0) / divisor
        gradient += diagonal[:, None] * other
        total += tl.sum(own * gradient, 1)
        rounded = (gradient * factor).to(gradients.dtype.element_ty)
        tl.store(gradients + at * width + depth, rounded, mask=mask)
    return total
