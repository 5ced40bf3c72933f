"""The learning rate that follows a line, with scripted losses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest

from fasterase.engine.history import StepRecord
from fasterase.engine.rates import (
    FASTER,
    FIRST_LR,
    LEAST_SHARE,
    LINE_STEPS,
    LR_RANGE,
    TRUSTED_DISTANCE,
    WIDENING,
    LineFollower,
    Rate,
)


def record(step: int, forget: float, anchor: float = 0.0, *, applied: bool = True) -> StepRecord:
    return StepRecord(step=step, forget=forget, anchor=anchor, applied=applied)


def rates(
    rate: Rate,
    steps: int,
    *,
    loss: Callable[[int], float] = lambda step: 0.8,
    anchor: Callable[[int], float] = lambda step: 0.0,
) -> list[float]:
    """The learning rate after each step."""
    found = []
    for step in range(1, steps + 1):
        rate.follow(record(step, loss(step), anchor(step)))
        found.append(rate.lr)
    return found


class TestLine:
    def test_it_rises_while_the_loss_lags_up_to_a_limit(self):
        found = rates(LineFollower(), 100)
        assert found[0] >= FIRST_LR
        assert all(later >= lr for lr, later in itertools.pairwise(found))
        assert found[30] > 10 * FIRST_LR
        assert found[-1] == LR_RANGE[1]

    def test_it_falls_while_the_loss_leads_down_to_a_share_of_its_highest(self):
        found = rates(LineFollower(), 70, loss=lambda step: 0.8 if step < 30 else 0.01)
        assert all(later <= lr for lr, later in itertools.pairwise(found[33:]))
        assert found[-1] == pytest.approx(LEAST_SHARE * max(found))

    @pytest.mark.parametrize("sensitivity", [10.0, 300.0, 1e4])
    def test_models_of_any_sensitivity_follow_it(self, sensitivity):
        """The loss of each step falls by a share that lr and the model decide."""
        rate, loss, below = LineFollower(), 0.7, []
        for step in range(1, 200):
            rate.follow(record(step, loss))
            loss *= math.exp(-sensitivity * rate.lr)
            below.append(loss < 0.07)
        assert 40 < below.index(True) < 130

    def test_steps_that_were_not_applied_are_ignored(self):
        plain, broken = LineFollower(), LineFollower()
        for step in range(1, 30):
            plain.follow(record(step, 0.8 / step, 0.001))
            if step % 3 == 0:
                broken.follow(record(step, float("nan"), float("nan"), applied=False))
            broken.follow(record(step, 0.8 / step, 0.001))
        assert plain.state() == broken.state()

    @pytest.mark.parametrize("loss", [0.0, 5e-4, -0.1])
    def test_a_first_loss_near_zero_does_not_raise_it(self, loss):
        assert max(rates(LineFollower(), 300, loss=lambda step: loss)) <= FIRST_LR

    def test_it_falls_while_kept_features_have_moved_too_far(self):
        inside = rates(LineFollower(), 40, anchor=lambda step: TRUSTED_DISTANCE)
        outside = rates(LineFollower(), 40, anchor=lambda step: TRUSTED_DISTANCE * 1.01)
        assert inside[-1] > 10 * FIRST_LR
        assert all(later < lr for lr, later in itertools.pairwise(outside[:20]))
        assert outside[-1] == pytest.approx(LEAST_SHARE * FIRST_LR)

    def test_the_region_widens_after_the_line(self):
        """A run that lags behind the whole line would else stand still at the border."""
        found = rates(LineFollower(), 400, anchor=lambda step: 2 * TRUSTED_DISTANCE)
        least = LEAST_SHARE * FIRST_LR
        assert found[LINE_STEPS] == pytest.approx(least)
        assert found[LINE_STEPS + 30] == pytest.approx(least)
        assert found[LINE_STEPS + 60] > 5 * least

    def test_it_does_not_leap_past_the_rate_that_left_the_region(self):
        """It returns there quickly, and grows as the region does from there on."""
        found = rates(LineFollower(), 119, anchor=lambda step: float(step == 26))
        left, found = found[24], found[25:]
        growth = [later / lr for lr, later in itertools.pairwise(found)]
        assert min(found) < 0.5 * left
        assert max(growth) == pytest.approx(FASTER)
        late = [factor for factor, lr in zip(growth, found, strict=False) if lr > left]
        assert len(late) > 20
        assert late == pytest.approx([WIDENING] * len(late))

    def test_very_long_runs_overflow_nothing(self):
        rate = LineFollower(line_steps=1)
        for step in range(1, 50_000, 7):
            rate.follow(record(step, 0.8, 1e6))
        rate.restore({**rate.state(), "steps": 10**9})
        rate.follow(record(2, 0.8, 0.0))
        assert LR_RANGE[0] <= rate.lr <= LR_RANGE[1]


def test_a_given_rate_is_constant_and_knows_the_share_left():
    rate = Rate(3e-4)
    assert rate.share_left == 0.0
    loss = lambda step: 0.8 if step == 1 else 0.2  # noqa: E731
    found = rates(rate, 60, loss=loss, anchor=lambda step: 9.0)
    assert set(found) == {3e-4}
    assert rate.share_left == pytest.approx(0.25, abs=1e-3)


def test_a_line_that_ends_too_high_is_lowered_until_the_rate_rises_again():
    """A concept that is still remembered at a spent loss: waiting would change nothing."""
    rate, other = LineFollower(), LineFollower()
    found = rates(rate, 121, loss=lambda step: 0.8 if step == 1 else 0.01)
    assert rate.is_spent
    fallen = rates(rate, 5, loss=lambda step: 0.01)[-1]
    assert fallen <= found[-1]
    for _ in range(4):
        rate.aim_lower()
    other.restore(rate.state())
    assert rates(other, 20, loss=lambda step: 0.01)[-1] > 5 * fallen
