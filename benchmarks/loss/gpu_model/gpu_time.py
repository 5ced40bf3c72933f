"""How long work takes on a GPU: rates of its units, phases of a tile, matrix products of cuBLAS.

A tile is a sequence of phases: fill the pipeline, loop over the depth, epilogue. Within a phase the
units overlap perfectly, so the phase takes the clocks of its busiest unit, plus latencies that
nothing hides. A block runs its phases one after another. An SM overlaps `occupancy` blocks, so a
tile takes

    max(sum over phases / occupancy, clocks of the busiest unit over all phases).

This is optimistic by construction: perfect overlap, no bank conflicts, no stalls with few warps.

Every rate is the hardware's or a published microbenchmark's; none is fitted to a kernel. Only the
clock under load (`clock`) is set, by a published large matrix product.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from benchmarks.loss.gpu_model.instructions import Instructions

LAUNCH_S = 3e-6  # between two kernels of one stream
# Clocks at the end of a phase in which its last results are in flight and nothing starts: a
# product (33), a write to shared memory and a read of it (29 each; Luo et al. 2024, A100, H100).
_DRAIN = 91


class Gpu(NamedTuple):
    """Rates and sizes of a GPU; clocks are SM clocks."""

    name: str
    sm: int
    num_sms: int
    boost_hz: float
    gemm_flops: float  # published, measured: cuBLAS, bf16, large and square, random data
    tensor_flops: float  # per clock and SM, dense bf16
    fp32_lanes: float  # per clock and SM, as all below
    alu_lanes: float
    special_lanes: float
    shared_bytes: float
    l2_bytes: float  # per clock, whole GPU
    hbm_bytes: float  # per second, whole GPU, streaming, measured
    latency: float  # clocks of a load that misses L1
    shared_capacity: int
    multicast: int  # blocks that share one operand's loads in cuBLAS's kernels (clusters)

    @property
    def peak_flops(self) -> float:
        return self.tensor_flops * self.num_sms * self.boost_hz


# Lanes: CUDA programming guide, throughput of arithmetic instructions (8.0 and 9.0). Shared memory
# and shuffles: quack's pipe microbenchmarks (128 B per clock, a shuffle as much as 4 B per lane).
# L2: 5120 B per clock, A100 whitepaper; the same 80 slices of 64 B in H100. Latency of global
# memory: Luo et al. 2024, "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture".
H100 = Gpu(
    name="H100 SXM",
    sm=90,
    num_sms=132,
    boost_hz=1.83e9,
    gemm_flops=798e12,
    tensor_flops=4096,
    fp32_lanes=128,
    alu_lanes=64,
    special_lanes=16,
    shared_bytes=128,
    l2_bytes=5120,
    hbm_bytes=3.0e12,
    latency=480,
    shared_capacity=228 * 1024,
    multicast=2,
)
# cuBLAS: 230 of 312 TFLOP/s (transformers-benchmarks, fp16). HBM: 90 % of 1.555 TB/s.
A100 = Gpu(
    name="A100",
    sm=80,
    num_sms=108,
    boost_hz=1.41e9,
    gemm_flops=230e12,
    tensor_flops=2048,
    fp32_lanes=64,
    alu_lanes=64,
    special_lanes=16,
    shared_bytes=128,
    l2_bytes=5120,
    hbm_bytes=1.4e12,
    latency=470,
    shared_capacity=164 * 1024,
    multicast=1,
)


class Clocks(NamedTuple):
    """SM clocks that each unit is busy; shuffles pass through shared memory and count in both."""

    tensor: float = 0.0
    special: float = 0.0
    fp32: float = 0.0
    alu: float = 0.0
    issue: float = 0.0
    shuffle: float = 0.0
    shared: float = 0.0
    l2: float = 0.0
    hbm: float = 0.0

    def plus(self, other: Clocks) -> Clocks:
        return Clocks(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, by: float) -> Clocks:
        return Clocks(*(a * by for a in self))

    def busiest(self) -> str:
        return max(self._fields, key=lambda field: getattr(self, field))


def clocks_of(
    gpu: Gpu,
    instructions: Instructions,
    num_warps: int,
    *,
    shared_bytes: float = 0.0,
    l2_bytes: float = 0.0,
    hbm_bytes: float = 0.0,
    clock_hz: float | None = None,
) -> Clocks:
    """Return how long one SM's units are busy.

    Args:
        instructions: of one of the `num_warps` warps.
        shared_bytes, l2_bytes, hbm_bytes: of the whole tile, beyond what the instructions count
            (cp.async's writes of shared memory; traffic of L2 and HBM).
        clock_hz: None for the boost clock; only HBM depends on it.
    """
    lanes = 32 * num_warps
    hbm_rate = gpu.hbm_bytes / (clock_hz or gpu.boost_hz) / gpu.num_sms
    shuffle = instructions.shuffle * 4 * lanes / gpu.shared_bytes
    shared = instructions.shared_bytes * num_warps + shared_bytes
    return Clocks(
        tensor=instructions.flops * num_warps / gpu.tensor_flops,
        special=instructions.special * lanes / gpu.special_lanes,
        fp32=instructions.fp32 * lanes / gpu.fp32_lanes,
        alu=instructions.alu * lanes / gpu.alu_lanes,
        issue=instructions.issued * num_warps / 4,
        shuffle=shuffle,
        shared=shared / gpu.shared_bytes + shuffle,
        l2=l2_bytes / (gpu.l2_bytes / gpu.num_sms),
        hbm=hbm_bytes / hbm_rate,
    )


def occupancy(gpu: Gpu, num_warps: int, registers: int, shared_bytes: int) -> int:
    """Return the number of blocks that an SM holds at once; 0 if one does not fit."""
    held = -(-registers // 8) * 8 * 32 * num_warps
    return min(65536 // held, gpu.shared_capacity // (shared_bytes + 1024), 64 // num_warps)


class Phase(NamedTuple):
    """A part of a tile in which all units overlap."""

    clocks: Clocks
    latency: float = 0.0  # clocks that nothing hides

    @property
    def length(self) -> float:
        return max(self.clocks) + self.latency + _DRAIN


class Cost(NamedTuple):
    """Cost of one tile."""

    clocks: Clocks
    tile: float  # clocks that an SM spends on it at the given occupancy
    alone: float  # clocks from start to end of one block alone
    binds: str  # what limits it


def cost(phases: tuple[Phase, ...], resident: int) -> Cost:
    """Return the cost of a tile when an SM holds `resident` blocks at once."""
    total = functools.reduce(Clocks.plus, (phase.clocks for phase in phases))
    alone = sum(phase.length for phase in phases)
    bound = max(total)
    if alone / resident <= bound:
        return Cost(total, bound, alone, total.busiest())
    phase = max(phases, key=lambda phase: phase.length)
    return Cost(total, alone / resident, alone, f"no overlap (longest: {phase.clocks.busiest()})")


def waves(tiles: int, places: int) -> float:
    """Return the time of whole waves divided by that of a perfectly even spread."""
    return math.ceil(tiles / places) * places / tiles


def gemm_seconds(gpu: Gpu, m: int, n: int, k: int, clock_hz: float, *, out_bytes: int = 2) -> float:
    """Predict cuBLAS's bf16 matrix product, with the best of its usual tiles and splits of k.

    `out_bytes` is the traffic per element of the result (4 + 4 if it accumulates in fp32).
    """
    best = math.inf
    for block_m, block_n in ((128, 256), (256, 128), (128, 128)):
        for split in (1, 2, 3, 4, 6, 8):
            depth = k / split
            area = block_m * block_n
            if gpu.sm >= 90:
                operands = block_m / 64 * (64 + block_n) * depth * 2  # wgmma, 64 rows at a time
            else:
                operands = area / 64**2 * 128 * depth * 2  # mma.sync, 64 x 64 per warp
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
    """Return the clock under load: the model's 8192^3 product then takes as long as measured.

    On random data the tensor cores' power keeps GPUs below their boost clock.
    """
    at_boost = gemm_seconds(gpu, 8192, 8192, 8192, gpu.boost_hz) - LAUNCH_S
    return min(1.0, gpu.gemm_flops * at_boost / (2 * 8192**3)) * gpu.boost_hz
