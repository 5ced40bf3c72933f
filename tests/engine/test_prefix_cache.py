"""Frozen blocks run once a pair, and the weights come out as without a cache."""

from __future__ import annotations

import copy

import pytest

from fasterase.engine.prefix_cache import VIEWS
from fasterase.errors import InputError
from fasterase.models.prefix import SplitTower
from tests import small_models
from tests.marks import SHORT_RUN
from tests.models.test_adapters import erase, vocabulary_of
from tests.tiny_model import same_weights

pytestmark = SHORT_RUN
RUN = {"tune": "last:1", "forget_augment": False, "max_steps": 4, "prefix_cache": 1.0}


@pytest.fixture
def lower_rows(monkeypatch):
    """Collects how many rows the frozen blocks of each tower have run."""
    rows = {"image": 0, "text": 0}
    lower = SplitTower.lower

    def counting(self, given):
        found = lower(self, given)
        rows[self._tower] += len(found)
        return found

    monkeypatch.setattr(SplitTower, "lower", counting)
    return rows


def weights_of(model, **options):
    erase(model, vocabulary_of(model), **{**RUN, **options})
    return model.state_dict()


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (small_models.open_clip_vit, {"micro_batch_size": 4}),
        (small_models.open_clip_vit, {"tune": "projections"}),
        (small_models.open_clip_custom_text, {}),
        (small_models.hf_clip, {}),
        (small_models.hf_siglip, {"activation_checkpointing": True}),
    ],
)
def test_the_weights_are_the_same_bits(build, options, lower_rows):
    model = build()
    original = copy.deepcopy(model)
    assert same_weights(
        weights_of(copy.deepcopy(model), **options),
        weights_of(model, **options, prefix_cache=None),
    )
    assert not same_weights(model.state_dict(), original.state_dict())
    # Of 4 pairs to forget and 8 to retain.
    assert lower_rows == {"image": 12, "text": 12}


def test_a_resumed_run_finds_what_was_kept(tmp_path, lower_rows):
    whole = small_models.open_clip_vit()
    parts = copy.deepcopy(whole)
    stopped = copy.deepcopy(whole)
    options = {"forget_augment": True}
    wanted = weights_of(whole, **options)
    lower_rows.update(image=0, text=0)
    options |= {"output_dir": str(tmp_path), "save_every": 1}
    weights_of(stopped, **options, callback=lambda record: record.step == 2)
    assert same_weights(weights_of(parts, **options, resume="must"), wanted)
    assert 12 < lower_rows["image"] <= 4 * VIEWS + 8
    assert lower_rows["text"] == 12


@pytest.mark.parametrize(
    ("build", "options", "says"),
    [
        (small_models.open_clip_vit, {"prefix_cache": 1e-5}, r"may take .* GB"),
        (small_models.open_clip_vit, {"tune": "last:2"}, "no block of the image tower is frozen"),
        (small_models.open_clip_vit, {"tune": "text"}, "prefix_cache with tune='text'"),
        (small_models.open_clip_resnet, {}, "not one row of modules"),
    ],
)
def test_what_cannot_be_kept_is_refused(build, options, says):
    with pytest.raises(InputError, match=says):
        weights_of(build(), **options)
