"""Charts of the losses of a run, and of what an evaluation found.

A `Chart` is drawn by matplotlib into a file (`plot_charts`), or scaled for the SVG of a page
(`place`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fasterase.errors import InputError, import_extra
from fasterase.evaluation.findings import Finding, Series
from fasterase.files import replace_file
from fasterase.report.lettering import letter

# The model stands out; the original and the references follow in order.
COLOURS = (
    *("#c8102e", "#202020", "#1f6feb", "#1a7f37", "#9a6700", "#8250df", "#57606a"),
    *("#d667a5", "#2aa5b8"),
)
PANEL_INCHES = 4.2, 3.2
DPI = 110
ROW_INCHES = 0.26  # of one finding
INTERVAL = {"color": COLOURS[0], "linewidth": 4, "alpha": 0.25}
CHANCE = {"marker": "|", "linestyle": "", "color": "0.5", "markersize": 11}

# Of a run's steps: title of a chart, what it shows, and whether its axis is logarithmic.
LOSSES = (
    ("total loss (weighted)", ("total",), False),
    ("forgetting: loss of the forget pairs", ("forget",), False),
    ("keeping: losses of the retain pairs", ("retain", "consistency", "anchor"), True),
    ("learning rate", ("lr",), True),
)
# Of the steps at which it was checked.
CHECKS = (
    ("residue: largest and smallest of a direction", ("residue", "least_residue"), False),
    ("damage: share of retain recall@1 that is lost", ("damage",), False),
)
# Share of the steps over which bold lines are averaged.
SMOOTHED = 0.05

WIDTH, HEIGHT = 320, 130  # of the area between the axes, in units of the SVG
# Points of a line there: of more steps, means of equally many.
_POINTS = 240
_TICKS = 4


class Line(NamedTuple):
    """One line of a chart, without points that are not known."""

    name: str
    x: np.ndarray  # [n]
    y: np.ndarray  # [n]
    mean: np.ndarray | None = None  # [n] of the points around each one
    is_marked: bool = False  # each point by a dot
    labels: Sequence[str] = ()  # [n] what to write at the points; or none


@dataclass(frozen=True)
class Chart:
    """Lines over one pair of axes."""

    title: str
    x_label: str
    lines: list[Line]
    y_label: str = ""
    is_log: bool = False
    x_ticks: Sequence[tuple[float, str]] = ()  # places and labels; none: numbers


def history_charts(history: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Return charts of losses, learning rate, residue and damage over the steps of a run.

    Terms that are always 0 were switched off and are left out, as are steps that were not finite.
    """
    checked = [record for record in history if "damage" in record]
    window = round(SMOOTHED * len(history)) | 1  # odd, so that it has a middle
    charts = []
    for panels, records in ((LOSSES, history), (CHECKS, checked)):
        steps = np.array([record["step"] for record in records], float)
        is_marked = panels is CHECKS or len(records) == 1
        for title, terms, is_log in panels:
            lines = []
            for term in terms:
                y = np.array([record.get(term, np.nan) for record in records], float)
                known = np.isfinite(y) & ((y > 0) | (not is_log))
                if y[known].any() or (panels is CHECKS and known.any()):
                    has_mean = not is_marked and term != "lr"
                    mean = _running_mean(y[known], window) if has_mean else None
                    lines.append(Line(term, steps[known], y[known], mean, is_marked))
            charts.append(Chart(title, "step", lines, is_log=is_log))
    return [chart for chart in charts if chart.lines]


def _running_mean(
    values: np.ndarray,  # [n]
    window: int,
) -> np.ndarray:  # [n], mean over the `window` values around each one
    kernel = np.ones(min(window, len(values)))
    sums, counts = (np.convolve(each, kernel, "same") for each in (values, np.ones_like(values)))
    return sums / counts


def series_charts(series: Iterable[Series]) -> list[Chart]:
    """Return one chart per panel of what an attack or a task has drawn."""
    panels: defaultdict[str, list[Series]] = defaultdict(list)
    for each in series:
        panels[each.panel].append(each)
    charts = []
    for panel, those in panels.items():
        lines = [line for line in map(_series_line, those) if len(line.x)]
        ticks = [*zip(those[0].x, those[0].ticks or (), strict=False)]
        charts.append(Chart(panel, those[0].x_label, lines, those[0].y_label, x_ticks=ticks))
    return [chart for chart in charts if chart.lines]


def _series_line(series: Series) -> Line:
    x, y = np.array(series.x, float), np.array(series.y, float)
    if series.kind == "steps":  # the corners of a histogram
        x, y = np.repeat(x, 2)[1:], np.repeat(y, 2)[:-1]
    known = np.isfinite(x) & np.isfinite(y)
    labels = [text for text, shown in zip(series.point_labels or (), known, strict=False) if shown]
    name = series.line or series.model
    return Line(name, x[known], y[known], is_marked=series.kind == "line", labels=labels)


def require_matplotlib() -> None:
    """Raise `MissingExtraError` if nothing can be plotted."""
    import_extra("matplotlib.figure", "eval", "plotting")


def plot_charts(charts: Sequence[Chart], path: str | PathLike[str], *, title: str = "") -> Path:
    """Draw charts side by side with one legend; the suffix (.png, .svg) sets the format.

    Where a line has a mean, that is bold and the line itself thin.

    Raises:
        InputError: there are no charts.
        MissingExtraError: matplotlib is not installed (extra `eval`).
    """
    if not charts:
        raise InputError("charts is empty: there is nothing to plot.")
    names = list(dict.fromkeys(line.name for chart in charts for line in chart.lines))
    columns = math.ceil(math.sqrt(len(charts)))
    rows = math.ceil(len(charts) / columns)
    figure = _new_figure(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows + 0.7)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(charts) :]:
        axis.remove()
    handles: dict[str, Any] = {}
    for chart, axis in zip(charts, axes, strict=False):
        for line in chart.lines:
            colour = COLOURS[names.index(line.name) % len(COLOURS)]
            handles.setdefault(line.name, _draw_line(axis, line, colour))
        axis.set_title(chart.title, loc="left", fontsize=10)
        axis.set_xlabel(chart.x_label)
        axis.set_ylabel(chart.y_label)
        if chart.x_ticks:
            axis.set_xticks(*zip(*chart.x_ticks, strict=True))
        elif chart.x_label == "step":
            axis.xaxis.get_major_locator().set_params(integer=True)
        if chart.is_log:
            axis.set_yscale("log")
        elif chart.y_label.endswith("%") and chart.lines[0].is_marked:
            axis.set_ylim(-3, 103)
        _tidy(axis, grid="both")
    figure.legend(handles.values(), handles, loc="outside lower left", ncols=4, frameon=False)
    return _save(figure, path, title=title)


def _draw_line(axis: Any, line: Line, colour: str) -> Any:
    """Draw a line, and return what stands for it in a legend."""
    y = line.y
    if line.mean is not None:
        axis.plot(line.x, y, color=colour, linewidth=0.8, alpha=0.35)
        y = line.mean
    marker = "o" if line.is_marked else None
    (drawn,) = axis.plot(line.x, y, color=colour, linewidth=1.6, marker=marker, markersize=4)
    for *place, text in zip(line.x, line.y, line.labels, strict=False):
        axis.annotate(text, place, (4, 3), textcoords="offset points", fontsize=7, color=colour)
    return drawn


def plot_findings(findings: Sequence[Finding], path: str | PathLike[str], *, title: str) -> Path:
    """Draw one row per share: the interval of the model, a dot per model, a tick at chance.

    Raises:
        MissingExtraError: matplotlib is not installed (extra `eval`).
    """
    groups: defaultdict[str, list[Finding]] = defaultdict(list)
    for each in findings:
        if each.unit == "share" and each.low is not None:
            groups[each.group].append(each)
    rows = sum(map(len, groups.values()))
    figure = _new_figure(9.0, ROW_INCHES * (rows + 1.4 * len(groups)) + 1.5)
    axis = figure.subplots()
    colours: dict[str, str] = {}
    ticks: dict[float, str] = {}
    place = 0.0
    for group, those in groups.items():
        axis.text(0, place, group, fontsize=9, weight="bold", va="center")
        for each in those:
            place += 1
            low, high = (100 * end for end in (each.low, each.high) if end is not None)
            axis.hlines(place, low, high, **INTERVAL)
            if each.chance is not None:
                axis.plot(100 * each.chance, place, **CHANCE)
            for model, (value, *_) in each.by_model().items():
                colour = colours.setdefault(model, COLOURS[len(colours) % len(COLOURS)])
                axis.plot(100 * float(value), place, "o", color=colour)
            ticks[place] = each.title
        place += 1.4
    axis.set_yticks([*ticks], [*ticks.values()], fontsize=8)
    axis.set_ylim(place, -1)
    axis.set_xlim(-2, 102)
    axis.set_xlabel("%")
    _tidy(axis, grid="x")
    for model, colour in colours.items():
        axis.plot([], [], "o", color=colour, label=model)
    axis.plot([], [], **INTERVAL, label="95 % interval of the model")
    axis.plot([], [], **CHANCE, label="chance")
    figure.legend(loc="outside lower left", ncols=4, frameon=False)
    return _save(figure, path, title=title)


def _tidy(axis: Any, *, grid: str) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis=grid, color="0.92")
    axis.set_axisbelow(True)


def _new_figure(width: float, height: float) -> Any:
    module = import_extra("matplotlib.figure", "eval", "plotting")
    # A bare Figure draws with Agg and leaves pyplot's global state and backend alone.
    return module.Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: str | PathLike[str], *, title: str) -> Path:
    path = Path(path)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    letter(figure)
    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=DPI)
    return path


class Placed(NamedTuple):
    """A chart in an area of `WIDTH` by `HEIGHT`, with y downwards."""

    lines: list[str]  # "x,y x,y ..."
    x_ticks: list[tuple[float, str]]  # place, label
    y_ticks: list[tuple[float, str]]
    summary: str  # names, first and last values, for those who cannot see them


def place(chart: Chart) -> Placed:
    """Scale a chart to the area."""
    scale = np.log10 if chart.is_log else np.asarray
    lines = [(line.name, _means(line.x), _means(line.y)) for line in chart.lines]
    left, right = _range([x for _, x, _ in lines])
    low, high = _range([scale(y) for _, _, y in lines])

    def across(x: Any) -> Any:
        return WIDTH * (x - left) / (right - left)

    def down(y: Any) -> Any:
        return HEIGHT * (high - y) / (high - low)

    points = [zip(across(x), down(scale(y)), strict=True) for _, x, y in lines]
    x_ticks = chart.x_ticks or [(at, _label(at)) for at in (left, right)]
    return Placed(
        [" ".join(f"{x:.1f},{y:.1f}" for x, y in each) for each in points],
        [(float(across(at)), text) for at, text in x_ticks],
        [
            (float(down(at)), _label(10**at if chart.is_log else at))
            for at in np.linspace(low, high, _TICKS).tolist()
        ],
        "; ".join(f"{name} from {_label(y[0])} to {_label(y[-1])}" for name, _, y in lines),
    )


def _means(values: np.ndarray) -> np.ndarray:
    """Return at most `_POINTS` values: means of neighbours."""
    size = -(-len(values) // _POINTS)
    return np.array([part.mean() for part in np.split(values, range(size, len(values), size))])


def _range(values: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return the ends of all values, apart from each other."""
    every = np.concatenate(values)
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
