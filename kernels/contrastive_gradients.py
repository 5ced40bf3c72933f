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
    IMAGE_STRETCH,
    MISS_PROBABILITY,
    MISS_RATIO,
    SCALE,
    SHIFT,
    SLOTS,
    TEXT_STRETCH,
    UPSTREAM_PEAK,
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


@triton.jit(do_not_specialize=["upstream", "n"])
def gradient_factors(
    upstream,  # [4 or 2, N] gradients: ce row, ce column, kl row, kl column
    scalars,
    softmaxes,  # [matrices, SOFTMAX_FIELDS, 2, N]
    factors,  # [1 + 2 * matrices, N] out, as below
    n,
    HAS_REF: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Factors and diagonal of a backward pass."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    store_factors(upstream, scalars, softmaxes, factors, rows, rows < n, n, HAS_REF, BLOCK_R)


@triton.jit
def store_factors(
    upstream, scalars, softmaxes, factors, rows, exists, n, HAS_REF: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Store the factors of some rows, whose softmaxes this program may have stored.

    The first row of `factors` is G's diagonal. exp(s - shift) times those of rows and columns is
    weight * p; with a reference, exp(s0 - its shift) times the last two is -kl * p0.
    """
    total_rows = tl.cast(n, tl.int64)
    peak = tl.load(scalars + UPSTREAM_PEAK)
    diagonal = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for direction in tl.static_range(2):  # rows, columns
        at = direction * total_rows + rows
        own = factors + (1 + direction) * total_rows + rows
        weight = tl.load(upstream + at, mask=exists, other=0.0) / peak
        if HAS_REF:
            ref_ratio = softmax_field(softmaxes, 1, MISS_RATIO, direction, n)
            ref_miss = softmax_field(softmaxes, 1, MISS_PROBABILITY, direction, n)
            kl = tl.load(upstream + 2 * total_rows + at, mask=exists, other=0.0) / peak
            weight += kl
            ref_factor = -kl * tl.load(ref_ratio + rows, mask=exists, other=0.0)
            tl.store(own + 2 * total_rows, ref_factor, mask=exists)
            diagonal += kl * tl.load(ref_miss + rows, mask=exists, other=0.0)
        ratio = softmax_field(softmaxes, 0, MISS_RATIO, direction, n)
        miss = softmax_field(softmaxes, 0, MISS_PROBABILITY, direction, n)
        factor = weight * tl.load(ratio + rows, mask=exists, other=0.0)
        tl.store(own, factor, mask=exists)
        diagonal -= weight * tl.load(miss + rows, mask=exists, other=0.0)
    tl.store(factors + rows, diagonal, mask=exists)


@triton.jit(do_not_specialize=["flag", "n", "first", "num_strip_rows", "run_length"])
def gradient_strip_without_reference(
    image,
    text,
    scalars,
    softmaxes,  # [1, SOFTMAX_FIELDS, 2, N]
    factors,  # [3, N]
    flag,  # []
    workspace,  # out: a strip of G, in the features' dtype
    image_stride,
    text_stride,
    n,
    first,  # the strip's first row
    num_strip_rows,
    width,
    run_length,  # row blocks of one column that a program computes, one after another
    gain,  # G is multiplied by it, so that fp16 holds small probabilities
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A strip of G without a reference; one run of tiles per program.

    The tiles of a run share one loop over depth, as in `row_and_column_sums`. Programs that run at
    the same time share few columns and all rows of a strip, which then stay in L2.
    """
    if tl.load(flag) == 0:
        num_row_blocks = tl.cdiv(num_strip_rows, BLOCK_M)
        runs_per_column = tl.cdiv(num_row_blocks, run_length)
        col_start = tl.program_id(0) // runs_per_column * BLOCK_N
        row_block = tl.program_id(0) % runs_per_column * run_length
        num_blocks = tl.minimum(num_row_blocks - row_block, run_length)
        scale_value = tl.load(scalars + SCALE)
        steps = tl.cdiv(width, BLOCK_K)
        depth = tl.arange(0, BLOCK_K)
        features = (image, text, image_stride, text_stride, width)
        strip = (first, num_strip_rows, gain)
        product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        step = 0
        # disable_licm: hoisted values would occupy registers throughout the loop, and spill.
        for _ in tl.range(0, num_blocks * steps, disable_licm=True):
            tile = (n, first + row_block * BLOCK_M, col_start)
            product = add_depth_step(
                product, features, tile, depth, step, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
            )
            is_last = step == steps - 1
            if is_last:
                s = scale_value * product
                _store_tile(s, s, softmaxes, factors, workspace, workspace, tile, strip,
                            False, False, False, BLOCK_M, BLOCK_N)  # fmt: skip
                product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            step = tl.where(is_last, 0, step + 1)
            row_block += tl.where(is_last, 1, 0)


@triton.jit(do_not_specialize=["flag", "n", "first", "num_strip_rows"])
def gradient_strip(
    image,
    text,
    ref_image,
    ref_text,
    scalars,
    softmaxes,  # [2, SOFTMAX_FIELDS, 2, N]
    factors,  # [1 + 2 * matrices, N]
    flag,  # []
    workspace,  # out: a strip of G, in the features' dtype
    row_crosses,  # [SLOTS, N] out, if HAS_CROSS: sums of e0 * (s0 - s), a slot per chunk of columns
    col_crosses,  # [row blocks of the longest strip, N] out: likewise, added up over the strips
    image_stride,
    text_stride,
    ref_image_stride,
    ref_text_stride,
    n,
    first,  # the strip's first row
    num_strip_rows,
    width,
    ref_width,
    gain,  # G is multiplied by it, so that fp16 holds small probabilities
    HAS_REF: tl.constexpr,
    HAS_CROSS: tl.constexpr,
    IS_ONLINE: tl.constexpr,  # whether for a group that is flagged, or for one that is not
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A strip of G, and the sums that make the KL; a block of rows x chunk of columns per program.

    Launched once per kind of group: one kernel for both would need the registers of both. Crosses
    are left to `row_and_column_sums_online` where the group is flagged.
    """
    features = (image, text, image_stride, text_stride, width)
    ref_features = (ref_image, ref_text, ref_image_stride, ref_text_stride, ref_width)
    num_row_blocks = tl.cdiv(num_strip_rows, BLOCK_M)
    row_block, chunk = tl.program_id(0) % num_row_blocks, tl.program_id(0) // num_row_blocks
    first_col, end_col = slot_range(chunk, n, BLOCK_N)
    if (tl.load(flag) != 0) == IS_ONLINE:
        row_start = first + row_block * BLOCK_M
        strip = (first, num_strip_rows, gain)
        col_cross = col_crosses + row_block * tl.cast(n, tl.int64)
        row_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
        # disable_licm: hoisted values would occupy registers throughout the products.
        for col_block in tl.range(first_col, end_col, disable_licm=True):
            col_start = col_block * BLOCK_N
            tile = (n, row_start, col_start)
            s = tl.load(scalars + SCALE) * tile_product(
                features, tile, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
            )
            if HAS_REF:
                s0 = tl.load(scalars + SCALE + 1) * tile_product(
                    ref_features, tile, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
                )
                # A quarter of the columns at a time: with both tiles whole registers spill.
                quarter: tl.constexpr = BLOCK_N // 4
                parts = _quarter(s, BLOCK_M, BLOCK_N)
                parts0 = _quarter(s0, BLOCK_M, BLOCK_N)
                for k in tl.static_range(4):
                    row_sum += _store_tile(
                        parts[k], parts0[k], softmaxes, factors, workspace, col_cross,
                        (n, row_start, col_start + k * quarter), strip,
                        True, HAS_CROSS, IS_ONLINE, BLOCK_M, quarter,
                    )  # fmt: skip
            else:
                _store_tile(s, s, softmaxes, factors, workspace, col_cross, tile, strip,
                            False, False, IS_ONLINE, BLOCK_M, BLOCK_N)  # fmt: skip
        if HAS_CROSS:
            at_row = row_start + tl.arange(0, BLOCK_M)
            slot = row_crosses + chunk * tl.cast(n, tl.int64) + at_row
            tl.store(slot, row_sum, mask=at_row < tl.minimum(first + num_strip_rows, n))


@triton.jit
def _quarter(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The columns of a tile in four parts."""
    left, right = _halve(x, BLOCK_M, BLOCK_N)
    return _halve(left, BLOCK_M, BLOCK_N // 2) + _halve(right, BLOCK_M, BLOCK_N // 2)


@triton.jit
def _halve(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right columns of a tile."""
    return tl.split(tl.permute(tl.reshape(x, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _store_tile(
    s,
    s0,  # not read unless HAS_REF
    softmaxes,
    factors,
    workspace,
    col_cross,  # [N], if HAS_CROSS
    tile,  # (n, row_start, col_start)
    strip,  # (first, num_strip_rows, gain)
    HAS_REF: tl.constexpr,
    HAS_CROSS: tl.constexpr,
    IS_ONLINE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store a tile of G, and add up its columns of e0 * (s0 - s), whose row sums are returned."""
    n, row_start, col_start = tile
    first, num_strip_rows, gain = strip
    # Indices are made after the products, so that they occupy no registers in their loops.
    at_row, at_col = row_start + tl.arange(0, BLOCK_M), col_start + tl.arange(0, BLOCK_N)
    rows, cols = tl.minimum(at_row, n - 1), tl.minimum(at_col, n - 1)
    row_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if is_edge(row_start, col_start, n, BLOCK_M, BLOCK_N):
        exists = off_diagonal(at_row, at_col, n)
        s = tl.where(exists, s, -float("inf"))
        if HAS_REF:
            s0 = tl.where(exists, s0, -float("inf"))
    if HAS_CROSS:
        shift = tl.load(softmax_field(softmaxes, 1, SHIFT, 0, n) + rows)
        gap = tl.where(s == -float("inf"), 0.0, s0 - s)
        cross = exp_gap(s0, shift[:, None]) * gap
        row_sum = tl.sum(cross, 1)
        earlier = tl.load(col_cross + at_col, mask=at_col < tl.where(first > 0, n, 0), other=0.0)
        tl.store(col_cross + at_col, earlier + tl.sum(cross, 0), mask=at_col < n)
    g = _weighted_exp(s, softmaxes, factors, 0, rows, cols, n, IS_ONLINE)
    if HAS_REF:
        g += _weighted_exp(s0, softmaxes, factors, 1, rows, cols, n, IS_ONLINE)
    # Writes whole cache lines, padding included: vector stores need one mask per 16 bytes.
    stride = tl.multiple_of(strip_stride(n), 64)
    corner = workspace + (row_start - first).to(tl.int64) * stride
    at = tl.arange(0, BLOCK_M)[:, None] * stride + at_col[None, :]
    in_strip = (at_row < first + num_strip_rows)[:, None] & (at_col < stride)[None, :]
    tl.store(corner + at, (g * gain).to(workspace.dtype.element_ty), mask=in_strip)
    return row_sum


@triton.jit
def _weighted_exp(
    s,
    softmaxes,
    factors,
    MATRIX: tl.constexpr,
    rows,  # in bounds
    cols,
    n,
    IS_ONLINE: tl.constexpr,
):
    """exp(s - shift) times the factors: one exp where rows and columns have one shift."""
    row_factors = factors + (1 + MATRIX * 2) * tl.cast(n, tl.int64)
    row_factor = tl.load(row_factors + rows)[:, None]
    col_factor = tl.load(row_factors + tl.cast(n, tl.int64) + cols)[None, :]
    row_shift = tl.load(softmax_field(softmaxes, MATRIX, SHIFT, 0, n) + rows)[:, None]
    if IS_ONLINE:
        col_shift = tl.load(softmax_field(softmaxes, MATRIX, SHIFT, 1, n) + cols)[None, :]
        g = exp_below(s, row_shift) * row_factor + exp_below(s, col_shift) * col_factor
    else:
        g = exp_gap(s, row_shift) * (row_factor + col_factor)
    return g


@triton.jit(
    do_not_specialize=["scale", "flag", "n", "num_row_crosses", "num_col_crosses", "is_text"]
)
def feature_gradients(
    products,  # [N, width] fp32: G @ partner or G.T @ partner, times gain, without the diagonal
    partner_products,  # likewise, of the partner's gradient; read if there are programs for it
    tower,  # [N, width] the features as given: image, or text where only its gradient is wanted
    partner,  # [N, width] of the other tower
    scale,  # []
    scalars,
    softmaxes,  # [matrices, SOFTMAX_FIELDS, 2, N]
    factors,  # as `store_factors` leaves them
    row_crosses,  # as in gradient_strip, likewise the next
    col_crosses,
    flag,  # []
    d_tower,  # [N, width] out: in tower's dtype; may be `products`
    d_partner,
    d_scale,  # [N] out: what each row adds to the gradient of scale
    losses,  # [4, N] in and out, if there are crosses: kl row and kl column get their part
    tower_stride,
    partner_stride,
    n,
    num_row_crosses,  # slots in row_crosses, 0 if there are none
    num_col_crosses,
    width,
    is_text,  # whether tower is text
    gain,  # as in gradient_strip
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add the diagonal in fp32, divide by the gain, multiply by scale, and round once."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = rows < n
    peak = tl.load(scalars + UPSTREAM_PEAK)
    diagonal = tl.load(factors + rows, mask=exists, other=0.0)
    factor = tl.load(scale) * peak
    if tl.program_id(1) == 0:
        if (num_row_crosses > 0) & (tl.load(flag) == 0):
            _add_crosses(losses, row_crosses, softmaxes, 0, rows, exists, num_row_crosses, n,
                         BLOCK_R)  # fmt: skip
            _add_crosses(losses, col_crosses, softmaxes, 1, rows, exists, num_col_crosses, n,
                         BLOCK_R)  # fmt: skip
        stretch = tl.load(scalars + tl.where(is_text != 0, IMAGE_STRETCH, TEXT_STRETCH))
        total = _finish_gradient(
            products, diagonal, tower, partner, factor, gain * stretch, d_tower, tower_stride,
            partner_stride, rows, exists, width, BLOCK_R, BLOCK_K,
        )  # fmt: skip
        tl.store(d_scale + rows, total * peak, mask=exists)
    else:
        _finish_gradient(
            partner_products, diagonal, partner, tower, factor,
            gain * tl.load(scalars + IMAGE_STRETCH), d_partner, partner_stride, tower_stride, rows,
            exists, width, BLOCK_R, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _add_crosses(
    losses,
    crosses,
    softmaxes,
    DIRECTION: tl.constexpr,
    rows,
    exists,
    num_slots,
    n,
    BLOCK_R: tl.constexpr,
):
    """Add `miss probability / mass * cross` of the reference to the KL of one direction."""
    total_rows = tl.cast(n, tl.int64)
    cross = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for first in range(0, num_slots, SLOTS):
        slot = first + tl.arange(0, SLOTS)[:, None]
        mask = (slot < num_slots) & exists[None, :]
        at = crosses + slot * total_rows + rows[None, :]
        cross += tl.sum(tl.load(at, mask=mask, other=0.0), 0)
    ratio = softmax_field(softmaxes, 1, MISS_RATIO, DIRECTION, n)
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
