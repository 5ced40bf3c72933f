"""Variants of the default recipe: each changes what it says, and is measured once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.evidence import trained, varied
from benchmarks.evidence.cells import METHODS, VARIANTS
from fasterase.demo import emoji
from fasterase.demo.sets import Drawings
from fasterase.engine import baseline


class Team(list):
    """Records of drawings."""

    def meta(self, row):
        return self[row]


@pytest.fixture
def runs(monkeypatch):
    """Collects (config, forget, retain) of every erasure; each adds 1 to the scale."""
    found = []

    def train(task, config, *, forget, retain, measured_at=()):
        found.append((config, forget, retain))
        with torch.no_grad():
            task.model.logit_scale.add_(1.0)
        return 7

    for module in (trained, varied):
        monkeypatch.setattr(module, "train", train)
    return found


@pytest.fixture
def measured(task):
    """A task, and the steps and scales at which its model was measured."""
    seen = []
    task = replace(task, measure=lambda steps: seen.append((steps, task.model.logit_scale.item())))
    return task, seen


def test_no_variant_takes_the_title_of_a_method():
    assert not VARIANTS.keys() & METHODS.keys()


def test_the_floor_lies_between_unrelated_and_matched_cosines(measured, runs):
    task, seen = measured
    floors = []
    for deviations in (0.0, 0.3):
        varied.erase_to_a_higher_floor(task, {"deviations": deviations})
        floors.append(runs[-1][0].floor)
    assert abs(floors[0]) < 0.1
    assert floors[0] + 0.02 < floors[1] < 0.3
    assert len(seen) == 2


def test_all_pairs_are_drawn_alike_in_the_variant_alone(measured, monkeypatch):
    shares = []
    monkeypatch.setattr(varied, "erase_by_default", lambda *_: shares.append(baseline.NEAR_SHARE))
    varied.erase_with_all_drawn_alike(measured[0], {})
    assert shares == [0.0]
    assert baseline.NEAR_SHARE > 0


@pytest.mark.parametrize("kind", ["retain", "forget"])
def test_pictures_get_the_nearest_caption_unless_it_is_to_be_forgotten(
    kind, measured, runs, monkeypatch
):
    task, _ = measured
    pictures = getattr(task.sets, kind).reworded(emoji.name_only)
    monkeypatch.setattr(Drawings, "of", lambda *_: pictures)
    varied.erase_beside_unlabelled_pictures(task, {})
    retain = runs[0][2]
    added = [retain[row]["text"] for row in range(60, len(retain))]
    # The model knows all of these drawings by name.
    assert added == ([task.sets.retain[i]["text"] for i in range(60)] if kind == "retain" else [])


def test_all_wordings_are_held(measured, runs):
    task, _ = measured
    varied.erase_beside_all_wordings(task, {})
    retain = runs[0][2]
    assert retain.names == task.sets.retain.names
    assert all(retain[i]["text"][0] == retain.names[i] for i in range(3))
    assert all(len(retain[i]["text"]) > 3 for i in range(3))


def test_captions_get_the_nearest_picture_unless_it_is_to_be_forgotten(measured, runs, monkeypatch):
    task, _ = measured
    kept, gone = task.sets.retain, task.sets.forget.reworded(emoji.name_only)
    records = [{"member": False, "concept": sets.names[i]} for sets in (kept, gone) for i in (0, 7)]
    records.append({"member": True, "concept": kept.names[3]})
    monkeypatch.setattr(varied, "open_teams", lambda teams: Team(records))
    monkeypatch.setattr(emoji, "naming_captions", emoji.name_only)
    varied.erase_beside_unlabelled_captions(task, {})
    retain = runs[0][2]
    added = [retain[row] for row in range(60, len(retain))]
    # The model knows all of these drawings by name.
    assert [pair["text"] for pair in added] == [kept.names[0], kept.names[7]]
    drawings = [
        kept[row]["image"].tobytes() for row in range(60) if kept.names[row] == added[0]["text"]
    ]
    assert added[0]["image"].tobytes() in drawings


def test_noise_is_added_in_training_alone(measured, monkeypatch):
    task, seen = measured
    layer = next(each for each in task.model.module.modules() if isinstance(each, torch.nn.Linear))
    rows, outputs = torch.randn(4, layer.in_features), []

    def train(task, config, *, forget, retain, measured_at=()):
        outputs.extend(layer(rows).detach() for _ in range(2))
        with torch.no_grad():
            outputs.append(layer(rows))
        return 5

    monkeypatch.setattr(varied, "train", train)
    varied.erase_under_noise(task, {"share": 0.05})
    with torch.no_grad():
        clean = layer(rows)
    noisy, again, measured_ = outputs
    assert torch.equal(measured_, clean)
    assert not torch.equal(noisy, again)
    found = (noisy - clean).std() / (0.05 * layer.weight.std() * rows.square().sum(1).mean().sqrt())
    assert 0.7 < found < 1.4
    assert seen[0][0] == 5


def test_weights_are_averaged(measured, runs):
    task, seen = measured
    before = task.model.logit_scale.item()
    varied.average_with_the_original(task, {"share": 0.8})
    assert seen == [(7, pytest.approx(before + 0.8))]


def test_what_came_back_is_erased_again(measured, runs):
    task, seen = measured
    before = task.model.logit_scale.item()
    varied.erase_relearn_erase(task, {"lr": 1e-5, "steps": 20})
    assert seen == [(7, pytest.approx(before + 3))]
    (first, _, _), (second, _, relearned), (third, _, _) = runs
    assert first == third
    assert (second.max_steps, second.forget_weight, second.retain_weight) == (20, 0.0, 1.0)
    assert relearned.names == task.sets.forget.names
