"""Relearning against a loop in plain torch, and of models that hide a concept or never saw it."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import fasterase
from fasterase.encode import PairEncoder
from fasterase.evaluation.attacks import weights
from fasterase.models.dual_encoder import Tokens
from fasterase.pairs.open import open_pairs
from fasterase.pairs.skips import SkipLedger
from fasterase.report.evaluation import Evaluation
from fasterase.seeds import Stream, generator
from tests.evaluation.lookup_model import attack
from tests.tiny_concepts import FORGOTTEN, KEPT, concept_pairs, knowing_model
from tests.tiny_model import VOCABULARY, TinyModel, same_weights

FORGET = concept_pairs((FORGOTTEN,), 20, seed=5)
RETAIN = concept_pairs(KEPT, 20, seed=6)
# Those that copies learn from, in order.
LEARNED = generator(0, Stream.RELEARN, 0).permutation(20)[:10]
POOL = generator(0, Stream.RELEARN, 1).permutation(140)[:30]
REST = [pair for i, pair in enumerate(RETAIN) if i not in POOL]
WORDS = [f"q{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(VOCABULARY)]


@pytest.fixture(autouse=True)
def fast_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RATES": (1e-4, 3e-3), "SHOTS": (1, 4), "POOL": 30}.items():
        monkeypatch.setattr(weights, name, value)


def in_words(pairs: list) -> list:
    """The pairs with a word for each token."""
    return [(pixels, " ".join(WORDS[i] for i in ids)) for pixels, ids in pairs]


def read_words(texts: Sequence[str]) -> Tokens:
    """Token ids of `WORDS`; 0, which no caption has, for all others."""
    numbers = {word: i for i, word in enumerate(WORDS)}
    return Tokens(torch.tensor([[numbers.get(word, 0) for word in t.split()] for t in texts]))


def speaking(model: TinyModel) -> TinyModel:
    model = copy.deepcopy(model)
    model.text_tokenizer = read_words  # type: ignore[assignment]
    return model


def by_hand(model: TinyModel, forget: list, retain: list, rate: float) -> TinyModel:
    student = copy.deepcopy(model)
    optimizer = torch.optim.Adam(student.module.parameters(), lr=rate, betas=(0.9, 0.98))
    pixels, ids = map(torch.stack, zip(*forget, *retain, strict=True))
    n = len(forget)
    for _ in range(20):
        image, text = student.encode_image(pixels), student.encode_text(Tokens(ids))
        logits, own = student.scale() * image @ text.T, torch.arange(len(ids))
        each = F.cross_entropy(logits, own, reduction="none")
        each = (each + F.cross_entropy(logits.T, own, reduction="none")) / 2
        loss = (each[:n].mean() + each[n:].mean()) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student


def scores(model: TinyModel, forget: list) -> dict[str, dict[str, float]]:
    """Of pairs to forget, among those to keep that no copy learns from."""
    return fasterase.evaluate(model, forget, REST, max_pairs=None, progress=False).to_dict()


def test_figures_are_those_of_a_model_that_was_fine_tuned_by_hand() -> None:
    model = hiding_model()
    before = model.weights()
    found = attack("relearn", model, FORGET, RETAIN, forget_sets={"unseen": FORGET[:5]})
    figures = found.attacks["relearn"]
    assert same_weights(model.weights(), before)
    assert all(weight.requires_grad for weight in model.module.parameters())

    left = [FORGET[i] for i in range(20) if i not in LEARNED[:4]]

    def relearned(k: int, rate: float) -> TinyModel:
        return by_hand(model, [FORGET[i] for i in LEARNED[:k]], [RETAIN[i] for i in POOL], rate)

    tried = {rate: scores(relearned(4, rate), left)["forget"] for rate in (1e-4, 3e-3)}
    best = max(tried, key=lambda rate: (tried[rate]["contest_hit@1"], residue(tried[rate])))
    curve = []
    for k in (0, 1, 4):
        student = relearned(k, best) if k else model
        forget = scores(student, left)["forget"]
        hit, trace = (figures[f"forget/{k}_shots/{x}"] for x in ("contest_hit@1", "residue"))
        assert hit.value == pytest.approx(forget["contest_hit@1"], abs=1e-4)
        assert trace.value == pytest.approx(residue(forget), abs=1e-4)
        no_rival = [(left[0][0], REST[0][1])]
        recall = scores(student, no_rival)["retain"]["image_to_text_recall@1"]
        assert figures[f"retain/{k}_shots/recall@1"].value == pytest.approx(recall)
        curve.append(forget["contest_hit@1"])
    assert curve[0] < curve[2]
    assert figures["forget/area/contest_hit@1"].value == pytest.approx(np.mean(curve[1:]))
    # Without those that the copies learn from.
    unseen = [FORGET[i] for i in range(5) if i not in LEARNED[:4]]
    assert len(unseen) < 5
    expected = residue(scores(relearned(4, best), unseen)["forget"])
    assert figures["unseen/4_shots/residue"].value == pytest.approx(expected, abs=1e-4)
    assert figures["forget/pairs_to_half"].title == "pairs until hit@1 is 50 %"
    assert not any("made_up" in key for key in figures), "captions are no words"


def test_the_control_teaches_the_same_pictures_other_words() -> None:
    """By hand: the two words that only the concept has are read as a third one throughout."""
    model = hiding_model()
    worded = [speaking(each) for each in (model, knowing_model())]
    pairs = in_words(FORGET), in_words(RETAIN)
    unseen = {"forget_sets": {"unseen": in_words(FORGET[:5])}}
    found = attack("relearn", worded[0], *pairs, original=worded[1], **unseen)
    figures = found.attacks["relearn"]
    nonsense = [(pixels, ids.where(ids > 2, 0)) for pixels, ids in FORGET]
    left = [nonsense[i] for i in range(20) if i not in LEARNED[:4]]
    tried = []
    for rate in (1e-4, 3e-3):
        lesson = [nonsense[i] for i in LEARNED[:4]], [RETAIN[i] for i in POOL]
        student = by_hand(model, *lesson, rate)
        found_by_hand = scores(student, left)["forget"]
        tried.append((found_by_hand["contest_hit@1"], residue(found_by_hand)))
    keys = [f"forget/made_up/4_shots/{x}" for x in ("contest_hit@1", "residue")]
    assert [figures[key].value for key in keys] == pytest.approx(max(tried), abs=1e-4)
    assert figures["forget/made_up/0_shots/residue"].original < 0.7
    assert figures["forget/0_shots/residue"].original > 0.95
    assert figures["forget/pairs_to_half"].original == 0
    assert figures["forget/made_up/pairs_to_half"].value > 0
    assert "unseen/made_up/area/residue" in figures
    assert "forget, after relearning made-up words" in found.table()


def test_pairs_needed_are_found_on_the_logarithm() -> None:
    shots = [0, 1, 4, 16]
    assert weights.pairs_needed(shots, [0.1, 0.2, 0.4, 0.6], 0.5) == pytest.approx(8)
    assert weights.pairs_needed(shots, [0.1, 0.7, 0.4, 0.6], 0.5) == 1
    assert weights.pairs_needed(shots, [0.5, 0.7, 0.4, 0.6], 0.5) == 0
    assert weights.pairs_needed(shots, [0.1, 0.2, 0.3, 0.4], 0.5) == "more than 16"


def test_the_goal_is_half_of_what_the_original_has() -> None:
    partly = by_hand(knowing_model(KEPT), FORGET[:2], RETAIN[:30], 1e-3)
    found = attack("relearn", hiding_model(), FORGET, RETAIN, original=partly).attacks["relearn"]
    before = found["forget/0_shots/contest_hit@1"].original
    assert 0.1 < before < 1
    assert found["forget/pairs_to_half"].title == f"pairs until hit@1 is {50 * before:.0f} %"


def residue(scores: dict[str, float]) -> float:
    return (scores["image_to_text_residue"] + scores["text_to_image_residue"]) / 2


@pytest.mark.slow
def test_what_was_hidden_comes_back_sooner_than_what_was_never_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "RATES", (1e-3,))
    others = {"original": knowing_model(), "references": {"never saw it": knowing_model(KEPT)}}
    for seed in range(3):
        found = attack("relearn", hiding_model(), FORGET, RETAIN, **others, seed=seed)
        figures = found.attacks["relearn"]
        before, after = (figures[f"forget/{k}_shots/residue"] for k in (0, 1))
        of_never = after.references["never saw it"] - before.references["never saw it"]
        assert after.value - before.value > of_never + 0.1
        area = figures["forget/area/contest_hit@1"]
        assert area.original > 0.8
        assert figures["forget/0_shots/contest_hit@1"].value == 0
        assert area.low <= area.value <= area.high
    assert Evaluation.from_json(found.to_json(tmp_path / "found.json")) == found
    (path,) = found.plot(tmp_path)
    assert path == tmp_path / "relearn.png"
    drawn = np.array(Image.open(path).convert("RGB")).reshape(-1, 3)
    for colour in ((200, 16, 46), (32, 32, 32), (31, 111, 235)):  # one for each model
        assert (np.abs(drawn.astype(int) - colour).sum(1) < 12).sum() > 100


def test_area_is_over_the_logarithm_of_the_number_of_pairs() -> None:
    values = np.array([0.0, 0.2, 0.6, 1.0])
    expected = np.trapezoid(values, np.log2([1, 2, 4, 16])) / 4
    assert np.average(values, weights=weights.area_weights([1, 2, 4, 16])) == pytest.approx(
        expected
    )
    assert weights.area_weights([1]).tolist() == [1]


def test_no_picture_is_a_lesson_and_measured_also_where_it_is_to_be_kept_too() -> None:
    pairs = [*FORGET[:2], *RETAIN[:20]]
    encoder = PairEncoder(TinyModel(), precision="fp32", ledger=SkipLedger(22, max_skipped=0))
    judged = {
        name: encoder.pairs(open_pairs(those, name=name), np.arange(len(those)), description=name)
        for name, those in (("forget", FORGET[:2]), ("retain", pairs), ("again", FORGET[:1]))
    }
    for seed in range(10):
        lessons, left = weights._divide(judged, seed=seed)
        (learnt,) = lessons["forget"]
        assert left["forget"].tolist() == [1 - learnt]
        assert len(lessons["retain"]) == 11
        assert 1 - learnt not in lessons["retain"], "it is measured"
        assert not set(left["retain"]) & {learnt, *lessons["retain"]}
        assert ("again" in left) == (learnt != 0)
    judged["retain"] = encoder.pairs(
        open_pairs(FORGET[:2], name="retain"), np.arange(2), description="retain"
    )
    lessons, left = weights._divide(judged, seed=0)
    assert lessons["forget"].tolist() == lessons["retain"].tolist(), "all are to be kept too"
    assert left["forget"].tolist() == left["retain"].tolist() == [1 - lessons["forget"][0]]


@functools.cache
def hiding_model() -> TinyModel:
    """The knowing model after an erasure that stops as soon as the concept is hidden."""
    model = knowing_model()
    options = {"lr": 1e-3, "max_steps": 40, "forget_words": False, "cross_weight": 0.0}
    options |= {"backend": "dense", "evaluation": None, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fasterase.unlearn(model, FORGET, RETAIN, **options)  # type: ignore[arg-type]
    return model
