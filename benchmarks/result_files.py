"""Where committed results are kept, and how every benchmark writes its CSV files."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fasterase.files import write_text

RESULTS = Path(__file__).parent / "results"


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace the file at `path`.

    Columns are the keys of all rows in the order of their first appearance. A cell is empty where
    a row lacks the column.
    """
    text = io.StringIO()
    columns = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
