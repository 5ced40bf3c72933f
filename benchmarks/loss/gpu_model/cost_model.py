"""Predict without a GPU how long each kernel and a training step take, and which unit limits them.

    python -m benchmarks.loss.gpu_model.cost_model [--tiles]

The model is in `gpu_time`; its instruction counts are those of the compiled kernels
(`instructions`). The published times of memeff and siglip-kernel show how optimistic it is: kernels
take about a quarter longer than predicted (1.24 and 1.25 times; an elementwise pass takes as long
as predicted). The command prints tables and writes `benchmarks/results/cost_model.csv`; `--tiles`
also compiles and ranks other tiles.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks.command import exit_with, new_parser
from benchmarks.loss.gpu_model import compiled_kernels
from benchmarks.loss.gpu_model.gpu_time import (
    A100,
    H100,
    LAUNCH_S,
    Clocks,
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
from benchmarks.loss.gpu_model.peer_kernels import published_rows
from benchmarks.result_files import RESULTS, group_rows, read_csv, write_csv
from fasterase.ops.contrastive import triton_plan
from fasterase.ops.contrastive.triton import RUN_LENGTH
from fasterase.ops.contrastive.triton_plan import (
    LEAST_STRIP_ROWS,
    WORKSPACE_BYTES,
    Tile,
    plan_strips,
    strip_stride,
)

# N of the training steps.
SIZES = tuple(2**k for k in range(10, 21))

# Of [N, N] logits that a step could keep on a GPU of 80 GB beside towers.
KEPT_BYTES = 8 * 2**30

CANDIDATES = [
    *(Tile(m, n, 64, 8, 3) for m, n in ((128, 128), (128, 256), (256, 128), (256, 64), (128, 64))),
    *(Tile(m, n, 64, 4, 3) for m, n in ((128, 128), (64, 256), (64, 128))),
]

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
    compiled = compiled_kernels.build(launch, f"sm_{gpu.sm}")
    cubin = compiled.asm["cubin"]
    listing = compiled_kernels.tool("cuobjdump", "--dump-sass", cubin=cubin)
    resources = *compiled_kernels.resources(cubin), compiled.metadata.shared
    path = TilePath(trace(listing), *resources)
    warps, stages = launch.options["num_warps"], launch.options["num_stages"]
    block_m, block_n, block_k = (launch.arguments[f"BLOCK_{axis}"] for axis in "MNK")
    phases = kernel_phases(gpu, launch, path, n)
    resident = occupancy(gpu, warps, path.registers, path.shared_bytes)
    tile = Tile(block_m, block_n, block_k, warps, stages)
    return Modelled(name, width, has_ref, tile, launch, path, phases, resident)


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
    kept = 0.0
    if keeps_logits:
        kept = matrices * 2 * n * n / gpu.hbm_bytes
        steps, _, run = strip.path.trace
        loops = 1 if run is not None else len(steps)
        strip = strip._replace(phases=strip.phases[loops:])
    # The diagonal and the lengths; partial sums, written and read, and crosses likewise;
    # feature_gradients (products, both towers, the result).
    streamed = matrices * 4 * n * width + 2 * (2 * matrices - 1) * 32 * n * 8 + 2 * n * width * 10
    return Step(
        matrices * sums.seconds(gpu, n, n, is_overlapped=is_overlapped) + kept,
        num_strips * (strip.seconds(gpu, strip_rows, n, is_overlapped=is_overlapped) + LAUNCH_S)
        + kept,
        num_strips * (image + text),
        streamed / gpu.hbm_bytes + 10 * LAUNCH_S,
    )


def kernel_row(gpu: Gpu, kernel: Modelled, n: int, table: str = "kernel") -> dict[str, Any]:
    """Predict one kernel over n rows."""
    result = kernel.cost
    at_load = clock(gpu) / gpu.boost_hz
    flops = (2 if kernel.has_ref else 1) * 2 * n * n * kernel.width
    name = kernel.name + (" + reference" if kernel.has_ref else "")
    tile = "x".join(map(str, kernel.tile[:3])) + " {}w {}s".format(*kernel.tile[3:])
    row: dict[str, Any] = {"table": table, "name": name, "gpu": gpu.name, "n": n}
    row |= {"width": kernel.width, "tile": tile, "registers": kernel.path.registers}
    row |= {"stack": kernel.path.stack_bytes, "resident": kernel.resident}
    row |= {unit: round(clocks) for unit, clocks in result.clocks._asdict().items()}
    row |= {"alone_clocks": round(result.alone), "tile_clocks": round(result.tile)}
    row |= {"binds": result.binds, **_rates(gpu, flops, kernel.seconds(gpu, n, n))}
    overlapped = at_load * result.clocks.tensor / max(result.clocks)
    return {**row, "of_peak_if_overlapped": overlapped}


def _rates(gpu: Gpu, flops: float, seconds: float) -> dict[str, float]:
    rate = flops / seconds
    return {"ms": seconds * 1e3, "of_peak": rate / gpu.peak_flops, "of_gemm": rate / gpu.gemm_flops}


def step_row(
    gpu: Gpu,
    n: int,
    pair: tuple[Modelled, Modelled],
    name: str,
    *,
    is_overlapped: bool = False,
    keeps_logits: bool = False,
) -> dict[str, Any]:
    """Predict a training step from its (sums, strip) kernels."""
    sums, strip = (kernel.at(gpu, n) for kernel in pair)
    elements = max(WORKSPACE_BYTES // 2, LEAST_STRIP_ROWS * strip_stride(n))
    strip_rows = plan_strips(n, elements, strip.tile.block_m)[0].stop
    parts = step(
        *(gpu, n, sums, strip, strip_rows), is_overlapped=is_overlapped, keeps_logits=keeps_logits
    )
    # As launched, also where kept logits save some: then the shares compare like the times.
    flops = (12 if strip.has_ref else 8) * n * n * sums.width
    name = f"{name}, {'InfoNCE + KL' if strip.has_ref else 'InfoNCE'}"
    row: dict[str, Any] = {"table": "step", "name": name, "gpu": gpu.name, "n": n}
    row |= {"width": sums.width, "strip_rows": strip_rows}
    row |= {f"{part}_ms": value * 1e3 for part, value in parts._asdict().items()}
    row |= {"host_ms": host_seconds(strip.has_ref) * 1e3}
    return row | _rates(gpu, flops, max(sum(parts), host_seconds(strip.has_ref)))


@functools.cache
def host_seconds(has_ref: bool) -> float:
    """Return the host's time for a step, as `host_time` measured it: the GPU works beside it."""
    measured = {
        (row["step"], row["loss"]): float(row["ms"]) for row in read_csv(RESULTS / "host_time.csv")
    }
    return measured["triton", "InfoNCE + KL" if has_ref else "InfoNCE"] / 1e3


def rows(n: int, wants_tiles: bool) -> Iterator[dict[str, Any]]:
    """Yield all rows: published times, shipped kernels, other tiles if wanted, training steps."""
    yield from published_rows()
    shipped = {
        (gpu, name, width, has_ref): modelled(gpu, name, width, has_ref, n)
        for gpu in (H100, A100)
        for name, has_ref in (("sums", False), ("strip", False), ("strip", True))
        for width in (512, 768, 1280)
    }
    for (gpu, *_), kernel in shipped.items():
        if kernel.resident:
            yield kernel_row(gpu, kernel, n)
    best: dict[tuple[str, bool], Tile] = {}
    if wants_tiles:
        for name, has_ref in (("sums", False), ("strip", False), ("strip", True)):
            candidates = [modelled(H100, name, 768, has_ref, n, tile) for tile in CANDIDATES]
            ranked = sorted(
                (kernel for kernel in candidates if kernel.resident),
                key=lambda kernel: kernel.seconds(H100, n, n),
            )
            whole = (kernel.tile for kernel in ranked if not kernel.path.stack_bytes)
            best[name, has_ref] = next(whole)
            yield from (kernel_row(H100, kernel, n, "tile") for kernel in ranked)
    for width in (512, 768, 1280):
        for has_ref in (False, True):
            sums, strip = (
                shipped[H100, "sums", width, False],
                shipped[H100, "strip", width, has_ref],
            )
            for size in sorted({n, *SIZES}):
                yield step_row(H100, size, (sums, strip), "as launched")
                if (2 if has_ref else 1) * 2 * size * size <= KEPT_BYTES:
                    yield step_row(H100, size, (sums, strip), "if kept", keeps_logits=True)
            yield step_row(H100, n, (sums, strip), "as launched, overlapped", is_overlapped=True)
            if best:
                sums = modelled(H100, "sums", width, False, n, best["sums", False])
                strip = modelled(H100, "strip", width, has_ref, n, best["strip", has_ref])
                yield step_row(H100, n, (sums, strip), "best spill-free tiles")


_RATES = ("ms", "of_peak", "of_gemm")
_KERNEL_COLUMNS = (
    *("name", "gpu", "width", "tile", "registers", "stack", "resident", *Clocks._fields),
    *("alone_clocks", "tile_clocks", *_RATES, "of_peak_if_overlapped", "binds"),
)
# Table -> the columns that are printed.
_COLUMNS = {
    "published": ("name", "ms", "measured_ms", "error", "tflops", "measured_tflops"),
    "kernel": _KERNEL_COLUMNS,
    "tile": _KERNEL_COLUMNS,
    "step": (
        *("name", "n", "width", "strip_rows", *(f"{part}_ms" for part in Step._fields)),
        *("host_ms", *_RATES),
    ),
}


def show(columns: Sequence[str], found: Sequence[dict[str, Any]]) -> str:
    """Format rows as an aligned table."""

    def text(column: str, value: Any) -> str:
        if not isinstance(value, float):
            return str(value)
        return f"{value:.0%}" if column.startswith(("of_", "error")) else f"{value:.2f}"

    lines = [columns, *([text(column, row[column]) for column in columns] for row in found)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--rows", type=int, default=32768, help="N")
    parser.add_argument("--tiles", action="store_true", help="compile and rank other tiles")
    parser.add_argument("--output", type=Path, default=RESULTS / "cost_model.csv")
    args = parser.parse_args(argv)
    found = list(rows(args.rows, args.tiles))
    for gpu in (H100, A100):
        peak = f"{gpu.peak_flops / 1e12:.0f} peak"
        print(f"{gpu.name}: {clock(gpu) / 1e9:.2f} GHz under load, {peak}")
    for (table,), those in group_rows(found, "table").items():
        print(f"\n{table}\n{show(_COLUMNS[table], those)}")
    write_csv(args.output, found, decimals=5)


if __name__ == "__main__":
    exit_with(main)
