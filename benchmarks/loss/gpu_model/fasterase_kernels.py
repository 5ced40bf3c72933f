"""Predict fasterase's kernels as compiled: a tile, a whole matrix, a training step."""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple
from unittest import mock

import torch

from benchmarks.loss.gpu_model import compiled_kernels
from benchmarks.loss.gpu_model.gpu_time import (
    LAUNCH_S,
    Cost,
    Gpu,
    Phase,
    clock,
    clocks_of,
    cost,
    gemm_seconds,
    occupancy,
    waves,
)
from benchmarks.loss.gpu_model.instructions import Instructions, Trace, trace
from fasterase.ops.contrastive import triton_plan
from fasterase.ops.contrastive.triton import RUN_LENGTH
from fasterase.ops.contrastive.triton_plan import Tile

# A program of `row_and_column_sums` has a strip of tiles that share one loop over depth. At most
# this many strips per matrix; `gradient_strip` has as many chunks of columns.
_STRIPS = 32
# "sums" is a sweep over one matrix, of which a step with the KL makes two.
_KERNELS = {
    ("sums", False): "row_and_column_sums",
    ("strip", False): "gradient_strip_without_reference",
    ("strip", True): "gradient_strip_with_crosses",
}


class TilePath(NamedTuple):
    """What one tile executes, and what its block occupies."""

    trace: Trace
    registers: int
    stack_bytes: int
    shared_bytes: int


def compile_path(launch: compiled_kernels.Launch, sm: int) -> TilePath:
    """Compile a launch for an architecture and find the path of one tile."""
    compiled = compiled_kernels.build(launch, f"sm_{sm}")
    registers, stack = compiled_kernels.resources(compiled.asm["cubin"])
    sass = compiled_kernels.tool("cuobjdump", "--dump-sass", cubin=compiled.asm["cubin"])
    return TilePath(trace(sass), registers, stack, compiled.metadata.shared)


def kernel_phases(
    gpu: Gpu, launch: compiled_kernels.Launch, path: TilePath, n: int
) -> tuple[Phase, ...]:
    """Return the phases of one tile of a sums or strip kernel over n rows: products, then epilogue.

    If tiles share one loop over depth, all but one stage of the next tile's features arrive during
    the epilogue, no tile waits for its first features, and all share the code around the loop.
    """
    block_m, block_n, block_k = (
        launch.arguments[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")
    )
    steps, end, run = path.trace
    widths = [launch.arguments[name] for name in ("width", "ref_width")[: len(steps)]]
    warps = launch.options["num_warps"]
    loaded = (block_m + block_n) * block_k * 2
    load = clocks_of(gpu, Instructions(), warps, shared_bytes=loaded, l2_bytes=loaded)
    # A strip writes its tile of G, and with a reference updates column sums; a sweep row sums.
    is_strip = launch.name.startswith("gradient_strip")
    written = 2 * block_m * block_n if is_strip else 0
    rest = clocks_of(
        gpu,
        end,
        warps,
        l2_bytes=written + (8 * block_m if not is_strip else 8 * block_n * (len(steps) - 1)),
        hbm_bytes=written,
        clock_hz=clock(gpu),
    )
    if run is not None:
        num_steps = math.ceil(widths[0] / block_k)
        ahead = min(launch.options["num_stages"] - 1, num_steps)
        computed = clocks_of(gpu, steps[0], warps).times(num_steps)
        shared_by = RUN_LENGTH if is_strip else math.ceil(math.ceil(n / block_m) / _STRIPS)
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
    """Return the bf16 launch of a kernel on this GPU, with another tile if one is given."""
    kernel = _KERNELS[name, ref_width is not None]
    with contextlib.ExitStack() as stack:
        if tile is not None:
            patch = mock.patch.object(triton_plan, "choose_tile", return_value=tile)
            stack.enter_context(patch)
        launches = compiled_kernels.launches(torch.bfloat16, width, ref_width, f"sm_{gpu.sm}")
    return next(launch for launch in launches if launch.name == kernel)


class Modelled(NamedTuple):
    """A kernel at one tile shape."""

    name: str
    width: int
    has_ref: bool
    tile: Tile
    launch: compiled_kernels.Launch
    path: TilePath
    phases: tuple[Phase, ...]
    resident: int

    def at(self, gpu: Gpu, n: int) -> Modelled:
        """Return the same kernel over n rows."""
        return self._replace(phases=kernel_phases(gpu, self.launch, self.path, n))

    @property
    def cost(self) -> Cost:
        return cost(self.phases, self.resident)

    def without_products(self) -> Modelled:
        """Return the same kernel if its logits were there already: only what follows products."""
        loops = 1 if self.path.trace[2] is not None else len(self.path.trace[0])
        return self._replace(phases=self.phases[loops:])

    def seconds(
        self, gpu: Gpu, num_rows: int, num_cols: int, *, is_overlapped: bool = False
    ) -> float:
        """Predict one matrix of this shape; is_overlapped: as if all phases overlapped."""
        block_m, block_n = self.tile[:2]
        blocks = math.ceil(num_rows / block_m), math.ceil(num_cols / block_n)
        # Programs take rectangles of tiles.
        if self.name == "sums":
            units = math.prod(min(_STRIPS, b) for b in blocks)
        elif self.has_ref:
            units = blocks[0] * min(_STRIPS, blocks[1])
        else:
            units = math.ceil(math.prod(blocks) / RUN_LENGTH)
        uneven = waves(units, gpu.num_sms * self.resident)
        tile = max(self.cost.clocks) if is_overlapped else self.cost.tile
        return tile * uneven * math.prod(blocks) / gpu.num_sms / clock(gpu)


def modelled(
    gpu: Gpu, name: str, width: int, has_ref: bool, n: int, tile: Tile | None = None
) -> Modelled:
    """Compile "sums" or "strip" and model it over n rows."""
    launch = find_launch(gpu, name, width, width if has_ref else None, tile)
    path = compile_path(launch, gpu.sm)
    warps, stages = launch.options["num_warps"], launch.options["num_stages"]
    block_m, block_n, block_k = (launch.arguments[f"BLOCK_{axis}"] for axis in "MNK")
    return Modelled(
        name,
        width,
        has_ref,
        Tile(block_m, block_n, block_k, warps, stages),
        launch,
        path,
        kernel_phases(gpu, launch, path, n),
        occupancy(gpu, warps, path.registers, path.shared_bytes),
    )


class Step(NamedTuple):
    """Seconds of one training step: forward, and gradients of both towers."""

    sums: float
    strip: float
    gemms: float
    small: float  # O(N D) kernels and launches


def step(
    gpu: Gpu,
    n: int,
    sums: Modelled,
    strip: Modelled,
    strip_rows: int,
    *,
    is_overlapped: bool = False,
    keeps_logits: bool = False,
) -> Step:
    """Predict a step: sums, strips of G, two products per strip; d_text accumulates in fp32.

    With `keeps_logits`, which no kernel does, the sweeps write their [n, n] logits in 16 bits and
    the strips read them in place of multiplying again.
    """
    width, has_ref = sums.width, strip.has_ref
    matrices = 2 if has_ref else 1
    num_strips = math.ceil(n / strip_rows)
    image = gemm_seconds(gpu, strip_rows, width, n, clock(gpu), out_bytes=4)
    text = gemm_seconds(gpu, n, width, strip_rows, clock(gpu), out_bytes=8)
    # The diagonal and the lengths; partial sums, written and read, and crosses likewise;
    # feature_gradients (products, both towers, the result).
    kept = matrices * 2 * n * n / gpu.hbm_bytes if keeps_logits else 0.0
    strip = strip.without_products() if keeps_logits else strip
    streamed = matrices * 4 * n * width + 2 * (2 * matrices - 1) * 32 * n * 8 + 2 * n * width * 10
    return Step(
        matrices * sums.seconds(gpu, n, n, is_overlapped=is_overlapped) + kept,
        num_strips * (strip.seconds(gpu, strip_rows, n, is_overlapped=is_overlapped) + LAUNCH_S)
        + kept,
        num_strips * (image + text),
        streamed / gpu.hbm_bytes + 10 * LAUNCH_S,
    )
