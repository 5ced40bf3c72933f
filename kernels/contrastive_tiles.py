"""Parts shared by the contrastive kernels: products of a tile, its mask, and numerical functions.

S = scale * image @ text.T; rows and columns are counted within their group.
"""

from __future__ import annotations

import triton
import triton.language as tl

# exp(66) times 2^20 columns, also times the KL's (s0 - s), still fits fp32.
HEADROOM = tl.constexpr(66.0)
# A smaller sum may have lost terms to underflow: fp32 is normal down to 2^-126.
UNDERFLOW = tl.constexpr(2.0**-80)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def tile_product(
    features,  # (left, right, left_stride, right_stride, width); left and right [N, width]
    tile,  # (n, row_start, col_start): the group's size, the corner
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,  # BLOCK_K divides width
    PRECISION: tl.constexpr,  # of fp32 products: "ieee" or "tf32"
):
    """fp32 <left_i, right_j> of a [BLOCK_M, BLOCK_N] tile.

    Rows past the end of the group repeat its last row, so that every load is in bounds without a
    mask per row; the caller masks the tile. Only the start of the tile needs 64-bit addresses.
    """
    left, right, left_stride, right_stride, width = features
    n, row_start, col_start = tile
    rows = tl.minimum(tl.arange(0, BLOCK_M), n - 1 - row_start)
    cols = tl.minimum(tl.arange(0, BLOCK_N), n - 1 - col_start)
    depth = tl.arange(0, BLOCK_K)
    left = left + tl.cast(row_start, tl.int64) * left_stride
    right = right + tl.cast(col_start, tl.int64) * right_stride
    left_at = rows[:, None] * left_stride + depth[None, :]
    right_at = cols[None, :] * right_stride + depth[:, None]
    product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, width, BLOCK_K):
        product = _add_product(
            product, left + left_at, right + right_at, depth, width - k, EVEN_K, PRECISION
        )
        left += BLOCK_K
        right += BLOCK_K
    return product


@triton.jit
def add_depth_step(
    product,
    features,  # as in tile_product
    tile,
    depth,  # arange(0, BLOCK_K), made outside the loop: otherwise 30 more registers
    step,  # of cdiv(width, BLOCK_K)
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of `tile_product`, for kernels whose tiles share one loop over depth.

    Addresses are made from the loop's counters in each step, since the tile changes in the loop.
    """
    left, right, left_stride, right_stride, width = features
    n, row_start, col_start = tile
    rows = tl.minimum(tl.arange(0, BLOCK_M), n - 1 - row_start)
    cols = tl.minimum(tl.arange(0, BLOCK_N), n - 1 - col_start)
    left = left + tl.cast(row_start, tl.int64) * left_stride + step * BLOCK_K
    right = right + tl.cast(col_start, tl.int64) * right_stride + step * BLOCK_K
    left += rows[:, None] * left_stride + depth[None, :]
    right += cols[None, :] * right_stride + depth[:, None]
    return _add_product(product, left, right, depth, width - step * BLOCK_K, EVEN_K, PRECISION)


@triton.jit
def _add_product(
    product,
    left,  # [BLOCK_M, BLOCK_K] pointers
    right,  # [BLOCK_K, BLOCK_N] pointers
    depth,  # [BLOCK_K]
    remaining,  # of the width
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """product + left @ right."""
    if EVEN_K:
        a = tl.load(left)
        b = tl.load(right)
    else:
        inside = depth < remaining
        a = tl.load(left, mask=inside[None, :], other=0.0)
        b = tl.load(right, mask=inside[:, None], other=0.0)
    return tl.dot(a, b, product, input_precision=PRECISION)


@triton.jit
def off_diagonal(rows, cols, n):
    """Which elements of the tile exist and are not on the diagonal."""
    return (rows[:, None] != cols[None, :]) & (rows < n)[:, None] & (cols < n)[None, :]


@triton.jit
def is_edge(row_start, col_start, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether a tile crosses the diagonal or the end of its group; other tiles need no mask."""
    crosses = (row_start < col_start + BLOCK_N) & (col_start < row_start + BLOCK_M)
    return crosses | (row_start + BLOCK_M > n) | (col_start + BLOCK_N > n)


@triton.jit
def exp_gap(x, shift):
    """exp(x - shift) by a multiply-add: one rounding, of a small result, and one ex2."""
    return tl.exp2(tl.fma(x, LOG2_E, shift * -LOG2_E))


@triton.jit
def exp_below(x, peak):
    """exp(x - peak), exact where x equals the peak, however large both are."""
    return tl.exp2((x - peak) * LOG2_E)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) to a relative error of 1e-7, even where it is 1e-20.

    log1p(u) = 2 atanh(u / (2 + u)) by its series. The hardware's logarithm has an absolute error of
    2^-22, too much near 1.
    """
    u = tl.exp(-tl.abs(x))
    z = u / (2.0 + u)
    w = z * z
    series = 1.0 / 17
    for k in tl.static_range(8):
        series = series * w + 1.0 / (15 - 2 * k)
    # tl.maximum(x, 0) would turn NaN into 0; the sum keeps it.
    return tl.where(x > 0, x, 0.0) + 2.0 * z * series


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), without the overflow of exp(-x)."""
    u = tl.exp(-tl.abs(x))
    return tl.where(x > 0, 1.0, u) / (1.0 + u)
