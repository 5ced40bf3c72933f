"""Plots of the losses of a run, and of what an evaluation found.

matplotlib draws files; for a page there are points, ticks and labels of small charts, which its
template draws as SVG.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fasterase.errors import InputError, import_extra
from fasterase.evaluation.findings import Finding, Series
from fasterase.files import replace_file
from fasterase.report.lettering import letter

# The model stands out; the original and the references follow in order.
COLOURS = ("#c8102e", "#202020", "#1f6feb", "#1a7f37", "#9a6700", "#8250df", "#57606a")
COLUMNS = 3
PANEL_INCHES = 4.2, 3.2
ROW_INCHES = 0.26  # of one finding
DPI = 110
INTERVAL = {"color": COLOURS[0], "linewidth": 4, "alpha": 0.25}
CHANCE = {"marker": "|", "linestyle": "", "color": "0.5", "markersize": 11}

# Of the losses: title of a panel, what it shows, and whether its axis is logarithmic.
PANELS = (
    ("total loss (weighted)", ("total",), False),
    ("forgetting: loss of the forget pairs", ("forget",), False),
    ("keeping: losses of the retain pairs", ("retain", "consistency", "anchor"), True),
    ("learning rate", ("lr",), True),
)
TERM_COLOURS = {
    "total": "#202020",
    "forget": "#c8102e",
    "retain": "#1a7f37",
    "consistency": "#1f6feb",
    "anchor": "#9a6700",
    "lr": "#57606a",
}
# Share of the steps over which the bold lines are averaged.
SMOOTHED = 0.05

WIDTH, HEIGHT = 320, 130  # of the area between the axes, in units of the SVG
# Of the checks: title of a panel, and what it shows.
CHECKED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("residue: largest and smallest of a direction", ("residue", "least_residue")),
    ("damage: share of retain recall@1 that is lost", ("damage",)),
)
# Points of a line: of more steps, means of equally many.
_POINTS = 240
_TICKS = 4


def require_matplotlib() -> None:
    """Raise `MissingExtraError` if nothing can be plotted."""
    import_extra("matplotlib.figure", "eval", "plotting")


def plot_history(history: Sequence[Mapping[str, Any]], path: str | PathLike[str]) -> Path:
    """Plot losses and learning rate over steps; the suffix (.png, .svg) sets the format.

    Thin lines are single steps, bold ones their running mean.

    Args:
        history: one record per step with `step`, the losses and `lr`, as in
            `UnlearnResult.history`. Terms that are always 0 were switched off and are left out.
        path: file to write.

    Raises:
        InputError: `history` is empty.
        MissingExtraError: matplotlib is not installed.
    """
    if not history:
        raise InputError("history is empty: there is nothing to plot.")
    figure = _new_figure(9, 8)
    panels = figure.subplots(len(PANELS), 1, sharex=True, height_ratios=(3, 3, 3, 2))
    steps = [record["step"] for record in history]
    window = round(SMOOTHED * len(steps)) | 1  # odd, so that it has a middle
    for panel, (title, terms, logarithmic) in zip(panels, PANELS, strict=True):
        panel.set_title(title, loc="left", fontsize=10)
        _tidy(panel, grid="y")
        shown = {term: np.array([record[term] for record in history], float) for term in terms}
        shown = {term: values for term, values in shown.items() if values.any()}
        for term, values in shown.items():
            smooth = window > 1 and term != "lr"
            style = {"color": TERM_COLOURS[term], "marker": "o" if len(steps) == 1 else None}
            if smooth:
                panel.plot(steps, values, linewidth=0.8, alpha=0.35, **style)
            mean = _running_mean(values, window) if smooth else values
            panel.plot(steps, mean, linewidth=1.8, label=term, **style)
        if logarithmic and any((values > 0).any() for values in shown.values()):
            panel.set_yscale("log", nonpositive="mask")
        elif not logarithmic:
            panel.axhline(0, color="0.7", linewidth=0.8, zorder=0)
        if len(shown) > 1:
            panel.legend(frameon=False, ncols=len(shown), loc="lower right", bbox_to_anchor=(1, 1))
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    return _save(figure, path, dpi=120)


def _running_mean(
    values: np.ndarray,  # [n]; NaN where a step was not finite
    window: int,
) -> np.ndarray:  # [n], mean over the `window` steps around each one
    kernel = np.ones(window)
    known = np.isfinite(values)
    count = np.convolve(known, kernel, mode="same")
    sums = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    return np.divide(sums, count, out=np.full(len(values), np.nan), where=count > 0)


def plot_series(series: Sequence[Series], path: str | PathLike[str], *, title: str) -> Path:
    """Draw one panel per title, with its lines; the suffix (.png, .svg) sets the format.

    Raises:
        MissingExtraError: matplotlib is not installed (extra `eval`).
    """
    panels = list(dict.fromkeys(each.panel for each in series))
    names = list(dict.fromkeys(each.line or each.model for each in series))
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = _new_figure(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows + 0.7)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(panels) :]:
        axis.remove()
    handles: dict[str, Any] = {}
    for panel, axis in zip(panels, axes, strict=False):
        for each in (each for each in series if each.panel == panel):
            place = names.index(each.line or each.model)
            _draw_series(axis, each, label=names[place], colour=COLOURS[place % len(COLOURS)])
        axis.set_title(panel, loc="left", fontsize=10)
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles, loc="outside lower left", ncols=4, frameon=False)
    return _save(figure, path, title=title)


def _draw_series(axis: Any, series: Series, *, label: str, colour: str) -> None:
    style = {"color": colour, "linewidth": 1.6, "label": label}
    if series.kind == "steps":
        axis.step(series.x, series.y, where="post", **style)
    else:
        axis.plot(series.x, series.y, marker="o", markersize=4, **style)
    if series.ticks is not None:
        axis.set_xticks(series.x, series.ticks)
    for x, y, text in zip(series.x, series.y, series.point_labels or (), strict=False):
        axis.annotate(text, (x, y), (4, 3), textcoords="offset points", fontsize=7, color=colour)
    axis.set_xlabel(series.x_label)
    axis.set_ylabel(series.y_label)
    if series.kind == "line" and series.y_label.endswith("%"):
        axis.set_ylim(-3, 103)
    _tidy(axis, grid="both")


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


def _save(figure: Any, path: str | PathLike[str], *, title: str = "", dpi: int = DPI) -> Path:
    path = Path(path)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    letter(figure)
    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=dpi)
    return path


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
