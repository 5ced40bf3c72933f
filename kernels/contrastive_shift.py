"""Forward, first step: lengths of the rows, the diagonal of S, and the shift of the exponentials.

The shift of a group is max(0, B - 66) with B = |scale| * max|image_i| * max|text_j| >= |S|.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fasterase.kernels.contrastive_tiles import HEADROOM


@triton.jit
def norms_and_diagonal(
    image,  # [N, width]
    text,  # [N, width]
    scale,  # []
    norms,  # [2, N] out: length of image and text rows
    diagonal,  # [N] out: diagonal of S, each pair's own logit
    image_stride,
    text_stride,
    num_rows,
    width,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Row lengths and the diagonal of S in fp32."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = rows < num_rows
    image += rows[:, None].to(tl.int64) * image_stride
    text += rows[:, None].to(tl.int64) * text_stride
    image_square = tl.zeros((BLOCK_R,), dtype=tl.float32)
    text_square = tl.zeros((BLOCK_R,), dtype=tl.float32)
    product = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for start in range(0, width, BLOCK_K):
        depth = start + tl.arange(0, BLOCK_K)[None, :]
        mask = exists[:, None] & (depth < width)
        a = tl.load(image + depth, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(text + depth, mask=mask, other=0.0).to(tl.float32)
        image_square += tl.sum(a * a, 1)
        text_square += tl.sum(b * b, 1)
        product += tl.sum(a * b, 1)
    scale_value = tl.load(scale)
    # 0, or NaN if the scale is infinite, which must not yield numbers.
    nan_if_infinite = scale_value - scale_value
    tl.store(norms + rows, tl.sqrt(image_square), mask=exists)
    tl.store(norms + num_rows + rows, tl.sqrt(text_square), mask=exists)
    tl.store(diagonal + rows, scale_value * product + nan_if_infinite, mask=exists)


@triton.jit
def group_shifts(
    norms,  # [matrices, 2, N]
    scale,  # []
    ref_scale,  # [] read only if there are two matrices
    starts,  # [num_groups + 1] first row of each group
    shifts,  # [matrices, num_groups] out
    flags,  # [num_groups] out: 0
    num_rows,
    BLOCK: tl.constexpr,
):
    """The shift of each group and matrix. One program per group and matrix."""
    group, matrix = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(starts + group), tl.load(starts + group + 1)
    norms += matrix.to(tl.int64) * 2 * num_rows
    image_peak = tl.zeros((BLOCK,), dtype=tl.float32)
    text_peak = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(start, end, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        image = tl.load(norms + rows, mask=rows < end, other=0.0)
        text = tl.load(norms + num_rows + rows, mask=rows < end, other=0.0)
        # Skip rows that are not finite, so that they do not affect others. False for NaN.
        image_peak = tl.maximum(image_peak, tl.where(image < float("inf"), image, 0.0))
        text_peak = tl.maximum(text_peak, tl.where(text < float("inf"), text, 0.0))
    scale_value = tl.load(scale)
    if matrix == 1:
        scale_value = tl.load(ref_scale)
    bound = tl.abs(scale_value) * tl.max(image_peak, 0) * tl.max(text_peak, 0)
    tl.store(shifts + matrix * tl.num_programs(0) + group, tl.maximum(bound - HEADROOM, 0.0))
    if matrix == 0:
        tl.store(flags + group, 0)
