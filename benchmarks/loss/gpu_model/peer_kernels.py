"""Predict the kernels of other libraries, to compare with the times their authors published."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from benchmarks.loss.gpu_model.gpu_time import (
    A100,
    H100,
    LAUNCH_S,
    Gpu,
    Phase,
    clock,
    clocks_of,
    cost,
    gemm_seconds,
    waves,
)
from benchmarks.loss.gpu_model.instructions import Instructions

# memeff 0.3.1 and siglip-kernel 0.1.2, compiled by Triton 3.9 and counted by `instructions.trace`,
# per warp. memeff: one j-block of clip_fa_grad_kernel (64 x 64, D = 512, 8 warps; its accumulator
# leaves room for one block per SM), and of clip_denom_kernel (128 x 128 x 64, 4 warps) one step and
# the rest. siglip-kernel: 16 elements per thread of _sigmoid_bce_fwd_kernel.
_MEMEFF_LOGITS = Instructions(295, 9, 6, 4, 0, 73984, 524288)
_MEMEFF_SOFTMAX = Instructions(235, 124, 63, 22, 0, 9728, 0)
_MEMEFF_PRODUCT = Instructions(243, 1, 73, 0, 0, 8064, 524288)
_MEMEFF_SUMS_STEP = Instructions(398, 68, 109, 0, 0, 16768, 524288)
_MEMEFF_SUMS_REST = Instructions(1373, 519, 468, 128, 88, 9472, 0)
_BCE = Instructions(913, 509, 314, 32, 21, 768, 0)


def memeff_seconds(gpu: Gpu, n: int) -> float:
    """Predict memeff's forward and backward at D = 512: 10 N^2 D, of which 8 N^2 D are counted."""
    loaded = 64 * 512 * 2  # the next j-block, while this one's product runs
    block = cost(
        (
            Phase(clocks_of(gpu, _MEMEFF_LOGITS, 8)),
            Phase(clocks_of(gpu, _MEMEFF_SOFTMAX, 8)),
            Phase(clocks_of(gpu, _MEMEFF_PRODUCT, 8, shared_bytes=loaded, l2_bytes=loaded)),
        ),
        1,
    )
    rows = math.ceil(n / 64)
    gradients = 2 * block.tile * rows * waves(rows, gpu.num_sms) * (n / 64) / gpu.num_sms
    loaded = 256 * 64 * 2
    main = clocks_of(gpu, _MEMEFF_SUMS_STEP, 4, shared_bytes=loaded, l2_bytes=loaded)
    end = clocks_of(gpu, _MEMEFF_SUMS_REST, 4, l2_bytes=2 * 128 * 4)
    tile = cost((Phase(main.times(512 / 64), gpu.latency), Phase(end, gpu.latency)), 2)
    sums = tile.tile * (n / 128) ** 2 / gpu.num_sms
    return (gradients + sums) / clock(gpu)


def siglip_seconds(gpu: Gpu, n: int, width: int, rows: int = 4096) -> tuple[float, float]:
    """Predict siglip-kernel with bf16 products by cuBLAS: (whole loss, its elementwise pass)."""
    hz = clock(gpu)
    clocks = clocks_of(gpu, _BCE, 4, l2_bytes=2 * 4 * 2048, hbm_bytes=2 * 2 * 2048, clock_hz=hz)
    blocks = n * n / 2048
    elementwise = max(clocks) * blocks / gpu.num_sms / hz
    products = (
        gemm_seconds(gpu, rows, n, width, hz)
        + gemm_seconds(gpu, rows, width, n, hz)
        + gemm_seconds(gpu, n, width, rows, hz, out_bytes=4)
    )
    chunks = math.ceil(n / rows)
    scaling = 2 * 2 * 2 * n * width / gpu.hbm_bytes  # both gradients, in the backward
    return elementwise + chunks * (products + LAUNCH_S) + scaling, elementwise


# Published seconds and FLOPs at B = 65,536, forward and backward (the libraries' documentation).
PUBLISHED = {
    "memeff 0.3.1, D=512, A100": (0.201, 8 * 65536**2 * 512),
    "siglip-kernel 0.1.2, D=768, H100": (0.0478, 6 * 65536**2 * 768),
    "its elementwise pass": (0.0089, 0),
}


def published_rows() -> Iterator[dict[str, Any]]:
    """Yield one row per published time, with the prediction beside it."""
    whole, elementwise = siglip_seconds(H100, 65536, 768)
    predictions = (memeff_seconds(A100, 65536), whole, elementwise)
    for (name, (measured, flops)), predicted in zip(PUBLISHED.items(), predictions, strict=True):
        row: dict[str, Any] = {"table": "published", "name": name, "ms": predicted * 1e3}
        row |= {"measured_ms": measured * 1e3, "error": predicted / measured - 1}
        for column, seconds in (("tflops", predicted), ("measured_tflops", measured)):
            row[column] = flops / seconds / 1e12 if flops else ""
        yield row
