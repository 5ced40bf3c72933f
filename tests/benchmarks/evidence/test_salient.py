"""SLUG, SalUn and SSD: each changes what it says it changes, and in the right direction."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from benchmarks.evidence import salient
from benchmarks.evidence.task import Task
from fasterase.demo import emoji
from tests.benchmarks.conftest import Few

SALUN = {"lr": 1e-3, "share": 0.1, "retain_weight": 1.0}


@pytest.fixture
def small(task: Task, monkeypatch: pytest.MonkeyPatch) -> Task:
    """A task with still fewer drawings, and short searches."""
    for name, value in {"BATCH": 8, "ROUNDS": 1, "SEARCHED": 16, "SEARCH_STEPS": 6}.items():
        monkeypatch.setattr(salient, name, value)
    counts = {"forget": 8, "retain": 16, "holdout": 8}
    few = {name: Few(getattr(task.sets, name), count) for name, count in counts.items()}
    return replace(task, sets=replace(task.sets, **few))


def weights_of(task: Task) -> dict[str, torch.Tensor]:
    return {name: each.clone() for name, each in task.model.module.state_dict().items()}


def changed(task: Task, before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return parameter -> which of its weights have changed, where some have."""
    after = task.model.module.state_dict()
    found = {name: after[name] != value for name, value in before.items()}
    return {name: each for name, each in found.items() if each.any()}


@pytest.mark.parametrize("tower", ["image", "text"])
def test_slug_moves_one_layer_and_forgets_before_it_destroys(small: Task, tower: str) -> None:
    before, judge = weights_of(small), salient.naming(small)
    assert judge()[0] > 0.9
    salient.erase_one_layer(small, {"tower": tower})
    (layer,) = changed(small, before)
    assert layer.startswith("visual.") == (tower == "image")
    assert "bias" not in layer
    assert "embedding" not in layer
    forgotten, kept = judge()
    assert forgotten == 0
    assert kept > 0.4


def test_the_front_holds_the_layers_that_no_other_beats(small: Task) -> None:
    numbers = torch.Generator().manual_seed(0)

    def draw() -> salient.Weights:
        named = small.model.module.named_parameters()
        return {name: torch.randn(each.shape, generator=numbers) for name, each in named}

    uphill, kept = draw(), draw()
    front = salient.pareto_front(small.model, uphill, kept, "text")
    scores = {}
    for name, weight in small.model.module.named_parameters():
        if not name.startswith("visual.") and name.endswith(("weight", "projection")):
            pair = (normalize(each[name].flatten(), dim=0) for each in (uphill, kept))
            alignment = abs(float(torch.stack([*pair]).prod(0).sum()))
            scores[name] = float(uphill[name].norm() / weight.detach().norm()), alignment
    scores.pop("token_embedding.weight")
    beaten = {
        one
        for one, other in product(scores, scores)
        if scores[other][0] > scores[one][0] and scores[other][1] < scores[one][1]
    }
    assert 0 < len(front) < len(scores)
    assert set(front) == scores.keys() - beaten


def test_salun_trains_the_salient_weights_alone(small: Task) -> None:
    before, original = weights_of(small), copy.deepcopy(small.model)
    forget, _ = salient.trained_pairs(small.sets, "fasterase")
    gradient = salient.gradients(small, forget, salient.clip_loss)
    masks = salient.salient(gradient, 0.1)
    share = sum(each.sum() for each in masks.values()) / sum(map(torch.numel, masks.values()))
    assert share == pytest.approx(0.1, abs=1e-3)
    measured = []
    small = replace(small, measure=lambda steps: measured.append((steps, weights_of(small))))
    salient.relabel_salient(small, {**SALUN, "steps": [1, 3]})
    assert [steps for steps, _ in measured] == [1, 3]
    for name, those in changed(small, before).items():
        assert not (those & (masks[name] == 0)).any()
    distance = [mean_distance(model, small) for model in (original, small.model)]
    assert distance[1] > distance[0] + 0.05


def test_relabelled_pictures_leave_their_own_captions(small: Task) -> None:
    """By hand; equal answers for equal seeds, others for others."""
    sets = salient.trained_pairs(small.sets, "fasterase")
    wrong, right = (next(salient.batches(small, each, rounds=1, size=8)) for each in sets)
    model = small.model
    text = torch.cat([model.encode_text(each.tokens) for each in (right, wrong)])
    logits = model.scale() * model.encode_image(wrong.pixels) @ text.T
    chosen = np.random.default_rng([0, 1]).integers(len(right.pixels), size=8)
    expected = -logits.log_softmax(1)[range(8), chosen].mean()
    found = salient.relabelled_loss(model, wrong, right, seed=[0, 1])
    torch.testing.assert_close(found, expected)
    assert salient.relabelled_loss(model, wrong, right, seed=[0, 2]) != found


def mean_distance(model, task: Task) -> float:
    """Of the names of the forget drawings."""
    named = task.sets.forget.reworded(emoji.name_only)
    with torch.no_grad():
        (batch,) = salient.batches(replace(task, model=model), named, rounds=1, size=8)
        return float(salient.mean_distance(model, batch))


def test_ssd_dampens_what_the_forget_pairs_need_most(small: Task) -> None:
    forget, retain = salient.trained_pairs(small.sets, "fasterase")
    both = salient.ConcatDataset([forget, retain])
    of_forget = salient.gradients(small, forget, salient.clip_loss, power=2)
    of_all = salient.gradients(small, both, salient.clip_loss, power=2)
    before, distance = weights_of(small), mean_distance(small.model, small)
    salient.dampen(small, {"selection": 2.0, "dampening": 1.0})
    assert mean_distance(small.model, small) > distance + 0.1
    for name, weight in small.model.module.named_parameters():
        ratio = of_all[name] / of_forget[name]
        expected = torch.where(ratio < 1 / 2.0, before[name] * ratio, before[name])
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-4, atol=1e-7)


def test_importance_is_the_mean_squared_gradient_of_batches(small: Task) -> None:
    """By hand, over the batches that are drawn; every drawing comes once a round, reworded."""
    forget, _ = salient.trained_pairs(small.sets, "fasterase")
    drawn = [*salient.batches(small, forget, rounds=2, size=8)]
    assert [len(batch.pixels) for batch in drawn] == [8, 8]
    assert not torch.equal(drawn[0].labels.sort().values, drawn[1].labels.sort().values)
    more = salient.ConcatDataset([forget, forget])
    (both,) = salient.batches(small, more, rounds=1, size=16)
    assert set(drawn[0].labels.tolist()) <= set(both.labels.tolist()), "the same wordings"
    scale = small.model.module.logit_scale
    slopes = [torch.autograd.grad(salient.clip_loss(small.model, each), scale)[0] for each in drawn]
    found = salient.gradients(small, forget, salient.clip_loss, rounds=2, power=2)
    assert found["logit_scale"] == pytest.approx(float(torch.stack(slopes).square().mean()))
