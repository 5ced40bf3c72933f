"""What a task or an attack is given, and what it finds: numbers and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from fasterase.encode import PairEncoder, PairFeatures
from fasterase.errors import InputError
from fasterase.evaluation.evaluator import Evaluator
from fasterase.evaluation.metrics import (
    bootstrap_intervals,
    format_value,
    metric_intervals,
    metrics_among,
    wilson_of,
)
from fasterase.evaluation.scores import distinct_firsts, find_position, first_copies
from fasterase.evaluation.verdict import PairTraces, features_at

NON_MEMBERS = ""  # no set has this name
CELL = 12  # characters of a text in a table
# Share of unrelated images that may be taken for the concept when an image counts as found.
FALSE_POSITIVES = 0.05


@dataclass(frozen=True)
class Finding:
    """One number of a task or an attack."""

    key: str  # name in dictionaries and JSON, such as `"forget/original_images/contest_hit@1"`
    group: str  # heading that the finding stands under in tables
    title: str  # its name there
    # `"share"` (0 to 1, printed in percent), `"cosine"`, `"rank"`, `"pairs"`, `"seconds"`,
    # `"verdict"` or `"text"`
    unit: str
    wanted: str  # wanted direction; empty if it only informs
    # of the model; words if the unit is `"verdict"` or `"text"`, or if it is `"pairs"` and there
    # were too few
    value: float | str
    low: float | None = None  # 95 % interval of `value`; None for what is no share
    high: float | None = None
    chance: float | None = None  # value of a random order; None if there is no such level
    original: float | str | None = None  # the original's value, or None if it was not attacked
    # name -> value of a further model
    references: dict[str, float | str] = field(default_factory=dict)
    # `"original"` or name of a reference -> low and high of its value
    other_intervals: dict[str, list[float]] = field(default_factory=dict)

    def format(self, value: float | str | None) -> str:
        """Format a value of this finding for tables, "-" for None; long texts are shortened."""
        if value is None:
            return "-"
        if isinstance(value, str):
            return value if len(value) <= CELL else value[: CELL - 3] + "..."
        return format_value(self.unit, value)

    def by_model(self) -> dict[str, tuple[float | str, float | None, float | None]]:
        """Return `"model"`, `"original"` and references -> value, low and high end, where known."""
        values = {"model": self.value, "original": self.original, **self.references}
        ends: dict[str, tuple[float | None, float | None]] = {"model": (self.low, self.high)}
        ends |= {name: (low, high) for name, (low, high) in self.other_intervals.items()}
        return {
            name: (value, *ends.get(name, (None, None)))
            for name, value in values.items()
            if value is not None
        }

    @property
    def interval(self) -> str:
        """The interval as tables show it."""
        return "-" if self.low is None else f"{self.format(self.low)} to {self.format(self.high)}"


Findings = dict[str, Finding]  # key -> finding


@dataclass(frozen=True)
class Series:
    """One line of one panel of a plot."""

    panel: str  # title of the panel; series of one title share it
    x_label: str  # with units, as the next
    y_label: str
    x: list[float]  # [n] of points, as the next
    y: list[float]
    # `"line"` through the points; or `"steps"`, a histogram with a level `y[i]` from `x[i]` to
    # `x[i + 1]`, whose last level is repeated.
    kind: str = "line"
    # What the line shows, where a panel has several of one model; colours then tell these apart,
    # and else the models.
    line: str = ""
    ticks: list[str] | None = None  # [n] what to write at `x` instead of the numbers
    point_labels: list[str] | None = None  # [n] what to write at each point
    model: str = "model"  # whose it is: `"model"`, `"original"` or the name of a reference


class UnsuitableModelError(InputError):
    """An attack cannot be run on this model; an original or a reference then has no findings."""


class Examined(NamedTuple):
    """What a task or an attack finds out about one model."""

    findings: list[Finding]
    # What its plot shows; none if the findings themselves are plotted.
    series: Sequence[Series] = ()


@dataclass(frozen=True)
class Target:
    """A model that is used or attacked."""

    name: str  # `"model"`, `"original"` or the name of a reference
    encoder: PairEncoder  # what changes its weights puts them back
    # Set -> its features of the measured pairs; `NON_MEMBERS` -> those of pairs that no model was
    # trained on, if there are any.
    features: Mapping[str, PairFeatures]
    # The same of the original; None if it is not among the models.
    original: Mapping[str, PairFeatures] | None
    evaluator: Evaluator  # the pairs, and the judge of the sets to forget

    def judged(self) -> dict[str, PairFeatures]:
        """Return set -> features of the pairs that the verdict compares; `"retain"`: unrelated."""
        return features_at(self.features, self.evaluator.judge.rows)

    def two_of_each(self, attack: str) -> dict[str, PairFeatures]:
        """Return `judged`; `InputError` for fewer than two images to forget or unrelated ones."""
        judged = self.judged()
        images = [judged[name].image for name in ("forget", "retain")]
        forget, retain = (len(np.unique(first_copies(those))) for those in images)
        if min(forget, retain) < 2:
            # A model may see no difference between many: another one's figures are kept.
            kind = InputError if min(map(len, images)) < 2 else UnsuitableModelError
            raise kind(
                f"attacks: {attack!r} needs two images or more of each kind that are different to "
                f"the model, found {forget} to forget and {retain} unrelated. Give more pairs, or "
                f"leave {attack!r} out."
            )
        return judged

    def encode(self, rows: Mapping[str, np.ndarray], what: str) -> dict[str, PairFeatures]:
        """Return set -> features of its `rows`, encoded anew; `what` stands at the bar."""
        return {
            name: self.encoder.pairs(
                self.evaluator.sources[name], those, description=f"{what} ({name})"
            )
            for name, those in rows.items()
        }

    def share(
        self,
        values: np.ndarray,  # [n] shares, or 0 and 1; NaN for pairs that do not count
        key: str,
        group: str,
        title: str,
        wanted: str,
        chance: float,
        *,
        are_trials: bool = False,
    ) -> Finding:
        """Return the mean of n shares: its interval is bootstrapped, or Wilson's of n trials."""
        if are_trials:
            ends = wilson_of(values)
        else:
            resamples, seed = self.evaluator.resamples, self.evaluator.seed
            (ends,) = bootstrap_intervals({key: values}, resamples=resamples, seed=seed).values()
        return Finding(key, group, title, "share", wanted, float(np.nanmean(values)), *ends, chance)

    def of_set(
        self, name: str, values: np.ndarray, *, key: str, title: str, chance: float, aim: str = ""
    ) -> Finding:
        """Return the mean over a set's pairs: to fall on sets to forget, with `aim` to chance."""
        wanted = f"↓{aim}" if name in self.evaluator.forget_sets else "↑"
        return self.share(values, f"{name}/{key}", name, title, wanted, chance)

    def hits(
        self, name: str, found: Mapping[int, tuple[np.ndarray, float]], *, key: str, title: str
    ) -> list[Finding]:
        """Return how often the first k candidates hold a right one, for several k.

        `found` maps k to the hits of queries [n] and the chance level (`Position.at`); `title` has
        `{}` for k, and `key` gets `"@k"`.
        """
        return [
            self.of_set(name, values, key=f"{key}@{k}", title=title.format(k), chance=chance)
            for k, (values, chance) in found.items()
        ]

    def separation(
        self,
        below: np.ndarray,  # [n] share of unrelated images below each image of the concept
        *,
        key: str,
        group: str,
        chance: float,
        prefix: str = "",
    ) -> list[Finding]:
        """Return how well a score tells images of the concept from unrelated ones.

        The AUC, `key/auc`, and the share of images above all but `FALSE_POSITIVES` of the others,
        `key/found`, beside the share that a random score finds. `prefix` is that of the titles.
        """
        found = (below >= 1 - FALSE_POSITIVES).astype(float)
        title = f"{prefix}found at 5 % FPR, %"
        return [
            self.share(below, f"{key}/auc", group, f"{prefix}AUC, %", "↓", 0.5),
            self.share(found, f"{key}/found", group, title, "↓", chance, are_trials=True),
        ]

    def traces(self, traces: Mapping[str, PairTraces], *, key: str, group: str) -> list[Finding]:
        """Return the metrics of each set to forget, as an evaluation has them.

        `key` and `group` stand beside the set's name in each finding's key and heading.
        """
        findings = []
        for name, found in traces.items():
            resamples, seed = self.evaluator.resamples, self.evaluator.seed
            ends = metric_intervals(found.values, resamples=resamples, seed=seed)
            for metric in metrics_among(ends):
                text = f"{name}/{key}/{metric.key}", f"{name}, {group}", metric.title
                value = metric.average_of(found.values[metric.key])
                figures = value, *ends[metric.key], found.chance[metric.key]
                findings.append(Finding(*text, metric.unit, metric.forget, *figures))
        return findings

    def recall(
        self,
        pairs: PairFeatures,
        *,
        key: str,
        group: str,
        title: str = "retain image->text R@1, %",
    ) -> Finding:
        """Return image->text recall@1 of pairs that should be kept, among their own captions."""
        distinct, own = distinct_firsts(pairs)
        right = torch.nn.functional.one_hot(torch.tensor(own), len(distinct)).bool()
        hit = find_position(pairs.image @ pairs.text[distinct].T, right).hit(1)
        chance = 1 / len(distinct)
        return self.share(hit, f"{key}/recall@1", group, title, "↑", chance, are_trials=True)
