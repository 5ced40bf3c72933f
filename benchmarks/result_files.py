"""Where committed results are kept, how benchmarks write them, and what they were measured on."""

from __future__ import annotations

import csv
import functools
import io
import os
import platform
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fasterase
from fasterase.errors import InputError
from fasterase.files import write_text

RESULTS = Path(__file__).parent / "results"


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


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """Format a Markdown table, of which the first `left` columns are words."""
    rule = "|" + "---|" * left + "---:|" * (len(columns) - left)
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, *rows)]
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


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


@functools.cache
def code_version() -> str:
    """Return fasterase's version and commit; without git, that of FASTERASE_COMMIT."""
    commit = ""
    if shutil.which("git"):
        command = ["git", "describe", "--always", "--dirty"]
        here = Path(__file__).parent
        commit = subprocess.run(command, cwd=here, capture_output=True, text=True).stdout.strip()
    commit = commit or os.environ.get("FASTERASE_COMMIT", "")
    return f"{fasterase.__version__} {commit}".strip()
