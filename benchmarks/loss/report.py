"""Show benchmark rows: Markdown tables, and log-log curves over N."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.loss.case import Case, flops
from benchmarks.loss.providers import PROVIDERS
from benchmarks.loss.rows import Row
from fasterase.errors import import_extra
from fasterase.files import replace_file

SHOWN_MODE = "full"
_DIGITS = 3
# What times are compared with: the best that a few lines of torch do, and what people use.
_BASELINES = ("torch-dense", "open_clip")
# Shares of the rate of a large product above this one need an explanation.
_MAX_SHARE = 1.05
# Samples from which quantiles make an interval.
_MIN_SAMPLES = 3


def markdown_tables(rows: list[Row]) -> str:
    """Return one table per metric, width, dtype and scale, without and with the KL and labels.

    Speed has one line per size and provider: the quantiles of the time, how many times as fast as
    each baseline the provider is, and its share of the rate of a large product. The fastest of a
    size is bold where the interval from its 20th to its 80th percentile overlaps no other, of at
    least three samples each. Memory has one line per provider and one column per size.
    """
    blocks: dict[str, list[Row]] = {}
    for row in rows:
        if row.kernel_operation_mode == SHOWN_MODE and row.metric_name in ("speed", "memory"):
            blocks.setdefault(_title(row), []).append(row)
    return "\n\n".join(
        (_speed_table if block[0].metric_name == "speed" else _memory_table)(title, block)
        for title, block in blocks.items()
    )


def explain_share(row: Row) -> str | None:
    """Say why a share of the large product's rate is above 1.05; None if it is not.

    A provider that keeps all logits computes 6 of the 8 N^2 D of the FLOPs that count, with the KL
    8 of 12. A share that this does not explain is one of a product that was slowed down.
    """
    share = row.extra.get("of_gemm")
    if share is None or share <= _MAX_SHARE:
        return None
    if _saves_products(row):
        work = "8 of the 12" if row.extra["kl"] else "6 of the 8"
        return f"keeps logits between the passes: computes as little as {work} N^2 D counted"
    return "left out, for it cannot be: the large product was slowed down by other work"


def _saves_products(row: Row) -> bool:
    provider = PROVIDERS.get(row.kernel_provider)
    spared = 12 / 8 if row.extra["kl"] else 8 / 6
    return (
        provider is not None
        and provider.keeps_logits
        and row.kernel_operation_mode in ("full", "backward")
        and row.extra["of_gemm"] <= _MAX_SHARE * spared
    )


def draw_curves(rows: list[Row], metric: str, csv: Path) -> list[Path]:
    """Draw one picture per dtype and scale beside `csv`, and return their paths.

    A picture has one panel per width, without and with the KL. Panels of times also show the time
    at the rate of a large matrix product.
    """
    import_extra("matplotlib", "eval", "--plot").use("Agg")
    variants: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        if (row.metric_name, row.kernel_operation_mode) == (metric, SHOWN_MODE):
            variants.setdefault((row.extra["dtype"], row.extra["scale"]), []).append(row)
    pictures = []
    for (dtype, scale), kept in sorted(variants.items()):
        path = csv.with_name(f"{csv.stem}_{metric}_{dtype}_{scale:g}.svg")
        _draw_panels(kept, f"{metric}, {SHOWN_MODE}, {dtype}, scale {scale:g}", path)
        pictures.append(path)
    return pictures


def _title(row: Row) -> str:
    extra = row.extra
    threads = f", {extra['threads']} threads" if extra["threads"] else ""
    return (
        f"{row.metric_name} ({row.metric_unit}), "
        f"{_loss_name(extra['kl'], extra.get('labels', False))}, D = {extra['D']}, "
        f"{extra['dtype']}, scale {extra['scale']:g}; {row.gpu_name}{threads}; "
        f"torch {extra['torch']}"
    )


def _loss_name(kl: bool, labels: bool) -> str:
    return ("InfoNCE + KL" if kl else "InfoNCE") + (", repeated labels" if labels else "")


def _speed_table(title: str, rows: list[Row]) -> str:
    ratios = " | ".join(f"x {name}" for name in _BASELINES)
    lines = [
        f"**{title}**",
        "",
        f"| N | | p20 | p50 | p80 | samples | {ratios} | of a large product |",
        "|---:|---|" + "---:|" * (5 + len(_BASELINES)),
    ]
    notes: dict[str, dict[str, None]] = {}  # what is said -> of what, each once
    for size in sorted({row.x_value for row in rows}):
        found = {row.kernel_provider: row for row in rows if row.x_value == size}
        timed = [
            row for name, row in found.items() if name != "gemm" and row.y_value_50 is not None
        ]
        best = fastest(timed)
        for row in timed:
            name = row.kernel_provider
            times = [_number(t) for t in (row.y_value_20, row.y_value_50, row.y_value_80)]
            if row is best:
                times[1] = f"**{times[1]}**"
            cells = [*times, str(row.extra["samples"])]
            cells += [_ratio(found.get(baseline), row) for baseline in _BASELINES]
            note = explain_share(row)
            is_believed = note is None or _saves_products(row)
            cells.append(f"{row.extra['of_gemm']:.0%}" if is_believed else "–")
            lines.append(f"| {size:,} | {name} | " + " | ".join(cells) + " |")
            if note is not None:
                cell = f"{name} at N = {size:,} ({row.extra['of_gemm']:.0%})"
                notes.setdefault(note, {})[cell] = None
        for name, row in found.items():
            if row.y_value_50 is None:
                notes.setdefault(row.extra["why"], {})[name] = None
    return "\n".join([*lines, *_listed(notes)])


def fastest(rows: list[Row]) -> Row | None:
    """Return the fastest row if its interval from p20 to p80 overlaps that of no other.

    None if a row has too few samples for an interval.
    """
    ranked = sorted(rows, key=lambda row: row.y_value_50 or 0.0)
    if not ranked or any(row.extra["samples"] < _MIN_SAMPLES for row in rows):
        return None
    slow_end = ranked[0].y_value_80
    fast_ends = [row.y_value_20 for row in ranked[1:]]
    assert slow_end is not None
    return ranked[0] if all(end is not None and slow_end < end for end in fast_ends) else None


def _ratio(baseline: Row | None, row: Row) -> str:
    """How many times as fast as the baseline."""
    if baseline is None or baseline.y_value_50 is None or row.y_value_50 is None:
        return "–"
    return f"{baseline.y_value_50 / row.y_value_50:.2f}"


def _listed(notes: dict[str, dict[str, None]]) -> list[str]:
    lines = [f"- {', '.join(names)}: {note}" for note, names in notes.items()]
    return ["", *lines] if lines else []


def _memory_table(title: str, rows: list[Row]) -> str:
    sizes = sorted({row.x_value for row in rows})
    found = {(row.kernel_provider, row.x_value): row for row in rows}
    lines = [
        f"**{title}**",
        "",
        "| | " + " | ".join(f"N = {size}" for size in sizes) + " |",
        "|---|" + "---:|" * len(sizes),
    ]
    reasons: dict[str, dict[str, None]] = {}
    for name in dict.fromkeys(row.kernel_provider for row in rows):
        line = [found.get((name, size)) for size in sizes]
        for row in line:
            if row is not None and row.y_value_50 is None:
                reasons.setdefault(row.extra["why"], {})[name] = None
        values = [None if row is None else row.y_value_50 for row in line]
        if any(value is not None for value in values):
            lines.append(f"| {name} | " + " | ".join(map(_number, values)) + " |")
    return "\n".join([*lines, *_listed(reasons)])


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.{_DIGITS}g}" if value < 10**_DIGITS else f"{value:,.0f}"


def _draw_panels(rows: list[Row], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    widths = sorted({row.extra["D"] for row in rows})
    losses = sorted({(row.extra["kl"], row.extra["labels"]) for row in rows})
    figure = Figure(figsize=(4.2 * len(widths), 3.4 * len(losses)), layout="constrained")
    grid = figure.subplots(len(losses), len(widths), squeeze=False, sharex=True)
    names = list(dict.fromkeys(row.kernel_provider for row in rows))
    for (i, (kl, labels)), (j, width) in product(enumerate(losses), enumerate(widths)):
        panel = [
            row
            for row in rows
            if (row.extra["kl"], row.extra["labels"], row.extra["D"]) == (kl, labels, width)
        ]
        if not panel:
            grid[i][j].axis("off")  # labels are measured at one width
            continue
        _draw_curves_of_panel(grid[i][j], panel, names)
        grid[i][j].set_title(f"D = {width}, {_loss_name(kl, labels)}", fontsize=9)
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
