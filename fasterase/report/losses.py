"""The plot of a run: losses, forgetting and learning rate over its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from fasterase.errors import InputError, import_extra
from fasterase.files import replace_file

# Title of a panel, what it shows, and whether its axis is logarithmic.
PANELS = (
    ("total loss (weighted)", ("total",), False),
    ("forgetting: loss of the forget pairs", ("forget",), False),
    ("keeping: losses of the retain pairs", ("retain", "consistency", "anchor"), True),
    ("learning rate", ("lr",), True),
)
COLOURS = {
    "total": "#202020",
    "forget": "#c8102e",
    "retain": "#1a7f37",
    "consistency": "#1f6feb",
    "anchor": "#9a6700",
    "lr": "#57606a",
}
# Share of the steps over which the bold lines are averaged.
SMOOTHED = 0.05


def require_matplotlib() -> None:
    """Raise `MissingExtraError` if `plot_history` cannot draw."""
    import_extra("matplotlib.figure", "eval", "plotting the history")


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
    figure_module = import_extra("matplotlib.figure", "eval", "plotting the history")
    # A bare Figure draws with Agg and leaves pyplot's global state and backend alone.
    figure = figure_module.Figure(figsize=(9, 8), layout="constrained")
    panels = figure.subplots(len(PANELS), 1, sharex=True, height_ratios=(3, 3, 3, 2))
    steps = [record["step"] for record in history]
    window = round(SMOOTHED * len(steps)) | 1  # odd, so that it has a middle
    for panel, (title, terms, logarithmic) in zip(panels, PANELS, strict=True):
        panel.set_title(title, loc="left", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="0.92")
        shown = {term: np.array([record[term] for record in history], float) for term in terms}
        shown = {term: values for term, values in shown.items() if values.any()}
        for term, values in shown.items():
            smooth = window > 1 and term != "lr"
            style = {"color": COLOURS[term], "marker": "o" if len(steps) == 1 else None}
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
    path = Path(path)
    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=120)
    return path


def _running_mean(
    values: np.ndarray,  # [n]; NaN where a step was not finite
    window: int,
) -> np.ndarray:  # [n], mean over the `window` steps around each one
    kernel = np.ones(window)
    known = np.isfinite(values)
    count = np.convolve(known, kernel, mode="same")
    sums = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    return np.divide(sums, count, out=np.full(len(values), np.nan), where=count > 0)
