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
OTHER = list(
    zip(
        *small_models.random_pairs(small_models.SIMPLE_VOCABULARY_SIZE, count=5, seed=3),
        strict=True,
    )
)
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
    erase(model, **{**RUN, **options})
    return model.state_dict()


@pytest.mark.parametrize(
    ("build", "options", "measured"),
    [
        (small_models.open_clip_vit, {"micro_batch_size": 4}, 0),
        (small_models.open_clip_vit, {"tune": "projections"}, 0),
        (small_models.open_clip_vit, {"evaluation": "quick", "sets": {"other": OTHER}}, 5),
        (
            small_models.open_clip_vit,
            {"stop_when_forgotten": True, "max_steps": None, "epochs": 4},
            0,
        ),
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
    whole = small_models.open_clip_vit()
    parts = copy.deepcopy(whole)
    stopped = copy.deepcopy(whole)
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
    options = {"prefix_cache": 16.9 * pair / 1e9, "evaluation": "quick", "sets": {"other": OTHER}}
    weights_of(small_models.open_clip_vit(), **options, output_dir=str(tmp_path))
    assert lower_rows == {"image": 12 + 2 * 5, "text": 12 + 2 * 5}
    cached = [path for path in tmp_path.rglob("*.safetensors") if "-below-" in str(path)]
    assert 11.9 * pair < sum(path.stat().st_size for path in cached) < 16.9 * pair


def test_images_that_are_cached_are_not_opened(tmp_path, monkeypatch):
    opened = []
    decode = table.decode_image
    monkeypatch.setattr(
        table, "decode_image", lambda data, *, id: (opened.append(id), decode(data, id=id))[1]
    )
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
    def flat(weights):
        return torch.cat([each.flatten() for each in weights.values()])

    sizes, features = {}, {}
    for precision in ("fp32", "bf16"):
        folder = tmp_path / precision
        weights = weights_of(
            small_models.open_clip_vit(), precision=precision, output_dir=str(folder)
        )
        features[precision] = flat(weights)
        files = [path for path in folder.rglob("*.safetensors") if "-below-" in str(path)]
        sizes[precision] = sum(path.stat().st_size for path in files)
    assert 0.5 < sizes["bf16"] / sizes["fp32"] < 0.55
    start = flat(small_models.open_clip_vit().state_dict())
    whole = small_models.open_clip_vit()
    exact = flat(weights_of(whole, precision="bf16", prefix_cache=None))
    assert (features["bf16"] - exact).norm() < 0.3 * (exact - start).norm()


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
