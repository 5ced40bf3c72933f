"""What a run warns of at its end: advice that can be followed."""

from __future__ import annotations

import pytest

from fasterase.config import UnlearnConfig
from fasterase.engine.outcome import Outcome, advise
from fasterase.evaluation.verdict import Trace

TRACES = {"forget": Trace(0.9, 0.9, 0.9, 0.8, 1.0, 0.05, 30)}


def warning(verdict: str | None = "remembered", *, limit: str | None = None, **settings) -> str:
    traces = {} if verdict is None else TRACES
    outcome = Outcome([], 0.0, verdict, traces, None, limit)
    return advise(outcome, UnlearnConfig(**settings)) or ""


def test_a_forgotten_set_needs_no_words_and_no_verdict_says_why():
    assert not warning("forgotten")
    assert warning(None).startswith("no verdict: there is no retain caption that is not")


def test_more_steps_continue_only_where_there_is_a_folder():
    assert "(max_steps or epochs)" in warning(max_steps=3)
    assert "the run in output_dir continues" in warning(max_steps=3, output_dir="runs/a")


@pytest.mark.parametrize("limit", ["damage", "steps", None])
def test_an_automatic_run_is_not_told_to_continue(limit):
    """Neither numbers nor another max_damage continue it: its checkpoint refuses them."""
    said = warning(limit=limit, output_dir="runs/a")
    assert "continues" not in said
    assert "Other settings need another output_dir, or resume='never'" in said
    assert "output_dir" not in warning(limit=limit)


def test_a_tower_that_stays_is_named_and_few_images_are_counted():
    trace = Trace(0.5, 0.5, 0.0, 0.0, 0.14, 0.05, 24, {"image": (1.0, 0.9), "text": (0.0, 0.0)})
    outcome = Outcome([], 0.0, "remembered", {"forget": trace}, None, None)
    said = advise(outcome, UnlearnConfig(tune="text"))
    assert "100 % by the image tower beside the original's other one" in said
    assert "tune='text' leaves the image tower as it is" in said
    assert "Use tune='all'" not in advise(outcome, UnlearnConfig())
    few = Trace(0.5, 0.5, 0.0, 0.0, 0.28, 0.05, 10)
    said = advise(Outcome([], 0.0, "undecided", {"forget": few}, None, None), UnlearnConfig())
    assert "up to 28 % of such images may still be found. Give at least 12 pictures" in said
    assert "show little" not in said
    won = Trace(0.5, 0.5, 0.12, 0.04, 0.29, 0.05, 26)
    said = advise(Outcome([], 0.0, "undecided", {"forget": won}, None, None), UnlearnConfig())
    assert "Some images are still found, so that up to 29 % of such images may be" in said


def test_what_was_erased_before_is_not_the_model_at_fault():
    assert "Unless they were erased before" in warning("never known")
