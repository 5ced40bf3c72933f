"""Loss plots."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasterase.errors import InputError
from fasterase.report.plots import _running_mean, plot_history

HISTORY = [
    {"step": step, "total": 3 / step, "forget": 0.7 / step, "retain": 0.1, "consistency": 0.02}
    | {"anchor": 0.0, "lr": 1e-5}
    for step in range(1, 20)
]


@pytest.mark.parametrize("history", [HISTORY, HISTORY[:1]])
def test_plot_history_writes_a_picture_that_is_not_blank(tmp_path: Path, history: list) -> None:
    path = plot_history(history, tmp_path / "loss.png")
    with Image.open(path) as image:
        assert image.size == (1080, 960)
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 50
    assert [p.name for p in tmp_path.iterdir()] == ["loss.png"]


def test_plot_history_leaves_pyplot_alone(tmp_path: Path) -> None:
    code = (
        "import sys; from fasterase.report.plots import plot_history; "
        f"plot_history({HISTORY[:2]!r}, {str(tmp_path / 'loss.svg')!r}); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "<svg" in (tmp_path / "loss.svg").read_text()


def test_an_empty_history_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="history is empty"):
        plot_history([], tmp_path / "loss.png")


def test_running_means_pass_over_steps_that_were_not_finite() -> None:
    values = np.array([1.0, 2.0, np.nan, 4.0, 6.0])
    assert _running_mean(values, 3).tolist() == [1.5, 1.5, 3.0, 5.0, 5.0]
    assert np.isnan(_running_mean(np.array([1.0, np.nan]), 1)[1])
