"""Where committed results are kept, how benchmarks write them, and what they were measured on."""

from __future__ import annotations

import csv
import functools
import io
import json
import os
import platform
import shutil
import statistics
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import fasterase
from fasterase.errors import InputError
from fasterase.files import write_text

RESULTS = Path(__file__).parent / "results"

Row = TypeVar("Row", bound=Mapping[str, Any])


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a file; none if it does not exist."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_csv(
    path: Path, rows: Sequence[Mapping[str, Any]], *, decimals: int | None = None
) -> None:
    """Replace the file at `path`.

    Columns are the keys of all rows in the order of their first appearance. A cell is empty where
    a row lacks the column. Floats are rounded to `decimals`, if given.
    """
    if decimals is not None:
        rows = [
            {name: round(v, decimals) if isinstance(v, float) else v for name, v in row.items()}
            for row in rows
        ]
    text = io.StringIO()
    columns = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def keep_json(path: Path, make: Callable[[], Any]) -> Any:
    """Return what a JSON file holds; where there is none, it is written with what `make` returns.

    What an earlier command measured is not measured again.
    """
    if not path.is_file():
        write_text(path, json.dumps(make()))
    return json.loads(path.read_text(encoding="utf-8"))


def measure_once(
    path: Path, thing: Mapping[str, Any], device: str, measure: Callable[[], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Return the rows of `thing` in a CSV file, measured on this device by this version.

    Where the file lacks them, or one of them says why it has no value or that bits differ, they are
    measured, and written in place of those of another version.
    """
    rows = read_csv(path)
    key, here = {name: str(value) for name, value in thing.items()}, measured_on(device)
    same = key | {"gpu_name": here["gpu_name"]}
    found = [row for row in rows if same.items() <= row.items()]
    if found and all(
        here.items() <= row.items() and not row.get("why") and row.get("equal") != "False"
        for row in found
    ):
        return [dict(row) for row in found]
    others = [row for row in rows if row not in found]
    measured = [{**key, **row, **here} for row in measure()]
    write_csv(path, [*others, *measured], decimals=4)
    return measured


def forget_rows(path: Path, check: str) -> None:
    """Remove the rows of a check from a CSV file, so that they are measured again."""
    if path.exists():
        write_csv(path, [row for row in read_csv(path) if row["check"] != check])


def group_rows(rows: Iterable[Row], *columns: str) -> dict[tuple[Any, ...], list[Row]]:
    """Return values of the columns -> the rows that have them, in the order of the first ones."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return groups


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """Format a Markdown table, of which the first `left` columns are words."""
    rule = "|" + "---|" * left + "---:|" * (len(columns) - left)
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, *rows)]
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def group_table(
    rows: Iterable[Row],
    by: Sequence[str],
    columns: Sequence[str],
    cell: Callable[[list[Row], str], str],
) -> str:
    """Format a Markdown table with a line for each group of rows that agree in the columns `by`.

    `cell` says for the rows of a group, and one of the further `columns`, what is there.
    """
    lines = [
        [*key, *(cell(those, column) for column in columns)]
        for key, those in group_rows(rows, *by).items()
    ]
    return markdown_table([*by, *columns], lines, left=len(by))


def sum_up(rows: Iterable[Mapping[str, Any]], column: str, form: str = ".1f") -> str:
    """Return the mean of a column in percent, or how often each of its words occurs."""
    values = [row[column] for row in rows]
    if isinstance(values[0], str):
        return count_words(values)
    return f"{100 * statistics.fmean(values):{form}}"


def count_words(words: Iterable[str]) -> str:
    """Return each word with how often it occurs, such as `forgotten 3, remembered 1`."""
    return ", ".join(f"{word} {count}" for word, count in Counter(words).most_common())


@functools.cache
def device_name(device: str) -> str:
    """Return the name of the GPU, or of the CPU with the instructions that torch uses."""
    # Not above: `make gpu` tells what it lacks where there is no torch.
    import torch

    if device == "cuda":
        if not torch.cuda.is_available():
            raise InputError("--device cuda: torch sees no CUDA GPU here. Give --device cpu.")
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    name = next(names, "") or platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def measured_on(device: str) -> dict[str, str]:
    """Return the columns that say what a row was measured on."""
    import torch

    versions = {"torch": torch.__version__, "version": code_version()}
    return {"gpu_name": device_name(device), **versions}


@functools.cache
def code_version() -> str:
    """Return fasterase's version and commit; without git, that of FASTERASE_COMMIT.

    New results do not make it "-dirty": a benchmark that writes them must know its rows again.
    """
    commit = ""
    if shutil.which("git"):
        root = Path(__file__).parents[1]
        command = ["git", "describe", "--always"]
        commit = subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip()
        changes = ["git", "diff", "--quiet", "HEAD", "--", ".", ":!benchmarks/results"]
        if commit and subprocess.run(changes, cwd=root, capture_output=True).returncode:
            commit += "-dirty"
    commit = commit or os.environ.get("FASTERASE_COMMIT", "")
    return f"{fasterase.__version__} {commit}".strip()
