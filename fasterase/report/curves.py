"""Curves for a page: points, ticks and labels of small charts, which its template draws as SVG."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from fasterase.evaluation.findings import Series
from fasterase.report.plots import PANELS

WIDTH, HEIGHT = 320, 130  # of the area between the axes, in units of the SVG
# Of the checks: title of a panel, and what it shows.
CHECKED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("residue: largest and smallest of a direction", ("residue", "least_residue")),
    ("damage: share of retain recall@1 that is lost", ("damage",)),
)
# Points of a line: of more steps, means of equally many.
_POINTS = 240
_TICKS = 4


class Line(NamedTuple):
    """One line of a chart."""

    name: str
    points: str  # "x,y x,y ..."
    first: str  # values, for those who cannot see them
    last: str


class Chart(NamedTuple):
    """A chart in an area of `WIDTH` by `HEIGHT`, with y downwards."""

    title: str
    x_label: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]  # place, label
    y_ticks: list[tuple[float, str]]


def history_charts(history: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Return charts of losses, learning rate, residue and damage over the steps of a run."""
    steps = np.array([record["step"] for record in history], float)
    charts = []
    for title, terms, logarithmic in PANELS:
        values = {term: np.array([record[term] for record in history], float) for term in terms}
        shown = {term: (steps, each) for term, each in values.items() if np.nan_to_num(each).any()}
        charts.append(_chart(title, "step", shown, is_log=logarithmic))
    checked = [record for record in history if "damage" in record]
    steps = np.array([record["step"] for record in checked], float)
    for title, names in CHECKED:
        found = {term: [record.get(term, np.nan) for record in checked] for term in names}
        lines = {term: (steps, np.array(each, float)) for term, each in found.items()}
        charts.append(_chart(title, "step", lines))
    return [chart for chart in charts if chart.lines]


def series_charts(series: Iterable[Series]) -> list[Chart]:
    """Return one chart per panel of what an attack or a task has drawn."""
    ordered = sorted(series, key=lambda each: each.panel)
    charts = []
    for panel, group in groupby(ordered, key=lambda each: each.panel):
        those = list(group)
        lines = {each.line or each.model: _corners(each) for each in those}
        ticks = list(zip(those[0].x, those[0].ticks or (), strict=False))
        title = f"{panel}: {those[0].y_label}"
        charts.append(_chart(title, those[0].x_label, lines, x_ticks=ticks))
    return [chart for chart in charts if chart.lines]


def _corners(series: Series) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.array(series.x, float), np.array(series.y, float)
    if series.kind != "steps":
        return x, y
    return np.repeat(x, 2)[1:], np.repeat(y, 2)[:-1]


def _chart(
    title: str,
    x_label: str,
    lines: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    is_log: bool = False,
    x_ticks: Sequence[tuple[float, str]] = (),
) -> Chart:
    """Scale lines, name -> x [n] and y [n], to the area; leave out points that are not finite."""
    known = {}
    for name, (x, y) in lines.items():
        finite = np.isfinite(x) & np.isfinite(y) & ((y > 0) | (not is_log))
        if finite.any():
            known[name] = _means(x[finite]), _means(y[finite])
    if not known:
        return Chart(title, x_label, [], [], [])
    left, right = _range(each for each, _ in known.values())
    scale = np.log10 if is_log else np.asarray
    low, high = _range(scale(each) for _, each in known.values())
    y_ticks = np.linspace(low, high, _TICKS)

    def place(x: Any, y: Any) -> tuple[Any, Any]:
        return WIDTH * (x - left) / (right - left), HEIGHT * (high - y) / (high - low)

    drawn = []
    for name, (x, y) in known.items():
        points = zip(*place(x, scale(y)), strict=True)
        text = " ".join(f"{across:.1f},{down:.1f}" for across, down in points)
        drawn.append(Line(name, text, _label(y[0]), _label(y[-1])))
    return Chart(
        title,
        x_label,
        drawn,
        [
            (float(place(at, low)[0]), text)
            for at, text in x_ticks or [(at, _label(at)) for at in (left, right)]
        ],
        [(float(place(left, at)[1]), _label(10**at if is_log else at)) for at in y_ticks.tolist()],
    )


def _means(values: np.ndarray) -> np.ndarray:
    """Return at most `_POINTS` values: means of neighbours."""
    size = -(-len(values) // _POINTS)
    return np.array([part.mean() for part in np.split(values, range(size, len(values), size))])


def _range(values: Iterable[np.ndarray]) -> tuple[float, float]:
    """Return the ends of all values, apart from each other."""
    every = np.concatenate(list(values))
    low, high = float(every.min()), float(every.max())
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    room = 0.5 * abs(low) or 0.5
    return low - room, high + room


def _label(value: float) -> str:
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    return f"{value:.1e}" if "e" in text else text
