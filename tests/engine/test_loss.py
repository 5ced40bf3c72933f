"""The loss of a run: where its pairs come to rest."""

from __future__ import annotations

import pytest

from fasterase.config import UnlearnConfig
from fasterase.engine.loss import choose_floor
from fasterase.original.features import Unmatched


@pytest.mark.parametrize(
    ("options", "floor", "margin"),
    [
        ({}, 0.1, 0.2 * 0.05),
        ({"lr": 1e-4}, 0.1, 0.2 * 0.05),
        ({"cross_weight": 0.0}, 0.1, 0.0),
        ({"tune": "image"}, 0.1, 0.0),
        ({"max_steps": 40}, 0.1, 0.0),
        ({"epochs": 2, "lr": 1e-4}, 0.1, 0.0),
        ({"floor": 0.3}, 0.3, 0.0),
        ({"floor": None, "epochs": 2, "lr": 1e-4}, None, 0.0),
    ],
)
def test_pairs_of_a_run_that_ends_by_itself_rest_above_the_automatic_floor(options, floor, margin):
    found = choose_floor(UnlearnConfig(**options), Unmatched(mean=0.1, deviation=0.05))
    assert found == (floor, pytest.approx(margin))
