"""Several concepts as a mapping, and the pairs that a run leaves out to judge itself by."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from fasterase.engine import job as job_module
from fasterase.engine import run as run_module
from fasterase.engine.findings import Check
from fasterase.engine.history import StepRecord
from fasterase.engine.job import Draws, choose_withheld
from fasterase.engine.loop import Trainer
from fasterase.engine.pacing import AutomaticPacing
from fasterase.engine.rates import Rate
from fasterase.errors import InputError
from fasterase.evaluation.verdict import Trace
from fasterase.objective import ForgetGroup, Objective, erase_loss, weighted_erase_loss
from fasterase.pairs.open import open_pairs
from fasterase.pairs.sampler import Sampler
from tests.tiny_concepts import AUTOMATIC, KEPT, RETAIN, concept_pairs, knowing_model
from tests.tiny_model import erase, same_weights

STEP = Trainer.train_step
FEW, MANY = concept_pairs([0], 12, seed=1), concept_pairs([1], 24, seed=1)
OTHERS = concept_pairs(KEPT[1:], 20, seed=2)
# As `find` gives it.
NONE_FOUND = open_pairs(FEW, name="forget").select([])
NONE_FOUND.found = {"counts": {}}
run = partial(erase, forget={"few": FEW, "many": MANY}, retain=OTHERS, **AUTOMATIC)


@pytest.fixture(scope="module")
def erased():
    """The result of a run, what its steps may draw, and the concepts' weights at each of them."""
    draws, weights, step = [], [], Trainer.train_step

    def see(self, *args, **options):
        weights.append(dict(options["weights"]))
        return step(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", see)
        patch.setattr(run_module, "Draws", lambda job: draws.append(Draws(job)) or draws[-1])
        result = run(knowing_model(), evaluation="quick")
    return result, draws[0], weights


@pytest.mark.slow
def test_every_concept_of_a_mapping_is_forgotten_and_has_a_row(erased):
    result = erased[0]
    assert result.verdict == "forgotten"
    assert result.concept == "few, many"
    evaluation = result.evaluation
    assert evaluation.set_verdicts["original"]["few"] == "remembered"
    for name, count in (("few", 12), ("many", 24), ("forget", 36)):
        assert evaluation.pairs[name] == count
        assert evaluation.set_verdicts["model"][name] == "forgotten"
        assert result.traces[name].residue < 0.75


@pytest.mark.slow
def test_a_slow_concept_weighs_more(erased):
    weights = erased[2]
    assert weights[0] == {}, "equal until the first check"
    assert weights[-1]["few"] == weights[-1]["many"] == 1, "both are forgotten"

    def check():
        few = Trace(0.55, 0.5, 0, 0, 0.1, 0.05, 20)
        return Check({"few": few, "many": replace(few, text_to_image=0.9)}, 0.0, False)

    pacing = AutomaticPacing(
        Rate(1e-3),
        check=check,
        weights=dict,
        load=lambda weights: None,
        original=(check(), {}),
        start=(None, {}),
        towers={},
        max_steps=400,
    )
    for step in range(1, 21):
        pacing.after_step(StepRecord(step=step, forget=0.8 / step, anchor=0.0, applied=True))
    assert pacing.weights["few"] == 1 < 2 < pacing.weights["many"] <= 3
    assert pacing.state()["progress"]["weights"] == pacing.weights


@pytest.mark.slow
def test_what_is_withheld_is_not_trained_on_and_is_judged(erased):
    result, draws, _ = erased
    assert len(draws.withheld) == 4
    assert (draws.withheld >= 12).all(), "of a small concept all are needed"
    drawn = [draws.sampler.draw(step).forget for step in range(20)]
    assert not np.isin(np.concatenate(drawn), draws.withheld).any()
    assert len(np.unique(np.concatenate(drawn))) == 36 - 4
    assert result.traces["withheld"].pairs == 4
    assert result.withheld_until is None, "they are forgotten with the others"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:verdict")
def test_what_is_withheld_is_drawn_in_the_end_if_it_alone_is_known(tmp_path, monkeypatch):
    """Nothing of what the run is trained on tells that the withheld pairs go too."""
    withheld = np.arange(24, 30)
    monkeypatch.setattr(job_module, "choose_withheld", lambda forget, seed: withheld)
    drawn = []

    def see(self, batch, *args, **options):
        rows = batch.forget_rows
        drawn.append((batch.step, len(np.intersect1d(rows, withheld))))
        return STEP(self, batch, *args, **options)

    monkeypatch.setattr(Trainer, "train_step", see)
    forget = [*MANY, *concept_pairs([2], 6, seed=3)]
    kept = concept_pairs(KEPT[2:], 20, seed=2)
    steps = {"output_dir": tmp_path, "save_every": 1, "callback": lambda record: record.step == 30}
    options = {"forget": forget, "retain": kept, "evaluation": None}
    run(knowing_model(), **options, **steps)
    result = run(knowing_model(), **options, output_dir=tmp_path, save_every=1)
    until = result.withheld_until
    assert until is not None
    assert {step < until for step, count in drawn if count} == {False}
    assert sum(count for _, count in drawn) >= 6
    assert result.traces["withheld"].hit < 0.5
    assert len(result.history) < 400
    whole = run(knowing_model(), **options)
    assert whole.withheld_until == until
    assert same_weights(result.model.state_dict(), whole.model.state_dict())


@pytest.mark.filterwarnings("ignore:verdict")
def test_a_run_of_several_concepts_continues_with_the_same_bits(tmp_path):
    whole = run(knowing_model(), max_steps=14)
    steps = {"output_dir": tmp_path, "save_every": 1}
    run(knowing_model(), max_steps=14, callback=lambda record: record.step == 6, **steps)
    resumed = run(knowing_model(), max_steps=14, **steps)
    assert len(resumed.history) == len(whole.history) == 14
    assert same_weights(resumed.model.state_dict(), whole.model.state_dict())


@pytest.mark.filterwarnings("ignore:verdict")
@pytest.mark.parametrize(("micro_batch_size", "most"), [(None, 18), (5, 5)])
def test_batches_grow_with_the_root_of_the_concepts(monkeypatch, micro_batch_size, most):
    """Twelve pairs to keep and six to forget, times 1.41; so many at a time as for one concept."""
    seen = []

    def see(self, batch, *args, **options):
        rows = batch.forget_rows
        seen.append([(rows < 12).sum(), (rows >= 12).sum(), len(batch.retain_rows)])
        assert max(len(part.ids) for part in batch.micro_batches) == most
        return STEP(self, batch, *args, **options)

    monkeypatch.setattr(Trainer, "train_step", see)
    sizes = {"batch_size": 12, "forget_batch_size": 6, "micro_batch_size": micro_batch_size}
    result = run(knowing_model(), lr=1e-4, max_steps=1, epochs=1, **sizes)
    assert seen == [[4, 4, 17]]
    assert (result.config.batch_size, result.config.forget_batch_size) == (12, 6)


def test_concepts_have_equal_parts_of_a_batch_whatever_their_size():
    groups = [np.arange(12), np.arange(12, 60)]
    sampler = Sampler(60, 0, forget_batch_size=8, batch_size=1, seed=0, forget_groups=groups)
    assert sampler.steps_per_epoch == 12, "a pass over the larger one"
    drawn = [sampler.draw(step).forget for step in range(12)]
    for rows in drawn:
        assert [(rows < 12).sum(), (rows >= 12).sum()] == [4, 4]
    counts = np.bincount(np.concatenate(drawn), minlength=60)
    assert set(counts[:12]) == {4}
    assert set(counts[12:]) == {1}


def test_the_forget_loss_weighs_concepts_each_above_its_own_floor():
    numbers = torch.Generator().manual_seed(0)
    features = [
        torch.nn.functional.normalize(torch.randn(9, 6, generator=numbers), dim=1) for _ in range(4)
    ]
    scale, objective = torch.tensor(10.0), Objective(anchor_weight=1.0, cross_weight=1.0)
    rows = [torch.tensor([0, 2]), torch.tensor([1, 3, 4])]
    groups = [ForgetGroup(rows[0], 0.1, 0.25), ForgetGroup(rows[1], -0.2, 0.75, 0.2)]
    kept = slice(5, 9)

    def alone(rows, floor, margin):
        chosen = [torch.cat([each[rows], each[kept]]) for each in features]
        options = {**objective._asdict(), "floor": floor, "floor_margin": margin}
        found = erase_loss(*chosen[:2], scale, *chosen[2:], scale, n_forget=len(rows), **options)
        return found.forget

    found = weighted_erase_loss(
        *features[:2], scale, *features[2:], scale, objective, n_forget=5, groups=groups
    )
    expected = 0.25 * alone(rows[0], 0.1, 0.0) + 0.75 * alone(rows[1], -0.2, 0.2)
    assert found.forget == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("forget", "options", "says"),
    [
        ({"a": FEW, "": MANY}, {}, "forget: '' is not a name"),
        ({"retain": FEW}, {}, "forget: 'retain' is an argument of its own"),
        ({"a": FEW}, {"forget_sets": {"withheld": FEW}}, "'withheld' is the name of the pairs to"),
        ({"a": FEW}, {"sets": {"erased before: b": FEW}}, "how sets are named that an earlier run"),
        ({"a": FEW}, {"sets": {"a": MANY}}, "sets: 'a' is also a set of another argument"),
        ({"a": FEW}, {"negatives": "joint"}, "several concepts .a. need forget_loss='similarity'"),
        ({"empty one": []}, {}, "`empty one`"),
        ({"a": NONE_FOUND}, {}, "`forget` is empty"),
    ],
)
def test_a_mapping_that_cannot_be_used_is_refused(forget, options, says):
    with pytest.raises(InputError, match=says):
        erase(forget=forget, retain=RETAIN, **options)


@pytest.mark.filterwarnings("ignore:verdict")
def test_one_batch_as_a_dict_is_no_mapping_of_concepts():
    pixels, ids = map(torch.stack, zip(*FEW, strict=True))
    result = erase(forget={"pixel_values": pixels, "input_ids": ids})
    assert set(result.traces) == {"forget"}, "nor is anything withheld, with numbers"


def test_a_fifth_of_the_pairs_is_withheld_by_whole_captions():
    image = torch.zeros(3, 8, 8)
    pairs = [(image, f"caption {n // 2}") for n in range(40)]
    rows = choose_withheld(open_pairs(pairs, name="forget"), seed=0)
    assert len(rows) == 8
    assert set(rows[::2] + 1) == set(rows[1::2]), "both pairs of a caption"
    assert rows.tolist() != choose_withheld(open_pairs(pairs, name="forget"), seed=1).tolist()
    one = choose_withheld(open_pairs([(image, "a")] * 25, name="forget"), seed=0)
    assert len(set(one)) == 5, "of a single caption, pairs"
    assert not len(choose_withheld(open_pairs(pairs[:19], name="forget"), seed=0))
