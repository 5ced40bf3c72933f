"""A live line in a terminal that vanishes; sparse lines in a log; one of several processes."""

from __future__ import annotations

import io
import sys

import pytest

import fasterase
import fasterase.progress
from fasterase.progress import LOG_SECONDS, Progress, WaitingShare, say, speaking
from tests.tiny_model import FORGET, RETAIN, TinyModel


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.isatty = lambda: terminal


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests turn by hand; returns the function that turns it."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setattr("fasterase.progress.time.monotonic", lambda: now[0])
    monkeypatch.setattr("fasterase.progress._spoken", now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def steps(monkeypatch, clock, *, terminal: bool, count: int = 100, **options) -> str:
    """What is written over `count` steps of a second."""
    stream = Stream(terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress("training", total=count, unit="step", **options) as bar:
        for step in range(count):
            clock(1)
            bar.update(1, {"loss": str(step)})
    return stream.getvalue()


def test_a_log_gets_a_line_every_thirty_seconds(monkeypatch, clock):
    text = steps(monkeypatch, clock, terminal=False)
    assert text.splitlines() == [
        "fasterase: training: 30 of 100 steps, loss 29 (00:30, up to 01:10 left)",
        "fasterase: training: 60 of 100 steps, loss 59 (01:00, up to 00:40 left)",
        "fasterase: training: 90 of 100 steps, loss 89 (01:30, up to 00:10 left)",
    ]
    assert "\r" not in text


def test_many_short_phases_leave_a_line_every_thirty_seconds_too(monkeypatch, clock):
    short = [steps(monkeypatch, clock, terminal=False, count=10) for _ in range(10)]
    assert [bool(text) for text in short] == 3 * [False, False, True] + [False]
    clock(60)
    assert steps(monkeypatch, clock, terminal=False, count=1) == "", "too short to tell of"


def test_a_line_that_was_just_said_puts_off_the_next(monkeypatch, clock):
    monkeypatch.setattr(sys, "stderr", stream := Stream(False))
    clock(20)
    say("original measured: recall\n96.8 %", since=1000.0)
    say("too short to tell of", since=1000.0, least=21)
    assert stream.getvalue() == "fasterase: original measured: recall 96.8 % (00:20)\n"
    assert steps(monkeypatch, clock, terminal=False, count=int(LOG_SECONDS) - 1) == ""


def test_captions_of_strangers_move_no_cursor(capsys):
    say("hurt most: \x1b[2J\rapple\u202e\ud800 \x9b1A 100 -> 0 %")
    assert capsys.readouterr().err == "fasterase: hurt most: [2J apple 1A 100 -> 0 %\n"


def test_a_terminal_gets_one_live_line_that_vanishes(monkeypatch, clock):
    monkeypatch.setattr(sys, "stderr", stream := Stream(True))
    with Progress("training", total=9, unit="step") as outer:
        clock(1)
        assert "training:   0%" in stream.getvalue()
        with Progress("is it forgotten?", total=9, unit="pair") as inner:
            clock(60)
            inner.update()
        outer.update(9, {"loss": "0.5"})
    text = stream.getvalue()
    assert "loss 0.5" in text
    assert "is it forgotten" not in text, "a second line"
    assert "\n" not in text
    assert text.rpartition("\r")[0].rpartition("\r")[2].strip() == "", "it was wiped out"
    with Progress("training", total=9, unit="step"):
        monkeypatch.setattr(sys, "stderr", stream := Stream(False))
        with Progress("is it forgotten?", total=9, unit="pair") as inner:
            clock(60)
            inner.update()
    assert stream.getvalue() == ""
    outer = Progress("training", total=9, unit="step")
    with outer, Progress("is it forgotten?", total=9, unit="pair") as inner:
        clock(60)
        inner.update()
    assert stream.getvalue() == "fasterase: training: 0 of 9 steps (01:00)\n"
    assert "9/9" in steps(monkeypatch, clock, terminal=True, count=9), "the next has one again"


def test_nothing_is_said_where_it_is_not_wanted_nor_by_further_processes(monkeypatch, clock):
    with speaking(False), speaking(True):
        assert steps(monkeypatch, clock, terminal=False) == ""
        say("nothing")
    assert steps(monkeypatch, clock, terminal=False, shown=False) == ""
    monkeypatch.setenv("RANK", "1")
    for terminal in (False, True):
        assert steps(monkeypatch, clock, terminal=terminal) == ""
    say("nothing")
    assert sys.stderr.getvalue() == ""
    monkeypatch.setenv("RANK", "0")
    assert steps(monkeypatch, clock, terminal=False)


def test_it_iterates_over_items(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Stream(False))
    assert list(Progress("reading", items=iter("abc"), unit="item", delay=2)) == list("abc")
    assert sys.stderr.getvalue() == ""


@pytest.mark.filterwarnings("ignore:verdict")
def test_a_run_says_one_line_a_phase_with_what_it_found(capsys, monkeypatch):
    monkeypatch.setattr(fasterase.progress, "LOG_SECONDS", 1e9)  # on a slow machine too
    options = {"lr": 1e-4, "max_steps": 2, "batch_size": 8, "forget_words": False}
    result = fasterase.unlearn(TinyModel(), FORGET, RETAIN, **options)
    out, said = capsys.readouterr()
    assert out == "", "results alone"
    begun, measured, trained, erased = (
        line.removeprefix("fasterase: ") for line in said.splitlines()
    )
    assert f"{len(FORGET)} pairs to forget, {len(RETAIN)} to keep" in begun
    recall = result.evaluation.original["retain"]["image_to_text_recall@1"]
    assert measured.startswith("original measured: ")
    assert f"{len(RETAIN)} retain pairs, recall {100 * recall:.1f} % (" in measured
    assert trained.startswith(f"trained: 2 steps, loss {result.history[-1].total:.3f} (")
    assert erased.startswith(f"erased model measured: {result.verdict}; ")
    assert f"residue {result.residue:.2f}" in erased
    assert "\r" not in said
    fasterase.unlearn(TinyModel(), FORGET, RETAIN, **options, progress=False)
    assert capsys.readouterr() == ("", "")


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
