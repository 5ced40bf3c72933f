"""Bars are live in a terminal and sparse lines in a log."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

import fasterase.progress
from fasterase.progress import LOG_SECONDS, WaitingShare, progress_bar


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.isatty = lambda: terminal


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests turn by hand; returns the function that turns it."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def steps(monkeypatch, clock, *, terminal: bool, count: int = 60, **options) -> str:
    """What a bar writes over `count` steps of a second."""
    stream = Stream(terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar("erasing", total=count, unit="step", **options) as bar:
        for step in range(count):
            clock(1)
            bar.set_postfix({"loss": step}, refresh=False)
            bar.update()
    return stream.getvalue()


def test_a_log_gets_a_line_every_few_seconds(monkeypatch, clock):
    text = steps(monkeypatch, clock, terminal=False)
    assert "\r" not in text
    lines = text.splitlines()
    assert len(lines) == 1 + 60 / LOG_SECONDS
    assert lines[0].startswith("erasing: 0/60 step")
    assert lines[1].startswith("erasing: 10/60 step")
    assert "loss=9" in lines[1]
    assert lines[-1].startswith("erasing: 60/60 step")


def test_a_terminal_gets_a_live_bar(monkeypatch, clock):
    assert steps(monkeypatch, clock, terminal=True).count("\r") >= 60


def test_a_short_bar_that_vanishes_leaves_no_line_in_a_log(monkeypatch, clock):
    assert steps(monkeypatch, clock, terminal=False, count=3, leave=False) == ""
    assert steps(monkeypatch, clock, terminal=False, count=3, shown=False) == ""


def test_a_bar_iterates_over_items(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Stream(False))
    assert list(progress_bar("reading", items=iter("abc"), unit="item", delay=2)) == list("abc")
    assert sys.stderr.getvalue() == ""


def test_the_package_makes_its_bars_in_one_place():
    users = {
        path.name
        for path in Path(fasterase.progress.__file__).parent.rglob("*.py")
        if "tqdm(" in path.read_text(encoding="utf-8")
    }
    assert users == {"progress.py"}


def test_the_share_of_time_that_a_loop_waits_for_data(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("fasterase.progress.time.perf_counter", lambda: now[0])

    def load():
        for seconds in (1, 1, 1, 0, 0):
            now[0] += seconds
            yield seconds

    waiting, shares = WaitingShare(), []
    assert str(waiting) == "0%"
    for _ in waiting.over(load()):
        shares.append(str(waiting))
        now[0] += 3
    # Nothing was worked on before the first item came; then 1 s in 4, less as new items come.
    assert shares[:2] == ["100%", "39%"]
    assert float(shares[2].rstrip("%")) == pytest.approx(33, abs=1)
    assert float(waiting) < 0.25
