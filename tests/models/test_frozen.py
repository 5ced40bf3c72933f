"""What the caller froze (`requires_grad=False`) is never trained, whatever `tune` says."""

from __future__ import annotations

import pytest
import torch

import fasterase
from fasterase.errors import InputError
from tests import small_models
from tests.marks import SHORT_RUN
from tests.tiny_model import TinyModel, pairs

FORGET, RETAIN = pairs(4, seed=1), pairs(8, seed=2)
STEPS = {
    "lr": 1e-2,
    "max_steps": 2,
    "batch_size": 8,
    "forget_batch_size": 4,
    "progress": False,
    "evaluation": None,
}

pytestmark = SHORT_RUN


def changed_by(module, run):
    """Names of the weights and buffers that `run` changes; no requires_grad may."""
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    flags = [parameter.requires_grad for parameter in module.parameters()]
    run()
    assert [parameter.requires_grad for parameter in module.parameters()] == flags
    assert all(parameter.grad is None for parameter in module.parameters())
    after = module.state_dict()
    return {name for name in before if not torch.equal(before[name], after[name])}


def erase(model, **options):
    return changed_by(
        model.module,
        lambda: fasterase.unlearn(model, FORGET, RETAIN, **{**STEPS, **options}),
    )


@pytest.mark.parametrize("tune", ["all", "projections", "text"])
def test_single_tensors_stay(tune):
    model = TinyModel()
    model.module.text_projection.weight.requires_grad_(False)
    model.module.image[1].requires_grad_(False)
    changed = erase(model, tune=tune)
    assert "text_projection.bias" in changed
    assert not changed & {"text_projection.weight", "image.1.weight", "image.1.bias"}
    assert any(name.startswith("image") for name in changed) is (tune != "text")


def test_a_frozen_tower_stays_with_its_batch_norm_statistics():
    model = TinyModel(batch_norm=True)
    model.module.image.requires_grad_(False)
    changed = erase(model, train_mode=True)
    assert changed
    assert not any(name.startswith("image") for name in changed)
    assert any(
        name.startswith("image.2.running")
        for name in erase(TinyModel(batch_norm=True), train_mode=True)
    )


def image_pairs(vocabulary):
    pixels, ids = small_models.random_pairs(vocabulary, count=12)
    return list(zip(pixels, ids, strict=True))


@pytest.mark.parametrize("build", [small_models.open_clip_vit, small_models.open_clip_resnet])
def test_a_locked_image_tower_of_open_clip(build, tmp_path):
    module = build()
    module.lock_image_tower(freeze_bn_stats=True)
    items = image_pairs(small_models.SIMPLE_VOCABULARY_SIZE)
    result = None

    def run():
        nonlocal result
        result = fasterase.unlearn(module, items[:4], items[4:], **STEPS)

    changed = changed_by(module, run)
    assert changed
    assert not any(name.startswith("visual.") for name in changed)
    assert result is not None
    again = fasterase.models.load_model(result.save(tmp_path / "erased"))
    torch.testing.assert_close(
        again.encode_image(items[0][0][None]), result.encoder.encode_image(items[0][0][None])
    )


def test_nothing_left_to_train_says_how_to_mend_it():
    model = TinyModel()
    model.module.requires_grad_(False)
    with pytest.raises(InputError, match=r"tune: .*all are frozen.*requires_grad_\(True\)"):
        erase(model)
    model.module.text_projection.requires_grad_(True)
    with pytest.raises(InputError, match=r'tune: "image" names .* frozen .*another tune'):
        erase(model, tune="image")
    assert erase(model) == {"text_projection.weight", "text_projection.bias"}


def test_a_frozen_temperature_is_not_trained_behind_the_back():
    model = TinyModel()
    model.module.logit_scale.requires_grad_(False)
    with pytest.raises(InputError, match=r"train_logit_scale: logit_scale is frozen"):
        erase(model, train_logit_scale=True)
