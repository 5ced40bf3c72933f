"""The course of a run as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from fasterase.errors import InputError
from fasterase.extras import require
from fasterase.report.files import replacing

TERMS = ("total", "forget", "retain", "consistency", "anchor")


def plot_history(history: Sequence[Mapping[str, Any]], path: str | PathLike[str]) -> Path:
    """Draw the losses and the learning rate over steps; the format follows the name (.png, .svg).

    Args:
        history: a record a step, as in `UnlearnResult.history`: `step`, the losses and `lr`. Terms
            that are 0 throughout were switched off and are left out.
        path: file to write.

    Raises:
        InputError: the history is empty.
        MissingExtraError: matplotlib is not installed.
    """
    if not history:
        raise InputError("history is empty: there is nothing to plot.")
    figure_module = require("matplotlib.figure", "eval", "plotting the history")
    # A bare Figure draws with Agg and leaves pyplot's global state and backend alone.
    figure = figure_module.Figure(figsize=(9, 5.5), layout="constrained")
    losses, rate = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    steps = [record["step"] for record in history]
    marker = "o" if len(steps) == 1 else None
    for term in TERMS:
        values = [record[term] for record in history]
        if any(values):
            width = 2.0 if term == "total" else 1.2
            losses.plot(steps, values, label=term, linewidth=width, marker=marker)
    losses.set_ylabel("loss (terms before weighting)")
    losses.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    losses.legend(frameon=False, ncols=len(TERMS), loc="lower left", bbox_to_anchor=(0, 1))
    rate.plot(steps, [record["lr"] for record in history], color="0.3", marker=marker)
    rate.set_ylabel("learning rate")
    rate.set_xlabel("step")
    path = Path(path)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
    return path
