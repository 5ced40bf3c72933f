"""The page of a run, made from its folder: for people who were not there.

It is one HTML file without script or request; the same stands in a file of Markdown.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from fasterase.config import UnlearnConfig, describe_recipe, field_names, format_yaml
from fasterase.engine.history import read_history
from fasterase.errors import InputError
from fasterase.evaluation.verdict import EARLIER, WITHHELD
from fasterase.facts import Judged, Kept, RunFacts
from fasterase.files import parse_path, to_json, write_text
from fasterase.objective import EraseLoss
from fasterase.provenance import read_record
from fasterase.report.evaluation import LEGEND, Evaluation
from fasterase.report.plots import HEIGHT, WIDTH
from fasterase.report.templating import percent, render
from fasterase.statement import state

PAGE, MARKDOWN = "report.html", "report.md"
# Pictures beside the Markdown, and their titles.
DRAWN = {
    "losses.png": "Losses over the steps",
    "pictures.png": "Closest captions before and after",
}
# What of a run no other file holds: pictures, the figures behind the verdict.
REST = "report.json"
_NAMED_SKIPS = 100  # in Markdown


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
        statement=state(run),
        recipe=describe_recipe(UnlearnConfig(**settings)),
        table=table,
        fence=fence,
        settings=format_yaml(run.settings),
        terms=EraseLoss._fields,
        named_skips=_NAMED_SKIPS,
        drawn=drawn,
    )


def render_page(runs: Sequence[RunFacts]) -> str:
    """Return the page of one run, or of several side by side."""
    sizes = {"width": WIDTH, "height": HEIGHT}
    if len(runs) == 1:
        notes = {"withheld": WITHHELD, "earlier": EARLIER, "legend": LEGEND}
        return render("report.html", run=runs[0], statement=state(runs[0]), **sizes, **notes)
    names = _distinct([run.name for run in runs])
    runs = [replace(run, name=name) for run, name in zip(runs, names, strict=True)]
    forgotten = [{each.name: _tell_left(each) for each in run.judged} for run in runs]
    kept = [{each.name: _tell_kept(each) for each in run.kept} for run in runs]
    settings = [{name: str(value) for name, value in run.settings.items()} for run in runs]
    hurt = [_tell_hurt(run) for run in runs]
    measured = [(run.record["data"], run.evaluation and run.evaluation.pairs) for run in runs]
    return render(
        "comparison.html",
        runs=runs,
        is_same_data=all(each == measured[0] for each in measured),
        forgotten=_side_by_side(forgotten),
        kept=_side_by_side(kept),
        hurt=_side_by_side(hurt),
        settings=[row for row in _side_by_side(settings) if len({*row[1]}) > 1],
        **sizes,
    )


def _distinct(names: Sequence[str]) -> list[str]:
    """Number the names that occur more than once."""
    seen = Counter[str]()
    found = []
    for name in names:
        seen[name] += 1
        found.append(f"{name} ({seen[name]})" if names.count(name) > 1 else name)
    return found


def _side_by_side(columns: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    """Return the rows of a table from its columns, row name -> cell."""
    rows = dict.fromkeys(name for column in columns for name in column)
    return [(name, [column.get(name, "-") for column in columns]) for name in rows]


def _tell_left(each: Judged) -> str:
    share = _tell_share(each.hit, each.low, each.high, each.chance)
    return f"{each.verdict or 'no verdict'}: {share}, residue {sum(each.residues) / 2:.2f}"


def _tell_kept(each: Kept) -> str:
    share = _tell_share(each.after, each.low, each.high, each.chance)
    return share if each.before is None else f"{percent(each.before)} → {share}"


def _tell_share(share: float, low: float, high: float, chance: float) -> str:
    return f"{percent(share)} ({percent(low)} to {percent(high)}; {percent(chance)})"


def _tell_hurt(run: RunFacts) -> dict[str, str]:
    """Return what was hurt most -> how much; the first row counts all."""
    if run.evaluation is None or run.evaluation.original is None:
        return {"in all": "not measured"}
    hurt = run.evaluation.hurt
    shown = {each.name: f"{percent(each.before)} → {percent(each.after)}" for each in hurt[:10]}
    return {"in all": f"{len(hurt):,}", **shown}
