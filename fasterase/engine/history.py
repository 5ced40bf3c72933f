"""Records of the steps taken, and a JSON-lines file of them that survives a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fasterase.files import append_whole, write_text


class StepRecord(dict[str, Any]):
    """One step: `step` (from 1), `total`, `forget`, `retain`, `consistency`, `anchor`, `lr`,
    `grad_norm`, `applied` (False if the step was not finite and left out) and `seconds`.

    A dict, ready for JSON and trackers, whose keys are also attributes.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class HistoryFile:
    """`history.jsonl`: one record per line, appended and flushed at each step."""

    def __init__(self, path: Path, *, keep_steps: int) -> None:
        """Open for appending after the records of the first `keep_steps` steps."""
        self.kept = [record for record in read_history(path) if record["step"] <= keep_steps]
        write_text(path, "".join(json.dumps(record) + "\n" for record in self.kept))
        self._path = path
        # Unbuffered: a buffer that could not be written would be tried again on closing.
        self._file = path.open("ab", buffering=0)

    def append(self, record: StepRecord) -> None:
        """Append a line.

        Raises:
            DiskFullError: there is no room for it; the lines before it are kept.
        """
        append_whole(self._file, json.dumps(record).encode() + b"\n", path=self._path)

    def close(self) -> None:
        self._file.close()


def read_history(path: Path) -> list[StepRecord]:
    """Return the records of a history file; a last line cut off by a kill is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(StepRecord(json.loads(line)))
        except json.JSONDecodeError:
            break
    return records
