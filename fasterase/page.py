"""The page of a run: one HTML file without script or request, for people who were not there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from fasterase.config import UnlearnConfig, describe_recipe, field_names, format_yaml
from fasterase.evaluation.verdict import EARLIER, WITHHELD
from fasterase.facts import Judged, Kept, RunFacts
from fasterase.objective import EraseLoss
from fasterase.report.curves import HEIGHT, WIDTH
from fasterase.report.evaluation import LEGEND
from fasterase.report.templating import percent, render
from fasterase.statement import state

_NAMED_SKIPS = 100  # in Markdown


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
    hurt = [] if run.evaluation is None else run.evaluation.hurt
    shown = {each.name: f"{percent(each.before)} → {percent(each.after)}" for each in hurt[:10]}
    return {"in all": f"{len(hurt):,}", **shown}
