"""The run that ends by itself, and one of a given number of steps, with scripted losses."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fasterase.engine.findings import Check
from fasterase.engine.pacing import (
    FADE_STEPS,
    LINK_FADE_STEPS,
    LINK_SETTLED_LOSS,
    LONG_PATIENCE_STEPS,
    PATIENCE_STEPS,
    AutomaticPacing,
    Pacing,
)
from fasterase.engine.rates import (
    FIRST_LR,
    LEAST_SHARE,
    LineFollower,
    Rate,
    Schedule,
)
from fasterase.evaluation.verdict import Trace
from tests.engine.test_rates import record

TOTAL = 400


class TestNumbers:
    """Steps that the user gave."""

    def test_a_schedule_is_followed_and_the_verdict_checked_once_a_pass(self):
        checks = iter([False, True])
        pacing = Pacing(
            Schedule(1.0, warmup_steps=8, total_steps=30, is_cosine=False),
            total_steps=30,
            is_forgotten=lambda: next(checks),
            check_steps=4,
        )
        done = []
        for step in range(8):
            assert pacing.lr(step) == (step + 1) / 8
            pacing.after_step(record(step + 1, 0.5))
            done.append(pacing.is_done)
        assert done == [False] * 7 + [True]
        assert pacing.tensors() == {}

    def test_the_automatic_rate_spans_the_steps(self):
        """Losses that follow the line of 40 steps lead one of 400."""
        found = []
        for total in (40, 400):
            lines = [LineFollower(line_steps=total) for _ in range(2)]
            pacing, again = (Pacing(line, total_steps=total) for line in lines)
            for step in range(1, 41):
                pacing.after_step(record(step, 0.8 * (1 - 0.8 * step / 40)))
            again.restore(json.loads(json.dumps(pacing.state())), {})
            assert again.lr(40) == pacing.lr(40)
            found.append(pacing.lr(40))
        assert found[0] > 10 * FIRST_LR
        assert found[1] < FIRST_LR


def check(
    residue: float,
    *,
    damage: float = 0.0,
    exceeded: bool = False,
    least: float | None = None,
    most: float = 0.1,
    towers: Sequence[float] = (),
    images: int = 50,
) -> Check:
    """Of a hit rate that may be as high as `most`, and of an image and a text tower's alone."""
    least = residue if least is None else least
    alone = {name: (hit, hit) for name, hit in zip(("image", "text"), towers, strict=False)}
    return Check(
        {"forget": Trace(residue, least, 0.0, 0.0, most, 0.05, images, alone)}, damage, exceeded
    )


KNOWN, SAFE = check(1.0, towers=(1.0, 1.0)), check(0.5)
# Of eleven images none may be won, and it stays open all the same.
FEW = check(0.5, most=0.3, images=11)
# All is forgotten but what was withheld.
WITHHELD_KNOWN = KNOWN._replace(trained=SAFE.traces)
HURT = check(0.8, damage=0.09, exceeded=True)
HURTS = {5: check(0.9), 10: check(0.85), 15: HURT, 35: HURT}
HEALED = {5: HURT, 25: check(0.8, damage=0.01), 30: SAFE}


class Run:
    """Drives an automatic run whose checks are a function of the step."""

    def __init__(
        self,
        script: Callable[[float], Check],
        *,
        loss: Callable[[int], float] = lambda step: 0.8 if step < 3 else 0.1,
        total: int = TOTAL,
        rate: Rate | None = None,
        has_weights: bool = True,
        patience: int = PATIENCE_STEPS,
        of_link: bool = False,
        original: Check = KNOWN,
    ) -> None:
        self.step = 0
        self.now = 0.0  # the step whose weights the model has
        self.checked: list[float] = []
        self.lrs: list[float] = []
        self.loaded: list[float] = []
        self._loss = loss
        self._script = script
        self._has_weights = has_weights
        self.pacing = AutomaticPacing(
            rate or Rate(1e-3),
            check=self._check,
            weights=self._weights,
            load=self._load,
            original=(original, self._weights()),
            start=(None, self._weights()),
            towers={},
            patience=patience,
            of_link=of_link,
            max_steps=total,
        )

    def _check(self) -> Check:
        self.checked.append(self.now)
        return self._script(self.now)

    def _weights(self) -> dict[str, Tensor]:
        return {"step": torch.tensor(self.now)} if self._has_weights else {}

    def _load(self, weights: dict[str, Tensor]) -> None:
        self.now = float(weights.get("step", 0.0))
        self.loaded.append(self.now)

    def take(self, steps: int | None = None) -> Run:
        """Take some steps, or all that there are."""
        last = self.pacing.total_steps if steps is None else self.step + steps
        while self.step < last and not self.pacing.is_done:
            self.lrs.append(self.pacing.lr(self.step))
            self.step += 1
            self.now = float(self.step)
            self.pacing.after_step(record(self.step, self._loss(self.step)))
        return self


def at(checks: dict[int, Check], otherwise: Check) -> Callable[[float], Check]:
    """A check at each of some steps, another at all others, and a bad one between steps."""
    return lambda step: checks.get(int(step), otherwise) if step == int(step) else KNOWN


class TestAutomatic:
    def test_checks_begin_once_the_loss_has_fallen(self):
        run = Run(lambda step: KNOWN, loss=lambda step: 1.0 if step < 42 else 0.5)
        run.take(60)
        assert run.checked == [50, 55, 60]
        assert set(run.lrs) == {1e-3}

    def test_of_a_link_lr_fades_slowly_once_the_loss_has_settled(self):
        settled = dict.fromkeys(range(5, 60, 5), KNOWN)
        run = Run(
            at(settled, SAFE),
            loss=lambda step: 0.4 if step < 20 else 0.4 * LINK_SETTLED_LOSS / 2,
            of_link=True,
        ).take()
        fade = run.lrs.index(next(lr for lr in run.lrs if lr < 1e-3))
        assert 20 < fade < 50
        assert run.step == fade + LINK_FADE_STEPS
        assert run.pacing.limit is None
        hurt = Run(lambda step: HURT, loss=lambda step: 0.4 if step < 20 else 0.01, of_link=True)
        assert hurt.take().step < 60, "what it may cost is no reason to go on for long"

    def test_lr_fades_once_the_verdict_holds_and_the_run_ends(self):
        run = Run(at({5: KNOWN}, SAFE)).take()
        assert run.step == 10 + FADE_STEPS
        assert run.lrs[:10] == [1e-3] * 10
        fade = run.lrs[10:]
        assert len(fade) == FADE_STEPS
        steps = [lr - later for lr, later in itertools.pairwise([1e-3, *fade])]
        assert steps == pytest.approx([1e-3 / (FADE_STEPS + 1)] * FADE_STEPS)
        assert fade[-1] > 0
        assert run.loaded == [run.step]
        assert (run.pacing.is_done, run.pacing.limit) == (True, None)
        assert run.pacing.tensors() == {}

    def test_a_run_that_waits_for_its_towers_does_not_hurry(self):
        """The trust region does not widen: what they tell is worth no more damage."""

        def lr(script: Callable[[int], Check]) -> float:
            rate = LineFollower()
            run = Run(script, rate=rate)
            while run.step < 200:
                run.step += 1
                run.pacing.after_step(record(run.step, 0.8 if run.step < 3 else 0.4, 0.02))
            return rate.lr

        def telling(step: float) -> Check:
            return check(0.5, towers=(0.15 + 0.35 * 0.985**step, 0.0))

        assert lr(telling) == pytest.approx(LEAST_SHARE * FIRST_LR)
        assert lr(lambda step: KNOWN) > 3 * FIRST_LR

    def test_forgotten_without_a_margin_is_not_enough(self):
        """Fading, and pictures that training has not seen, need one."""
        run = Run(at({25: SAFE}, check(0.7))).take(25)
        assert run.checked == [5, 6, 10, 15, 20, 25]
        assert len(set(run.lrs)) == 1
        run.take()
        assert run.step == 25 + FADE_STEPS

    def test_it_does_not_wait_for_the_margin_once_the_loss_is_spent(self):
        """The rate has fallen to its limit then: the run would idle until its last step."""

        def run(residue: float) -> Run:
            return Run(lambda step: check(residue), loss=lambda step: 0.8 if step < 3 else 0.01)

        spent = run(0.7).take()
        assert spent.step < 50
        assert spent.loaded == [spent.step]
        assert run(0.8).take(200).lrs == [1e-3] * 200, "remembered: it goes on"

    def test_it_resumes_at_most_twice(self):
        """Each fade ends remembered: the concept comes back as lr falls."""
        ends = [5 + FADE_STEPS, 10 + 2 * FADE_STEPS, 15 + 3 * FADE_STEPS]
        run = Run(at({ends[0]: check(0.9), ends[1]: check(0.8), ends[2]: check(0.85)}, SAFE)).take()
        assert run.step == ends[2]
        assert run.lrs[ends[0]] == run.lrs[ends[1]] == 1e-3, "resumed at full speed"
        assert run.loaded == [5], "forgotten, if only before fading"
        assert run.pacing.limit is None

    def test_it_resumes_where_enough_images_leave_it_open(self):
        end = 5 + FADE_STEPS
        run = Run(at({end: check(0.5, most=0.3)}, SAFE)).take()
        assert run.step == 5 + end + FADE_STEPS
        assert run.loaded == [run.step]
        assert Run(at({end: FEW}, SAFE)).take().step == end

    @pytest.mark.parametrize(
        ("script", "end", "kept", "limit"),
        [
            # A fade may pass a better place than its end.
            (at({5: SAFE, 15: check(0.5, damage=-0.1)}, check(0.2)), 5 + FADE_STEPS, 15, None),
            # Beyond the damage it fades, and keeps the least residue within it.
            (at(HURTS, KNOWN), 15 + FADE_STEPS, 10, "damage"),
            # Damage that fading heals is no end.
            (at(HEALED, check(0.6, damage=0.02)), 30 + FADE_STEPS, 30 + FADE_STEPS, None),
            # What only makes it worse gives the original back.
            (lambda step: KNOWN, TOTAL, 0, "steps"),
        ],
    )
    def test_it_ends_and_keeps_one_step_s_weights(self, script, end, kept, limit):
        run = Run(script).take()
        assert (run.step, run.loaded, run.pacing.limit) == (end, [kept], limit)

    @pytest.mark.parametrize(
        ("checks", "best"),
        [
            # Faded ones first, even with more damage; then the least damage.
            ({5: check(0.7, damage=0.01), 10: SAFE, 30: check(0.6, damage=0.02)}, 30),
            ({5: check(0.7, damage=0.02), 10: check(0.5, damage=0.03), 30: check(0.1)}, 5),
            ({5: check(0.7, damage=0.03), 10: check(0.5, damage=0.02), 30: check(0.1)}, 10),
            # Those that rest within the margins before faded ones.
            ({5: check(0.72), 10: SAFE, 30: check(0.5, damage=0.1, least=0.28)}, 10),
            ({5: check(0.6, damage=0.1, least=0.31), 25: check(0.74)}, 5),
            # Within the budget of damage first.
            (
                {5: check(0.7, damage=0.01), 10: SAFE, 30: check(0.6, damage=0.09, exceeded=True)},
                10,
            ),
            # Over-erased before remembered.
            (dict.fromkeys(range(6, 25), KNOWN) | {5: check(0.2), 25: check(0.2, damage=0.01)}, 5),
            # Too few images to tell before over-erased, and after "forgotten".
            (dict.fromkeys(range(6, 25), KNOWN) | {5: check(0.2), 25: FEW}, 25),
            ({5: check(0.5, damage=0.01), 25: FEW}, 5),
        ],
    )
    def test_the_best_weights_are_restored(self, checks, best):
        run = Run(at(checks, check(0.7, damage=1.0))).take()
        assert run.loaded[-1] == best
        assert run.pacing.limit is None

    def test_of_weights_that_still_know_it_as_well_the_least_damage_counts(self):
        """What is left of a few pictures that are found falls no further with the residue."""

        def found(residue: float, damage: float) -> Check:
            few = Trace(0.7, 0.7, 0.67, 0.3, 0.9, 0.05, 6, by_hits=True)
            return Check({**check(residue).traces, "withheld": few}, damage, False)

        run = Run(lambda step: found(0.6, 0.01) if step == 30 else found(0.5, 0.02)).take()
        assert run.loaded == [30]

    def test_withheld_pairs_are_drawn_where_they_alone_keep_a_run_going(self):
        run = Run(at({5: KNOWN, **dict.fromkeys(range(10, 25), WITHHELD_KNOWN)}, SAFE))
        assert run.take(19).pacing.withheld_until is None
        run.take()
        assert run.pacing.withheld_until == 20, "ten steps after the first such check"
        assert run.step == 25 + FADE_STEPS
        others = Run(at(dict.fromkeys((5, 10, 20), WITHHELD_KNOWN), KNOWN)).take()
        assert others.pacing.withheld_until is None, "not for ten steps on end"

    def test_withheld_pairs_stay_withheld_where_only_a_margin_is_missing(self):
        traces = {name: replace(trace, hit=0.1) for name, trace in SAFE.traces.items()}
        unsafe = SAFE._replace(traces=traces, trained=traces)
        assert unsafe.is_low
        assert not unsafe.is_safely_forgotten
        assert Run(lambda step: unsafe).take().pacing.withheld_until is None
        spared = unsafe._replace(trained=SAFE.traces)
        assert spared.is_safely_forgotten, "the margin is that of what training draws"

    def test_a_run_that_never_gets_there_fades_in_its_last_steps(self):
        run = Run(lambda step: check(1.0 - step / 2000)).take()
        assert run.step == TOTAL
        assert run.lrs[TOTAL - FADE_STEPS - 1] == 1e-3
        assert run.lrs[-1] == pytest.approx(1e-3 / (FADE_STEPS + 1))
        assert run.loaded == [TOTAL]
        assert run.pacing.limit == "steps"

    @pytest.mark.parametrize(
        "script",
        [
            at({5: KNOWN}, SAFE),
            at({25: check(0.9), 50: check(0.8)}, SAFE),
            at({5: check(0.9), 10: check(0.8, damage=0.1, exceeded=True)}, check(0.79)),
            lambda step: check(1.0 - step / 2000),
            at(dict.fromkeys(range(5, 35), WITHHELD_KNOWN), SAFE),
            lambda step: check(0.5, towers=(0.3, 0.0)),
        ],
        ids=["forgotten", "resumes", "damage", "steps", "withheld", "towers"],
    )
    def test_a_run_that_is_continued_anywhere_has_the_same_future(self, script):
        def start() -> Run:
            rate = LineFollower()
            return Run(script, loss=lambda step: 0.8 * 0.95**step, total=120, rate=rate)

        whole = start().take()
        for step in range(whole.step + 1):
            first, second = start().take(step), start()
            state = json.loads(json.dumps(first.pacing.state()))
            second.pacing.restore(state, first.pacing.tensors())
            second.step = step
            second.take()
            for each in ("lrs", "checked", "loaded"):
                assert getattr(first, each) + getattr(second, each) == getattr(whole, each)
            assert second.pacing.limit == whole.pacing.limit
            assert second.pacing.is_done

    def test_checks_are_every_step_where_a_margin_is_near(self):
        """The residue falls by .02 a step, through the whole window in 25."""
        run = Run(lambda step: check(max(0.0, 1.2 - 0.02 * step))).take()
        near = [step for step in run.checked if 0.64 < 1.2 - 0.02 * step < 0.7]
        assert near == [26, 27]
        assert run.step == 28 + FADE_STEPS
        assert 0.29 < 1.2 - 0.02 * run.loaded[-1] < 0.71

    def test_it_goes_on_while_one_tower_tells(self):
        """Beside the original's other one: of what it is trained for, all must have gone."""

        def script(step: float) -> Check:
            return check(0.5, towers=(1.0 - step / 50, 0.0))

        run = Run(script).take()
        assert run.step == 45 + FADE_STEPS, "1 - 45 / 50 is a tenth"
        assert run.loaded == [run.step]
        stuck = Run(lambda step: check(1.0 - step / 1000, towers=(0.9, 0.9 - step / 1000))).take()
        assert (stuck.step, stuck.pacing.limit) == (TOTAL, "steps")
        assert stuck.loaded == [TOTAL], "where pairs and one tower have forgotten the most"

    def test_a_run_goes_on_until_the_towers_are_silent_or_tell_no_less(self):
        def taken(tower: Callable[[float], float], *, images: int = 50, **options: Any) -> int:
            def script(step: float) -> Check:
                return check(0.5, towers=(tower(step), 0.0), images=images)

            run = Run(script, **options).take()
            assert run.pacing.limit is None
            assert run.loaded == [run.step]
            return run.step - FADE_STEPS

        assert taken(lambda step: (40 - step) / 100) == 30
        assert taken(lambda step: 0.3) == 5 + PATIENCE_STEPS
        assert taken(lambda step: 0.3, patience=LONG_PATIENCE_STEPS) == 5 + LONG_PATIENCE_STEPS
        slow = {"tower": lambda step: 0.5 if step < 40 else 0.1}
        assert taken(**slow) == 5 + PATIENCE_STEPS
        assert taken(**slow, patience=LONG_PATIENCE_STEPS) == 40
        assert taken(lambda step: 0.3, images=11) == 5, "three of eleven images are no share"
        assert taken(lambda step: 0.3, patience=0) == 5, "nothing pushes the towers"

    def test_waiting_ends_before_it_leads_to_over_erased(self):
        def script(step: float) -> Check:
            return check(0.7 - step / 100, towers=(0.3, 0.0), damage=step / 1000)

        run = Run(script).take()
        assert run.step == 35 + FADE_STEPS
        rests = Run(lambda step: script(min(step, 36.0))).take()
        assert rests.loaded == [rests.step], "and the weights of the fade are the best"

    def test_the_best_weights_have_silent_towers_where_they_rest_within_the_margins(self):
        def best(residue: float) -> float:
            def script(step: float) -> Check:
                is_late = step >= 20
                return check(residue if is_late else 0.5, towers=(0.0 if is_late else 0.3, 0.0))

            return Run(script).take().loaded[-1]

        assert best(0.4) == 20 + FADE_STEPS
        assert best(0.29) < 20

    def test_a_fade_may_bring_a_picture_back(self):
        def script(step: float) -> Check:
            return check(0.5, towers=(0.12 if step > 20 else 0.1, 0.0), damage=(50 - step) / 1000)

        run = Run(script).take()
        assert run.loaded == [run.step]

    def test_what_training_draws_has_to_be_silent_not_what_is_withheld(self):
        loud, silent = (check(0.5, towers=(hit, 0.0)) for hit in (0.2, 0.1))
        assert loud.told == [pytest.approx(0.1)]
        assert loud._replace(trained=silent.traces).told == [0]
        assert silent._replace(trained=loud.traces).told == loud.told
        known = loud.traces["forget"]
        for further in ({}, {"withheld": known}, {"few": replace(known, by_hits=True)}):
            assert silent._replace(traces={**silent.traces, **further}).told == [0]
