"""Benchmark rows in Liger-Kernel's CSV schema; values without a column of it are kept as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Any

from benchmarks.result_files import read_csv, write_csv

# Keys of extra_benchmark_config_str that tell two measurements apart; the others are results.
_SETTINGS = ("D", "dtype", "scale", "kl", "threads", "labels")


@dataclass
class Row:
    """One measured quantity; a row without values gives the reason in `extra["why"]`."""

    kernel_name: str
    kernel_provider: str
    kernel_operation_mode: str  # forward | backward | full | no-grad-forward
    metric_name: str
    metric_unit: str
    x_name: str
    x_label: str
    x_value: int
    y_value_50: float | None = None
    y_value_20: float | None = None
    y_value_80: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    gpu_name: str = ""  # the CPU's name if there is no GPU
    timestamp: str = ""
    version: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for two measurements of the same thing."""
        named = (self.kernel_name, self.kernel_provider, self.kernel_operation_mode)
        settings = (self.extra[name] for name in _SETTINGS)
        return (*named, self.metric_name, self.x_value, self.gpu_name, *settings)


_COLUMNS = [
    "extra_benchmark_config_str" if column.name == "extra" else column.name
    for column in fields(Row)
]


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file; none if the file does not exist."""
    return [_parse(line) for line in read_csv(path)]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Replace the file; of rows with equal keys the last is kept, in the place of the first."""
    latest = {row.key: row for row in rows}
    lines = [map(_format, astuple(row)) for row in latest.values()]
    write_csv(path, [dict(zip(_COLUMNS, line, strict=True)) for line in lines])


def _format(value: Any) -> Any:
    if isinstance(value, dict):
        return json.dumps(value)
    return f"{value:.6g}" if isinstance(value, float) else value


def _parse(line: dict[str, str]) -> Row:
    values: list[Any] = []
    for column in _COLUMNS:
        text = line[column]
        if column == "extra_benchmark_config_str":
            values.append(json.loads(text))
        elif column == "x_value":
            values.append(int(text))
        elif column.startswith("y_value"):
            values.append(float(text) if text else None)
        else:
            values.append(text)
    return Row(*values)
