"""Weights that were moved too far go back along a straight line to the start's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fasterase.engine.findings import Check
from fasterase.engine.pacing import EASE_CHECKS, AutomaticPacing
from fasterase.engine.rates import Rate
from tests.engine.test_pacing import KNOWN, TOTAL, Run, check
from tests.engine.test_rates import record


class TestEasing:
    """Weights that fell below the margin move back along the line to the start's, step 0."""

    @staticmethod
    def run(
        least: float, *, gap: float = 0.3, images: int = 50
    ) -> tuple[Run, Callable[[float], Check]]:
        """The only candidate is step 10; residues rise evenly on the way back from it, to 1."""

        def script(step: float) -> Check:
            if step != 10 and step == int(step):
                return KNOWN
            low = least + (1 - step / 10) * (1 - least)
            return check(min(1.0, low + gap), least=low, images=images)

        return Run(script, original=check(1.0, images=images)), script

    @pytest.mark.parametrize("least", [0.29, 0.26, 0.22, 0.15])
    @pytest.mark.parametrize("images", [11, 50])
    def test_they_rest_at_the_margin(self, least, images):
        """A few images too, whose higher residue is at its own margin before that."""
        run, script = self.run(least, gap=0.38 if images == 11 else 0.3, images=images)
        run.take()
        few = EASE_CHECKS + 1 if images == 11 else 0
        assert len(run.loaded) == EASE_CHECKS + 1 + few
        assert 7.5 <= run.loaded[-1] < 10
        assert 0.3 <= script(run.loaded[-1]).least_residue < 0.4
        assert run.pacing.limit is None

    def test_none_better_leaves_the_best(self):
        """With the directions further apart than the margins there is no place between them."""
        run, script = self.run(0.27, gap=0.45)
        run.take()
        assert run.loaded[-1] == 10
        assert script(10).verdict == "forgotten"

    def test_one_tower_moves_where_the_other_one_would_tell(self):
        """The text tower fell too far; the image tower tells at once if it moves back."""
        ends = {"image": torch.tensor(10.0), "text": torch.tensor(10.0)}
        now: dict[str, Tensor] = {}

        def measured() -> Check:
            low = 0.2 + (10 - float(now["text"])) / 20
            tells = 1.0 if now["image"] < 10 else 0.0
            return check(0.4 + low / 2, least=low, towers=(tells, 0.0))

        pacing = AutomaticPacing(
            Rate(1e-3),
            check=measured,
            weights=lambda: dict(now),
            load=now.update,
            original=(KNOWN, {}),
            start=(None, dict.fromkeys(ends, torch.tensor(0.0))),
            towers={"image": ["image"], "text": ["text"]},
            max_steps=TOTAL,
        )
        for step in range(1, TOTAL + 1):
            if not pacing.is_done:
                now.update(ends)
                pacing.after_step(record(step, 0.8 if step < 3 else 0.1))
        assert now["image"] == 10
        assert 7.5 <= now["text"] <= 8
        assert measured().verdict == "forgotten"

    @pytest.mark.parametrize(
        ("images", "won_from", "rests"), [(11, 0, 8.5), (11, 9.4, 9.4), (50, 0, 10)]
    )
    def test_of_a_few_images_they_move_up_to_the_margin(self, images, won_from, rests):
        """Residues reach .65 at step 8.5; with `won_from` an image is won again below it."""

        def script(step: float) -> Check:
            found = check(0.5 + (10 - step) / 10, most=0.3, images=images)
            hit = 0.1 if step < won_from else 0.0
            trace = replace(found.traces["forget"], hit=hit)
            return found._replace(traces={"forget": trace})

        known = check(1.0, images=images)
        for of_link in (False, True):
            run = Run(
                lambda step: script(step) if step == 10 or step != int(step) else KNOWN,
                original=known,
                of_link=of_link,
            ).take()
            expected = rests if not of_link else 10
            assert expected <= run.loaded[-1] <= expected + 0.1

    def test_what_is_still_remembered_is_not_moved(self):
        run = Run(lambda step: check(0.9, least=0.2)).take()
        assert len(run.loaded) == 1

    @pytest.mark.parametrize(("images", "loads"), [(50, EASE_CHECKS + 1), (11, EASE_CHECKS + 2)])
    def test_a_rank_without_weights_takes_part_in_every_check(self, images, loads):
        least = 0.5 if images == 11 else 0.29
        found, known = check(0.5, least=least, images=images), check(1.0, images=images)
        run = Run(lambda step: found, has_weights=False, original=known)
        assert run.take().loaded == [0.0] * loads

    @pytest.mark.parametrize(
        ("images", "before", "hit", "holds"),
        [(2, 0.0, 1.0, True), (4, 0.0, 0.5, True), (4, 0.0, 0.75, False), (4, 0.75, 0.75, True)],
    )
    def test_of_a_few_images_a_tower_may_win_some_but_not_nearly_tell(
        self, images, before, hit, holds
    ):
        """All of four would tell, and nothing is told by two."""
        whole, found = (
            Check({"forget": replace(trace, towers={"image": (share, 0.0)})}, 0.0, False)
            for trace in [check(0.5, images=images).traces["forget"]]
            for share in (before, hit)
        )
        assert found.keeps_low(whole) == holds
