"""Wrapped, compiled, quantised and inference-mode models: taken, or refused with what to pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fasterase
from fasterase.errors import InputError
from fasterase.models import load_model
from tests import small_models
from tests.marks import SHORT_RUN
from tests.models.test_adapters import erase, pairs

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
        erase(model, small_models.SIMPLE_VOCABULARY_SIZE)


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


def test_an_unknown_wrapper_is_named():
    with pytest.raises(InputError, match=r"model: AveragedModel wraps a CLIPModel; pass the model"):
        load_model(torch.optim.swa_utils.AveragedModel(small_models.hf_clip()))
