"""Which unit binds each kernel, without a GPU: `python -m benchmarks.cost_model`.

A tile is a sequence of phases: fill the pipeline, the loop over depth, the epilogue. Within a phase
the units overlap perfectly, so it takes its busiest unit's clocks, plus latencies that nothing
hides. A block runs its phases one after another; `occupancy` blocks an SM overlap, so a tile takes

    max(sum over phases / occupancy, the busiest unit's clocks over all phases).

Optimistic by construction (perfect overlap, no bank conflicts, no stalls of few warps), and the
published figures that it must reproduce, memeff's and siglip-kernel's, show by how much: kernels
take about a quarter longer than predicted (1.24 and 1.25 times; an elementwise pass as predicted).
Instruction counts are those of the compiled kernels (`instruction_path`). Prints tables and writes
`benchmarks/results/cost_model.csv`; `--tiles` compiles and ranks other tiles too.
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import torch

from benchmarks import compiled_kernels
from benchmarks.gpu_rates import A100, H100, Clocks, Gpu, clocks_of, occupancy
from benchmarks.instruction_path import Instructions, Path, measure

RESULTS = FilePath(__file__).parent / "results" / "cost_model.csv"
_LAUNCH_S = 3e-6  # between two kernels of one stream
# Clocks at the end of a phase in which its last results travel on and nothing starts: a product
# (33), a write to shared memory and a read of it (29 each; Luo et al. 2024, A100 and H100).
_DRAIN = 91
# Candidates: block_m, block_n, block_k, num_warps, num_stages.
TILES = (
    (128, 128, 64, 8, 3),
    (128, 128, 64, 4, 3),
    (128, 256, 64, 8, 3),
    (256, 128, 64, 8, 3),
    (64, 256, 64, 4, 3),
    (64, 128, 64, 4, 3),
)


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
    return best + _LAUNCH_S


@functools.cache
def clock(gpu: Gpu) -> float:
    """Clock under load: at which the model's 8192^3 product takes what cuBLAS's was measured to.

    Tensor cores on random data hold GPUs below their boost clock by power.
    """
    at_boost = gemm_seconds(gpu, 8192, 8192, 8192, gpu.boost_hz) - _LAUNCH_S
    return min(1.0, gpu.gemm_flops * at_boost / (2 * 8192**3)) * gpu.boost_hz


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
        num_strips * (strip.seconds(gpu, strip_rows, n, is_overlapped=is_overlapped) + _LAUNCH_S),
        num_strips * (image + text),
        streamed / gpu.hbm_bytes + 10 * _LAUNCH_S,
    )


# memeff 0.3.1 and siglip-kernel 0.1.2, compiled by Triton 3.9 and counted by `instruction_path`, a
# warp. memeff: a j-block of clip_fa_grad_kernel (64 x 64, D = 512, 8 warps; its accumulator leaves
# room for one block an SM), and clip_denom_kernel (128 x 128 x 64, 4 warps), a step and the rest.
# siglip-kernel: 16 elements a thread of _sigmoid_bce_fwd_kernel.
_MEMEFF_LOGITS = Instructions(295, 9, 6, 4, 0, 73984, 524288)
_MEMEFF_SOFTMAX = Instructions(235, 124, 63, 22, 0, 9728, 0)
_MEMEFF_PRODUCT = Instructions(243, 1, 73, 0, 0, 8064, 524288)
_MEMEFF_SUMS_STEP = Instructions(398, 68, 109, 0, 0, 16768, 524288)
_MEMEFF_SUMS_REST = Instructions(1373, 519, 468, 128, 88, 9472, 0)
_BCE = Instructions(913, 509, 314, 32, 21, 768, 0)


def memeff_seconds(gpu: Gpu, n: int) -> float:
    """memeff's forward and backward at D = 512: 10 N^2 D, of which 8 N^2 D are counted."""
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
    """(whole loss, its elementwise pass) of siglip-kernel's chunks of bf16 products by cuBLAS."""
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
    scaling = 2 * 2 * 2 * n * width / gpu.hbm_bytes  # of both gradients, in the backward
    return elementwise + chunks * (products + _LAUNCH_S) + scaling, elementwise


# Published, in seconds: B = 65,536, forward and backward (kernels' own documentation).
PUBLISHED = {
    "memeff 0.3.1, D=512, A100": (0.201, 8 * 65536**2 * 512),
    "siglip-kernel 0.1.2, D=768, H100": (0.0478, 6 * 65536**2 * 768),
    "its elementwise pass": (0.0089, 0),
}


def published_rows() -> Iterator[dict[str, Any]]:
    whole, elementwise = siglip_seconds(H100, 65536, 768)
    predictions = (memeff_seconds(A100, 65536), whole, elementwise)
    for (name, (measured, flops)), predicted in zip(PUBLISHED.items(), predictions, strict=True):
        yield {
            "table": "published",
            "name": name,
            "ms": predicted * 1e3,
            "measured_ms": measured * 1e3,
            "error": predicted / measured - 1,
            "tflops": flops / predicted / 1e12 if flops else "",
            "measured_tflops": flops / measured / 1e12 if flops else "",
        }


def kernel_row(gpu: Gpu, kernel: Modelled, n: int, table: str = "kernel") -> dict[str, Any]:
    result = kernel.cost
    at_load = clock(gpu) / gpu.boost_hz
    flops = (2 if kernel.has_ref else 1) * 2 * n * n * kernel.width
    seconds = kernel.seconds(gpu, n, n)
    return {
        "table": table,
        "name": kernel.name + (" + reference" if kernel.has_ref else ""),
        "gpu": gpu.name,
        "n": n,
        "width": kernel.width,
        "tile": "x".join(map(str, kernel.tile[:3])) + " {}w {}s".format(*kernel.tile[3:]),
        "registers": kernel.path.registers,
        "stack": kernel.path.stack_bytes,
        "resident": kernel.resident,
        **{unit: round(clocks) for unit, clocks in result.clocks._asdict().items()},
        "alone_clocks": round(result.alone),
        "tile_clocks": round(result.tile),
        "binds": result.binds,
        "ms": seconds * 1e3,
        "of_peak": flops / seconds / gpu.peak_flops,
        "of_gemm": flops / seconds / gpu.gemm_flops,
        "of_peak_if_overlapped": at_load * result.clocks.tensor / max(result.clocks),
    }


def step_row(
    gpu: Gpu,
    n: int,
    pair: tuple[Modelled, Modelled],
    name: str,
    *,
    is_overlapped: bool = False,
) -> dict[str, Any]:
    sweep, strip = pair
    strip_rows = min(n, 2**27 // n)  # 256 MB of G, as launched
    parts = step(gpu, n, sweep, strip, strip_rows, is_overlapped=is_overlapped)
    flops = (12 if sweep.has_ref else 8) * n * n * sweep.width
    seconds = sum(parts)
    return {
        "table": "step",
        "name": f"{name}, {'InfoNCE + KL' if sweep.has_ref else 'InfoNCE'}",
        "gpu": gpu.name,
        "n": n,
        "width": sweep.width,
        "strip_rows": strip_rows,
        **{f"{part}_ms": value * 1e3 for part, value in parts._asdict().items()},
        "ms": seconds * 1e3,
        "of_peak": flops / seconds / gpu.peak_flops,
        "of_gemm": flops / seconds / gpu.gemm_flops,
    }


def rows(n: int, wants_tiles: bool) -> Iterator[dict[str, Any]]:
    yield from published_rows()
    shipped = {
        (gpu, name, width, has_ref): modelled(gpu, name, width, has_ref)
        for gpu in (H100, A100)
        for name in ("sweep", "strip")
        for has_ref in (False, True)
        for width in (512, 768, 1280)
    }
    for (gpu, *_), kernel in shipped.items():
        if kernel.resident:
            yield kernel_row(gpu, kernel, n)
    best: dict[tuple[str, bool], tuple[int, ...]] = {}
    if wants_tiles:
        for name in ("sweep", "strip"):
            for has_ref in (False, True):
                candidates = [modelled(H100, name, 768, has_ref, tile) for tile in TILES]
                ranked = sorted(
                    (kernel for kernel in candidates if kernel.resident),
                    key=lambda kernel: kernel.seconds(H100, n, n),
                )
                best[name, has_ref] = ranked[0].tile
                yield from (kernel_row(H100, kernel, n, "tile") for kernel in ranked)
    for width in (512, 768, 1280):
        for has_ref in (False, True):
            sweep, strip = (shipped[H100, name, width, has_ref] for name in ("sweep", "strip"))
            yield step_row(H100, n, (sweep, strip), "as launched")
            if best:
                sweep, strip = (
                    modelled(H100, name, width, has_ref, best[name, has_ref])
                    for name in ("sweep", "strip")
                )
                yield step_row(H100, n, (sweep, strip), "best tiles")
            yield step_row(H100, n, (sweep, strip), "and overlapped", is_overlapped=True)


_COLUMNS: dict[str, tuple[str, ...]] = {
    "published": ("name", "ms", "measured_ms", "error", "tflops", "measured_tflops"),
    "kernel": (
        *("name", "gpu", "width", "tile", "registers", "stack", "resident"),
        *Clocks._fields,
        *("alone_clocks", "tile_clocks", "ms", "of_peak", "of_gemm", "of_peak_if_overlapped"),
        "binds",
    ),
    "step": (
        *("name", "width", "strip_rows", "sweep_ms", "strip_ms", "gemms_ms", "small_ms", "ms"),
        *("of_peak", "of_gemm"),
    ),
}
_COLUMNS["tile"] = _COLUMNS["kernel"]


def show(table: str, found: list[dict[str, Any]]) -> str:
    """The rows of one table as text."""
    columns = _COLUMNS[table]
    cells = [list(columns)] + [[_text(c, row[c]) for c in columns] for row in found]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )


def _text(column: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0%}" if column.startswith(("of_", "error")) else f"{value:.2f}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=32768, help="N")
    parser.add_argument("--tiles", action="store_true", help="compile and rank other tiles")
    parser.add_argument("--output", type=FilePath, default=RESULTS)
    args = parser.parse_args(argv)
    found = list(rows(args.rows, args.tiles))
    for gpu in (H100, A100):
        print(
            f"{gpu.name}: {clock(gpu) / 1e9:.2f} GHz under load, {gpu.peak_flops / 1e12:.0f} peak"
        )
    for table in ("published", "kernel", "tile", "step"):
        of_table = [row for row in found if row["table"] == table]
        if of_table:
            print(f"\n{table}\n{show(table, of_table)}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.output.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        names = dict.fromkeys(name for row in found for name in row)
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(
            {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()} for row in found
        )
    temporary.rename(args.output)


if __name__ == "__main__":
    main()
