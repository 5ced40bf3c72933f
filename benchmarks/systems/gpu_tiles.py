"""Measure a step with other tiles of each Triton kernel, and write the table of the fastest.

    python -m benchmarks.systems.gpu_tiles tiles --output benchmarks/results/gpu_tiles.json

Of one kernel at a time the tile, warps and stages vary, and the time of the whole step is taken at
two sizes; the fastest by the product of both replaces the planned tile if it gains at least 1 %.
One that the GPU runs only with fewer stages, or whose gradient is another, does not count.
Candidates are compiled by 16 processes first. Measured candidates are kept; an interrupted run
resumes; --fresh measures them again. Copied to fasterase/ops/contrastive/tiles.json, the table is
what the plan reads, for its architecture and half-precision features whose width the tile's depth
divides.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import warnings
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.command import exit_with, mode_parser
from benchmarks.loss.case import Case, make_inputs
from benchmarks.loss.measure import clock
from benchmarks.processes import MeasurementError, call_all, describe_error
from benchmarks.result_files import measured_on
from benchmarks.systems.gpu_checks import PROCESSES, make_step
from fasterase.files import write_text
from fasterase.ops.contrastive import triton_plan
from fasterase.ops.contrastive.triton_plan import Tile

# A step's kernels, and whether it has the KL when they are measured.
KERNELS = {"sums": False, "strip": False, "strip_with_reference": True}
_SHAPES = ((64, 128), (128, 64), (128, 128), (128, 256), (256, 64), (256, 128))
_LEAST_GAIN = 0.01
# How far a gradient may be from the planned tile's, relative to the largest: sums in another order.
_TOLERANCE = 0.01

Candidate = tuple[str, Tile]


def candidates(is_dry: bool) -> list[Candidate]:
    """Return the tiles to try, the planned one of each kernel first."""
    found: list[Candidate] = []
    for kernel in KERNELS:
        planned = planned_tile(kernel)
        varied = (
            Tile(*shape, 64, warps, stages)
            for shape, warps, stages in product(_SHAPES, (4, 8), (3, 4))
        )
        tiles = [planned, *(tile for tile in varied if tile != planned)]
        found += [(kernel, tile) for tile in (tiles[:2] if is_dry else tiles)]
    return found


def planned_tile(kernel: str) -> Tile:
    """Return the tile that a step takes now."""
    return triton_plan.choose_tile(kernel, True, (768, 768), architecture())


def architecture() -> str:
    """Return the name under which the plan keeps the tiles of this GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return triton_plan._architecture(device)


def use(kernel: str, tile: Tile | None) -> None:
    """Make later steps take a tile for a kernel, None: the planned one."""
    tiles = triton_plan.EVEN_TILES.setdefault(architecture(), {})
    _planned.setdefault((kernel, True), tiles.get((kernel, True)))
    chosen = tile or _planned[kernel, True]
    if chosen is None:
        tiles.pop((kernel, True), None)
    else:
        tiles[kernel, True] = chosen
    # What was planned and compiled for the other one.
    for name, module in list(sys.modules.items()):
        if name.startswith("fasterase.ops.contrastive.triton"):
            for value in list(vars(module).values()):
                if callable(getattr(value, "cache_clear", None)):
                    value.cache_clear()


_planned: dict[tuple[str, bool], Tile | None] = {}


@functools.cache
def planned_gradient(case: Case) -> Tensor:
    """Return the gradient of the images by a step with the planned tiles."""
    return make_step(case, make_inputs(case))()[0]


def measure(
    candidate: Candidate, cases: list[Case], times: int, *, is_checked: bool = True
) -> dict[str, Any]:
    """Return what a candidate takes: milliseconds by the number of pairs, or why it cannot run."""
    kernel, tile = candidate
    row: dict[str, Any] = {"kernel": kernel, "tile": list(tile)}
    is_planned = tile == planned_tile(kernel)
    try:
        expected = planned_gradient(cases[0]) if is_checked else None
        use(kernel, tile)
        for case in cases:
            step = make_step(case, make_inputs(case))
            with warnings.catch_warnings():
                # A launch that does not fit warns and takes fewer stages, as planned tiles may.
                if not is_planned:
                    warnings.filterwarnings("error", module=r"fasterase\.ops\.contrastive")
                found = step()[0]
            if expected is not None and case == cases[0]:
                off = (found - expected).abs().max() / expected.abs().max()
                if not off <= _TOLERANCE:
                    raise MeasurementError(f"its gradient is {off:.1%} off the planned tile's")
            spent = [clock(step, case.device) for _ in range(times)]
            row[str(case.num_pairs)] = float(np.median(spent))
    except Exception as error:  # such as too much shared memory
        row["why"] = describe_error(error)
    finally:
        use(kernel, None)
    return row


def compile_candidate(candidate: Candidate, device: str) -> str:
    """Compile a candidate's kernels in this process, into Triton's cache on disk."""
    cases = _cases(candidate[0], device, is_small=True)
    return str(measure(candidate, cases, 1, is_checked=False).get("why", "compiled"))


def fastest(measured: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Return the tiles that gain enough over the planned ones, by kernel."""
    found = {}
    for kernel in KERNELS:
        rows = [row for row in measured if row["kernel"] == kernel and "why" not in row]
        if not rows or rows[0] is not next(r for r in measured if r["kernel"] == kernel):
            continue  # without the planned one there is nothing to compare with
        costs = [math.prod(v for name, v in row.items() if name.isdecimal()) for row in rows]
        best = int(np.argmin(costs))
        sizes = sum(name.isdecimal() for name in rows[0])
        if (costs[best] / costs[0]) ** (1 / sizes) <= 1 - _LEAST_GAIN:
            found[kernel] = rows[best]["tile"]
    return found


def _cases(kernel: str, device: str, *, is_small: bool = False) -> list[Case]:
    kl = KERNELS[kernel]
    if device == "cpu":
        return [Case(24, 64, "float16", kl=kl, device=device)]
    sizes = (4096,) if is_small else (8192, 32768)
    return [Case(n, 768, "bfloat16", kl=kl, device=device) for n in sizes]


def main(argv: list[str] | None = None) -> None:
    parser = mode_parser(__doc__, "benchmarks.systems.gpu_tiles", ("tiles",), "gpu_tiles.json")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    here = measured_on(device)
    table = json.loads(args.output.read_text("utf-8")) if args.output.is_file() else {}
    if args.fresh or any(table.get(name) != value for name, value in here.items()):
        table = {**here, "measured": []}
    measured: list[dict[str, Any]] = table["measured"]
    done = {(row["kernel"], *row["tile"]) for row in measured}
    todo = [each for each in candidates(device == "cpu") if (each[0], *each[1]) not in done]
    if device == "cuda" and todo:
        call_all(compile_candidate, todo, device, processes=PROCESSES)
    for candidate in todo:
        cases = _cases(candidate[0], device)
        measured.append(measure(candidate, cases, 10 if device == "cuda" else 1))
        print(measured[-1], flush=True)
        table["tiles"] = {architecture(): fastest(measured)}
        write_text(args.output, json.dumps(table, indent=1) + "\n")
    print(f"faster than planned: {table['tiles'][architecture()] or 'none'}")


if __name__ == "__main__":
    exit_with(main)
