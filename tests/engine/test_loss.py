"""The loss of a run, as its settings and the original have it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fasterase.config import UnlearnConfig
from fasterase.engine.loss import FLOOR_MARGIN, StepLoss
from fasterase.original.features import Unmatched
from fasterase.parallel.ranks import ALONE

FLOORS = [Unmatched(0.1, 0.2), Unmatched(-0.1, 0.4)]


def loss_of(concepts=(), **settings):
    model = SimpleNamespace(scale=lambda: torch.tensor(14.3))
    config = UnlearnConfig(**settings)
    job = SimpleNamespace(config=config, model=model, precision="fp32", ranks=ALONE)
    job.concepts, job.forget = dict.fromkeys(concepts, range(2)), range(4)
    trained = SimpleNamespace(image=True, text=True, scale=False)
    return StepLoss.of_job(job, trained, floors=FLOORS[: len(concepts) or 1])


def test_pairs_rest_a_share_of_the_spread_above_a_measured_floor():
    objective = loss_of().objective
    assert (objective.floor, objective.floor_margin) == pytest.approx((0.1, 0.2 * FLOOR_MARGIN))
    several = loss_of(["octopus", "santa"])
    floors = [(0.1, 0.2 * FLOOR_MARGIN), (-0.1, 0.4 * FLOOR_MARGIN)]
    assert [(each.floor, each.floor_margin) for each in several.groups] == floors


@pytest.mark.parametrize("floor", [0.3, None])
def test_on_a_floor_that_the_caller_gives_they_rest(floor):
    steps = {"lr": 1e-5, "max_steps": 1, "floor": floor}
    objective = loss_of(**steps).objective
    assert (objective.floor, objective.floor_margin) == (floor, 0.0)
    groups = loss_of(["octopus", "santa"], **steps).groups
    assert [(each.floor, each.floor_margin) for each in groups] == [(floor, 0.0)] * 2
