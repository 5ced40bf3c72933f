"""Predict without a GPU which unit limits each kernel.

    python -m benchmarks.loss.gpu_model.cost_model [--tiles]

The model is in `gpu_time`; its instruction counts are those of the compiled kernels
(`instructions`). The published times of memeff and siglip-kernel (`peer_kernels`) show how
optimistic it is: kernels take about a quarter longer than predicted (1.24 and 1.25 times; an
elementwise pass takes as long as predicted). The command prints tables and writes
`benchmarks/results/cost_model.csv`; `--tiles` also compiles and ranks other tiles.
"""

from __future__ import annotations

import argparse
import csv
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.command import exit_with
from benchmarks.loss.gpu_model.fasterase_kernels import Modelled, modelled, step
from benchmarks.loss.gpu_model.gpu_time import A100, H100, Clocks, Gpu, clock
from benchmarks.loss.gpu_model.peer_kernels import published_rows
from benchmarks.result_files import RESULTS, write_csv
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
    return {
        "ms": seconds * 1e3,
        "of_peak": rate / gpu.peak_flops,
        "of_gemm": rate / gpu.gemm_flops,
    }


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
    with (RESULTS / "host_time.csv").open() as file:
        measured = {(row["step"], row["loss"]): float(row["ms"]) for row in csv.DictReader(file)}
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


_COLUMNS: dict[str, tuple[str, ...]] = {
    "published": ("name", "ms", "measured_ms", "error", "tflops", "measured_tflops"),
    "kernel": (
        *("name", "gpu", "width", "tile", "registers", "stack", "resident"),
        *Clocks._fields,
        *("alone_clocks", "tile_clocks", "ms", "of_peak", "of_gemm", "of_peak_if_overlapped"),
        "binds",
    ),
    "step": (
        *(
            "name",
            "n",
            "width",
            "strip_rows",
            "sums_ms",
            "strip_ms",
            "gemms_ms",
            "small_ms",
            "host_ms",
            "ms",
        ),
        *("of_peak", "of_gemm"),
    ),
}
_COLUMNS["tile"] = _COLUMNS["kernel"]


def show(table: str, found: list[dict[str, Any]]) -> str:
    """Format the rows of one table as text."""
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
    parser.add_argument("--output", type=Path, default=RESULTS / "cost_model.csv")
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
    write_csv(args.output, found, decimals=5)


if __name__ == "__main__":
    exit_with(main)
