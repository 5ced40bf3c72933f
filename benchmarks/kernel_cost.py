"""Our kernels, as compiled, in the model of `phase_cost`: a tile, a matrix, a training step."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from benchmarks import compiled_kernels
from benchmarks.gpu_rates import Gpu, clocks_of, occupancy
from benchmarks.instruction_path import Instructions, Path, measure
from benchmarks.phase_cost import LAUNCH_S, Cost, Phase, clock, cost, gemm_seconds, waves


def kernel_phases(gpu: Gpu, launch: compiled_kernels.Launch, path: Path) -> tuple[Phase, ...]:
    """A tile of `sweep` or `strip`: the products of each matrix, then the epilogue."""
    block_m, block_n, block_k = (
        launch.arguments[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")
    )
    widths = [launch.arguments[name] for name in ("width", "ref_width")][: len(path.steps)]
    warps = launch.options["num_warps"]
    loaded = (block_m + block_n) * block_k * 2
    phases = []
    for width, step in zip(widths, path.steps, strict=True):
        clocks = clocks_of(gpu, step, warps, shared_bytes=loaded, l2_bytes=loaded)
        phases.append(Phase(clocks.times(math.ceil(width / block_k)), gpu.latency))
    stats = 3 if len(path.steps) == 2 else 1
    # strip writes its tile of G; sweep updates its columns' sums, after a load.
    is_strip = launch.name == "strip"
    moved = 2 * block_m * block_n if is_strip else 8 * stats * block_n
    rest = clocks_of(
        gpu,
        path.rest,
        warps,
        l2_bytes=moved,
        hbm_bytes=moved if is_strip else 0,
        clock_hz=clock(gpu),
    )
    phases.append(Phase(rest, 0.0 if is_strip else gpu.latency))
    return tuple(phases)


def find_launch(
    name: str, width: int, ref_width: int | None, tile: tuple[int, ...] | None = None
) -> compiled_kernels.Launch:
    """The bf16 launch of a kernel, with another tile where one is given."""
    launches = compiled_kernels.launches(torch.bfloat16, width, ref_width)
    launch = next(launch for launch in launches if launch.name == name)
    if tile is None:
        return launch
    block_m, block_n, block_k, warps, stages = tile
    arguments = launch.arguments | {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "EVEN_K": width % block_k == 0,
        "EVEN_REF_K": (ref_width or width) % block_k == 0,
    }
    return launch._replace(
        arguments=arguments,
        options=launch.options | {"num_warps": warps, "num_stages": stages},
    )


class Modelled(NamedTuple):
    """A kernel of ours at one tile shape."""

    name: str
    width: int
    has_ref: bool
    tile: tuple[int, ...]
    path: Path
    phases: tuple[Phase, ...]
    resident: int

    @property
    def cost(self) -> Cost:
        return cost(self.phases, self.resident)

    def seconds(
        self, gpu: Gpu, num_rows: int, num_cols: int, *, is_overlapped: bool = False
    ) -> float:
        """Over one matrix of this shape; is_overlapped: as if phases hid behind one another."""
        block_m, block_n = self.tile[:2]
        blocks = math.ceil(num_rows / block_m), math.ceil(num_cols / block_n)
        # Blocks of `sweep` take rectangles of tiles, at most 32 x 32 of them.
        units = math.prod(min(32, b) if self.name == "sweep" else b for b in blocks)
        uneven = waves(units, gpu.num_sms * self.resident)
        tile = max(self.cost.clocks) if is_overlapped else self.cost.tile
        return tile * uneven * math.prod(blocks) / gpu.num_sms / clock(gpu)


def modelled(
    gpu: Gpu, name: str, width: int, has_ref: bool, tile: tuple[int, ...] | None = None
) -> Modelled:
    launch = find_launch(name, width, width if has_ref else None, tile)
    path = measure(launch, gpu.sm)
    shape = tuple(launch.arguments[f"BLOCK_{axis}"] for axis in "MNK")
    warps, stages = launch.options["num_warps"], launch.options["num_stages"]
    return Modelled(
        name,
        width,
        has_ref,
        (*shape, warps, stages),
        path,
        kernel_phases(gpu, launch, path),
        occupancy(gpu, warps, path.registers, path.shared_bytes),
    )


class Step(NamedTuple):
    """Seconds of a training step: forward, and gradients of both towers."""

    sweep: float
    strip: float
    gemms: float
    small: float  # O(N D) kernels and launches


def step(
    gpu: Gpu,
    n: int,
    sweep: Modelled,
    strip: Modelled,
    strip_rows: int,
    *,
    is_overlapped: bool = False,
) -> Step:
    """sweep + strips of G + two products a strip, d_text accumulated in fp32."""
    width, has_ref = sweep.width, sweep.has_ref
    num_strips = math.ceil(n / strip_rows)
    image = gemm_seconds(gpu, strip_rows, width, n, clock(gpu), out_bytes=4)
    text = gemm_seconds(gpu, n, width, strip_rows, clock(gpu), out_bytes=8)
    stats = 3 if has_ref else 1
    # row_statistics; slots written and read; gradients (products, both towers, the result).
    streamed = (2 if has_ref else 1) * 4 * n * width + 2 * stats * 32 * n * 8 + 2 * n * width * 10
    return Step(
        sweep.seconds(gpu, n, n, is_overlapped=is_overlapped),
        num_strips * (strip.seconds(gpu, strip_rows, n, is_overlapped=is_overlapped) + LAUNCH_S),
        num_strips * (image + text),
        streamed / gpu.hbm_bytes + 10 * LAUNCH_S,
    )
