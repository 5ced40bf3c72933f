"""First steps of either pass: the diagonal of S, the shift of the exponentials, rounded features.

The shift of a group is max(0, B - 66) with B = |scale| * max|image_i| * max|text_j| >= |S|.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fasterase.kernels.contrastive_layout import (
    GROUP_SHIFT,
    IMAGE_STRETCH,
    SCALE,
    TEXT_STRETCH,
    UPSTREAM_PEAK,
)
from fasterase.kernels.contrastive_tiles import HEADROOM


@triton.jit(do_not_specialize=["scale", "ref_scale", "upstream", "n", "num_losses"])
def diagonals_and_peaks(
    image,  # [N, width]
    text,
    ref_image,  # [N, ref_width] read if there are two matrices, likewise below
    ref_text,
    scale,  # []
    ref_scale,
    upstream,  # [num_losses, N] weights of the losses
    diagonals,  # [matrices, N] out: each pair's own logit
    peaks,  # [matrices, 3, num_blocks] out: longest finite image, text; largest finite weight
    image_stride,
    text_stride,
    ref_image_stride,
    ref_text_stride,
    n,
    width,
    ref_width,
    num_losses,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Of one block of rows and one matrix."""
    matrix = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = rows < n
    peaks += matrix * 3 * tl.num_programs(0) + tl.program_id(0)
    diagonals += matrix.to(tl.int64) * n
    if matrix == 0:
        _diagonal_and_peaks(
            image, text, scale, diagonals, peaks, image_stride, text_stride, rows, exists, width,
            BLOCK_R, BLOCK_K,
        )  # fmt: skip
        peak = tl.zeros((BLOCK_R,), dtype=tl.float32)
        for loss in range(num_losses):
            at = upstream + loss * tl.cast(n, tl.int64) + rows
            peak = tl.maximum(peak, _if_finite(tl.abs(tl.load(at, mask=exists, other=0.0))))
        tl.store(peaks + 2 * tl.num_programs(0), tl.max(peak, 0))
    else:
        _diagonal_and_peaks(
            ref_image, ref_text, ref_scale, diagonals, peaks, ref_image_stride, ref_text_stride,
            rows, exists, ref_width, BLOCK_R, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _diagonal_and_peaks(
    image, text, scale, diagonal, peaks, image_stride, text_stride, rows, exists, width,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
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
    tl.store(diagonal + rows, scale_value * product + nan_if_infinite, mask=exists)
    tl.store(peaks, tl.max(_if_finite(tl.sqrt(image_square)), 0))
    tl.store(peaks + tl.num_programs(0), tl.max(_if_finite(tl.sqrt(text_square)), 0))


@triton.jit
def _if_finite(x):
    """x, or 0 where it is NaN or infinite, so that such rows do not affect others."""
    return tl.where(x < float("inf"), x, 0.0)


@triton.jit(do_not_specialize=["scale", "ref_scale", "n", "num_blocks"])
def shifts_and_rounded_features(
    image,
    text,
    ref_image,
    ref_text,
    scale,
    ref_scale,
    peaks,  # [matrices, 3, num_blocks] of `diagonals_and_peaks`
    rounded_image,  # [N, width] out, if ROUNDS; likewise the next three
    rounded_text,
    rounded_ref_image,
    rounded_ref_text,
    scalars,  # out
    flag,  # [] out: 0
    image_stride,
    text_stride,
    ref_image_stride,
    ref_text_stride,
    n,
    width,
    ref_width,
    num_blocks,
    ROUNDS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Shifts; half-precision features, the longest row of each tower stretched to 1 to 2.

    No element can overflow fp16 then, and one too small for it is 2^-24 of a logit's bound. A power
    of two costs no precision. The scale of the products takes it back.
    """
    matrix = tl.program_id(1)
    peaks += matrix * 3 * num_blocks
    longest_image = _largest(peaks, num_blocks)
    longest_text = _largest(peaks + num_blocks, num_blocks)
    scale_value = tl.where(matrix == 1, tl.load(ref_scale), tl.load(scale))
    image_exponent, text_exponent = 0, 0
    if ROUNDS:
        image_exponent, text_exponent = _exponent(longest_image), _exponent(longest_text)
    image_stretch, text_stretch = _power_of_two(-image_exponent), _power_of_two(-text_exponent)
    if tl.program_id(0) == 0:
        shift = tl.maximum(tl.abs(scale_value) * longest_image * longest_text - HEADROOM, 0.0)
        shrunk = scale_value * _power_of_two(image_exponent) * _power_of_two(text_exponent)
        tl.store(scalars + SCALE + matrix, shrunk)
        tl.store(scalars + GROUP_SHIFT + matrix, shift)
        tl.store(scalars + IMAGE_STRETCH + matrix, image_stretch)
        tl.store(scalars + TEXT_STRETCH + matrix, text_stretch)
        if matrix == 0:
            tl.store(flag, 0)
            peak = _largest(peaks + 2 * num_blocks, num_blocks)
            tl.store(scalars + UPSTREAM_PEAK, tl.where(peak == 0.0, 1.0, peak))
    if ROUNDS:
        if matrix == 0:
            _round(image, rounded_image, image_stretch, image_stride, n, width, BLOCK_R, BLOCK_K)
            _round(text, rounded_text, text_stretch, text_stride, n, width, BLOCK_R, BLOCK_K)
        else:
            _round(ref_image, rounded_ref_image, image_stretch, ref_image_stride, n, ref_width,
                   BLOCK_R, BLOCK_K)  # fmt: skip
            _round(ref_text, rounded_ref_text, text_stretch, ref_text_stride, n, ref_width,
                   BLOCK_R, BLOCK_K)  # fmt: skip


@triton.jit
def _largest(values, end):
    """The largest of values[:end], none of which is negative."""
    peak = tl.zeros((1024,), dtype=tl.float32)
    for k in range(0, end, 1024):
        at = k + tl.arange(0, 1024)
        peak = tl.maximum(peak, tl.load(values + at, mask=at < end, other=0.0))
    return tl.max(peak, 0)


@triton.jit
def _exponent(x):
    """floor(log2(x)); 0 for 0."""
    bits = tl.where(x == 0.0, 1.0, x).to(tl.int32, bitcast=True)
    return tl.minimum(tl.maximum((bits >> 23) - 127, -126), 126)


@triton.jit
def _power_of_two(exponent):
    """2^exponent, for exponents of normal numbers."""
    return (((exponent + 127) << 23) + tl.zeros((), dtype=tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _round(side, rounded, stretch, stride, n, width, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    at = rows[:, None].to(tl.int64)
    for start in range(0, width, BLOCK_K):
        depth = start + tl.arange(0, BLOCK_K)[None, :]
        mask = (rows < n)[:, None] & (depth < width)
        x = tl.load(side + at * stride + depth, mask=mask, other=0.0).to(tl.float32)
        tl.store(rounded + at * width + depth, (x * stretch).to(rounded.dtype.element_ty), mask)
