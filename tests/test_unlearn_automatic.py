"""`unlearn` without a knob: models that a test has trained forget, and others are left alone."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

import fasterase
from fasterase.engine import baseline
from fasterase.engine import run as run_module
from fasterase.engine.baseline import NEAR_SHARE
from fasterase.engine.damage import Damage, DamageMeter
from fasterase.engine.findings import RESTING
from fasterase.engine.job import Draws
from fasterase.models.dual_encoder import Tokens
from tests import digits
from tests.marks import SHORT_RUN
from tests.tiny_concepts import (
    AUTOMATIC,
    CONCEPTS,
    FORGET,
    FORGOTTEN,
    KEPT,
    RETAIN,
    concept_pairs,
    knowing_model,
)
from tests.tiny_model import TinyModel, erase, same_weights, unchanged

run = partial(erase, forget=FORGET, retain=RETAIN, **AUTOMATIC)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "resnet", "siglip"])
def test_a_digit_is_erased_from_a_model_that_knows_it(kind):
    trained, others = digits.Digits.load()
    digit = digits.KINDS[kind].erased
    kept = [each for each in range(10) if each != digit]
    model = digits.pinned_model(kind)
    before = digits.accuracy(model, others)
    assert before.mean() > 0.9
    assert before[digit] > 0.85

    result = fasterase.unlearn(
        model,
        trained.pairs({digit}),
        trained.pairs(set(kept)),
        forget_sets={"unseen": others.pairs({digit})},
        tokenizer=digits.tokenizer(),
        **digits.OPTIONS,
    )
    after = digits.accuracy(model, others)
    assert result.verdict == "forgotten"
    assert set(result.traces) == {"forget", "unseen", "withheld"}
    residues = result.traces["forget"]
    low, high = RESTING
    for residue in (residues.image_to_text, residues.text_to_image):
        assert low <= residue <= high, "it rests within the verdict's thresholds, with a margin"
    assert after[digit] <= 0.2, "chance is 0.1"
    assert after[kept].mean() >= before[kept].mean() - 0.02
    assert 0 < len(result.history) < 400


@pytest.mark.slow
def test_a_run_goes_on_until_neither_tower_tells(monkeypatch):
    patient = run(knowing_model())
    monkeypatch.setattr(run_module, "PATIENCE_STEPS", 0)
    hasty = run(knowing_model())
    assert hasty.verdict == patient.verdict == "forgotten"
    assert len(hasty.history) < len(patient.history) < 400
    told = [
        max(hit for hit, _ in each.traces["forget"].towers.values()) for each in (patient, hasty)
    ]
    assert told[0] <= told[1]


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"tune": "text"}, "leaves the image tower as it is"),
        ({"tune": "image"}, "leaves the text tower as it is"),
        ({"max_steps": 1}, "Give more steps"),
    ],
)
def test_a_tower_that_still_finds_the_concept_is_no_forgetting(options, advice):
    with pytest.warns(UserWarning, match=advice):
        result = run(knowing_model(), **options)
    assert (result.verdict, result.forgotten) == ("remembered", False)
    known = {"text": ["image"], "image": ["text"]}.get(options.get("tune"), ["image", "text"])
    assert result.traces["forget"].telling_towers == known
    assert len(result.history) < 300, "it does not wait for what cannot change"


def test_captions_that_point_at_another_concept_are_no_forgetting():
    """Swapped token vectors: what the concept's captions say now is a code word's meaning."""
    model = knowing_model()
    table = model.module.get_parameter("embedding.weight")
    with torch.no_grad():
        first, other = ([2 * each + 1, 2 * each + 2] for each in (FORGOTTEN, KEPT[0]))
        table[first + other] = table[other + first]
    found = fasterase.evaluate(model, FORGET, RETAIN, original=knowing_model(), progress=False)
    assert found.verdict == "remembered"
    assert found.scores["forget"]["image_tower_hit@1"] == 1
    assert (
        found.original["forget"]["image_tower_hit@1"] == found.original["forget"]["contest_hit@1"]
    )


def test_a_concept_is_erased_and_the_others_stay():
    model, original = knowing_model(), knowing_model()
    unseen = concept_pairs([FORGOTTEN], 24, seed=3)
    result = run(model, forget_sets={"unseen": unseen})
    assert result.verdict == "forgotten"
    found = fasterase.evaluate(
        model,
        FORGET,
        RETAIN,
        sets={"new": concept_pairs(KEPT, 20, seed=5)},
        forget_sets={"unseen": unseen},
        original=original,
        progress=False,
    )
    assert found.verdicts == {"model": "forgotten", "original": "remembered"}
    assert found.residue == pytest.approx(result.residue, abs=0.02), "drawn by another seed"
    for name in ("retain", "new"):
        recall = "image_to_text_recall@10"
        assert found.scores[name][recall] > found.original[name][recall] - 0.03
        assert found.scores[name]["concept_hit@1"] < 0.02


@pytest.fixture
def draws(monkeypatch):
    """What the steps of each run may draw."""
    found = []
    monkeypatch.setattr(run_module, "Draws", lambda job: found.append(Draws(job)) or found[-1])
    return found


def test_pairs_nearest_to_the_concept_are_drawn_more_often(draws):
    model = knowing_model()
    with torch.no_grad():
        forget, retain = (
            model.encode_text(Tokens(torch.stack([ids for _, ids in pairs])))
            for pairs in (FORGET, RETAIN)
        )
    closeness = (retain @ forget.T).amax(1).numpy()
    run(model)
    pool, sampler = draws[0].pool.drawn, draws[0].sampler
    counts = np.bincount(np.concatenate([sampler.draw(step).retain for step in range(50)]))
    near = pool[np.argsort(closeness[pool])[-int(NEAR_SHARE * len(pool)) :]]
    others = np.setdiff1d(pool, near)
    assert len(near) == 13
    assert counts[near].min() > 2 * counts[others].max()
    assert counts[others].min() > 0


@SHORT_RUN
def test_a_resumed_run_draws_the_same_pairs_more_often(draws, tmp_path, monkeypatch):
    """Features that are encoded anew may round differently, and others be the nearest."""
    run(knowing_model(), output_dir=tmp_path, callback=lambda record: record.step == 2)
    monkeypatch.setattr(baseline, "find_neighbours", lambda *_, **__: np.arange(3))
    run(knowing_model(), output_dir=tmp_path, callback=lambda record: record.step == 4)
    first, resumed = (each.emphasised for each in draws)
    assert first == resumed
    assert len(first) == 13


@SHORT_RUN
@pytest.mark.parametrize("kind", ["numbers of steps", "link"])
def test_other_runs_draw_all_pairs_alike(kind, draws):
    options = {"erase": "link"} if kind == "link" else {"max_steps": 1, "lr": 1e-3}
    run(knowing_model(), **options, callback=lambda record: True)
    assert draws[0].emphasised == []


@pytest.mark.parametrize("output", [False, True])
def test_a_model_that_never_knew_is_left_as_it_is(tmp_path, output):
    model = TinyModel()
    steps = []
    options = {**AUTOMATIC, "evaluation": None, "output_dir": tmp_path if output else None}
    warns = pytest.warns(UserWarning, match=r"(?s)^verdict: never known\n.*; it was left as it is")
    with unchanged(model.module), warns as warned:
        result = fasterase.unlearn(model, FORGET, RETAIN, callback=steps.append, **options)
    assert warned[-1].filename == __file__
    assert result.verdict == "never known"
    assert steps == result.history == []


def test_the_original_is_given_back_if_everything_costs_too_much(monkeypatch):
    """However the run goes: what it may cost is kept to, and the warning says what it kept."""
    monkeypatch.setattr(DamageMeter, "measure", lambda self, features: Damage(0.2, 0.1))
    model = knowing_model()
    warns = pytest.warns(UserWarning, match="^verdict: remembered")
    with unchanged(model.module), warns as caught:
        result = run(model, max_damage=0.0)
    assert "costs kept pairs more than max_damage=0 of their recall@1" in str(caught[0].message)
    assert "max_damage=None allows any" in str(caught[0].message)
    assert 0 < len(result.history) < 100, "it does not try on after its fade"
    assert run(knowing_model(), max_damage=None).verdict == "forgotten"


@pytest.mark.filterwarnings("ignore:verdict")
def test_retain_captions_that_name_the_concept_are_listed():
    naming = [*RETAIN, *concept_pairs([FORGOTTEN], 3, seed=8)]
    with pytest.warns(UserWarning, match=r"^retain: \d+ of 143 captions seem to name") as caught:
        run(knowing_model(), retain=naming, max_steps=1)
    (found,) = [str(each.message) for each in caught if "seem to name" in str(each.message)]
    first, second = 2 * FORGOTTEN + 1, 2 * FORGOTTEN + 2
    assert f"'ids [{first}, {second}, " in found
    assert "Move such pairs to `forget`" in found


@pytest.mark.filterwarnings("ignore:retain. .* captions seem to name")
def test_the_worst_of_all_sets_to_forget_is_the_verdict():
    """A concept that is only measured, and kept, stays known, whatever happens to the other."""
    known = {"second": concept_pairs([CONCEPTS - 1], 24, seed=4)}
    with pytest.warns(UserWarning, match="^verdict: remembered\nforget: .*\nsecond: residue"):
        result = run(knowing_model(), forget_sets=known, lr=1e-3, max_steps=60)
    assert result.verdict == "remembered"
    assert result.traces["forget"].residue < 0.6
    assert result.traces["second"].is_remembered
    with pytest.warns(UserWarning, match="^verdict: never known"):
        never = run(TinyModel(), forget_sets=known)
    assert never.verdict == "never known"


@pytest.mark.slow
def test_a_given_lr_is_kept_until_the_run_fades():
    result = run(knowing_model(), lr=1e-3)
    lrs = [record.lr for record in result.history]
    assert result.verdict == "forgotten"
    start = lrs.index(next(lr for lr in lrs if lr != 1e-3))
    assert 0 < start < len(lrs)
    assert np.all(np.diff(lrs[start - 1 :]) < 0)


def test_without_unrelated_captions_numbers_are_asked_for():
    """Nothing tells then when the concept is forgotten."""
    caption = FORGET[0][1]
    sets = {"forget": [(image, caption) for image, _ in FORGET]}
    sets["retain"] = [(image, caption) for image, _ in RETAIN]
    model = knowing_model()
    with unchanged(model.module):
        for options, asked in (
            ({}, "Give numbers"),
            ({"lr": 1e-3, "max_steps": 2, "stop_when_forgotten": True}, "no stop_when_forgotten"),
        ):
            with pytest.raises(fasterase.InputError, match=rf"retain: every caption .* {asked}"):
                run(model, **sets, **options)
    before = model.weights()
    with pytest.warns(UserWarning, match="no verdict: there is no retain caption"):
        result = run(model, **sets, lr=1e-3, max_steps=2)
    assert (result.verdict, result.residue, result.forgotten) == (None, None, False)
    assert not same_weights(before, model.weights())
