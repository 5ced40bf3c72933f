"""Log-log curves of benchmark rows over N, with the time at the rate of a matrix product."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.contrastive_case import Case, flops
from benchmarks.rows import Row
from fasterase.errors import import_extra
from fasterase.files import replace_file


def plot_rows(rows: list[Row], metric: str, csv: Path, mode: str = "full") -> list[Path]:
    """One picture a dtype and scale beside `csv`: a panel a width, without and with the KL.

    Raises:
        MissingExtraError: matplotlib is missing.
    """
    import_extra("matplotlib", "eval", "--plot").use("Agg")
    shown = [r for r in rows if r.metric_name == metric and r.kernel_operation_mode == mode]
    settings = sorted({(row.extra["dtype"], row.extra["scale"]) for row in shown})
    pictures = []
    for dtype, scale in settings:
        kept = [r for r in shown if (r.extra["dtype"], r.extra["scale"]) == (dtype, scale)]
        path = csv.with_name(f"{csv.stem}_{metric}_{dtype}_{scale:g}.svg")
        _draw(kept, f"{metric}, {mode}, {dtype}, scale {scale:g}", path)
        pictures.append(path)
    return pictures


def _draw(rows: list[Row], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    widths = sorted({row.extra["D"] for row in rows})
    teachers = sorted({row.extra["kl"] for row in rows})
    figure = Figure(figsize=(4.2 * len(widths), 3.4 * len(teachers)), layout="constrained")
    grid = figure.subplots(len(teachers), len(widths), squeeze=False, sharex=True)
    names = list(dict.fromkeys(row.kernel_provider for row in rows))
    for (i, kl), (j, width) in product(enumerate(teachers), enumerate(widths)):
        panel = [r for r in rows if r.extra["kl"] == kl and r.extra["D"] == width]
        _draw_panel(grid[i][j], panel, names)
        grid[i][j].set_title(f"D = {width}, {'InfoNCE + KL' if kl else 'InfoNCE'}", fontsize=9)
        if j == 0:
            grid[i][j].set_ylabel(rows[0].metric_unit)
        if i == len(teachers) - 1:
            grid[i][j].set_xlabel("N, pairs in the batch")
    handles: dict[str, Any] = {}
    for axes in grid.flat:
        found, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, found, strict=True))
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=4, fontsize=8
    )
    figure.suptitle(f"{title}: {rows[0].gpu_name}", fontsize=10)
    with replace_file(path) as temporary:
        figure.savefig(temporary)


def _draw_panel(axes: Any, rows: list[Row], names: list[str]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    for number, name in enumerate(names):
        line = sorted(
            (r.x_value, r.y_value_50, r.y_value_20, r.y_value_80)
            for r in rows
            if r.kernel_provider == name and r.y_value_50 is not None
        )
        if name != "gemm" and line:
            sizes, middle, low, high = zip(*line, strict=True)
            axes.plot(sizes, middle, marker="o", markersize=3, label=name, color=f"C{number}")
            axes.fill_between(sizes, low, high, color=f"C{number}", alpha=0.2)
    rates = [r.extra["tflops"] for r in rows if r.kernel_provider == "gemm"]
    if rates:
        ends = sorted({r.x_value for r in rows})
        first, mode = rows[0].extra, rows[0].kernel_operation_mode
        cases = [Case(n, first["D"], first["dtype"], first["scale"], first["kl"]) for n in ends]
        times = [flops(case, mode) / median(rates) / 1e9 for case in cases]
        axes.plot(ends, times, "k--", linewidth=1, label="rate of a large matrix product")
