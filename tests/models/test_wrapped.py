"""Wrapped, compiled, quantised and frozen models: taken, or refused with what to pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fasterase
from fasterase.errors import InputError
from fasterase.models import load_model
from tests import small_models
from tests import tiny_model as tiny
from tests.marks import SHORT_RUN
from tests.models.conftest import STEPS, erase, pairs

FORGET, RETAIN = tiny.pairs(4, seed=1), tiny.pairs(8, seed=2)

pytestmark = SHORT_RUN


def measurable(model):
    return "forget" in fasterase.evaluate(model, pairs()[:4], pairs()[4:]).to_dict()


def test_data_parallel_models_are_unwrapped(tmp_path):
    inside = small_models.hf_clip()
    before = inside.text_projection.weight.detach().clone()
    given = nn.DataParallel(inside)
    result = erase(given)
    assert result.model is given
    assert given.module is inside
    assert not torch.equal(inside.text_projection.weight, before)
    again: Any = load_model(result.save(tmp_path / "erased")).module
    assert torch.equal(again.text_projection.weight, inside.text_projection.weight)


def test_under_a_compiled_model_the_original_is_trained():
    inside = small_models.hf_clip()
    before = inside.text_projection.weight.detach().clone()
    given: Any = torch.compile(inside, backend="eager")
    with pytest.warns(UserWarning, match="model: it is compiled, .* without compilation"):
        result = erase(given)
    assert result.model is given
    assert not torch.equal(inside.text_projection.weight, before)
    assert given.text_projection.weight is inside.text_projection.weight


@pytest.mark.parametrize("build", [small_models.hf_clip, small_models.open_clip_vit])
def test_a_compiled_part_is_saved_under_its_plain_names(build, tmp_path):
    model = build()
    tower = "vision_model" if build is small_models.hf_clip else "visual"
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    setattr(model, tower, torch.compile(getattr(model, tower), backend="eager"))
    load_model(model).save(tmp_path / "saved")
    again = load_model(tmp_path / "saved").module.state_dict()
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[name], expected[name]) for name in expected)


# Of torch, about a future without its own quantisation.
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantised_models_are_measured_but_not_trained():
    named = r"model: \S+ of CLIP\w* is quantised.*before quantisation"
    model = torch.ao.quantization.quantize_dynamic(small_models.hf_clip(), {nn.Linear})
    with pytest.raises(InputError, match=named):
        erase(model)
    assert measurable(model)
    model = torch.ao.quantization.quantize_dynamic(small_models.open_clip_vit(), {nn.Linear})
    with pytest.raises(InputError, match=named):
        erase(model)


def test_a_quantised_checkpoint_keeps_its_dtypes(tmp_path, monkeypatch):
    import transformers

    model = load_model(small_models.hf_clip())
    model.module.half()
    model.save(tmp_path / "saved")
    # Set by the quantiser of a checkpoint; the library then raises on any call of float().
    monkeypatch.setattr(transformers.CLIPModel, "is_quantized", True, raising=False)
    again = load_model(tmp_path / "saved").module
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float16}


class EightBit(nn.Linear):
    """A layer of integer weights and a scale, as quantising libraries make them."""

    def __init__(self, full):
        super().__init__(full.in_features, full.out_features, bias=False)
        self.bias = full.bias
        largest = full.weight.detach().abs().max()
        self.register_buffer("step", largest / 127)
        whole = (full.weight.detach() / self.step).round().to(torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)

    def forward(self, values):
        return nn.functional.linear(values, self.weight.float() * self.step, self.bias)


def test_adapters_on_quantised_weights_do_train():
    import peft

    model: Any = small_models.hf_clip()
    layer = model.vision_model.encoder.layers[0].mlp
    layer.fc1 = EightBit(layer.fc1)
    with pytest.raises(InputError, match=r"fc1\.weight of CLIPModel is quantised"):
        erase(model)
    given = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), model)
    layer.register_buffer("scales", torch.ones(2).to(torch.float8_e4m3fn))
    before = layer.fc1.weight.clone()
    assert erase(given).model is model
    assert torch.equal(layer.fc1.weight, before)
    assert layer.scales.dtype == torch.float8_e4m3fn


def test_inference_mode_weights_say_how_to_load_them():
    with torch.inference_mode():
        model = small_models.hf_clip()
    with pytest.raises(InputError, match=r"model: .*torch\.inference_mode.*copy=True"):
        erase(model)
    assert measurable(model)
    result = erase(model, copy=True)
    assert not torch.equal(result.model.text_projection.weight, model.text_projection.weight)


# What the caller froze (`requires_grad=False`) is never trained, whatever `tune` says.
def changed_by(module, run):
    """Names of the weights and buffers that `run` changes; no requires_grad may."""
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    flags = [parameter.requires_grad for parameter in module.parameters()]
    run()
    assert [parameter.requires_grad for parameter in module.parameters()] == flags
    assert all(parameter.grad is None for parameter in module.parameters())
    after = module.state_dict()
    return {name for name in before if not torch.equal(before[name], after[name])}


def changed_by_erasing(model, **options):
    return changed_by(
        model.module,
        lambda: fasterase.unlearn(model, FORGET, RETAIN, **{**STEPS, **options}),
    )


@pytest.mark.parametrize("tune", ["all", "projections", "text"])
def test_single_tensors_stay(tune):
    model = tiny.TinyModel()
    model.module.text_projection.weight.requires_grad_(False)
    model.module.image[1].requires_grad_(False)
    changed = changed_by_erasing(model, tune=tune)
    assert "text_projection.bias" in changed
    assert not changed & {"text_projection.weight", "image.1.weight", "image.1.bias"}
    assert any(name.startswith("image") for name in changed) is (tune != "text")


def test_a_frozen_tower_stays_with_its_batch_norm_statistics():
    model = tiny.TinyModel(batch_norm=True)
    model.module.image.requires_grad_(False)
    changed = changed_by_erasing(model, train_mode=True)
    assert changed
    assert not any(name.startswith("image") for name in changed)
    assert any(
        name.startswith("image.2.running")
        for name in changed_by_erasing(tiny.TinyModel(batch_norm=True), train_mode=True)
    )


@pytest.mark.parametrize("build", [small_models.open_clip_vit, small_models.open_clip_resnet])
def test_a_locked_image_tower_of_open_clip(build, tmp_path):
    module = build()
    module.lock_image_tower(freeze_bn_stats=True)
    results = []
    changed = changed_by(module, lambda: results.append(erase(module)))
    assert changed
    assert not any(name.startswith("visual.") for name in changed)
    again = load_model(results[0].save(tmp_path / "erased"))
    pixels = pairs(module)[0][0][None]
    expected = results[0].encoder.encode_image(pixels)
    torch.testing.assert_close(again.encode_image(pixels), expected)


def test_nothing_left_to_train_says_how_to_mend_it():
    model = tiny.TinyModel()
    model.module.requires_grad_(False)
    with pytest.raises(InputError, match=r"tune: .*all are frozen.*requires_grad_\(True\)"):
        changed_by_erasing(model)
    model.module.text_projection.requires_grad_(True)
    with pytest.raises(InputError, match=r'tune: "image" names .* frozen .*another tune'):
        changed_by_erasing(model, tune="image")
    assert changed_by_erasing(model) == {"text_projection.weight", "text_projection.bias"}


def test_a_frozen_temperature_is_not_trained_behind_the_back():
    model = tiny.TinyModel()
    model.module.logit_scale.requires_grad_(False)
    with pytest.raises(InputError, match=r"train_logit_scale: logit_scale is frozen"):
        changed_by_erasing(model, train_logit_scale=True)
