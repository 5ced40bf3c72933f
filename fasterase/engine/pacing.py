"""How fast a run learns and when it ends: the learning rate of each step, and the stop.

With numbers for `lr` and the steps both are fixed beforehand. The automatic recipe needs neither:
the learning rate follows the forgetting loss (rates.py), and the run ends once the concept is
forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

from torch import Tensor

from fasterase.engine.findings import LEAST_RESIDUE, RANKS, RESTING, Check
from fasterase.engine.history import StepRecord
from fasterase.engine.rates import Rate
from fasterase.evaluation.placebo import MARGIN_RESIDUE
from fasterase.evaluation.verdict import REMEMBERED, Trace

# Steps between checks of the verdict, which begin once the loss is this share of its first value.
# There are fewer where a residue, at its pace, would soon pass a margin.
CHECK_STEPS = 5
CHECKED_LOSS = 0.6
# A run on a link starts to fade only at this share: its fact is no nearer than others of the kind.
LINK_SETTLED_LOSS = 0.15
# A run waits for more than the verdict until that has not fallen by a tenth in so many steps.
PATIENCE_STEPS, LONG_PATIENCE_STEPS, NOTICED_FALL = 30, 60, 0.9
FADE_STEPS = 20
# ... of a link, of which more goes meanwhile: in benchmarks/links residues fell from .85 to .79.
LINK_FADE_STEPS = 100
# Weights below them are moved back towards the start by at most this share, found by halving: all
# of them or, where one tower then tells too much, those of one tower.
MOST_EASED = {"all": 0.25, "text": 0.5, "image": 0.5}
EASE_CHECKS = 5
# So long a run waits for pairs that it does not train on, if they alone are still remembered.
WITHHELD_PATIENCE_STEPS = 10
# The first fade and two more.
MAX_FADES = 3
# How much heavier a concept weighs of which all is left than one that is forgotten.
SLOW_WEIGHT = 2.0
# Steps of an automatic run, or one pass over the forget set if that is more.
MAX_STEPS = 400


class Pacing:
    """Pacing of a number of steps that the user gave. Its state is saved in checkpoints."""

    # What kept an automatic run from forgetting: "damage" or "steps".
    limit: str | None = None
    # Step after which training also draws the withheld forget pairs, which alone were remembered.
    withheld_until: int | None = None
    # Of several concepts, the weight of each in the forget loss; 1 of one that is missing.
    weights: Mapping[str, float] = MappingProxyType({})
    # The largest residue that the last check has found.
    residue: float | None = None

    def __init__(
        self,
        rate: Rate,
        *,
        total_steps: int,
        is_forgotten: Callable[[], bool] | None = None,  # True ends the run
        check_steps: int = 1,  # between calls of it: one pass over the forget set
    ) -> None:
        self.total_steps = total_steps  # the largest number
        self.is_done = False
        self._rate = rate
        self._is_forgotten = is_forgotten
        self._check_steps = check_steps

    def lr(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        return self._rate.at(step)

    def after_step(self, record: StepRecord) -> Mapping[str, float]:
        """Take note of a step; return what a check after it has found, by name."""
        self._rate.follow(record)
        if self._is_forgotten is not None and record.step % self._check_steps == 0:
            self.is_done = self._is_forgotten()
        return {}

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs, ready for JSON."""
        return {"is_done": self.is_done, "rate": self._rate.state()}

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights that a resumed run may have to restore; empty if there are none."""
        return {}

    def restore(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Continue from `state` and `tensors`."""
        # A user who no longer wants the run to stop early gets the steps that are left.
        self.is_done = state["is_done"] and self._is_forgotten is not None
        self._rate.restore(state["rate"])


@dataclass
class _Progress:
    """How far an automatic run has come."""

    last: tuple[int, float, float]  # step of the last check, its largest and smallest residue
    best_rank: list[float]  # of the best weights, see `Check.rank`
    best_least: float  # their smallest residue
    lowest: tuple[int, float] | None = None  # what is waited for fell last: step, what is left
    next_check: int = 0  # a step, if no check is due before
    fade_from: tuple[int, float] | None = None  # first step of a fade, and its learning rate
    fades: int = 0  # how many have begun
    has_exceeded: bool = False  # whether a check has found more damage than is allowed
    waits_since: int | None = None  # step since which the withheld pairs alone are not forgotten
    withheld_until: int | None = None  # see `Pacing`
    weights: dict[str, float] = field(default_factory=dict)  # see `Pacing`


class AutomaticPacing(Pacing):
    """Runs until the verdict holds, within a budget of steps and damage.

    The verdict is checked every few steps. Once it holds by a margin, or the loss has converged, or
    the damage is exceeded, lr decays to 0, which recovers some damage. Before that a run waits for
    silent towers, and one on a link for a low loss, while these still fall. If the verdict does not
    hold then, or images enough to be sure leave it open, the run resumes, at most twice. Where the
    withheld pairs alone are remembered, it soon trains on them too. The best weights seen are
    restored at the end: of forgotten ones those that rest within the margins, with silent towers
    and faded ones first, then those with the least damage; else those that exceed the verdict's
    thresholds least, within `max_damage`. Where the best lie below the margins, weights between the
    start's and theirs are considered too. Of a few pictures they move back in any case: below the
    margin nothing more can be shown to be forgotten, and others are lost (docs/results.md).

    The loss of a link measures from made-up facts, as the margins of the verdict do: it settles
    first, and then lr fades slowly.
    """

    def __init__(
        self,
        rate: Rate,
        *,
        check: Callable[[], Check],
        weights: Callable[[], dict[str, Tensor]],  # copies the trained weights, to CPU
        load: Callable[[dict[str, Tensor]], None],  # puts such a copy back
        original: tuple[Check, dict[str, Tensor]],  # the first candidate for the best weights
        # Where training starts; no check if that is the original, or in a resumed run.
        start: tuple[Check | None, dict[str, Tensor]],
        towers: Mapping[str, Collection[str]],  # "image", "text" -> names of its weights
        patience: int = PATIENCE_STEPS,  # how long what is waited for may not fall; 0: nothing is
        of_link: bool = False,
        max_steps: int,
    ) -> None:
        super().__init__(rate, total_steps=max_steps)
        self._check = check
        self._weights = weights
        self._load = load
        self._patience = patience
        self._of_link = of_link
        self._towers = towers
        self._step = 0
        self._found: Check | None = None  # after the last step
        known, self._best = original
        self._has_few = known.has_few and not of_link
        residues = known.residue, known.least_residue
        self._now = _Progress((0, *residues), known.rank(faded=False), known.least_residue)
        found, self._start = start
        if found is not None:
            self._consider(found, faded=False)

    @property
    def weights(self) -> Mapping[str, float]:  # type: ignore[override]
        return self._now.weights

    @property
    def withheld_until(self) -> int | None:  # type: ignore[override]
        return self._now.withheld_until

    @property
    def residue(self) -> float:  # type: ignore[override]
        return self._now.last[1]

    @property
    def _fade_steps(self) -> int:
        return LINK_FADE_STEPS if self._of_link and not self._now.has_exceeded else FADE_STEPS

    def lr(self, step: int) -> float:
        if self._now.fade_from is None:
            return self._rate.at(step)
        start, lr = self._now.fade_from
        return lr * max(0.0, 1 - (step - start + 1) / (self._fade_steps + 1))

    def after_step(self, record: StepRecord) -> Mapping[str, float]:
        self._step, self._found = record.step, None
        if self._now.fade_from is not None:
            self._fade(record.step - self._now.fade_from[0])
        else:
            self._follow(record)
        return {} if self._found is None else self._found.findings()

    def _follow(self, record: StepRecord) -> None:
        now, rate = self._now, self._rate
        rate.follow(record)
        last = record.step == self.total_steps - self._fade_steps
        if last or (self._is_check_due() and rate.share_left <= CHECKED_LOSS):
            found = self._check_now()
            self._consider(found, faded=False)
            spent = found.verdict != REMEMBERED and rate.is_spent
            if found.verdict == REMEMBERED and rate.is_spent:
                rate.aim_lower()
            is_safe = found.is_safely_forgotten or self._of_link
            settled = is_safe and self._is_settled(found)
            rate.hurry(settled or not is_safe)
            if last or spent or settled or found.exceeded:
                now.fade_from = record.step, rate.lr
                now.fades += 1
        if record.step == self.total_steps:
            self._finish()

    def _is_check_due(self) -> bool:
        return self._step % CHECK_STEPS == 0 or self._step == self._now.next_check

    def _check_now(self) -> Check:
        """Check the model, and decide when to do so again."""
        found = self._found = self._check()
        self._now.weights = {name: _slowness(trace) for name, trace in found.traces.items()}
        self._release_withheld(found)
        step, most, least = self._now.last
        self._now.last = self._step, found.residue, found.least_residue
        fall = max(most - found.residue, least - found.least_residue) / max(1, self._step - step)
        room = (found.residue - MARGIN_RESIDUE, found.least_residue - LEAST_RESIDUE)
        nearest = min((each for each in room if each > 0), default=0.0)
        steps = nearest / (2 * fall) if fall > 0 else CHECK_STEPS
        self._now.next_check = self._step + int(min(max(steps, 1), CHECK_STEPS))
        return found

    def _release_withheld(self, found: Check) -> None:
        """Let training draw the withheld pairs if they alone are remembered for long."""
        now = self._now
        if now.withheld_until is not None or not found.lacks_withheld_alone:
            now.waits_since = None
        elif now.waits_since is None:
            now.waits_since = self._step
        elif self._step - now.waits_since >= WITHHELD_PATIENCE_STEPS:
            now.withheld_until = self._step

    def _is_settled(self, found: Check) -> bool:
        """Whether nothing more is to be waited for."""
        if self._of_link:
            left, enough = self._rate.share_left, LINK_SETTLED_LOSS
        else:
            left, enough = sum(found.told), 0.0
            if found.least_residue <= LEAST_RESIDUE:  # waiting would lead to "over-erased"
                return True
        lowest = self._now.lowest
        if lowest is None or left < NOTICED_FALL * lowest[1]:
            lowest = self._now.lowest = self._step, left
        return left <= enough or self._step - lowest[0] >= self._patience

    def _fade(self, steps: int) -> None:
        """Check now and then how far the fade has come: it may pass a better place."""
        is_last = steps >= self._fade_steps or self._step == self.total_steps
        if not is_last and not self._is_check_due():
            return
        found = self._check_now()
        self._consider(found, faded=is_last)
        if not is_last:
            return
        is_forgotten = found.verdict != REMEMBERED and not found.is_indecisive
        is_settled = is_forgotten or found.exceeded
        if is_settled or self._now.fades == MAX_FADES or self._step == self.total_steps:
            self._finish()
        else:
            self._now.fade_from = None

    def _finish(self) -> None:
        if not self._is_remembered and self._has_few:
            self._ease_few()
        if not self._is_remembered and self._now.best_least < RESTING[0]:
            self._ease()
        self._load(self._best)
        self.is_done = True
        if self._is_remembered:
            out_of_steps = "steps" if self._step == self.total_steps else None
            self.limit = "damage" if self._now.has_exceeded else out_of_steps

    @property
    def _is_remembered(self) -> bool:
        """Whether the best weights still know the concept."""
        return self._now.best_rank[1] == RANKS[REMEMBERED]

    def _ease(self) -> None:
        """Look for the margin on straight lines from the best weights back to the start's."""
        best = self._best
        for part, most in MOST_EASED.items():
            names = self._towers.get(part, ())
            if part == "all" or names:
                self._ease_part(best, names or best.keys(), most)
            if self._now.best_least >= RESTING[0]:
                return

    def _ease_part(self, best: dict[str, Tensor], names: Collection[str], most: float) -> None:
        def is_below(found: Check) -> bool:
            self._consider(found, faded=True)
            return found.least_residue < RESTING[0]

        self._move_back(best, names, most, is_below)

    def _ease_few(self) -> None:
        """Move the best weights back as far as residues and hits stay low."""
        best = self._best
        self._load(best)
        whole = self._check()

        def is_low(found: Check) -> bool:
            if not found.keeps_low(whole):
                return False
            self._best, self._now.best_least = self._weights(), found.least_residue
            return True

        self._move_back(best, best, MOST_EASED["all"], is_low)

    def _move_back(
        self, best: dict[str, Tensor], names: Collection[str], most: float, on: Callable[..., bool]
    ) -> None:
        """Halve the range of shares of the way to the start, and go `on` from its middle or not."""
        low, high = 0.0, most
        for _ in range(EASE_CHECKS):
            share = (low + high) / 2
            eased = {n: _between(best[n], self._start[n], share) for n in names if n in best}
            self._load({**best, **eased})
            low, high = (share, high) if on(self._check()) else (low, share)

    def _consider(self, found: Check, *, faded: bool) -> None:
        """Take a copy of the weights if they are better than the best so far."""
        self._now.has_exceeded |= found.exceeded
        waits = self._patience > 0 and not self._of_link
        rank = found.rank(faded=faded, waits=waits)
        if rank < self._now.best_rank:
            self._now.best_rank, self._best = rank, self._weights()
            self._now.best_least = found.least_residue

    def state(self) -> dict[str, Any]:
        return {**super().state(), "limit": self.limit, "progress": asdict(self._now)}

    def tensors(self) -> dict[str, Tensor]:
        # After the end the best weights are those of the checkpoint itself.
        return {} if self.is_done else self._best

    def restore(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.is_done, self.limit = state["is_done"], state["limit"]
        self._rate.restore(state["rate"])
        self._now = _Progress(**state["progress"])
        if tensors:
            self._best = tensors


def _slowness(trace: Trace) -> float:
    """Return the weight of a concept among several, higher if more is left of it."""
    most = max(trace.image_to_text, trace.text_to_image)
    return 1 + SLOW_WEIGHT * max(0.0, most - MARGIN_RESIDUE) / (1 - MARGIN_RESIDUE)


def _between(tensor: Tensor, start: Tensor, share: float) -> Tensor:
    return tensor.lerp(start, share) if tensor.is_floating_point() else tensor
