"""What each step did: a record, and a JSON-lines file of them that survives being killed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class StepRecord(dict[str, Any]):
    """One step: `step` (from 1), `total`, `forget`, `retain`, `consistency`, `anchor`, `lr`,
    `grad_norm`, `applied` (False where a non-finite step was left out) and `seconds`.

    A dict, fit for JSON and trackers, whose keys also read as attributes.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class HistoryFile:
    """`history.jsonl`, one record a line, appended and flushed at each step."""

    def __init__(self, path: Path, *, keep_steps: int) -> None:
        """Open for appending behind the records of the first `keep_steps` steps."""
        self.kept = [record for record in read_history(path) if record["step"] <= keep_steps]
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in self.kept)
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")

    def append(self, record: StepRecord) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_history(path: Path) -> list[StepRecord]:
    """Records of a history file; a last line cut off by a kill is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(StepRecord(json.loads(line)))
        except json.JSONDecodeError:
            break
    return records
