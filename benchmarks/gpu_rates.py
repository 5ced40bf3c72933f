"""What a GPU's units do in a clock, and how long a tile's instructions keep each of them busy.

Every number is the hardware's or a published microbenchmark's; none is fitted to a kernel. One
number a GPU, its clock under load, is set by a published large matrix product (`cost_model.clock`).
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.instruction_path import Instructions


class Gpu(NamedTuple):
    name: str
    sm: int
    num_sms: int
    boost_hz: float
    gemm_flops: float  # published, measured: cuBLAS, bf16, large and square, random data
    tensor_flops: float  # a clock and SM, dense bf16
    fp32_lanes: float  # a clock and SM, as all below
    alu_lanes: float
    special_lanes: float
    shared_bytes: float
    l2_bytes: float  # a clock, whole GPU
    hbm_bytes: float  # a second, whole GPU, streaming, measured
    latency: float  # clocks of a load that misses L1
    shared_capacity: int
    multicast: int  # blocks that share one operand's loads in cuBLAS's kernels (clusters)

    @property
    def peak_flops(self) -> float:
        return self.tensor_flops * self.num_sms * self.boost_hz


# Lanes: CUDA programming guide, throughput of arithmetic instructions (8.0 and 9.0). Shared memory
# and shuffles: quack's pipe microbenchmarks (128 B a clock, a shuffle as much as 4 B a lane).
# L2: 5120 B a clock, A100 whitepaper; the same 80 slices of 64 B in H100. Latency of global memory:
# Luo et al. 2024, "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture".
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
    """SM clocks that each unit is busy. Shuffles pass through shared memory and count in both."""

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
    """Busy clocks of one SM.

    instructions: of one of the num_warps warps. The bytes are the whole tile's, beyond what
        instructions name (cp.async's writes of shared memory; what passes L2 and HBM).
    clock_hz: None for the boost clock; it matters to HBM alone.
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
    """Blocks that an SM holds at once; 0 where one does not fit."""
    held = -(-registers // 8) * 8 * 32 * num_warps
    return min(65536 // held, gpu.shared_capacity // (shared_bytes + 1024), 64 // num_warps)
