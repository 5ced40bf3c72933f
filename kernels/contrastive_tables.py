"""Memory shared by the contrastive kernels and the Python code that launches them.

Three int tables say which program computes what. `fasterase.ops.contrastive.triton_plan` writes
their rows as the NamedTuples below; the `load_...` functions read them in the order of the fields.
The rest is the layout of two tensors, `parts` and `softmaxes`.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

# `parts` [2 (row, column), statistics, SLOTS, N]: partial sums per row or column of S. 32 strips x
# 32 chunks per group keep any GPU busy.
SLOTS = tl.constexpr(32)
# Statistics in `parts`, as the online kernel writes them: peak, mass; and with a reference also its
# peak, mass, cross. The other kernels write fewer of them, the sums below.
PART_STATS = tl.constexpr(2)
PART_STATS_WITH_REF = tl.constexpr(5)
# Sums: e = exp(s - shift); and with a reference also e0 = exp(s0 - its shift), e0 * (s0 - s).
SUMS = tl.constexpr(1)
SUMS_WITH_REF = tl.constexpr(3)

# `softmaxes` [matrices, SOFTMAX_FIELDS, 2 (row, column), N]: what a backward pass needs.
SOFTMAX_FIELDS = tl.constexpr(3)
SHIFT = tl.constexpr(0)  # the shift of the exponentials
MISS_RATIO = tl.constexpr(1)  # miss_probability / sum of exp(s - shift)
MISS_PROBABILITY = tl.constexpr(2)  # 1 - p_ii: the softmax's mass beside the diagonal


class Item(NamedTuple):
    """A rectangle of tiles of one group, for one program of a kernel that makes sums.

    Its rows and columns are counted in blocks, from the group's start; the ends are exclusive.
    """

    start: int  # the group's first row in the batch
    n: int  # rows of the group
    first_row: int
    end_row: int
    strip: int  # slot of the column sums
    first_col: int
    end_col: int
    chunk: int  # slot of the row sums
    group: int


ITEM_FIELDS = tl.constexpr(len(Item._fields))


@triton.jit
def load_item(items, index):
    """Load the fields of an `Item`."""
    entry = items + index * ITEM_FIELDS
    return (
        tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3),
        tl.load(entry + 4), tl.load(entry + 5), tl.load(entry + 6), tl.load(entry + 7),
        tl.load(entry + 8),
    )  # fmt: skip


class Span(NamedTuple):
    """Rows of one group, for one program of a kernel that adds up slots."""

    start: int  # first row in the batch
    num_rows: int
    num_strips: int  # slots of column sums
    num_chunks: int  # slots of row sums
    group: int
    has_negatives: int  # 1 if the group has more than one row


SPAN_FIELDS = tl.constexpr(len(Span._fields))


@triton.jit
def load_span(spans, index):
    """Load the fields of a `Span`."""
    entry = spans + index * SPAN_FIELDS
    return (
        tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3),
        tl.load(entry + 4), tl.load(entry + 5),
    )  # fmt: skip


class Segment(NamedTuple):
    """Rows of one group's G, and their place in the workspace."""

    start: int  # the group's first row in the batch
    n: int  # rows of the group
    first: int  # the segment's first row in the group
    num_rows: int
    group: int
    offset: int  # in the workspace, in elements; like `stride` a multiple of 64
    stride: int  # elements from row to row
    last_tile: int  # number of tiles of the launch up to and including this segment

    @property
    def batch_rows(self) -> slice:
        return slice(self.start + self.first, self.start + self.first + self.num_rows)

    @property
    def batch_cols(self) -> slice:
        return slice(self.start, self.start + self.n)


SEGMENT_FIELDS = tl.constexpr(len(Segment._fields))


@triton.jit
def load_segment(entry):
    """Load `start` (int64), `n`, `first` and `num_rows` of a `Segment`."""
    return (
        tl.load(entry),
        tl.load(entry + 1).to(tl.int32),
        tl.load(entry + 2).to(tl.int32),
        tl.load(entry + 3).to(tl.int32),
    )


@triton.jit
def load_segment_group(entry):
    """Load `group` of a `Segment`."""
    return tl.load(entry + 4)


@triton.jit
def load_segment_memory(entry):
    """Load `offset` and `stride` of a `Segment`."""
    return tl.multiple_of(tl.load(entry + 5), 64), tl.multiple_of(tl.load(entry + 6), 64)


@triton.jit
def load_segment_last_tile(entry):
    """Load `last_tile` of a `Segment`."""
    return tl.load(entry + 7)


@triton.jit
def stat_stride(num_rows):
    """Elements of `parts` from one statistic to the next."""
    return SLOTS * tl.cast(num_rows, tl.int64)


@triton.jit
def item_slots(parts, start, strip, chunk, num_rows, NUM_STATS: tl.constexpr):
    """Pointers to an item's slots of row sums and of column sums, at its group's first row."""
    row_slot = parts + chunk.to(tl.int64) * num_rows + start
    col_slot = parts + NUM_STATS * stat_stride(num_rows) + strip.to(tl.int64) * num_rows + start
    return row_slot, col_slot


@triton.jit
def softmax_field(
    softmaxes, MATRIX: tl.constexpr, FIELD: tl.constexpr, DIRECTION: tl.constexpr, num_rows
):
    """Pointer to one field [N] of `softmaxes`; MATRIX is 0 for S, 1 for the reference's S0."""
    index: tl.constexpr = (MATRIX * SOFTMAX_FIELDS + FIELD) * 2 + DIRECTION
    return softmaxes + index * tl.cast(num_rows, tl.int64)
