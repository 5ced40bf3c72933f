"""The folder of a run, read again for its page."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from fasterase.engine.history import read_history
from fasterase.errors import InputError
from fasterase.facts import RunFacts
from fasterase.files import parse_path, to_json, write_text
from fasterase.page import render_markdown, render_page
from fasterase.provenance import read_record
from fasterase.report.evaluation import Evaluation

PAGE, MARKDOWN = "report.html", "report.md"
# Pictures beside the Markdown, and their titles.
DRAWN = {
    "losses.png": "Losses over the steps",
    "pictures.png": "Closest captions before and after",
}
# What of a run no other file holds: pictures, the figures behind the verdict.
REST = "report.json"


def read_run(folder: str | PathLike[str]) -> RunFacts:
    """Read what a run left in its `output_dir`: its newest evaluation, too.

    Raises:
        InputError: it is no folder of a finished run, or one of its files is damaged.
    """
    folder = parse_path(folder, argument="folder").expanduser()
    record = read_record(folder / "model")
    if record is None:
        raise InputError(
            f"{str(folder)!r} is no folder of a finished run: there is no model/provenance.json. "
            "Give the output_dir of one."
        )
    evaluation, rest = folder / "evaluation.json", folder / REST
    return RunFacts(
        name=folder.resolve().name,
        record={**dict.fromkeys(("concept", "request", "found")), "words": [], **record},
        history=read_history(folder / "history.jsonl"),
        evaluation=Evaluation.from_json(evaluation) if evaluation.is_file() else None,
        has_folder=True,
        **(_read_rest(rest) if rest.is_file() else {}),
    )


def _read_rest(file: Path) -> dict[str, Any]:
    try:
        return RunFacts.parse_rest(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file} is damaged ({error!r}). Remove it: the page is then without pictures."
        ) from error


def write_rest(run: RunFacts, folder: Path) -> Path:
    """Write what `read_run` finds in no other file."""
    return write_text(folder / REST, to_json(run.rest()) + "\n")


def write_markdown(run: RunFacts, path: Path, drawn: Collection[str] | None = None) -> Path:
    """Write a run in Markdown, and return its path.

    It shows those of the pictures `DRAWN` that were `drawn`; None: those in the run's own folder.
    """
    if drawn is None:
        drawn = [file for file in DRAWN if (path.parent / file).is_file()]
    return write_text(path, render_markdown(run, {file: DRAWN[file] for file in drawn}))


def write_page(runs: Sequence[RunFacts], path: Path) -> Path:
    """Write the page of a run, or of several side by side, and return its path."""
    return write_text(path, render_page(runs))
