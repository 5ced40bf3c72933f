"""Frozen blocks run once a pair, and the weights come out as without a cache."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image

import fasterase
from fasterase.engine.prefix_cache import VIEWS, row_bytes
from fasterase.errors import InputError
from fasterase.models.forward import SplitTower
from fasterase.pairs import table
from tests import small_models
from tests.marks import SHORT_RUN
from tests.models.conftest import STEPS, erase
from tests.tiny_model import same_weights

pytestmark = SHORT_RUN
MEASURED = small_models.random_pairs(small_models.SIMPLE_VOCABULARY_SIZE, count=5, seed=3)
OTHER = {"evaluation": "quick", "sets": {"other": list(zip(*MEASURED, strict=True))}}
RUN = {"tune": "last:1", "forget_augment": False, "max_steps": 4, "prefix_cache": 1.0}
EPOCHS = {"max_steps": None, "epochs": 4}


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
    erase(model, **{**RUN, **options})
    return model.state_dict()


def cached_bytes(folder):
    files = (path for path in folder.rglob("*.safetensors") if "-below-" in str(path))
    return sum(path.stat().st_size for path in files)


@pytest.mark.parametrize(
    ("build", "options", "measured"),
    [
        (small_models.open_clip_vit, {"micro_batch_size": 4}, 0),
        (small_models.open_clip_vit, {"tune": "projections"}, 0),
        (small_models.open_clip_vit, OTHER, 5),
        (small_models.open_clip_vit, {"stop_when_forgotten": True, **EPOCHS}, 0),
        (small_models.open_clip_custom_text, {}, 0),
        (small_models.open_clip_resnet, {}, 0),
        (small_models.hf_clip, {}, 0),
        (small_models.hf_siglip, {"activation_checkpointing": True}, 0),
    ],
)
def test_the_weights_are_the_same_bits(build, options, measured, lower_rows):
    model = build()
    original = copy.deepcopy(model)
    assert same_weights(
        weights_of(copy.deepcopy(model), **options),
        weights_of(model, **options, prefix_cache=None),
    )
    assert not same_weights(model.state_dict(), original.state_dict())
    # Of 4 pairs to forget and 8 to retain, also for the original's features and the verdict.
    assert lower_rows == {"image": 12 + measured, "text": 12 + measured}


def test_the_weights_are_the_same_bits_where_captions_repeat(lower_rows):
    model = small_models.open_clip_vit()
    plain = copy.deepcopy(model)
    pixels, ids = small_models.random_pairs(small_models.SIMPLE_VOCABULARY_SIZE, count=12)
    captions = [0, 1, 0, 0, 2, 3, 4, 4, 2, 2, 3, 2]
    items = list(zip(pixels, ids[captions], strict=True))
    options = {**STEPS, **RUN, "micro_batch_size": 5}
    fasterase.unlearn(model, items[:4], items[4:], **options)
    fasterase.unlearn(plain, items[:4], items[4:], **{**options, "prefix_cache": None})
    assert same_weights(model.state_dict(), plain.state_dict())
    assert lower_rows == {"image": 12, "text": 5}


def test_a_resumed_run_finds_what_was_cached(tmp_path, lower_rows):
    whole, stopped, parts = (small_models.open_clip_vit() for _ in range(3))
    options = {"forget_augment": True}
    wanted = weights_of(whole, **options)
    lower_rows.update(image=0, text=0)
    options |= {"output_dir": str(tmp_path), "save_every": 1}
    weights_of(stopped, **options, callback=lambda record: record.step == 2)
    assert same_weights(weights_of(parts, **options, resume="must"), wanted)
    assert 12 < lower_rows["image"] <= 4 * VIEWS + 12
    assert lower_rows["text"] == 12


def test_what_is_only_measured_is_cached_while_there_is_room(tmp_path, lower_rows):
    """The budget holds what training draws; nothing more is written."""
    pair = sum(row_bytes(tokens * 32, "fp32") for tokens in (17, small_models.CONTEXT_LENGTH))
    options = {"prefix_cache": 16.9 * pair / 1e9, **OTHER, "output_dir": str(tmp_path)}
    weights_of(small_models.open_clip_vit(), **options)
    assert lower_rows == {"image": 12 + 2 * 5, "text": 12 + 2 * 5}
    assert 11.9 * pair < cached_bytes(tmp_path) < 16.9 * pair


def test_images_that_are_cached_are_not_opened(tmp_path, monkeypatch):
    opened = []
    decode = table.decode_image
    note = lambda data, *, id: opened.append(id) or decode(data, id=id)  # noqa: E731
    monkeypatch.setattr(table, "decode_image", note)
    numbers = np.random.default_rng(0)
    for name, count in (("forget", 4), ("retain", 8)):
        for row in range(count):
            path = tmp_path / name / f"{name} {row}" / "a.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(numbers.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    counts = []
    for steps in (1, 5):
        opened.clear()
        fasterase.unlearn(
            small_models.open_clip_vit(),
            tmp_path / "forget",
            tmp_path / "retain",
            tokenizer=small_models.simple_tokenizer(),
            **{**STEPS, **RUN, "max_steps": steps},
        )
        counts.append(len(opened))
    assert counts[0] == counts[1] > 0


def test_half_the_disk_for_towers_in_bf16(tmp_path):
    def weights(**options):
        found = weights_of(small_models.open_clip_vit(), **options)
        return torch.cat([each.flatten() for each in found.values()])

    weights(precision="fp32", output_dir=str(tmp_path / "fp32"))
    found = weights(precision="bf16", output_dir=str(tmp_path / "bf16"))
    assert 0.5 < cached_bytes(tmp_path / "bf16") / cached_bytes(tmp_path / "fp32") < 0.55
    exact = weights(precision="bf16", prefix_cache=None)
    start = torch.cat([w.flatten() for w in small_models.open_clip_vit().state_dict().values()])
    assert (found - exact).norm() < 0.3 * (exact - start).norm()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prefix_cache": 1e-5}, r"may take .* GB"),
        ({"tune": "last:2"}, "no block of the image tower is frozen"),
        ({"tune": "text"}, "prefix_cache with tune='text'"),
    ],
)
def test_what_cannot_be_cached_is_refused(options, says):
    with pytest.raises(InputError, match=says):
        weights_of(small_models.open_clip_vit(), **options)
