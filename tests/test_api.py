"""`fasterase.unlearn` as callers call it: a set left out, a caller in inference mode."""

from __future__ import annotations

import pytest
import torch

import fasterase
from tests import small_models
from tests.marks import SHORT_RUN
from tests.tiny_model import TinyModel, pairs, same_weights


@pytest.mark.parametrize("name", ["forget", "retain"])
def test_a_set_that_is_none_is_named(name):
    tower = TinyModel()
    before = tower.weights()
    sets = {"forget": pairs(3, seed=1), "retain": pairs(4, seed=2), name: None}
    with pytest.raises(fasterase.InputError, match=f"`{name}` must be a dataset.*NoneType"):
        fasterase.unlearn(tower, **sets)
    assert same_weights(tower.weights(), before)


@SHORT_RUN
def test_a_copy_made_in_the_callers_inference_mode_is_trained():
    model = small_models.open_clip_vit()
    pixels, ids = small_models.random_pairs(count=10)
    given = list(zip(pixels, ids, strict=True))
    options = {"max_steps": 1, "lr": 1e-3, "progress": False, "evaluation": None}
    with torch.inference_mode():
        result = fasterase.unlearn(model, given[:4], given[4:], copy=True, **options)
    assert not same_weights(result.model.state_dict(), model.state_dict())
