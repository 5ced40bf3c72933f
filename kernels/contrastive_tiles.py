"""One tile of a similarity matrix: its products, its mask, and the small functions of its epilogue.

Shared by every kernel of the operator. S = scale * image @ text.T; rows and columns are counted
within their group.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Private partial sums a row or column: 32 strips x 32 chunks of a group keep any GPU busy.
SLOTS = tl.constexpr(32)
ITEM_FIELDS = tl.constexpr(9)  # start, n, row blocks [2], strip, column blocks [2], chunk, group
SPAN_FIELDS = tl.constexpr(6)  # start, rows, strips, chunks, group, whether the group has > 1 row


@triton.jit
def tile_product(
    left,  # [n, width], the group's first row
    right,  # [n, width]
    left_stride,
    right_stride,
    row_start,
    col_start,
    n,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,  # BLOCK_K divides width
    PRECISION: tl.constexpr,  # of fp32 products: "ieee" or "tf32"
):
    """fp32 <left_i, right_j> of a [BLOCK_M, BLOCK_N] tile.

    Rows past the end repeat the last one, so that no load leaves the tensors and none needs a mask
    a row; the caller masks the tile. Only the start of the tile needs 64 bits.
    """
    rows = tl.minimum(tl.arange(0, BLOCK_M), n - 1 - row_start)
    cols = tl.minimum(tl.arange(0, BLOCK_N), n - 1 - col_start)
    depth = tl.arange(0, BLOCK_K)
    left += tl.cast(row_start, tl.int64) * left_stride
    right += tl.cast(col_start, tl.int64) * right_stride
    left_at = rows[:, None] * left_stride + depth[None, :]
    right_at = cols[None, :] * right_stride + depth[:, None]
    product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, width, BLOCK_K):
        if EVEN_K:
            a = tl.load(left + left_at)
            b = tl.load(right + right_at)
        else:
            a = tl.load(left + left_at, mask=depth[None, :] < width - start, other=0.0)
            b = tl.load(right + right_at, mask=depth[:, None] < width - start, other=0.0)
        product = tl.dot(a, b, product, input_precision=PRECISION)
        left += BLOCK_K
        right += BLOCK_K
    return product


@triton.jit
def off_diagonal(rows, cols, n):
    """Which elements of the tile exist and are not a pair's own logit."""
    return (rows[:, None] != cols[None, :]) & (rows < n)[:, None] & (cols < n)[None, :]


@triton.jit
def is_edge(row_start, col_start, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether a tile crosses the diagonal or the end of its group; the others need no mask."""
    crosses = (row_start < col_start + BLOCK_N) & (col_start < row_start + BLOCK_M)
    return crosses | (row_start + BLOCK_M > n) | (col_start + BLOCK_N > n)


@triton.jit
def exp_gap(x, shift):
    """exp(x - shift): the multiply-add rounds once, where the result is small, and feeds ex2."""
    return tl.exp2(tl.fma(x, 1.4426950408889634, shift * -1.4426950408889634))


@triton.jit
def exp_below(x, peak):
    """exp(x - peak), exact where x is the peak, however large both are."""
    return tl.exp2((x - peak) * 1.4426950408889634)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), relative error 1e-7 also where it is 1e-20.

    log1p(u) = 2 atanh(u / (2 + u)) by its series: the hardware's logarithm is exact to 2^-22
    absolute only, which near 1 is nothing.
    """
    u = tl.exp(-tl.abs(x))
    z = u / (2.0 + u)
    w = z * z
    series = 1.0 / 17
    for k in tl.static_range(8):
        series = series * w + 1.0 / (15 - 2 * k)
    # The sum keeps NaN, which tl.maximum alone would turn into 0.
    return tl.where(x > 0, x, 0.0) + 2.0 * z * series


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), without the overflow of exp(-x)."""
    u = tl.exp(-tl.abs(x))
    return tl.where(x > 0, 1.0, u) / (1.0 + u)
