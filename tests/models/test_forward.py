"""`TowerForward`: the same numbers as the model, gradients only where asked."""

from __future__ import annotations

import copy

import pytest
import torch

from fasterase.models.forward import TowerForward, autocast, resolve_precision
from tests.models.conftest import batch_for, build_model

CPU = torch.device("cpu")


def test_features_and_scale_equal_the_model_s_and_absent_inputs_give_none(model):
    pixels, tokens = batch_for(model)
    expected = model.encode_image(pixels), model.encode_text(tokens), model.scale()
    forward = TowerForward(model, precision="fp32")
    assert all(map(torch.equal, forward(pixels, tokens), expected))
    assert forward(pixels).text is None
    assert torch.equal(forward(pixels).image, expected[0])
    assert forward(tokens=tokens).image is None
    assert torch.equal(forward(tokens=tokens).text, expected[1])
    assert forward()[:2] == (None, None)


@pytest.mark.parametrize("image_trained", [True, False])
@pytest.mark.parametrize("text_trained", [True, False])
def test_only_trained_towers_have_a_graph(image_trained, text_trained):
    model = build_model("hf_clip")
    forward = TowerForward(
        model, precision="fp32", image_trained=image_trained, text_trained=text_trained
    )
    image, text, scale = forward(*batch_for(model))
    assert image.requires_grad is image_trained
    assert text.requires_grad is text_trained
    assert scale.requires_grad
    with torch.no_grad():
        assert not any(part.requires_grad for part in forward(*batch_for(model)))


def test_bf16_runs_in_bf16_and_returns_fp32(model):
    pixels, tokens = batch_for(model)
    image, text, scale = TowerForward(model, precision="bf16")(pixels, tokens)
    for features, exact in ((image, model.encode_image(pixels)), (text, model.encode_text(tokens))):
        assert features.dtype == torch.float32
        assert not torch.equal(features, exact)
        assert (features * exact).sum(-1).min() > 0.99
    assert torch.equal(scale, model.scale())
    image.sum().backward()
    assert all(p.dtype == torch.float32 for p in model.module.parameters())


def test_half_and_double_weights_return_fp32():
    model = build_model("open_clip_vit")
    batch = batch_for(model)
    for dtype in (torch.bfloat16, torch.float64):
        model.module.to(dtype)
        image, text, _ = TowerForward(model, precision="fp32")(*batch)
        assert image.dtype == torch.float32
        assert text.dtype == torch.float32


def test_a_copy_runs_its_own_weights():
    model = build_model("open_clip_vit")
    pixels, _ = batch_for(model)
    forward = TowerForward(model, precision="fp32")
    assert forward.module is model.module
    before = forward(pixels).image
    other = copy.deepcopy(forward)
    with torch.no_grad():
        for parameter in other.module.parameters():
            parameter.mul_(2)
    assert torch.equal(forward(pixels).image, before)
    assert not torch.allclose(other(pixels).image, before)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_autocast_sets_the_dtype_of_products(precision, dtype):
    assert resolve_precision("auto", CPU) == "fp32"
    assert resolve_precision(precision, CPU) == precision
    with autocast(precision, CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
