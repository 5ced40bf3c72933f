"""Show benchmark rows: Markdown tables, and log-log curves over N."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.contrastive.case import Case, flops
from benchmarks.contrastive.rows import Row
from fasterase.errors import import_extra
from fasterase.files import replace_file

_DIGITS = 3


def markdown_tables(rows: list[Row], mode: str = "full") -> str:
    """Return tables of speed and memory, one line per provider and one column per size.

    Each width, dtype and scale has its own table, without and with the KL.
    """
    shown = [
        row
        for row in rows
        if row.kernel_operation_mode == mode and row.metric_name in ("speed", "memory")
    ]
    blocks: dict[str, list[Row]] = {}
    for row in shown:
        blocks.setdefault(_title(row), []).append(row)
    return "\n\n".join(_markdown_table(title, block) for title, block in blocks.items())


def draw_curves(rows: list[Row], metric: str, csv: Path, mode: str = "full") -> list[Path]:
    """Draw one picture per dtype and scale beside `csv`, and return their paths.

    A picture has one panel per width, without and with the KL. Panels of times also show the time
    at the rate of a large matrix product.

    Raises:
        MissingExtraError: matplotlib is missing.
    """
    import_extra("matplotlib", "eval", "--plot").use("Agg")
    shown = [r for r in rows if r.metric_name == metric and r.kernel_operation_mode == mode]
    variants = sorted({(row.extra["dtype"], row.extra["scale"]) for row in shown})
    pictures = []
    for dtype, scale in variants:
        kept = [r for r in shown if (r.extra["dtype"], r.extra["scale"]) == (dtype, scale)]
        path = csv.with_name(f"{csv.stem}_{metric}_{dtype}_{scale:g}.svg")
        _draw_panels(kept, f"{metric}, {mode}, {dtype}, scale {scale:g}", path)
        pictures.append(path)
    return pictures


def _title(row: Row) -> str:
    extra = row.extra
    threads = f", {extra['threads']} threads" if extra["threads"] else ""
    return (
        f"{row.metric_name} ({row.metric_unit}), {_loss_name(extra['kl'])}, D = {extra['D']}, "
        f"{extra['dtype']}, scale {extra['scale']:g}; {row.gpu_name}{threads}; "
        f"torch {extra['torch']}"
    )


def _loss_name(kl: bool) -> str:
    return "InfoNCE + KL" if kl else "InfoNCE"


def _markdown_table(title: str, rows: list[Row]) -> str:
    sizes = sorted({row.x_value for row in rows})
    found = {(row.kernel_provider, row.x_value): row for row in rows}
    lines = [
        f"**{title}**",
        "",
        "| | " + " | ".join(f"N = {size}" for size in sizes) + " |",
        "|---|" + "---:|" * len(sizes),
    ]
    reasons: dict[str, list[str]] = {}
    for name in dict.fromkeys(row.kernel_provider for row in rows):
        line = [found.get((name, size)) for size in sizes]
        for row in line:
            if row is not None and row.y_value_50 is None:
                names = reasons.setdefault(row.extra["why"], [])
                names += [name] if name not in names else []
        if name != "gemm" and any(row is not None and row.y_value_50 is not None for row in line):
            lines.append(f"| {name} | " + " | ".join(_cell(row) for row in line) + " |")
    lines += [""] if reasons else []
    lines += [f"- {', '.join(names)}: {why}" for why, names in reasons.items()]
    return "\n".join(lines)


def _cell(row: Row | None) -> str:
    if row is None or row.y_value_50 is None:
        return "–"
    value = row.y_value_50
    text = f"{value:.{_DIGITS}g}" if value < 10**_DIGITS else f"{value:,.0f}"
    return f"{text} ({row.extra['of_gemm']:.0%})" if "of_gemm" in row.extra else text


def _draw_panels(rows: list[Row], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    widths = sorted({row.extra["D"] for row in rows})
    losses = sorted({row.extra["kl"] for row in rows})
    figure = Figure(figsize=(4.2 * len(widths), 3.4 * len(losses)), layout="constrained")
    grid = figure.subplots(len(losses), len(widths), squeeze=False, sharex=True)
    names = list(dict.fromkeys(row.kernel_provider for row in rows))
    for (i, kl), (j, width) in product(enumerate(losses), enumerate(widths)):
        panel = [r for r in rows if r.extra["kl"] == kl and r.extra["D"] == width]
        _draw_curves_of_panel(grid[i][j], panel, names)
        grid[i][j].set_title(f"D = {width}, {_loss_name(kl)}", fontsize=9)
        if j == 0:
            grid[i][j].set_ylabel(rows[0].metric_unit)
        if i == len(losses) - 1:
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


def _draw_curves_of_panel(axes: Any, rows: list[Row], names: list[str]) -> None:
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
