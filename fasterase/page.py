"""The page of a run, made from its folder: for people who were not there.

It is one HTML file without script or request; the same stands in a file of Markdown.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path
from typing import Any

from fasterase.config import UnlearnConfig, describe_recipe, field_names, format_yaml
from fasterase.engine.history import read_history
from fasterase.errors import InputError
from fasterase.evaluation.verdict import EARLIER, FEW_IMAGES, WITHHELD, Trace
from fasterase.facts import Picture, RunFacts
from fasterase.files import parse_path, to_json, write_text
from fasterase.objective import EraseLoss
from fasterase.provenance import read_record
from fasterase.report.evaluation import LEGEND, Evaluation
from fasterase.report.plots import HEIGHT, WIDTH
from fasterase.report.templating import render

PAGE, MARKDOWN = "report.html", "report.md"
# Pictures beside the Markdown, and their titles.
DRAWN = {
    "losses.png": "Losses over the steps",
    "pictures.png": "Closest captions before and after",
}
# What of a run no other file holds: pictures, the figures behind the verdict.
REST = "report.json"
LIMITS = "What is not claimed"  # of the record
_NAMED_SKIPS = 100  # in Markdown
_LISTED = 40  # names of one kind of damage


def read_run(folder: str | PathLike[str]) -> RunFacts:
    """Read what a run left in its `output_dir`: its newest evaluation, too.

    Raises:
        InputError: it is no folder of a finished run, or one of its files is damaged.
    """
    folder = parse_path(folder, argument="folder")
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
    """Return fields of `RunFacts` from what `write_rest` wrote."""
    try:
        rest = json.loads(file.read_text(encoding="utf-8"))
        rest["traces"] = {name: Trace(**each) for name, each in rest["traces"].items()}
        rest["pictures"] = [Picture(*each) for each in rest["pictures"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file} is damaged ({error!r}). Remove it: the page is then without pictures."
        ) from error
    return rest


def write_rest(run: RunFacts, folder: Path) -> Path:
    """Write what `read_run` finds in no other file."""
    rest = {
        "traces": {name: asdict(trace) for name, trace in run.traces.items()},
        "pictures": run.pictures,
        "neighbours": run.neighbours,
        "skipped": run.skipped,
        "removed": run.removed,
        "called": run.called,
    }
    return write_text(folder / REST, to_json(rest) + "\n")


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


def write_reports(run: RunFacts, folder: Path, drawn: Collection[str] | None = None) -> None:
    """Write both to the folder of a run; see `write_markdown`."""
    write_markdown(run, folder / MARKDOWN, drawn)
    write_page([run], folder / PAGE)


def render_markdown(run: RunFacts, drawn: Mapping[str, str]) -> str:
    """Return the run in Markdown; `drawn` maps files of pictures beside it to their titles."""
    settings = {n: value for n, value in run.settings.items() if n in field_names()}
    table = "" if run.evaluation is None else run.evaluation.table()
    fence = "```"
    while fence in table:  # in the name of a set or in a caption
        fence += "`"
    return render(
        "report.md",
        run=run,
        record=state(run),
        recipe=describe_recipe(UnlearnConfig(**settings)),
        table=table,
        fence=fence,
        settings=format_yaml(run.settings),
        terms=EraseLoss._fields,
        named_skips=_NAMED_SKIPS,
        drawn=drawn,
    )


def state(run: RunFacts) -> dict[str, list[str]]:
    """Return the record that is kept with the request: title -> sentences, in reading order.

    It says in words what was asked, done, found and is not claimed.
    """
    notes = {"withheld": WITHHELD, "few_images": FEW_IMAGES, "listed": _LISTED}
    record: dict[str, list[str]] = {}
    title = ""
    for line in render("record.lines", run=run, **notes).rstrip().split("\n"):
        if line.startswith(" "):
            record[title].append(line.strip())
        else:
            title = line
            record[title] = []
    return record


def render_page(runs: Sequence[RunFacts]) -> str:
    """Return the page of one run, or of several side by side."""
    sizes = {"width": WIDTH, "height": HEIGHT}
    if len(runs) == 1:
        notes = {"withheld": WITHHELD, "earlier": EARLIER, "legend": LEGEND, "listed": _LISTED}
        return render("report.html", run=runs[0], record=state(runs[0]), **sizes, **notes)
    names = _distinct([run.name for run in runs])
    runs = [replace(run, name=name) for run, name in zip(runs, names, strict=True)]
    measured = [(run.record["data"], run.evaluation and run.evaluation.pairs) for run in runs]
    settings = dict.fromkeys(name for run in runs for name in run.settings)
    evaluations = [run.evaluation for run in runs if run.evaluation is not None]
    return render(
        "comparison.html",
        runs=runs,
        is_same_data=all(each == measured[0] for each in measured),
        worst=[each.name for evaluation in evaluations for each in evaluation.hurt[:10]],
        settings=[
            name for name in settings if len({str(run.settings.get(name, "-")) for run in runs}) > 1
        ],
        **sizes,
    )


def _distinct(names: Sequence[str]) -> list[str]:
    """Number the names that occur more than once."""
    return [
        f"{name} ({names[: place + 1].count(name)})" if names.count(name) > 1 else name
        for place, name in enumerate(names)
    ]
