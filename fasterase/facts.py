"""What is told of a run, in pages, cards and records: from its result, or from its folder."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

from fasterase.config import UnlearnConfig
from fasterase.engine.words import Word
from fasterase.evaluation.hurt import RECALL, Hurt
from fasterase.evaluation.metrics import CONTEST_HIT, TOWER_HITS
from fasterase.evaluation.verdict import (
    FORGOTTEN,
    JUDGED_PAIRS,
    NEVER_KNOWN,
    OVER_ERASED,
    PRECEDENCE,
    REMEMBERED,
    UNDECIDED,
    Trace,
    decide_each,
)
from fasterase.provenance import erasures
from fasterase.report.evaluation import Evaluation, columns_of, describe_outside, sections_of
from fasterase.report.pictures import SheetRow, make_thumbnail
from fasterase.report.plots import Chart, history_charts, series_charts
from fasterase.report.tables import html_table
from fasterase.report.templating import jpeg_uri

_CAPTION = 300  # characters
_HEADLINES = {
    FORGOTTEN: "The model has forgotten {}.",
    REMEMBERED: "The model still knows {}.",
    OVER_ERASED: "The model avoids {} so strongly that this shows what was erased.",
    UNDECIDED: "There are too few pictures to tell whether the model has forgotten {}.",
    NEVER_KNOWN: "The model never knew {}: there was nothing to forget.",
    None: "There is no verdict: no pairs to compare {} with.",
}
# Of undecided sets, where the pictures would be enough if fewer were found.
_SOME_FOUND = "The model still finds too many pictures to be sure that it has forgotten {}."


class Picture(NamedTuple):
    """A picture of the gallery, ready for JSON."""

    section: str
    is_to_forget: bool
    image: str  # `data:` URI
    caption: str
    before: list[str]  # the closest captions by the original, best first
    after: list[str]  # by the model
    is_wrong: bool  # still named by what was erased, or no longer by its own caption

    @classmethod
    def of(cls, row: SheetRow, erased: Collection[str]) -> Picture:
        return cls(
            row.section,
            row.is_to_forget,
            jpeg_uri(make_thumbnail(row.image)),
            row.caption[:_CAPTION],
            [name[:_CAPTION] for name in row.before],
            [name[:_CAPTION] for name in row.after],
            row.is_wrong(erased),
        )


class Judged(NamedTuple):
    """What is left of a set to forget."""

    name: str
    verdict: str | None
    trace: Trace
    before: float | None  # `trace.hit` of the original


class Kept(NamedTuple):
    """A set to keep: the share of its pictures whose own caption is found first."""

    name: str
    pairs: int
    before: float | None  # by the original
    after: float
    low: float  # 95 % interval of `after`
    high: float
    chance: float


@dataclass(frozen=True)
class RunFacts:
    """What is told of a run, from its result or from what it left in its folder.

    Attributes:
        name: of the run, such as its folder's.
        record: what `provenance.json` holds.
        history: one record per step.
        evaluation: of the erased model; None if it was not measured.
        traces: set to forget -> the figures behind its verdict.
        pictures: the gallery.
        neighbours: names in `evaluation.hurt` that are close to what was erased.
        skipped: id and reason of pairs that could not be read.
        removed: number of retain pairs that were also in the forget set.
        called: what the page calls what was erased, where the record does not state it.
        has_folder: whether the run left its settings in a folder.
    """

    name: str
    record: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]] = ()
    evaluation: Evaluation | None = None
    traces: Mapping[str, Trace] = field(default_factory=dict)
    pictures: Sequence[Picture] = ()
    neighbours: Collection[str] = ()
    skipped: Sequence[Sequence[str]] = ()
    removed: int = 0
    called: str = "what it was to forget"
    has_folder: bool = False

    @property
    def settings(self) -> Mapping[str, Any]:
        """Fields of `UnlearnConfig` that say how to erase."""
        settings: Mapping[str, Any] = self.record["config"]
        return settings

    @property
    def concept(self) -> str:
        return self.record.get("concept") or self.called

    @property
    def verdict(self) -> str | None:
        """Of the newest measurement."""
        if self.evaluation is not None and self.evaluation.verdict is not None:
            return self.evaluation.verdict
        found: str | None = self.record["outcome"]["verdict"]
        return found

    @property
    def headline(self) -> str:
        still_open = [trace for trace in self.traces.values() if not trace.is_decisive]
        some_found = still_open and all(trace.could_decide for trace in still_open)
        is_open = self.verdict == UNDECIDED
        sentence = _SOME_FOUND if is_open and some_found else _HEADLINES[self.verdict]
        return sentence.format(self.concept)

    @cached_property
    def judged(self) -> list[Judged]:
        """The sets to forget, those of the worst verdict first."""
        names = dict.fromkeys(self.traces)
        if self.evaluation is not None and self.evaluation.set_verdicts:
            measured = self.evaluation.set_verdicts["model"]
            # Another measurement than the run's own counts alone.
            names = names if set(names) == set(measured) else dict.fromkeys(measured)
        found = [self._judge(name) for name in names]
        order = [*PRECEDENCE, None]
        return sorted(found, key=lambda each: order.index(each.verdict))

    def _judge(self, name: str) -> Judged:
        """Take the figures of the newest measurement, or else those of the run."""
        trace, evaluation = self.traces.get(name), self.evaluation
        if evaluation is None or CONTEST_HIT not in evaluation.scores.get(name, {}):
            outcome = self.record["outcome"]
            verdict = outcome["verdict"]
            if len(self.traces) > 1 and verdict != NEVER_KNOWN:
                # Records of an earlier version lack the verdicts.
                verdict = (outcome.get("verdicts") or decide_each(self.traces)).get(name)
            return Judged(name, verdict, self.traces[name], None)
        scores, intervals = evaluation.scores[name], evaluation.intervals[name]
        measured = Trace(
            scores["image_to_text_residue"],
            scores["text_to_image_residue"],
            scores[CONTEST_HIT],
            *intervals[CONTEST_HIT],
            evaluation.chance[name][CONTEST_HIT],
            min(evaluation.pairs[name], JUDGED_PAIRS),
            towers={
                tower: (scores[key], intervals[key][0])
                for tower, key in TOWER_HITS.items()
                if key in scores
            },
            band=None if trace is None else trace.band,
        )
        verdict = evaluation.set_verdicts.get("model", {}).get(name)
        before = (evaluation.original or {}).get(name, {}).get(CONTEST_HIT)
        return Judged(name, verdict, measured, before)

    @cached_property
    def kept(self) -> list[Kept]:
        """The sets to keep."""
        evaluation = self.evaluation
        if evaluation is None:
            return []
        return [
            Kept(
                name,
                evaluation.pairs[name],
                (evaluation.original or {}).get(name, {}).get(RECALL),
                scores[RECALL],
                *evaluation.intervals[name][RECALL],
                evaluation.chance[name][RECALL],
            )
            for name, scores in evaluation.scores.items()
            if name not in evaluation.forget_sets and RECALL in scores
        ]

    @cached_property
    def damage(self) -> list[tuple[str, str, list[Hurt]]]:
        """Groups of what was hurt, neighbours first: title, what is counted, names."""
        hurt = [] if self.evaluation is None else self.evaluation.hurt
        near = set(self.neighbours)
        groups = []
        for is_word in (False, True):
            what = "everyday words" if is_word else "captions and classes"
            counted = "nearest words that stayed" if is_word else "own pictures named rightly"
            for is_near in (True, False):
                where = "Close to what was erased" if is_near else "Further away" if near else "All"
                those = [
                    each
                    for each in hurt
                    if (each.kind == "word") == is_word and (each.name in near) == is_near
                ]
                groups.append((f"{where}: {what}", counted, those))
        return [group for group in groups if group[2]]

    @property
    def outside(self) -> str:
        return "" if self.evaluation is None else describe_outside(self.evaluation.outside)

    @property
    def sections(self) -> list[tuple[str, list[Picture]]]:
        by_section = groupby(self.pictures, key=lambda picture: picture.section)
        return [(section, list(those)) for section, those in by_section]

    @property
    def charts(self) -> list[Chart]:
        return history_charts(self.history)

    @property
    def examined(self) -> list[tuple[str, str, list[Chart]]]:
        """Tasks and attacks: title, table of their findings, charts."""
        evaluation = self.evaluation
        if evaluation is None:
            return []
        sections, found = sections_of(evaluation), []
        for kind, name, _ in evaluation.examined():
            those = [each for each in sections if each.title.startswith(f"{kind} {name}: ")]
            table = html_table(columns_of(evaluation), those)
            charts = series_charts(evaluation.series.get(name, ()))
            found.append((f"{kind} {name}".capitalize(), table, charts))
        return found

    @property
    def metrics(self) -> str:
        """Every metric of every set, as a table."""
        if self.evaluation is None:
            return ""
        sections = sections_of(self.evaluation)[: len(self.evaluation.scores)]
        return html_table(columns_of(self.evaluation), sections)

    @property
    def common(self) -> set[str]:
        """Those of the words that lost their meaning that are common in English."""
        return {each["word"] for each in self.record["words"] if Word(**each).is_common}

    @property
    def earlier(self) -> int:
        """Number of erasures that led to the original."""
        return len(erasures(self.record)) - 1

    @property
    def changed(self) -> dict[str, Any]:
        """Settings that are not the defaults."""
        defaults = UnlearnConfig().to_dict()
        return {
            name: value
            for name, value in self.settings.items()
            if name not in defaults or value != defaults[name]
        }
