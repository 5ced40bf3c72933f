"""Learning rates: constant, on a schedule, or led by the forgetting loss along a falling line."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from fasterase.engine.history import StepRecord

# The automatic learning rate, whatever the model: it finds its level within tens of steps.
FIRST_LR = 1e-5
LR_RANGE = (1e-7, 1e-2)
FASTER, SLOWER = 1.12, 0.9
# lr never falls below this share of its highest value: from further below it would need tens of
# steps to return, in which nothing moves, not even retained features back to where they were.
LEAST_SHARE = 0.1
# Steps that the loss is extrapolated, to change the learning rate before it is too late.
HORIZON = 5
# The line leads from the first forgetting loss to this share of it, in this many steps.
LINE_END = 0.05
LINE_STEPS = 80
# ... of a link, which is one of many that share their tokens: faster, it would drag them along.
LINK_LINE_STEPS = 160
# Trust region: squared distance that retained features may move (the anchor loss) before lr falls.
# It widens by a factor per step once the line has ended: otherwise a run that lags behind the whole
# line would stand still at its border. lr may climb back to where it left the region, and beyond
# that only as fast as the region widens: a faster run jumps from "remembered" to "over-erased".
TRUSTED_DISTANCE = 0.012
WIDENING = 1.02
# Weight of the past in running averages of the loss and the distance.
SMOOTHING = 0.8
# Forgetting losses below it leave nothing to follow; they must not drive lr up.
NEGLIGIBLE_LOSS = 1e-3


@dataclass
class _RateState:
    lr: float
    steps: int = 0  # applied ones
    first: float = 0.0
    loss: float = 0.0
    trend: float = 0.0  # of the loss, per step
    distance: float = 0.0
    end: float = LINE_END  # share of the first loss at which the line ends
    hurries: bool = True
    highest: float = 0.0  # lr so far
    ceiling: float = LR_RANGE[1]  # lr at which retained features last left the trust region
    trusted: bool = True  # whether they are inside


class Rate:
    """A constant learning rate, with running averages of the steps that were applied."""

    def __init__(self, lr: float) -> None:
        self._now = _RateState(lr)

    @property
    def lr(self) -> float:
        return self._now.lr

    def at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0: the next one."""
        return self.lr

    @property
    def share_left(self) -> float:
        """The smoothed forgetting loss, as a share of its first value."""
        now = self._now
        return now.loss / now.first if now.first > NEGLIGIBLE_LOSS else 0.0

    @property
    def is_spent(self) -> bool:
        """Whether the loss has converged; waiting longer for the verdict's margin would idle."""
        return self.share_left <= LINE_END

    def aim_lower(self) -> None:
        """Lower the target loss; the verdict is still "remembered"."""

    def hurry(self, wanted: bool) -> None:
        """Allow a lagging run to widen its trust region, or forbid it."""
        self._now.hurries = wanted

    def follow(self, record: StepRecord) -> None:
        """Record a step; `record.anchor` is the distance that retained features have moved."""
        if not record.applied:
            return
        now = self._now
        if now.steps == 0:
            now.first, now.loss, now.distance = record.forget, record.forget, record.anchor
        else:
            before = now.loss
            now.loss = SMOOTHING * now.loss + (1 - SMOOTHING) * record.forget
            now.trend = SMOOTHING * now.trend + (1 - SMOOTHING) * (now.loss - before)
            now.distance = SMOOTHING * now.distance + (1 - SMOOTHING) * record.anchor
        now.steps += 1

    def state(self) -> dict[str, Any]:
        return asdict(self._now)

    def restore(self, state: dict[str, Any]) -> None:
        self._now = _RateState(**state)


class Schedule(Rate):
    """A linear warm-up to `lr`, then `lr`, or a cosine from it to 0 at `total_steps`."""

    def __init__(self, lr: float, *, warmup_steps: int, total_steps: int, is_cosine: bool) -> None:
        super().__init__(lr)
        self._warmup_steps = warmup_steps
        self._total_steps = total_steps
        self._is_cosine = is_cosine

    def at(self, step: int) -> float:
        if step < self._warmup_steps:
            return self.lr * (step + 1) / self._warmup_steps
        if not self._is_cosine:
            return self.lr
        done = (step - self._warmup_steps) / max(1, self._total_steps - self._warmup_steps)
        return self.lr * 0.5 * (1 + math.cos(math.pi * done))


class LineFollower(Rate):
    """A learning rate that makes the smoothed forgetting loss fall to 5 % in `line_steps`.

    It rises while the loss lags behind that line, falls while it leads, and falls while retained
    features have moved too far, so that one start serves all models.
    """

    def __init__(self, *, line_steps: int = LINE_STEPS) -> None:
        super().__init__(FIRST_LR)
        self._line_steps = line_steps

    @property
    def is_spent(self) -> bool:
        # A higher lr still moves the features on.
        return super().is_spent and self.lr <= max(FIRST_LR, self._least_lr)

    @property
    def _least_lr(self) -> float:
        return max(LEAST_SHARE * self._now.highest, LR_RANGE[0])

    def aim_lower(self) -> None:
        self._now.end /= 2

    def follow(self, record: StepRecord) -> None:
        super().follow(record)
        if not record.applied:
            return
        now = self._now
        ahead = now.steps + HORIZON
        line = now.first * (1 - (1 - now.end) * min(1.0, ahead / self._line_steps))
        expected = now.loss + HORIZON * now.trend
        late = max(0, now.steps - self._line_steps) if now.hurries else 0
        # exp: the bound passes any distance long before the power could overflow.
        bound = TRUSTED_DISTANCE * math.exp(min(late * math.log(WIDENING), 50.0))
        was_trusted, now.trusted = now.trusted, now.distance <= bound
        if was_trusted and not now.trusted:
            now.ceiling = now.lr
        now.highest = max(now.highest, now.lr)
        if not now.trusted or expected < line:
            now.lr *= SLOWER
        elif now.loss > NEGLIGIBLE_LOSS:
            now.lr *= FASTER if FASTER * now.lr <= now.ceiling else WIDENING
        now.lr = min(max(now.lr, self._least_lr), LR_RANGE[1])
