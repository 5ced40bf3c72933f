"""Benchmark rows as Markdown tables: a line a provider, a column a size."""

from __future__ import annotations

from benchmarks.rows import Row

_DIGITS = 3


def table(rows: list[Row], mode: str = "full") -> str:
    """One table each of speed and memory for every width, dtype and scale, without and with KL."""
    shown = [
        row
        for row in rows
        if row.kernel_operation_mode == mode and row.metric_name in ("speed", "memory")
    ]
    blocks: dict[str, list[Row]] = {}
    for row in shown:
        blocks.setdefault(_title(row), []).append(row)
    return "\n\n".join(_block(title, block) for title, block in blocks.items())


def _title(row: Row) -> str:
    extra = row.extra
    loss = "InfoNCE + KL" if extra["kl"] else "InfoNCE"
    threads = f", {extra['threads']} threads" if extra["threads"] else ""
    return (
        f"{row.metric_name} ({row.metric_unit}), {loss}, D = {extra['D']}, {extra['dtype']}, "
        f"scale {extra['scale']:g}; {row.gpu_name}{threads}; torch {extra['torch']}"
    )


def _block(title: str, rows: list[Row]) -> str:
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
