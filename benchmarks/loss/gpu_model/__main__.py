"""Hold the cost model against times that the sweep of the loss measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.command import exit_with, new_parser
from benchmarks.loss.gpu_model.gpu_time import A100, H100, Gpu
from benchmarks.loss.rows import Row, read_rows
from benchmarks.result_files import write_csv
from fasterase.errors import InputError

# GPUs of the model by a word of torch's name for the device.
_GPUS = {"H100": H100, "A100": A100}
_HALVES = ("bfloat16", "float16")
# How much longer than predicted the two kernels with published times took.
USUAL_RATIO = 1.25

# (gpu, n, width, has_ref) -> milliseconds of forward and backward.
Predict = Callable[[Gpu, int, int, bool], float]


def select(path: Path) -> list[tuple[Row, Gpu]]:
    """Return the measured steps of fasterase's Triton backend in half precision, and their GPUs.

    Raises:
        InputError: there are none, or only those of GPUs that the model does not know.
    """
    step = ("fasterase-triton", "speed", "full")
    measured = [
        row
        for row in read_rows(path)
        if (row.kernel_provider, row.metric_name, row.kernel_operation_mode) == step
        and row.y_value_50 is not None
        and row.extra["dtype"] in _HALVES
        and not row.extra["labels"]
    ]
    if not measured:
        raise InputError(
            f"--against: {path} has no times of fasterase-triton, forward and backward, in half "
            "precision. Give what python -m benchmarks.loss --device cuda wrote."
        )
    known = [(row, gpu) for row in measured for word, gpu in _GPUS.items() if word in row.gpu_name]
    if not known:
        names = ", ".join(sorted({row.gpu_name for row in measured}))
        raise InputError(f"--against: the model knows {' and '.join(_GPUS)}; {path} has {names}.")
    return known


def compare(path: Path, predict: Predict | None = None) -> list[dict[str, Any]]:
    """Return one row per measured step, as `select` finds them, with its predicted time."""
    found = []
    for row, gpu in select(path):
        width, kl, measured = row.extra["D"], row.extra["kl"], row.y_value_50
        assert measured is not None
        predicted = (predict or predict_step)(gpu, row.x_value, width, kl)
        flops = (12 if kl else 8) * row.x_value**2 * width
        line: dict[str, Any] = {"gpu": row.gpu_name, "dtype": row.extra["dtype"]}
        line |= {"kl": kl, "width": width}
        line |= {"n": row.x_value, "predicted_ms": predicted, "measured_ms": measured}
        line |= {"measured_p20": row.y_value_20, "measured_p80": row.y_value_80}
        for name, spent in (("of_peak", measured), ("of_peak_predicted", predicted)):
            line |= {"ratio": measured / predicted, name: flops / spent / 1e-3 / gpu.peak_flops}
        found.append(line)
    return sorted(found, key=lambda row: (row["dtype"], row["kl"], row["width"], row["n"]))


def predict_step(gpu: Gpu, n: int, width: int, has_ref: bool) -> float:
    """Predict a step in milliseconds, from the kernels as they compile now."""
    # Compiling needs Triton and its tools; reading measurements does not.
    from benchmarks.loss.gpu_model.cost_model import modelled, step_row

    sums = modelled(gpu, "sums", width, False, n)
    strip = modelled(gpu, "strip", width, has_ref, n)
    return step_row(gpu, n, (sums, strip), "as launched")["ms"]


def summarise(rows: list[dict[str, Any]]) -> str:
    """Return the comparison as text, with the median ratio of large and of small batches."""
    lines = [
        f"{'':9} {'':9} {'D':>5} {'N':>8} {'predicted':>10} {'measured':>10} {'ratio':>6} of peak"
    ]
    for row in rows:
        loss = "KL" if row["kl"] else "InfoNCE"
        lines.append(
            f"{row['dtype']:9} {loss:9} {row['width']:5} {row['n']:8,} {row['predicted_ms']:10.3f} "
            f"{row['measured_ms']:10.3f} {row['ratio']:6.2f} {row['of_peak']:.0%}, predicted "
            f"{row['of_peak_predicted']:.0%}"
        )
    lines.append("")
    for name, low, high in (("N < 8,192", 0, 8192), ("N >= 8,192", 8192, 2**62)):
        ratios = [row["ratio"] for row in rows if low <= row["n"] < high]
        if ratios:
            lines.append(
                f"{name}: {np.median(ratios):.2f} times as long as predicted "
                f"({min(ratios):.2f} to {max(ratios):.2f}); kernels of others with published times "
                f"took {USUAL_RATIO:.2f} times as long"
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__, prog="python -m benchmarks.loss.gpu_model")
    add = parser.add_argument
    text = "CSV of python -m benchmarks.loss --device cuda"
    add("--against", type=Path, required=True, metavar="FILE", help=text)
    add("--output", type=Path, help="CSV to write; default: FILE's name with _model, beside it")
    args = parser.parse_args(argv)
    found = compare(args.against)
    output = args.output or args.against.with_name(f"{args.against.stem}_model.csv")
    write_csv(output, found, decimals=5)
    print(summarise(found))


if __name__ == "__main__":
    exit_with(main)
