"""Who computes what, and the layout of the tensors that contrastive kernels exchange.

A launch covers at most two groups: rows [0, split) and [split, num_rows) of the batch. Programs
find their work by arithmetic alone, so a launch needs no tables.
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

# Tiles are visited column by column in bands of this many rows of tiles, so that those computed at
# one time share rows and columns in L2.
_BAND = tl.constexpr(8)


@triton.jit
def locate_rows(block, split, num_rows, BLOCK: tl.constexpr):
    """(group, its first row, its size, the block's number in it) of a block of BLOCK rows."""
    return _select_group(block, tl.cdiv(split, BLOCK), split, num_rows)


@triton.jit
def _select_group(index, num_first, split, num_rows):
    """(group, start, n, index in the group) where the first group has `num_first` indices."""
    is_second = index >= num_first
    start = tl.where(is_second, split, 0)
    n = tl.where(is_second, num_rows - split, split)
    return is_second.to(tl.int32), start, n, tl.where(is_second, index - num_first, index)


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
def locate_rectangle(index, split, num_rows, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The index-th strip x chunk of a sweep: (group, start, n, strip, chunk)."""
    num_first = count_slots(split, BLOCK_M) * count_slots(split, BLOCK_N)
    group, start, n, index = _select_group(index, num_first, split, num_rows)
    strip, chunk = visit(index, count_slots(n, BLOCK_M), count_slots(n, BLOCK_N))
    return group, start, n, strip, chunk


@triton.jit
def slot_range(slot, n, BLOCK: tl.constexpr):
    """The first block of a slot and the one after its last."""
    length = blocks_per_slot(n, BLOCK)
    return slot * length, tl.minimum((slot + 1) * length, tl.cdiv(n, BLOCK))


@triton.jit
def stat_stride(num_rows):
    """Elements of `parts` from one statistic to the next."""
    return SLOTS * tl.cast(num_rows, tl.int64)


@triton.jit
def sweep_slots(parts, start, strip, chunk, num_rows, NUM_STATS: tl.constexpr):
    """Pointers to a rectangle's slots of row sums and of column sums, at its group's first row."""
    total_rows = tl.cast(num_rows, tl.int64)
    row_slot = parts + chunk * total_rows + start
    col_slot = parts + NUM_STATS * stat_stride(num_rows) + strip * total_rows + start
    return row_slot, col_slot


@triton.jit
def softmax_field(
    softmaxes, MATRIX: tl.constexpr, FIELD: tl.constexpr, DIRECTION: tl.constexpr, num_rows
):
    """Pointer to one field [N] of `softmaxes`; MATRIX is 0 for S, 1 for the reference's S0."""
    index: tl.constexpr = (MATRIX * SOFTMAX_FIELDS + FIELD) * 2 + DIRECTION
    return softmaxes + index * tl.cast(num_rows, tl.int64)


@triton.jit
def locate_strip(index, split, num_rows, first_rows, second_rows, num_first):
    """(group, start, n, rows of its strip of G, the strip's offset in the workspace, index in it).

    The strips of both groups, of `first_rows` and `second_rows` rows, lie one after the other; a
    launch has `num_first` programs for the first.
    """
    group, start, n, index = _select_group(index, num_first, split, num_rows)
    offset = tl.cast(first_rows, tl.int64) * strip_stride(split)
    num_strip_rows = tl.where(group == 0, first_rows, second_rows)
    return group, start, n, num_strip_rows, tl.where(group == 0, 0, offset), index


@triton.jit
def strip_stride(n):
    """Elements from row to row of a strip of G: whole cache lines, which GEMMs prefer."""
    return tl.cdiv(n, 64) * 64
