"""Forward, first step: lengths of the rows, the diagonal of S, and the shift of the exponentials.

The shift of a group is max(0, B - 66) with B = |scale| * max|image_i| * max|text_j| >= |S|.
`round_features` makes the half-precision features that the products take.
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
    peaks,  # [matrices, 2, num_groups] out: length of the longest finite image and text row
    flags,  # [num_groups] out: 0
    num_rows,
    BLOCK: tl.constexpr,
):
    """The shift of each group and matrix. One program per group and matrix."""
    num_groups = tl.num_programs(0)
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
    longest_image, longest_text = tl.max(image_peak, 0), tl.max(text_peak, 0)
    bound = tl.abs(scale_value) * longest_image * longest_text
    tl.store(shifts + matrix * num_groups + group, tl.maximum(bound - HEADROOM, 0.0))
    tl.store(peaks + matrix * 2 * num_groups + group, longest_image)
    tl.store(peaks + (matrix * 2 + 1) * num_groups + group, longest_text)
    if matrix == 0:
        tl.store(flags + group, 0)


@triton.jit
def round_features(
    image,  # [N, width]
    text,  # [N, width]
    scale,  # []
    peaks,  # [2, num_groups] as in group_shifts
    rounded_image,  # [N, width] out
    rounded_text,  # [N, width] out
    rounded_scale,  # [] out: the scale of their products
    stretches,  # [2] out: the powers of two that image and text were multiplied by
    image_stride,
    text_stride,
    num_groups,
    num_rows,
    width,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Round features to half precision, the longest row of each tower stretched to 1 to 2.

    No element can overflow fp16 then, and one too small for it is 2^-24 of a logit's bound. A power
    of two costs no precision. The scale of the products takes it back.
    """
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = rows < num_rows
    at = rows[:, None].to(tl.int64)
    image_exponent = _largest_exponent(peaks, num_groups)
    text_exponent = _largest_exponent(peaks + num_groups, num_groups)
    image_stretch, text_stretch = _power_of_two(-image_exponent), _power_of_two(-text_exponent)
    for start in range(0, width, BLOCK_K):
        depth = start + tl.arange(0, BLOCK_K)[None, :]
        mask = exists[:, None] & (depth < width)
        a = tl.load(image + at * image_stride + depth, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(text + at * text_stride + depth, mask=mask, other=0.0).to(tl.float32)
        a = (a * image_stretch).to(rounded_image.dtype.element_ty)
        b = (b * text_stretch).to(rounded_text.dtype.element_ty)
        tl.store(rounded_image + at * width + depth, a, mask=mask)
        tl.store(rounded_text + at * width + depth, b, mask=mask)
    if tl.program_id(0) == 0:
        tl.store(stretches, image_stretch)
        tl.store(stretches + 1, text_stretch)
        shrunk = tl.load(scale) * _power_of_two(image_exponent)
        tl.store(rounded_scale, shrunk * _power_of_two(text_exponent))


@triton.jit
def _largest_exponent(peaks, num_groups):
    """floor(log2) of the largest of `num_groups` numbers; 0 if all are 0."""
    peak = tl.load(peaks)
    for group in range(1, num_groups):
        peak = tl.maximum(peak, tl.load(peaks + group))
    peak = tl.where(peak == 0.0, 1.0, peak)
    exponent = (peak.to(tl.int32, bitcast=True) >> 23) - 127
    return tl.minimum(tl.maximum(exponent, -126), 126)


@triton.jit
def _power_of_two(exponent):
    """2^exponent, for exponents of normal numbers."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)
