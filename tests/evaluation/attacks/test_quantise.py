"""Rounded weights against loops, and against a model that was saved with them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import fasterase
from fasterase.evaluation.attacks.weights import linear_weights, round_to_nearest
from tests import small_models
from tests.evaluation.lookup_model import attack
from tests.tiny_concepts import FORGOTTEN, KEPT, concept_pairs, knowing_model
from tests.tiny_model import same_weights


@pytest.mark.parametrize("bits", [8, 4])
def test_every_weight_goes_to_the_nearest_of_few_values(bits: int) -> None:
    numbers = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 300, generator=numbers) * torch.tensor([[1e-3], [1], [50], [1], [0]])
    found = round_to_nearest(weight, bits)
    for row, result in zip(weight.double().numpy(), found.double().numpy(), strict=True):
        grid = np.linspace(-1, 1, 2**bits - 1) * np.abs(row).max()
        nearest = grid[np.abs(row[:, None] - grid[None]).argmin(1)]
        assert result == pytest.approx(nearest, rel=1e-5, abs=1e-6 * np.abs(row).max())
        assert len(np.unique(result)) <= 2**bits - 1


def test_figures_are_those_of_a_model_with_rounded_weights() -> None:
    model = knowing_model()
    forget, retain = (concept_pairs(those, 6, seed=5) for those in ((FORGOTTEN,), KEPT))
    before = model.weights()
    found = attack("quantise", model, forget, retain, original=model).attacks["quantise"]
    assert same_weights(model.weights(), before)
    for bits in (8, 4):
        other = copy.deepcopy(model)
        for name, weight in other.module.named_parameters():
            if weight.dim() == 2 and not name.startswith("embedding"):
                weight.data = round_to_nearest(weight.data, bits)
        expected = fasterase.evaluate(other, forget, retain, progress=False)
        assert found[f"{bits}_bits/verdict"].value == expected.verdict
        assert found[f"{bits}_bits/verdict"].original == expected.verdict
        for key in ("image_to_text_residue", "text_to_image_residue", "contest_hit@1"):
            figure = found[f"forget/{bits}_bits/{key}"]
            assert figure.value == figure.original == expected.to_dict()["forget"][key]
        alone = fasterase.evaluate(other, retain, retain, progress=False).to_dict()["retain"]
        recall = found[f"retain/{bits}_bits/recall@1"]
        assert recall.value == pytest.approx(alone["image_to_text_recall@1"])
    assert found["8_bits/verdict"].value == "remembered"
    coarse, fine = (found[f"retain/{bits}_bits/recall@1"].value for bits in (4, 8))
    assert coarse != fine


def test_attention_is_rounded_too() -> None:
    module = small_models.open_clip_vit()
    names = {id(weight): name for name, weight in module.named_parameters()}
    found = {names[id(weight)] for weight in linear_weights(module)}
    block = "visual.transformer.resblocks.0"
    assert {f"{block}.attn.in_proj_weight", f"{block}.attn.out_proj.weight"} <= found
    assert {f"{block}.mlp.c_fc.weight", f"{block}.mlp.c_proj.weight"} <= found
    assert not {name for name in found if "embedding" in name or name.endswith("bias")}
    apart = nn.MultiheadAttention(4, 1, kdim=2, vdim=3)
    shapes = [tuple(weight.shape) for weight in linear_weights(apart)]
    assert shapes == [(4, 4), (4, 2), (4, 3), (4, 4)]


def test_the_weights_come_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = knowing_model()
    before = model.weights()
    forget, retain = (concept_pairs(those, 3, seed=5) for those in ((FORGOTTEN,), KEPT))
    monkeypatch.setattr(
        "fasterase.evaluation.attacks.weights.round_to_nearest",
        lambda weight, bits: torch.full_like(weight, torch.nan) if len(weight) == 12 else 1 / 0,
    )
    with pytest.raises(ZeroDivisionError):
        attack("quantise", model, forget, retain)
    assert same_weights(model.weights(), before)
