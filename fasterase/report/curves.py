"""Plots of an evaluation: curves and histograms of several models, and figures with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from fasterase.errors import InputError, import_extra
from fasterase.evaluation.figures import Series
from fasterase.files import replace_file
from fasterase.report.lettering import letter

# The model stands out; the original and the references follow in order.
COLOURS = ("#c8102e", "#202020", "#1f6feb", "#1a7f37", "#9a6700", "#8250df", "#57606a")
COLUMNS = 3
PANEL_INCHES = 4.2, 3.2
ROW_INCHES = 0.26  # of one figure
DPI = 110


class Dots(NamedTuple):
    """One row of a plot of figures, in percent."""

    group: str
    title: str
    values: dict[str, float]  # model -> value
    low: float  # interval of the first of them
    high: float
    chance: float | None


def plot_series(series: Sequence[Series], path: str | PathLike[str], *, title: str) -> Path:
    """Draw one panel per title, with its lines; the suffix (.png, .svg) sets the format.

    Raises:
        InputError: `series` is empty.
        MissingExtraError: matplotlib is not installed (extra `eval`).
    """
    if not series:
        raise InputError("series is empty: there is nothing to plot.")
    panels = list(dict.fromkeys(each.panel for each in series))
    names = list(dict.fromkeys(each.line or each.model for each in series))
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = _new_figure(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows + 0.7)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, axis in zip(panels, axes, strict=False):
        for each in (each for each in series if each.panel == panel):
            name = each.line or each.model
            _draw_series(axis, each, label=name, colour=COLOURS[names.index(name) % len(COLOURS)])
        axis.set_title(panel, loc="left", fontsize=10)
    for axis in axes[len(panels) :]:
        axis.remove()
    handles: dict[str, Any] = {}
    for axis in axes[: len(panels)]:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.legend(handles.values(), handles, loc="outside lower left", ncols=4, frameon=False)
    return _save(figure, path)


def plot_dots(dots: Sequence[Dots], path: str | PathLike[str], *, title: str) -> Path:
    """Draw one row per figure: the interval of the first model, a dot per model, a tick at chance.

    Raises:
        InputError: `dots` is empty.
        MissingExtraError: matplotlib is not installed (extra `eval`).
    """
    if not dots:
        raise InputError("dots is empty: there is nothing to plot.")
    models = list(dict.fromkeys(model for row in dots for model in row.values))
    groups = list(dict.fromkeys(row.group for row in dots))
    figure = _new_figure(9.0, ROW_INCHES * (len(dots) + 1.4 * len(groups)) + 1.5)
    axis = figure.subplots()
    names: list[str] = []
    places: list[float] = []
    place = 0.0
    for group in groups:
        axis.text(0, place, group, fontsize=9, weight="bold", va="center")
        place += 1
        for row in (row for row in dots if row.group == group):
            axis.hlines(place, row.low, row.high, color=COLOURS[0], linewidth=4, alpha=0.25)
            if row.chance is not None:
                axis.plot(row.chance, place, marker="|", color="0.5", markersize=11)
            for model, value in row.values.items():
                axis.plot(value, place, "o", color=COLOURS[models.index(model) % len(COLOURS)])
            names.append(row.title)
            places.append(place)
            place += 1
        place += 0.4
    axis.set_yticks(places, names, fontsize=8)
    axis.set_ylim(place, -1)
    axis.set_xlim(-2, 102)
    axis.set_xlabel("%")
    _tidy(axis, grid="x")
    for model in models:
        axis.plot([], [], "o", color=COLOURS[models.index(model) % len(COLOURS)], label=model)
    axis.plot([], [], color=COLOURS[0], linewidth=4, alpha=0.25, label="95 % interval of the model")
    axis.plot([], [], marker="|", linestyle="", color="0.5", markersize=11, label="chance")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.legend(loc="outside lower left", ncols=4, frameon=False)
    return _save(figure, path)


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


def _tidy(axis: Any, *, grid: str) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis=grid, color="0.92")
    axis.set_axisbelow(True)


def _new_figure(width: float, height: float) -> Any:
    module = import_extra("matplotlib.figure", "eval", "plotting an evaluation")
    # A bare Figure draws with Agg and leaves pyplot's global state and backend alone.
    return module.Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: str | PathLike[str]) -> Path:
    path = Path(path)
    letter(figure)
    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=DPI)
    return path
