"""Who computes what, and the layout of the tensors that contrastive kernels exchange.

A launch covers one group of N pairs. Programs find their work by arithmetic alone, so a launch
needs no tables.
"""

from __future__ import annotations

import triton
import triton.language as tl

# `parts` [2 (row, column), statistics, SLOTS, N]: partial sums per row or column of S. A sweep
# divides a group into at most SLOTS strips of rows x SLOTS chunks of columns, one per program.
SLOTS = tl.constexpr(32)
# Statistics in `parts`: the sums e = exp(s - shift), e0 = exp(s0 - its shift), e0 * (s0 - s); or,
# of the fallback, peak, mass, the reference's peak, mass, and cross. Without reference 1 and 2.
PART_STATS = tl.constexpr(2)
PART_STATS_WITH_REF = tl.constexpr(5)

# `softmaxes` [matrices, SOFTMAX_FIELDS, 2 (row, column), N]: what a backward pass needs.
SOFTMAX_FIELDS = tl.constexpr(3)
SHIFT = tl.constexpr(0)  # the shift of the exponentials
MISS_RATIO = tl.constexpr(1)  # miss_probability / sum of exp(s - shift)
MISS_PROBABILITY = tl.constexpr(2)  # 1 - p_ii: the softmax's mass beside the diagonal

# `scalars` [NUM_SCALARS], fp32; at each of the first four a value for S and one for S0.
NUM_SCALARS = tl.constexpr(9)
SCALE = tl.constexpr(0)  # of the products
GROUP_SHIFT = tl.constexpr(2)  # of the exponentials
IMAGE_STRETCH = tl.constexpr(4)  # the power of two that image was multiplied by in the products
TEXT_STRETCH = tl.constexpr(6)
UPSTREAM_PEAK = tl.constexpr(8)  # the largest finite weight of the losses; 1 if all are 0

# Tiles are visited column by column in bands of this many rows of tiles, so that those computed at
# one time share rows and columns in L2.
_BAND = tl.constexpr(8)


@triton.jit
def blocks_per_slot(n, BLOCK: tl.constexpr):
    """Consecutive blocks of one of a group's at most SLOTS slots."""
    return tl.maximum(tl.cdiv(tl.cdiv(n, BLOCK), SLOTS), 1)


@triton.jit
def count_slots(n, BLOCK: tl.constexpr):
    """Slots that a group of n rows uses."""
    return tl.cdiv(tl.cdiv(n, BLOCK), blocks_per_slot(n, BLOCK))


@triton.jit
def visit(index, num_rows, num_cols):
    """(row, column) of the index-th element, in bands."""
    band = index // (_BAND * num_cols) * _BAND
    band_rows = tl.minimum(num_rows - band, _BAND)
    in_band = index % (_BAND * num_cols)
    return band + in_band % band_rows, in_band // band_rows


@triton.jit
def locate_rectangle(n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(strip, chunk) of a program of a sweep."""
    return visit(tl.program_id(0), count_slots(n, BLOCK_M), count_slots(n, BLOCK_N))


@triton.jit
def slot_range(slot, n, BLOCK: tl.constexpr):
    """The first block of a slot and the one after its last."""
    length = blocks_per_slot(n, BLOCK)
    return slot * length, tl.minimum((slot + 1) * length, tl.cdiv(n, BLOCK))


@triton.jit
def stat_stride(n):
    """Elements of `parts` from one statistic to the next."""
    return SLOTS * tl.cast(n, tl.int64)


@triton.jit
def sweep_slots(parts, strip, chunk, n, num_stats):
    """Pointers to a rectangle's slots of row sums and of column sums."""
    row_slot = parts + chunk * tl.cast(n, tl.int64)
    col_slot = parts + num_stats * stat_stride(n) + strip * tl.cast(n, tl.int64)
    return row_slot, col_slot


@triton.jit
def softmax_field(softmaxes, MATRIX: tl.constexpr, FIELD: tl.constexpr, DIRECTION: tl.constexpr, n):
    """Pointer to one field [N] of `softmaxes`; MATRIX is 0 for S, 1 for the reference's S0."""
    index: tl.constexpr = (MATRIX * SOFTMAX_FIELDS + FIELD) * 2 + DIRECTION
    return softmaxes + index * tl.cast(n, tl.int64)


@triton.jit
def strip_stride(n):
    """Elements from row to row of a strip of G: whole cache lines, which GEMMs prefer."""
    return tl.cdiv(n, 64) * 64
