"""Compare implementations of the contrastive loss: speed, memory and error.

    python -m benchmarks.loss [--plot] [--table]

Sweeps N and D, with and without the KL to a frozen original, and at the first width also with
labels, under which four pairs at a time are each other's positives. All providers (providers.py)
run in one process and in turn; times of different cells were not measured in turn. Each number
becomes one row of benchmarks/results/contrastive_<device>.csv as soon as its cell is measured. An
interrupted command resumes from the rows of this version of the code; --fresh measures the cells
that are asked for again. If a provider cannot take a case, its row gives the reason. A provider
that failed, or that was not installed and now is, is tried again after all other cells.

Rates are the FLOPs of an implementation that keeps no [N, N] matrix, divided by the median time.
They are also given as a fraction of the rate of one large matrix product timed in turn with the
providers ("gemm"). An implementation that keeps logits between the passes can exceed 1; the tables
(--table, also written beside the CSV) say so, and leave out a share that nothing explains.
"""

from __future__ import annotations

import argparse
import functools
import os
import warnings
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.command import exit_with, new_parser
from benchmarks.loss.case import MODES, Case, Inputs, flops, make_inputs
from benchmarks.loss.measure import (
    available_bytes,
    errors_against_fp64,
    gemm_repetition,
    peak_extra_bytes,
    repetition,
    time_interleaved,
)
from benchmarks.loss.providers import PROVIDERS, Loss, Provider, UnavailableError
from benchmarks.loss.report import draw_curves, explain_share, markdown_tables
from benchmarks.loss.rows import Row, read_rows, write_rows
from benchmarks.processes import describe_error
from benchmarks.result_files import RESULTS, code_version, device_name
from fasterase.files import write_text

KERNEL = "contrastive"
METRICS = ("speed", "memory", "error")
ERRORS = ("loss_error", "image_grad_error", "text_grad_error", "scale_grad_error")
# Edge of the matrix product whose rate counts as the device's best.
GEMM_SIZE = {"cpu": 2048, "cuda": 8192}
# Share of the free memory that a provider's dense matrices may take.
_SHARE_OF_MEMORY = 0.9

Work = tuple[str, Case, str]  # metric, case, mode
Key = tuple[Any, ...]  # of a row


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    path = args.output or RESULTS / f"contrastive_{args.device}.csv"
    rows = read_rows(path)
    work = _keyed(args)
    if args.fresh:
        asked = {key for _, keys in work for each in keys.values() for key in each}
        rows = [row for row in rows if row.key not in asked]
    failed = {row.key for row in _of_this_version(rows).values() if row.y_value_50 is None}
    # What fails every time must not keep a resumed command from the cells that follow.
    work.sort(key=lambda cell: any(key in failed for keys in cell[1].values() for key in keys))
    warnings.filterwarnings("ignore", message=".*[Tt]ensor [Cc]ores.*")
    reported: set[tuple[str, str]] = set()
    with tqdm(work, unit="cell", dynamic_ncols=True, disable=None) as bar:
        for (metric, case, mode), keys in bar:
            bar.set_postfix_str(f"{metric} {mode} N={case.num_pairs} D={case.width} kl={case.kl}")
            known = _of_this_version(rows)
            missing = [
                PROVIDERS[name]
                for name in args.providers
                if not _is_done(PROVIDERS[name], case, mode, [known.get(key) for key in keys[name]])
            ]
            if missing and metric == "speed":
                # Times compare only if measured in turn.
                missing = [PROVIDERS[name] for name in args.providers]
            if missing:
                found = _measure(metric, case, mode, missing, args)
                rows += found
                write_rows(path, rows)
                for row in found:
                    why = (row.kernel_provider, row.extra.get("why", ""))
                    if row.y_value_50 is not None or why not in reported:
                        bar.write(_line(row))
                        reported.add(why)
    print(f"{len(rows)} rows in {path}")
    _show(path, args)


def _keyed(args: argparse.Namespace) -> list[tuple[Work, dict[str, list[Key]]]]:
    """Return the cells, each with the keys of the rows that each provider can give."""
    found = []
    for metric, case, mode in cases(args):
        keys = {
            name: [_row(case, name, mode, m).key for m in _metrics(metric, PROVIDERS[name])]
            for name in args.providers
        }
        found.append(((metric, case, mode), keys))
    return found


def _of_this_version(rows: list[Row]) -> dict[Key, Row]:
    return {row.key: row for row in rows if row.version == code_version()}


def _is_done(provider: Provider, case: Case, mode: str, rows: list[Row | None]) -> bool:
    """Tell whether a provider's rows of a cell have values, or would still give their reason."""
    if None in rows:
        return False
    if all(row is not None and row.y_value_50 is not None for row in rows):
        return True
    try:
        _prepare(provider, case, mode)
    except Exception as error:
        return isinstance(error, UnavailableError)
    return False


def _show(path: Path, args: argparse.Namespace) -> None:
    """Draw curves and print tables of a file, where asked for."""
    if args.plot:
        for metric in ("speed", "memory"):
            for picture in draw_curves(read_rows(path), metric, path):
                print(f"drawn: {picture}")
    if args.table:
        tables = markdown_tables(read_rows(path))
        write_text(path.with_suffix(".md"), f"{tables}\n")
        print(tables)


def cases(args: argparse.Namespace) -> Iterator[Work]:
    """Yield the sweep, small sizes first.

    Memory and labels are at the first width only, errors at sizes of their own.
    """
    kls, labelled = ([word == "with" for word in words] for words in (args.teacher, args.labels))
    variants = [
        variant
        for variant in product(args.widths, kls, labelled)
        if variant[0] == args.widths[0] or not variant[2]
    ]
    for dtype, scale in product(args.dtypes, args.scales):
        for size, (width, kl, labels) in product(args.sizes, variants):
            case = Case(size, width, dtype, scale, kl, args.device, labels)
            for mode in args.modes:
                if "speed" in args.metrics:
                    yield "speed", case, mode
                if "memory" in args.metrics and width == args.widths[0]:
                    yield "memory", case, mode
        if "error" in args.metrics:
            for size, (width, kl, labels) in product(args.error_size, variants):
                yield "error", Case(size, width, dtype, scale, kl, args.device, labels), "full"


def _measure(
    metric: str, case: Case, mode: str, providers: list[Provider], args: argparse.Namespace
) -> list[Row]:
    if metric == "speed":
        return _speed_rows(case, mode, providers, args)
    rows = []
    for provider in providers:
        found: dict[str, float] = {}
        why = f"{provider.name} gives no gradient of the scale"
        try:
            _prepare(provider, case, mode)
            if metric == "memory":
                found["memory"] = peak_extra_bytes(provider, case, mode) / 2**20
            else:
                found = errors_against_fp64(provider, case)
        except Exception as error:
            why = describe_error(error)
        for name in ERRORS if metric == "error" else (metric,):
            values = [found[name]] if name in found else []
            rows.append(_row(case, provider.name, mode, name, values, why))
    return rows


def _speed_rows(
    case: Case, mode: str, providers: list[Provider], args: argparse.Namespace
) -> list[Row]:
    size = GEMM_SIZE[case.device]
    repetitions = {"gemm": gemm_repetition(size, case.torch_dtype, case.device)}
    failures: dict[str, str] = {}
    for provider in providers:
        try:
            loss = _prepare(provider, case, mode)
            repetitions[provider.name] = repetition(loss, _inputs(case), mode, case.device)
        except Exception as error:
            failures[provider.name] = describe_error(error)
    samples, failed = time_interleaved(
        repetitions,
        seconds=args.seconds,
        min_samples=args.min_samples,
        max_samples=args.max_samples,
        compiled=frozenset(p.name for p in providers if p.compiles),
    )
    failures |= failed
    gemm_rate = 2 * size**3 / float(np.median(samples["gemm"])) / 1e9
    rows = []
    for name in ("gemm", *(provider.name for provider in providers)):
        times = samples.get(name, [])
        row = _row(case, name, mode, "speed", times, failures.get(name, ""))
        if times:
            work = 2 * size**3 if name == "gemm" else flops(case, mode, PROVIDERS[name].objective)
            rate = work / float(np.median(times)) / 1e9  # ms to TFLOP/s
            row.extra |= {"samples": len(times), "tflops": round(rate, 4)}
            row.extra["of_gemm"] = round(rate / gemm_rate, 4)
        rows.append(row)
    return rows


@functools.lru_cache(maxsize=1)
def _inputs(case: Case) -> Inputs:
    """Make the inputs that all providers of a case share; no result outlives a repetition."""
    return make_inputs(case)


def _prepare(provider: Provider, case: Case, mode: str) -> Loss:
    """Build a provider's loss.

    Raises:
        UnavailableError: it cannot take the case or the mode.
    """
    if provider.makes_gradients_early and mode in ("forward", "backward"):
        raise UnavailableError("its forward pass makes the gradients: only both together compare")
    needed, free = provider.dense_bytes(case), available_bytes(case.device)
    if needed > _SHARE_OF_MEMORY * free:
        raise UnavailableError(
            f"not tried: its dense matrices take about {needed / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free"
        )
    return provider.build(case)


def _row(
    case: Case, provider: str, mode: str, metric: str, values: Sequence[float] = (), why: str = ""
) -> Row:
    """Return a row with the quantiles of values; without any it says why."""
    extra: dict[str, Any] = {
        "D": case.width,
        "dtype": case.dtype,
        "scale": case.scale,
        "kl": case.kl,
        "labels": case.labels,
        "threads": torch.get_num_threads() if case.device == "cpu" else None,
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
    }
    if provider in PROVIDERS:
        extra["provider_version"] = PROVIDERS[provider].version
    if not values:
        extra["why"] = why
    middle, low, high = np.quantile(values, (0.5, 0.2, 0.8)).tolist() if values else [None] * 3
    return Row(
        kernel_name=KERNEL,
        kernel_provider=provider,
        kernel_operation_mode=mode,
        metric_name=metric,
        metric_unit={"speed": "ms", "memory": "MiB"}.get(metric, "relative"),
        x_name="N",
        x_label="pairs in the batch",
        x_value=case.num_pairs,
        y_value_50=middle,
        y_value_20=low,
        y_value_80=high,
        extra=extra,
        gpu_name=device_name(case.device),
        timestamp=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        version=code_version(),
    )


def _metrics(metric: str, provider: Provider) -> tuple[str, ...]:
    if metric != "error":
        return (metric,)
    return ERRORS if provider.has_scale_gradient else ERRORS[:-1]


def _line(row: Row) -> str:
    case = f"N={row.x_value:<6} D={row.extra['D']:<5} {'KL' if row.extra['kl'] else '--'}"
    case += " labels" if row.extra["labels"] else ""
    head = f"{row.kernel_provider:<20} {row.metric_name:<17} {row.kernel_operation_mode:<9} {case}"
    if row.y_value_50 is None:
        return f"{head}  {row.extra['why']}"
    spread = f"[{row.y_value_20:.4g}, {row.y_value_80:.4g}] " if row.metric_name == "speed" else ""
    rate = f"  {row.extra['of_gemm']:.0%} of gemm" if "of_gemm" in row.extra else ""
    note = explain_share(row)
    return f"{head}  {row.y_value_50:.4g} {spread}{row.metric_unit}{rate}" + (
        f" ({note})" if note else ""
    )


def _parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__, prog="python -m benchmarks.loss")
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=device)
    add("--sizes", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384], help="N")
    add("--widths", type=int, nargs="+", default=[512, 768, 1280], help="D")
    add("--dtypes", nargs="+", default=["float32"], choices=("float32", "bfloat16", "float16"))
    add("--scales", type=float, nargs="+", default=[100.0])
    add("--teacher", nargs="+", default=["without", "with"], choices=("without", "with"))
    add("--labels", nargs="+", default=["without", "with"], choices=("without", "with"))
    add("--modes", nargs="+", default=["full"], choices=MODES)
    add("--metrics", nargs="+", default=list(METRICS), choices=METRICS)
    add("--providers", nargs="+", default=list(PROVIDERS), choices=list(PROVIDERS))
    add("--error-size", type=int, nargs="+", default=[1000], help="N of comparisons with fp64")
    add("--seconds", type=float, default=1.0, help="minimum time per provider and cell")
    add("--min-samples", type=int, default=5)
    add("--max-samples", type=int, default=100)
    add("--threads", type=int, help="CPU threads; default: torch's")
    add("--output", type=Path, help="CSV file to write")
    add("--fresh", action="store_true", help="measure again what is asked for")
    add("--plot", action="store_true", help="draw curves into files beside the CSV")
    add("--table", action="store_true", help="print Markdown tables, and write them beside the CSV")
    return parser


if __name__ == "__main__":
    exit_with(main)
