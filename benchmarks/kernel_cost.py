"""Our kernels, as compiled, in the model of `phase_cost`: a tile, a matrix, a training step."""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple
from unittest import mock

import torch

from benchmarks import compiled_kernels
from benchmarks.gpu_rates import Gpu, clocks_of, occupancy
from benchmarks.instruction_path import Instructions, Path, measure
from benchmarks.phase_cost import LAUNCH_S, Cost, Phase, clock, cost, gemm_seconds, waves
from fasterase.ops.contrastive import triton_features, triton_launch
from fasterase.ops.contrastive.triton_tiles import Tile

# Tiles of an item of `sweep` that share one loop over depth: at most 32 strips a matrix.
_STRIPS = 32
_KERNELS = {
    ("sweep", False): "sweep",
    ("sweep", True): "sweep_reference",
    ("strip", False): "strip_run",
    ("strip", True): "strip",
}


def kernel_phases(
    gpu: Gpu, launch: compiled_kernels.Launch, path: Path, n: int
) -> tuple[Phase, ...]:
    """A tile of a sweep or a strip over n rows: the products of each matrix, then the epilogue.

    Where tiles share one loop over depth, all but one stage of the next tile's features arrive
    during the epilogue, no tile waits for its first ones, and what begins and ends the loop is
    shared.
    """
    block_m, block_n, block_k = (
        launch.arguments[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")
    )
    steps, end, run = path.trace
    widths = [launch.arguments[name] for name in ("width", "ref_width")[: len(steps)]]
    warps = launch.options["num_warps"]
    loaded = (block_m + block_n) * block_k * 2
    load = clocks_of(gpu, Instructions(), warps, shared_bytes=loaded, l2_bytes=loaded)
    # strip writes its tile of G; a sweep updates sums after a load, the row sums where run is.
    is_strip = launch.name.startswith("strip")
    if is_strip:
        moved = 2 * block_m * block_n
    else:
        moved = 8 * block_m if run is not None else 8 * (3 if len(steps) == 2 else 1) * block_n
    rest = clocks_of(
        gpu,
        end,
        warps,
        l2_bytes=moved,
        hbm_bytes=moved if is_strip else 0,
        clock_hz=clock(gpu),
    )
    if run is not None:
        num_steps = math.ceil(widths[0] / block_k)
        ahead = min(launch.options["num_stages"] - 1, num_steps)
        computed = clocks_of(gpu, steps[0], warps).times(num_steps)
        shared_by = triton_launch.RUN if is_strip else math.ceil(math.ceil(n / block_m) / _STRIPS)
        run_clocks = clocks_of(gpu, run, warps, l2_bytes=0 if is_strip else 4 * block_n)
        return (
            Phase(computed.plus(load.times(num_steps - ahead))),
            Phase(rest.plus(load.times(ahead))),
            Phase(run_clocks.times(1 / shared_by), gpu.latency / shared_by),
        )
    loops = [
        Phase(clocks_of(gpu, step, warps).plus(load).times(math.ceil(width / block_k)), gpu.latency)
        for width, step in zip(widths, steps, strict=True)
    ]
    return (*loops, Phase(rest, 0.0 if is_strip else gpu.latency))


def find_launch(
    gpu: Gpu, name: str, width: int, ref_width: int | None, tile: Tile | None = None
) -> compiled_kernels.Launch:
    """The bf16 launch of a kernel on this GPU, with another tile where one is given."""
    kernel = _KERNELS[name, ref_width is not None]
    with contextlib.ExitStack() as stack:
        if tile is not None:
            patch = mock.patch.object(triton_features, "choose_tile", return_value=tile)
            stack.enter_context(patch)
        launches = compiled_kernels.launches(torch.bfloat16, width, ref_width, f"sm_{gpu.sm}")
    return next(launch for launch in launches if launch.name == kernel)


class Modelled(NamedTuple):
    """A kernel of ours at one tile shape."""

    name: str
    width: int
    has_ref: bool
    tile: Tile
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
        # Blocks of a sweep take rectangles of tiles, at most 32 x 32 of them.
        units = math.prod(min(_STRIPS, b) if self.name == "sweep" else b for b in blocks)
        if self.name == "strip" and self.path.trace.run is not None:
            units = math.ceil(units / triton_launch.RUN)
        uneven = waves(units, gpu.num_sms * self.resident)
        tile = max(self.cost.clocks) if is_overlapped else self.cost.tile
        return tile * uneven * math.prod(blocks) / gpu.num_sms / clock(gpu)


def modelled(
    gpu: Gpu, name: str, width: int, has_ref: bool, n: int, tile: Tile | None = None
) -> Modelled:
    """A kernel over n rows: "sweep" or "strip"."""
    launch = find_launch(gpu, name, width, width if has_ref else None, tile)
    path = measure(launch, gpu.sm)
    warps, stages = launch.options["num_warps"], launch.options["num_stages"]
    block_m, block_n, block_k = (launch.arguments[f"BLOCK_{axis}"] for axis in "MNK")
    return Modelled(
        name,
        width,
        has_ref,
        Tile(block_m, block_n, block_k, warps, stages),
        path,
        kernel_phases(gpu, launch, path, n),
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
