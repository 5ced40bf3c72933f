"""Parameter groups, schedules, and the small parts that a run is steered by."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from torch import nn

from fasterase.engine.history import HistoryFile, StepRecord, read_history
from fasterase.engine.loop import NonFiniteGuard, non_finite_term
from fasterase.engine.optim import Trained, build_optimizer
from fasterase.engine.rates import Schedule
from fasterase.errors import NonFiniteError
from fasterase.objective import EraseLoss
from tests.tiny_model import TinyModel


@pytest.mark.parametrize(("name", "kind"), [("adamw", "AdamW"), ("adam", "Adam")])
def test_only_matrices_decay(name, kind):
    model = TinyModel()
    # transformers and open_clip keep it 0-d, others as a vector or a matrix.
    model.module.logit_scale = nn.Parameter(torch.ones(1, 1))
    trained = Trained.choose(model, "all", logit_scale=True)
    config = {"lr": 0.1, "betas": (0.9, 0.98), "weight_decay": 0.5}
    made = build_optimizer(model.module, trained, name=name, **config)
    assert type(made).__name__ == kind
    groups = {group["weight_decay"]: group["params"] for group in made.param_groups}
    assert [p.shape for p in groups[0.5]] == [(24, 48), (12, 24), (50, 16), (16, 16), (12, 16)]
    assert any(p is model.module.logit_scale for p in groups[0.0])
    assert len(groups[0.0]) == 7
    assert all(group["betas"] == (0.9, 0.98) for group in made.param_groups)
    grouped = [id(p) for group in made.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.module.parameters())


@pytest.mark.parametrize(
    ("tune", "touched"),
    [("all", (True, True)), ("image", (True, False)), ("text", (False, True))],
)
def test_what_is_trained_is_chosen_by_name(tune, touched):
    """Before anything wraps the model: sharded parameters keep names, not identities or shapes."""
    model = TinyModel()
    trained = Trained.choose(model, tune, logit_scale=False)
    assert (trained.image, trained.text) == touched
    assert not trained.scale
    copy = TinyModel(seed=3).module
    found = trained.parameters(copy)
    assert list(found) == [name for name, _ in model.trainable(tune)]
    assert all(found[name] is copy.get_parameter(name) for name in found)


def test_learning_rates():
    def rates(schedule, warmup_steps=4):
        is_cosine = schedule == "cosine"
        rate = Schedule(2.0, warmup_steps=warmup_steps, total_steps=12, is_cosine=is_cosine)
        return [rate.at(step) for step in range(12)]

    assert rates("constant") == [0.5, 1.0, 1.5, 2.0] + [2.0] * 8
    cosine = rates("cosine")
    assert cosine[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert cosine[8] == pytest.approx(1.0)
    assert all(a > b for a, b in itertools.pairwise(cosine[4:]))
    assert 0 < cosine[-1] < 0.1
    assert rates("constant", warmup_steps=0) == [2.0] * 12
    assert rates("cosine", warmup_steps=50) == [2.0 * (step + 1) / 50 for step in range(12)]


def test_the_first_broken_term_is_named():
    def named(**terms):
        return non_finite_term(dict.fromkeys(EraseLoss._fields, 1.0) | terms)

    assert named() is None
    assert named(total=math.nan, consistency=math.nan, anchor=math.inf) == "consistency"
    assert named(total=math.inf) == "total"


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 3), ("bf16", 3), ("fp16", 20)])
def test_a_few_broken_steps_in_a_row_stop(precision, limit):
    guard = NonFiniteGuard(precision)
    almost = ["retain"] * (limit - 1)
    for step, term in enumerate([*almost, None, *almost]):
        guard.record(term, step=step, ids=["a"])
    ids = [f"pair {i}" for i in range(30)]
    named = r"retain .* step 99.*pair 7, \.\.\. \(30 in all\)"
    with pytest.raises(NonFiniteError, match=named) as e:
        guard.record("retain", step=99, ids=ids)
    assert e.value.pair_ids == tuple(ids)


def test_history_keeps_the_first_steps_and_drops_a_torn_line(tmp_path):
    path = tmp_path / "history.jsonl"
    file = HistoryFile(path, keep_steps=0)
    for step in (1, 2, 3):
        file.append(StepRecord(step=step, total=0.1 * step))
    with path.open("a") as raw:
        raw.write('{"step": 4, "to')
    assert [record.step for record in read_history(path)] == [1, 2, 3]
    file = HistoryFile(path, keep_steps=2)
    file.append(StepRecord(step=3, total=7.0))
    assert [record.total for record in read_history(path)] == [0.1, 0.2, 7.0]
    with pytest.raises(AttributeError, match="loss"):
        _ = file.earlier[0].loss


def test_a_history_with_nan_is_json(tmp_path):
    path = tmp_path / "history.jsonl"
    HistoryFile(path, keep_steps=0).append(StepRecord(step=1, total=math.nan, anchor=math.inf))
    for _ in range(2):  # of a run and of one that resumes it
        assert json.loads(path.read_text(), parse_constant=pytest.fail)["total"] is None
        (record,) = HistoryFile(path, keep_steps=1).earlier
        assert math.isnan(record.total)
