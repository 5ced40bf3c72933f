"""Benchmark results in Liger-Kernel's CSV schema, with what it has no column for as JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Any

from fasterase.files import write_text

# Of extra_benchmark_config_str: what tells two measurements apart. The rest of it was found out.
_SETTINGS = ("D", "dtype", "scale", "kl", "threads")


@dataclass
class Row:
    """One measured quantity; a row without values says in `extra["why"]` why there are none."""

    kernel_name: str
    kernel_provider: str
    kernel_operation_mode: str  # forward | backward | full | no-grad-forward
    metric_name: str
    metric_unit: str
    x_name: str
    x_label: str
    x_value: int
    y_value_50: float | None
    y_value_20: float | None
    y_value_80: float | None
    extra: dict[str, Any] = field(default_factory=dict)
    gpu_name: str = ""  # the CPU's name where there is no GPU
    timestamp: str = ""
    version: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for two measurements of the same thing."""
        settings = tuple(self.extra.get(name) for name in _SETTINGS)
        return (
            self.kernel_name,
            self.kernel_provider,
            self.kernel_operation_mode,
            self.metric_name,
            self.x_value,
            self.gpu_name,
            *settings,
        )


_COLUMNS = [
    "extra_benchmark_config_str" if column.name == "extra" else column.name
    for column in fields(Row)
]


def read_rows(path: Path) -> list[Row]:
    """Rows of a file, none where there is none."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [_parse(line) for line in csv.DictReader(file)]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Replace the file; of rows with one key the last stays, in the place of the first."""
    latest = {row.key: row for row in rows}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row in latest.values():
        writer.writerow(_format(value) for value in astuple(row))
    write_text(path, text.getvalue())


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
