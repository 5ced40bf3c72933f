"""Charts of a run's history: what they show, on pages and in files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasterase.errors import InputError
from fasterase.report.plots import history_charts, place, plot_charts

HISTORY = [
    {"step": step, "total": 3 / step, "forget": 0.7 / step, "retain": 0.1, "consistency": 0.02}
    | {"anchor": 0.0, "lr": 1e-5}
    for step in range(1, 20)
]


@pytest.mark.parametrize("history", [HISTORY, HISTORY[:1]])
def test_a_picture_that_is_not_blank_is_written(tmp_path: Path, history: list) -> None:
    path = plot_charts(history_charts(history), tmp_path / "loss.png")
    with Image.open(path) as image:
        assert min(image.size) > 700
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 50
    assert [p.name for p in tmp_path.iterdir()] == ["loss.png"]


@pytest.mark.slow
def test_plots_leave_pyplot_alone(tmp_path: Path) -> None:
    code = (
        "import sys; from fasterase.report.plots import history_charts, plot_charts; "
        f"plot_charts(history_charts({HISTORY[:2]!r}), {str(tmp_path / 'loss.svg')!r}); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "<svg" in (tmp_path / "loss.svg").read_text()


def test_an_empty_history_is_an_error(tmp_path: Path) -> None:
    assert history_charts([]) == []
    with pytest.raises(InputError, match="nothing to plot"):
        plot_charts([], tmp_path / "loss.png")


def test_steps_that_were_not_finite_are_left_out_and_means_pass_over_them() -> None:
    totals = [1.0, 2.0, np.nan, *[4.0, 6.0] * 10]
    history = [HISTORY[0] | {"step": i, "total": each} for i, each in enumerate(totals)]
    line = history_charts(history)[0].lines[0]
    assert line.x.tolist() == [0, 1, *range(3, 23)]
    assert line.mean.tolist() == line.y.tolist(), "a twentieth of the steps is one"
    history = [HISTORY[0] | {"step": i, "total": float(i % 2)} for i in range(60)]
    history[10]["total"] = np.nan
    line = history_charts(history)[0].lines[0]
    assert line.x[9:12].tolist() == [9, 11, 12]
    assert line.mean[:3].tolist() == pytest.approx([0.5, 1 / 3, 2 / 3]), "of three steps"
    assert line.mean[9:11].tolist() == pytest.approx([2 / 3, 2 / 3]), "its neighbours are 1, 1"


def test_what_checks_found_is_drawn_where_they_were_made() -> None:
    steps = [{**HISTORY[0], "step": i} for i in range(1, 31)]
    for step, residue in ((10, 0.9), (20, 0.6), (30, 0.5)):
        steps[step - 1] |= {"residue": residue, "least_residue": residue - 0.1, "damage": 0.0}
    residue, damage = history_charts(steps)[-2:]
    assert [line.name for line in residue.lines] == ["residue", "least_residue"]
    placed = place(residue)
    assert len(placed.lines[0].split(" ")) == 3
    assert placed.summary == "residue from 0.9 to 0.5; least_residue from 0.8 to 0.4"
    assert [label for _, label in placed.x_ticks] == ["10", "30"]
    assert damage.title.startswith("damage")
    assert not any("residue" in chart.title for chart in history_charts(HISTORY))


def test_long_histories_are_averaged_on_pages() -> None:
    steps = [HISTORY[0] | {"step": i, "anchor": 0.1, "total": float(i)} for i in range(1, 5001)]
    steps[7]["total"] = float("nan")
    charts = history_charts(steps)
    assert charts[-1].title == "learning rate"
    points = place(charts[0]).lines[0].split(" ")
    assert 100 < len(points) <= 240
    across, down = zip(*(map(float, point.split(",")) for point in points), strict=True)
    assert list(across) == sorted(across)
    assert list(down) == sorted(down, reverse=True), "upwards"
    assert [line.name for line in charts[2].lines] == ["retain", "consistency", "anchor"]
