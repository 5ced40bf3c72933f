"""How long a tile's phases take on a GPU, and the matrix products of cuBLAS.

A tile is a sequence of phases: fill the pipeline, the loop over depth, the epilogue. Within a phase
the units overlap perfectly, so it takes its busiest unit's clocks, plus latencies that nothing
hides. A block runs its phases one after another; `occupancy` blocks an SM overlap, so a tile takes

    max(sum over phases / occupancy, the busiest unit's clocks over all phases).

Optimistic by construction: perfect overlap, no bank conflicts, no stalls of few warps.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from benchmarks.gpu_rates import Clocks, Gpu, clocks_of
from benchmarks.instruction_path import Instructions

LAUNCH_S = 3e-6  # between two kernels of one stream
# Clocks at the end of a phase in which its last results travel on and nothing starts: a product
# (33), a write to shared memory and a read of it (29 each; Luo et al. 2024, A100 and H100).
_DRAIN = 91


class Phase(NamedTuple):
    clocks: Clocks
    latency: float = 0.0

    @property
    def length(self) -> float:
        return max(self.clocks) + self.latency + _DRAIN


class Cost(NamedTuple):
    """Of one tile."""

    clocks: Clocks
    tile: float  # clocks an SM spends on it, at the occupancy
    alone: float  # clocks from start to end of one block alone
    binds: str


def cost(phases: tuple[Phase, ...], resident: int) -> Cost:
    """resident: blocks an SM holds at once."""
    total = functools.reduce(Clocks.plus, (phase.clocks for phase in phases))
    alone = sum(phase.length for phase in phases)
    bound = max(total)
    if alone / resident <= bound:
        return Cost(total, bound, alone, total.busiest())
    phase = max(phases, key=lambda phase: phase.length)
    return Cost(total, alone / resident, alone, f"no overlap (longest: {phase.clocks.busiest()})")


def waves(tiles: int, places: int) -> float:
    """Time of whole waves over time of a perfectly even spread."""
    return math.ceil(tiles / places) * places / tiles


def gemm_seconds(gpu: Gpu, m: int, n: int, k: int, clock_hz: float, *, out_bytes: int = 2) -> float:
    """cuBLAS's matrix product of bf16, by the best of its usual tiles and splits of k.

    out_bytes: moved for an element of the result (4 + 4 where fp32 accumulates).
    """
    best = math.inf
    for block_m, block_n in ((128, 256), (256, 128), (128, 128)):
        for split in (1, 2, 3, 4, 6, 8):
            depth = k / split
            area = block_m * block_n
            if gpu.sm >= 90:
                operands = block_m / 64 * (64 + block_n) * depth * 2  # wgmma, 64 rows at a time
            else:
                operands = area / 64**2 * 128 * depth * 2  # mma.sync, 64 x 64 a warp
            loaded = (block_m + block_n) * depth * 2
            from_l2 = (block_m + block_n / gpu.multicast) * depth * 2
            main = Clocks(
                tensor=2 * area * depth / gpu.tensor_flops,
                shared=(operands + loaded) / gpu.shared_bytes,
                l2=from_l2 / (gpu.l2_bytes / gpu.num_sms),
            )
            written = area * (out_bytes if split == 1 else 4)
            end = clocks_of(
                gpu, Instructions(), 8, l2_bytes=written, hbm_bytes=written, clock_hz=clock_hz
            )
            tiles = math.ceil(m / block_m) * math.ceil(n / block_n) * split
            tile = cost((Phase(main, gpu.latency), Phase(end)), 1).tile
            seconds = math.ceil(tiles / gpu.num_sms) * tile / clock_hz
            if split > 1:
                seconds += (4 * split + out_bytes) * m * n / gpu.hbm_bytes
            traffic = 2 * (m * k + n * k) + out_bytes * m * n
            best = min(best, max(seconds, traffic / gpu.hbm_bytes))
    return best + LAUNCH_S


@functools.cache
def clock(gpu: Gpu) -> float:
    """Clock under load: at which the model's 8192^3 product takes what cuBLAS's was measured to.

    Tensor cores on random data hold GPUs below their boost clock by power.
    """
    at_boost = gemm_seconds(gpu, 8192, 8192, 8192, gpu.boost_hz) - LAUNCH_S
    return min(1.0, gpu.gemm_flops * at_boost / (2 * 8192**3)) * gpu.boost_hz
