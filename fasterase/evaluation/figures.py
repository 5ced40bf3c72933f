"""What a task or an attack finds: numbers and curves, for the model and for those beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from fasterase.encode import PairFeatures
from fasterase.evaluation.judge import PairTraces
from fasterase.evaluation.metrics import (
    METRICS,
    bootstrap_intervals,
    format_value,
    wilson_interval,
)
from fasterase.evaluation.scores import TIE, find_position

CELL = 12  # characters of a text in a table


@dataclass(frozen=True)
class Figure:
    """One number of a task or an attack.

    Attributes:
        key: name in dictionaries and JSON, such as `"forget/original_images/contest_hit@1"`.
        group: heading that the figure stands under in tables.
        title: its name there.
        unit: `"share"` (0 to 1, printed in percent), `"cosine"`, `"seconds"`, `"verdict"` or
            `"text"`.
        wanted: wanted direction; empty if it only informs.
        value: of the model; words if the unit is `"verdict"` or `"text"`.
        low, high: 95 % interval of `value`; None for what is no share.
        chance: value of a random order; None if there is no such level.
        original: the original's value, or None if it was not attacked.
        references: name -> value of a further model.
        other_intervals: `"original"` or name of a reference -> low and high of its value.
    """

    key: str
    group: str
    title: str
    unit: str
    wanted: str
    value: float | str
    low: float | None = None
    high: float | None = None
    chance: float | None = None
    original: float | str | None = None
    references: dict[str, float | str] = field(default_factory=dict)
    other_intervals: dict[str, list[float]] = field(default_factory=dict)

    def format(self, value: float | str | None) -> str:
        """Format a value of this figure for tables, "-" for None; long texts are shortened."""
        if value is None:
            return "-"
        if isinstance(value, str):
            return value if len(value) <= CELL else value[: CELL - 3] + "..."
        return format_value(self.unit, value)

    @property
    def interval(self) -> str:
        """The interval as tables show it."""
        if self.low is None:
            return "-"
        return f"{self.format(self.low)} to {self.format(self.high)}"


Figures = dict[str, Figure]  # key -> figure


@dataclass(frozen=True)
class Series:
    """One line of one panel of a plot.

    Attributes:
        panel: title of the panel; series of one title share it.
        x_label, y_label: of the panel's axes, with units.
        x, y: [n] points.
        kind: `"line"` through the points; or `"steps"`, a histogram with a level `y[i]` from `x[i]`
            to `x[i + 1]`, whose last level is repeated.
        line: what the line shows, where a panel has several of one model; colours then tell these
            apart, and else the models.
        ticks: [n] what to write at `x` instead of the numbers.
        point_labels: [n] what to write at each point.
        model: whose it is: `"model"`, `"original"` or the name of a reference.
    """

    panel: str
    x_label: str
    y_label: str
    x: list[float]
    y: list[float]
    kind: str = "line"
    line: str = ""
    ticks: list[str] | None = None
    point_labels: list[str] | None = None
    model: str = "model"


class Found(NamedTuple):
    """What a task or an attack finds out about one model.

    Attributes:
        figures: none if a reference cannot be attacked.
        series: what its plot shows; none if the figures themselves are plotted.
    """

    figures: list[Figure]
    series: Sequence[Series] = ()


def trace_figures(
    traces: Mapping[str, PairTraces], *, key: str, group: str, resamples: int, seed: int
) -> list[Figure]:
    """Return residues (bootstrap intervals over pairs) and hit@1 (Wilson interval) of each set.

    Args:
        traces: set to forget -> what the judge found.
        key: stands between the set's name and the metric's in each figure's key.
        group: follows the set's name in the heading.
        resamples, seed: of the bootstrap.
    """
    figures = []
    for name, found in traces.items():
        metrics = found.metrics()
        intervals = bootstrap_intervals(
            {metric: values for metric, (values, _) in metrics.items()},
            {},
            resamples=resamples,
            seed=seed,
        )
        hit = found.summary()
        intervals["contest_hit@1"] = hit.hit_low, hit.hit_high
        for metric in METRICS:
            if metric.key in metrics:
                values, chance = metrics[metric.key]
                figures.append(
                    Figure(
                        key=f"{name}/{key}/{metric.key}",
                        group=f"{name}, {group}",
                        title=metric.title,
                        unit=metric.unit,
                        wanted=metric.forget,
                        value=metric.average_of(values),
                        low=intervals[metric.key][0],
                        high=intervals[metric.key][1],
                        chance=chance,
                    )
                )
    return figures


def share_figure(
    values: np.ndarray,  # [n] 0 or 1, or shares where ties are counted as chance would break them
    *,
    key: str,
    group: str,
    title: str,
    wanted: str,
    chance: float,
    interval: tuple[float, float] | None = None,
) -> Figure:
    """Return a share of n trials; its interval is Wilson's unless another one is given."""
    share = float(values.mean())
    low, high = interval or wilson_interval(share, len(values))
    return Figure(key, group, title, "share", wanted, share, low, high, chance)


def share_below(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return [n], the share of `others` [m] or [n, m] below each score; ties count half.

    With the scores of all others in every row, its mean is the AUC.
    """
    gap = scores[:, None] - np.atleast_2d(others)
    return ((gap > TIE).mean(1) + (gap >= -TIE).mean(1)) / 2


def recall_figure(
    pairs: PairFeatures, *, key: str, group: str, title: str = "retain image->text R@1, %"
) -> Figure:
    """Return image->text recall@1 of pairs that should be kept, among their own captions."""
    firsts = [captions[0] for captions in pairs.pair_text]
    distinct = list(dict.fromkeys(firsts))
    right = torch.tensor(firsts)[:, None] == torch.tensor(distinct)[None]
    position = find_position(pairs.image @ pairs.text[distinct].T, right)
    return share_figure(
        position.hit(1),
        key=f"{key}/recall@1",
        group=group,
        title=title,
        wanted="↑",
        chance=1 / len(distinct),
    )
