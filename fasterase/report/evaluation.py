"""The result of an evaluation: measurements side by side; table, JSON, plots."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import Any

from fasterase.errors import InputError
from fasterase.evaluation.evaluator import Evaluator, Measurement, Scores
from fasterase.evaluation.examiner import Examiner
from fasterase.evaluation.findings import Finding, Findings, Series
from fasterase.evaluation.hurt import (
    RECALL,
    Hurt,
    Outside,
    Remaining,
    find_remaining,
    hurt_groups,
    worst_first,
)
from fasterase.evaluation.metrics import (
    CONTEST_HIT,
    IMAGE_TO_IMAGE,
    METRICS,
    OLD_INDEX,
    TOWER_HITS,
)
from fasterase.evaluation.verdict import decide, decide_each
from fasterase.files import check_creatable, check_writable, parse_path, to_json, write_text
from fasterase.numerals import counted
from fasterase.report.plots import plot_charts, plot_findings, series_charts
from fasterase.report.tables import Section, html_table, markdown_table, text_table
from fasterase.report.templating import inline, render

LEGEND = (
    "Sets to forget: ↓ should fall to chance or below; ↓ chance and ↑ chance should reach chance\n"
    "and not pass it. All other sets, against the original: ↑ should not fall, ↓ should not rise."
)
LISTED = 20  # names of what was hurt most
REFERENCE_WIDTH = 10  # characters of a line of a reference's name


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a model on every set, beside those of the original and further models.

    Shares (accuracy, recall, hit) are 0 to 1 here and percent in tables. All models were measured
    on the same pairs and candidates.

    Attributes:
        scores: set -> metric -> value of the model, as `to_dict()` gives it.
        intervals: set -> metric -> (low, high), 95 % interval over pairs: Wilson's for
            shares of pairs, else percentile bootstrap.
        chance: set -> metric -> value of a random order of the candidates; for the cosine the
            model's mean over unmatched pairs.
        pairs: set -> number of pairs measured.
        settings: model name, number of candidate captions, max_pairs, seed, resamples.
        forget_sets: names of the sets to forget, `"forget"` first; all others are to be kept.
        verdicts: `"model"`, `"original"` or name of a reference -> its verdict; see `verdict`.
            Empty if no retain pair is unrelated to the forget set.
        set_verdicts: the same names -> set to forget -> its verdict alone.
        original: the original's scores, or None if it was not measured.
        references: name -> a further model's scores.
        tasks: name of a task -> what it found; see docs/attacks.md.
        attacks: name of an attack -> what it found.
        audit: what the record beside a saved model says, and how the model compares with it.
        series: name of an attack -> what `plot` draws, if that is more than its figures.
        hurt: what lost outside the sets to forget, by name, the worst first: captions and classes
            of sets to keep, and everyday words. Empty without the original.
        remaining: captions to forget that still win pictures in the verdict's contest, by name,
            with the share of their pictures, the most found first.
        outside: of everyday things, which need no pictures: how many were measured (`things`), the
            mean `cosine` with the original's feature and that of the lowest 5 %, the mean share of
            nearest `neighbours` that stayed, the share of things that lost more than half of them
            (`hurt`). No cosines for an original of another width; empty without the original, or
            a tokenizer that reads them.
    """

    scores: Scores
    intervals: dict[str, dict[str, tuple[float, float]]]
    chance: Scores
    pairs: dict[str, int]
    settings: dict[str, Any]
    forget_sets: list[str] = field(default_factory=lambda: ["forget"])
    verdicts: dict[str, str] = field(default_factory=dict)
    set_verdicts: dict[str, dict[str, str]] = field(default_factory=dict)
    original: Scores | None = None
    references: dict[str, Scores] = field(default_factory=dict)
    tasks: dict[str, Findings] = field(default_factory=dict)
    attacks: dict[str, Findings] = field(default_factory=dict)
    audit: list[str] = field(default_factory=list)
    series: dict[str, list[Series]] = field(default_factory=dict)
    hurt: list[Hurt] = field(default_factory=list)
    outside: dict[str, float] = field(default_factory=dict)
    remaining: list[Remaining] = field(default_factory=list)

    @property
    def verdict(self) -> str | None:
        """The verdict on the model: `"remembered"`, `"over-erased"`, `"undecided"`, `"forgotten"`
        or `"never known"` (only if the original was measured); None without unrelated retain pairs.

        It is the worst over all sets to forget; see `fasterase.evaluation.verdict`.
        """
        return self.verdicts.get("model")

    @property
    def residue(self) -> float | None:
        """Mean residue of the forget set over both directions: 1 known, 0.5 no trace."""
        return self.mean_residue("forget")

    def mean_residue(self, name: str, scores: Scores | None = None) -> float | None:
        """Return the mean over both directions of a set's residue; None if it was not judged.

        Args:
            name: a set to forget.
            scores: of the original or a reference; None for the model's.
        """
        found = (self.scores if scores is None else scores).get(name, {})
        if "image_to_text_residue" not in found:
            return None
        return (found["image_to_text_residue"] + found["text_to_image_residue"]) / 2

    def to_dict(self) -> Scores:
        """Return set -> metric -> value of the model; then `"task:retrieval"`, `"attack:swap"`, ...

        Verdicts and prompts are words, and only in `attacks`.
        """
        found = {name: dict(values) for name, values in self.scores.items()}
        for kind, name, findings in self.examined():
            values = {key: finding.value for key, finding in findings.items()}
            found[f"{kind}:{name}"] = {k: v for k, v in values.items() if not isinstance(v, str)}
        return found

    def examined(self) -> Iterator[tuple[str, str, Findings]]:
        """Yield `"task"` or `"attack"`, its name and what it found."""
        for kind, those in (("task", self.tasks), ("attack", self.attacks)):
            for name, findings in those.items():
                yield kind, name, findings

    def flat(self) -> dict[str, float]:
        """Return `set/metric` -> value of the model, for trackers."""
        return {
            f"{name}/{metric}": value
            for name, values in self.scores.items()
            for metric, value in values.items()
        }

    def table(self) -> str:
        """Return plain text, one row per set and metric; 100 columns wide with two references."""
        references = ["\n".join(textwrap.wrap(name, REFERENCE_WIDTH)) for name in self.references]
        table = text_table(columns_of(self, references), sections_of(self))
        return "\n\n".join([table, *_notes(self)])

    def markdown(self) -> str:
        """Return the same table in Markdown, with a heading."""
        table = markdown_table(columns_of(self), sections_of(self))
        title = f"# Evaluation of {self.settings['model']}"
        return "\n\n".join([title, table, *_notes(self, written=inline)]) + "\n"

    def _repr_html_(self) -> str:
        """Show the verdict, what was hurt, and the table in a notebook."""
        table = html_table(columns_of(self), sections_of(self))
        *notes, legend = _notes(self)
        return render("evaluation.html", notes=notes, table=table, legend=legend)

    def report(self, path: str | PathLike[str]) -> Path:
        """Write the report to `path`: Markdown, or JSON if the name ends in `.json`.

        Raises:
            InputError: the name does not end in .md, .markdown, .txt or .json, or cannot be a
                file.
        """
        path = parse_path(path, argument="path")
        check_report_path(path, argument="path")
        if path.suffix == ".json":
            return self.to_json(path)
        return write_text(path, self.markdown())

    def plot(self, folder: str | PathLike[str]) -> list[Path]:
        """Draw each task and attack to a file of its name in `folder`, such as `relearn.png`.

        Raises:
            InputError: there is neither, or the folder cannot be written to.
            MissingExtraError: matplotlib is not installed (extra `eval`).
        """
        folder = parse_path(folder, argument="folder")
        if not (self.tasks or self.attacks):
            raise InputError(
                "plot: there is nothing to draw. Evaluate with tasks=(...) or attacks=(...)."
            )
        check_writable(folder, argument="folder")
        files = []
        for kind, name, findings in self.examined():
            path, title = folder / f"{name}.png", f"{kind} {name} of {self.settings['model']}"
            charts = series_charts(self.series.get(name, ()))
            files.append(
                plot_charts(charts, path, title=title)
                if charts
                else plot_findings([*findings.values()], path, title=title)
            )
        return files

    def to_json(self, path: str | PathLike[str]) -> Path:
        """Write everything to a JSON file that `from_json` reads.

        Raises:
            InputError: `path` is no path.
        """
        text = to_json(asdict(self), indent=1) + "\n"
        return write_text(parse_path(path, argument="path"), text)

    @classmethod
    def from_json(cls, path: str | PathLike[str]) -> Evaluation:
        """Read what `to_json` wrote.

        Raises:
            InputError: the file is missing or is not an evaluation.
        """
        path = parse_path(path, argument="path")
        if not path.is_file():
            raise InputError(f"path: no file {path}. Give one that Evaluation.to_json wrote.")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            for found in values["intervals"].values():
                found |= {key: tuple(ends) for key, ends in found.items()}
            for found in (*values.get("tasks", {}).values(), *values.get("attacks", {}).values()):
                found |= {key: Finding(**each) for key, each in found.items()}
            for those in values.get("series", {}).values():
                those[:] = [Series(**each) for each in those]
            values["hurt"] = [Hurt(*each) for each in values.get("hurt", [])]
            values["remaining"] = [Remaining(*each) for each in values.get("remaining", [])]
            return cls(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"path: {path} is not an evaluation ({error}).") from error


def compare(
    evaluator: Evaluator,
    model: Measurement,
    *,
    original: Measurement | None = None,
    references: Mapping[str, Measurement] | None = None,
    examiner: Examiner | None = None,
) -> Evaluation:
    """Put the measurement of `model` beside those of the others, with intervals and verdicts.

    `examiner` has run the tasks and attacks, if there are any.

    Raises:
        InputError: the measurements are of different pairs.
    """
    references = references or {}
    others = {**({} if original is None else {"original": original}), **references}
    for name, other in others.items():
        model.check_same_pairs(other, name)
    before = None if original is None else original.traces
    traces = {name: each.traces for name, each in {"model": model, **others}.items()}
    verdicts = {name: decide(each, before) for name, each in traces.items()}
    outside, hurt = _compare_outside(evaluator, model, original)
    return Evaluation(
        scores=model.averages(),
        intervals=model.intervals(resamples=evaluator.resamples, seed=evaluator.seed),
        chance={name: dict(scores.chance) for name, scores in model.sets.items()},
        pairs={name: len(scores.ids) for name, scores in model.sets.items()},
        settings={
            "model": model.model,
            "candidates": model.candidates,
            "max_pairs": evaluator.max_pairs,
            "seed": evaluator.seed,
            "resamples": evaluator.resamples,
        },
        forget_sets=list(evaluator.forget_sets),
        verdicts={name: verdict for name, verdict in verdicts.items() if verdict is not None},
        set_verdicts={name: decide_each(each, before) for name, each in traces.items()},
        original=None if original is None else _original_scores(original, model),
        references={name: other.averages() for name, other in references.items()},
        hurt=hurt,
        outside=outside,
        remaining=find_remaining(
            {n: [each[0] for each in model.features[n].captions] for n in evaluator.forget_sets},
            model.sets,
        ),
        **({} if examiner is None else examiner.results()),
    )


def _compare_outside(
    evaluator: Evaluator, model: Measurement, original: Measurement | None
) -> tuple[dict[str, float], list[Hurt]]:
    """Return `Evaluation.outside` and `Evaluation.hurt`."""
    if original is None:
        return {}, []
    kept = [name for name in model.sets if name not in evaluator.forget_sets]
    captions = {name: [each[0] for each in model.features[name].captions] for name in kept}
    classes = {name: model.classes[name] for name in kept if name in model.classes}
    found = [
        *hurt_groups("caption", captions, model.sets, original.sets, RECALL),
        *hurt_groups("class", classes, model.sets, original.sets, "zero_shot_accuracy"),
    ]
    if model.things is None or original.things is None:
        return {}, worst_first(found)
    outside = Outside.compare(model.things, original.things)
    return outside.summary(), worst_first([*found, *outside.hurt(evaluator.things)])


def _original_scores(original: Measurement, model: Measurement) -> Scores:
    """Return an original's averages: in the old index too, which its own images are.

    Beside itself each of its towers knows what both know.
    """
    scores = original.averages()
    for name, values in scores.items():
        for metric in TOWER_HITS.values():
            if metric in model.sets[name].values:
                values[metric] = values[CONTEST_HIT]
        if OLD_INDEX in model.sets[name].values:
            values[OLD_INDEX] = values["text_to_image_recall@1"]
    return scores


def columns_of(evaluation: Evaluation, references: Iterable[str] | None = None) -> list[str]:
    """Return the headers of the table; `references` replaces the names of further models."""
    original = [] if evaluation.original is None else ["original"]
    others = evaluation.references if references is None else references
    return ["metric", "wanted", "chance", *original, "model", "95 % interval", *others]


def sections_of(evaluation: Evaluation) -> list[Section]:
    """Return one section per set, then one per task or attack and group of its findings."""
    found: list[tuple[str, Iterable[Finding]]] = []
    for name in evaluation.scores:
        count = evaluation.pairs[name]
        aim = "to forget" if name in evaluation.forget_sets else "to keep"
        title = f"{name} ({counted(count, 'pair')}, {aim})"
        found.append((title, _set_findings(evaluation, name)))
    for kind, name, findings in evaluation.examined():
        for group, those in groupby(findings.values(), key=lambda finding: finding.group):
            found.append((f"{kind} {name}: {group}", list(those)))
    return [Section(title, [_row(evaluation, each) for each in those]) for title, those in found]


def _set_findings(evaluation: Evaluation, name: str) -> Iterator[Finding]:
    """Yield the metrics of a set in the form of findings."""
    for metric in METRICS:
        if metric.key in evaluation.scores[name]:
            wanted = metric.forget if name in evaluation.forget_sets else metric.keep
            others: dict[str, float | str] = {
                other: scores[name][metric.key]
                for other, scores in evaluation.references.items()
                if metric.key in scores.get(name, {})
            }
            yield Finding(
                metric.key,
                name,
                metric.title,
                metric.unit,
                wanted,
                evaluation.scores[name][metric.key],
                *evaluation.intervals[name][metric.key],
                evaluation.chance[name][metric.key],
                (evaluation.original or {}).get(name, {}).get(metric.key),
                others,
            )


def _row(evaluation: Evaluation, finding: Finding) -> list[str]:
    return [
        finding.title,
        finding.wanted,
        finding.format(finding.chance),
        *([] if evaluation.original is None else [finding.format(finding.original)]),
        finding.format(finding.value),
        finding.interval,
        *(finding.format(finding.references.get(name)) for name in evaluation.references),
    ]


def _notes(evaluation: Evaluation, written: Callable[[str], str] = str) -> list[str]:
    """Return the verdicts, what the audit found, and how to read the table.

    `written` is how names are written, which may hold anything.
    """
    audit = [f"- {line}" for line in evaluation.audit]
    notes = [
        _describe_verdicts(evaluation),
        written(_name_first("Still found", evaluation.remaining, LISTED)),
        written(describe_hurt(evaluation, count=LISTED)),
        describe_outside(evaluation.outside),
        "\n".join(["Audit:", *audit]) if audit else "",
    ]
    candidates = evaluation.settings["candidates"]
    legend = (
        f"{LEGEND}\nimage->text ranks among {counted(candidates, 'caption')}, "
        "text->image among the set's images and the\nretain set's."
    )
    if any(IMAGE_TO_IMAGE in values for values in evaluation.scores.values()):
        legend += " image->image ranks these too; right is the same class, or else caption."
    if any(OLD_INDEX in values for values in evaluation.scores.values()):
        legend += (
            "\ntext->old image ranks the original's features of the images, an index not rebuilt."
        )
    return [*filter(None, notes), legend]


def describe_hurt(evaluation: Evaluation, *, count: int) -> str:
    """Name the `count` that lost most; empty if nothing did."""
    return _name_first("Hurt most", evaluation.hurt, count)


def _name_first(title: str, found: Sequence[Hurt | Remaining], count: int) -> str:
    named = ", ".join(each.describe() for each in found[:count])
    more = f" and {len(found) - count:,} more" if len(found) > count else ""
    return f"{title}: {named}{more}." if found else ""


def describe_outside(outside: Mapping[str, float]) -> str:
    """Say how everyday things fared, from `Evaluation.outside`."""
    if not outside:
        return ""
    text = (
        f"Outside the sets: {outside['things']:,} everyday things kept "
        f"{100 * outside['neighbours']:.0f} % of their nearest neighbours; "
        f"{100 * outside['hurt']:.1f} % of them lost more than half."
    )
    if "cosine" not in outside:
        return text
    return (
        f"{text} Cosine with the original {outside['cosine']:.3f}, of the lowest 5 % "
        f"{outside['cosine_of_5_percent']:.3f}."
    )


def _describe_verdicts(evaluation: Evaluation) -> str:
    if not evaluation.verdicts:
        return (
            "Verdict: none. No retain pair has a caption that is not in a set to forget, so\n"
            "there is nothing to compare with."
        )
    listed = []
    for name, verdict in evaluation.verdicts.items():
        sets = evaluation.set_verdicts.get(name, {})
        # Where there are several, say which set the verdict comes from.
        by_set = ", ".join(f"{each} by {other}" for other, each in sets.items())
        listed.append(f"{name} {verdict}" + (f" ({by_set})" if len(sets) > 1 else ""))
    return f"Verdict: {', '.join(listed)}."


def check_report_path(path: Path, *, argument: str) -> None:
    """Refuse a path that `Evaluation.report` could not write to, before anything is measured."""
    if path.suffix not in ("", ".md", ".markdown", ".txt", ".json"):
        raise InputError(f"{argument}={str(path)!r}: a report is Markdown (.md) or JSON (.json).")
    if path.is_dir():
        raise InputError(f"{argument}={str(path)!r} is a folder. Give the name of a file.")
    check_creatable(path.parent, argument=f"{argument}={str(path)!r}")
