"""Words that only the forget set uses: which they are, and what becomes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fasterase
from fasterase.encode import PairEncoder
from fasterase.engine import words
from fasterase.engine.baseline import Baseline
from fasterase.engine.optim import Trained
from fasterase.engine.words import Word, forget_words
from fasterase.models.load import load_model
from fasterase.pairs.open import open_pairs
from tests import small_models
from tests.tiny_concepts import FORGOTTEN, KEPT, concept_pairs, knowing_model

PICTURE = torch.zeros(3, small_models.IMAGE_SIZE, small_models.IMAGE_SIZE)
FORGET = ["a zebra", ["a zebra on grass", "stripes"]]
RETAIN = ["a horse on grass", *(f"a dog {number}" for number in range(100))]
MODELS = {
    "open_clip": (small_models.open_clip_vit, small_models.simple_tokenizer),
    "custom text": (small_models.open_clip_custom_text, small_models.simple_tokenizer),
    "CoCa": (small_models.open_clip_coca, small_models.simple_tokenizer),
    "transformers": (small_models.hf_clip, small_models.hf_tokenizer),
    "SigLIP": (small_models.hf_siglip, small_models.hf_tokenizer),
}


def as_source(captions, name):
    return open_pairs([{"image": PICTURE, "text": text} for text in captions], name=name)


def ids_of(model, captions):
    return set(model.tokenize(captions).ids.flatten().tolist())


def run(model, *, forget=FORGET, retain=RETAIN, retain_rows=None, drawn=(), tune="all", **options):
    forget, retain = as_source(forget, "forget"), as_source(retain, "retain")
    if retain_rows is not None:
        retain = retain.select(retain_rows)
    trained = Trained.choose(model, tune, logit_scale=False)
    drawn = np.array(drawn, dtype=np.int64)
    encoder = PairEncoder(model)
    options = {"seed": 0, **options}
    return forget_words(encoder, forget, retain, drawn=drawn, trained=trained, **options)


@pytest.mark.parametrize("library", MODELS)
def test_only_the_vectors_of_lone_tokens_change(library):
    build, tokenizer = MODELS[library]
    model = load_model(build(), tokenizer=tokenizer())
    lone = ids_of(model, ["a zebra", "a zebra on grass", "stripes"]) - ids_of(model, RETAIN)
    assert lone
    before = {name: weight.detach().clone() for name, weight in model.module.named_parameters()}
    found = run(model)
    assert set(found.tokens) == lone
    assert found.words == [Word("zebra", 2, 0), Word("stripes", 1, 0)]
    assert found.are_taken(model)
    changed = {n: w for n, w in model.module.named_parameters() if not torch.equal(w, before[n])}
    ((name, table),) = changed.items()
    assert set((table != before[name]).any(1).nonzero().flatten().tolist()) == lone
    new = table.detach()[sorted(lone)]
    spread = (new - before[name].mean(0)).std() / before[name].std()
    assert spread == pytest.approx(words.SPREAD, rel=0.2)
    assert not torch.equal(new[0], new[1])
    weights = found.put_back(dict(model.module.state_dict()))
    assert found.table == name
    assert torch.equal(weights[name], before[name])


def make_model():
    return load_model(small_models.open_clip_vit(), tokenizer=small_models.simple_tokenizer())


def test_nothing_changes_that_is_not_trained_or_has_nothing_to_be_kept():
    model = make_model()
    before = {name: weight.clone() for name, weight in model.module.named_parameters()}
    for tune in ("image", "projections", "last:1"):
        assert run(model, tune=tune) is None
    assert run(model, retain_rows=[]) is None
    assert run(model, forget=["a dog"]) is None
    assert all(torch.equal(w, before[n]) for n, w in model.module.named_parameters())
    assert run(model, tune="text") is not None


def test_a_sample_of_the_retain_set_is_read_and_what_the_run_draws(monkeypatch):
    monkeypatch.setattr(words, "READ_PAIRS", 2)
    monkeypatch.setattr(words, "CONTRAST", 0.1)
    retain = [*RETAIN[1:91], "a zebra with stripes on grass"]
    assert run(make_model(), retain=retain, drawn=[90]) is None
    assert run(make_model(), retain=retain) is not None


def test_what_may_be_missing_among_the_kept_by_chance_is_left_alone():
    """A token in a smaller share of the forget pairs than 8 * 3 / n, of n captions to keep."""
    model = make_model()
    (zebra,) = ids_of(model, ["zebra"]) - ids_of(model, ["a dog"])
    kept = [f"a dog {number}" for number in range(4000)]
    for share, n_kept, is_lone in ((0.5, 49, True), (0.5, 47, False), (0.02, 1201, True)):
        forget = ["a zebra"] * int(100 * share) + ["a dog"] * int(100 * (1 - share))
        found = run(make_model(), forget=forget, retain=kept[:n_kept])
        assert (found is not None) == is_lone
        assert found is None or found.tokens == [zebra]
    rare = ["a zebra"] + ["a dog"] * 150  # in less than 1 % of the forget pairs
    assert run(make_model(), forget=rare, retain=kept) is None
    assert run(make_model(), forget=["a zebra"], retain=kept[:5] * 1000) is None


def test_token_ids_and_seeds():
    found = {}
    for seed in (0, 0, 1):
        model = knowing_model()
        forget, retain = (
            open_pairs(concept_pairs(which, 30, seed=3), name=name)
            for which, name in (([FORGOTTEN], "forget"), (KEPT, "retain"))
        )
        trained = Trained.choose(model, "all", logit_scale=False)
        before = model.weights()
        found_here = forget_words(
            PairEncoder(model), forget, retain, drawn=np.arange(3), trained=trained, seed=seed
        )
        assert len(found_here.tokens) == 2  # the concept's own
        ((name, table),) = (
            (n, w) for n, w in model.weights().items() if not torch.equal(w, before[n])
        )
        rows = (table != before[name]).any(1).nonzero().flatten()
        assert rows.tolist() == [2 * FORGOTTEN + 1, 2 * FORGOTTEN + 2]
        found.setdefault(seed, []).append(table)
    assert torch.equal(*found[0])
    assert not torch.equal(found[0][0], found[1][0])


@pytest.mark.filterwarnings("ignore:verdict")
@pytest.mark.parametrize("forget_weight", [0.0, 3.0])
def test_a_run_begins_with_it_unless_it_forgets_nothing_and_says_so(forget_weight, capsys):
    erased = knowing_model()
    original = {name: weight.clone() for name, weight in erased.weights().items()}
    fasterase.unlearn(
        erased,
        concept_pairs([FORGOTTEN], 24, seed=1),
        concept_pairs(KEPT, 20, seed=2),
        forget_weight=forget_weight,
        lr=1e-9,
        max_steps=3,
        batch_size=8,
        evaluation=None,
    )
    moved = {n: (w - original[n]).abs().amax().item() for n, w in erased.weights().items()}
    large = [name for name, distance in moved.items() if distance > 1e-3]
    assert len(large) == (forget_weight > 0)
    printed = "".join(capsys.readouterr())
    assert "training draws at most 24 of 140 retain pairs" in printed
    said = "2 tokens of the forget set alone lost their meaning"
    assert (said in printed) == (forget_weight > 0)


def test_a_run_names_the_words_and_which_are_common(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(Baseline, "is_never_known", False)
    pairs = [(PICTURE + number, f"a dog of {number}") for number in range(2, 62)]
    with pytest.warns(UserWarning, match="verdict"):
        result = fasterase.unlearn(
            small_models.open_clip_vit(),
            [(PICTURE, "an apple"), (PICTURE + 0.5, ["an apple", "tangerine apple"])],
            pairs,
            tokenizer=small_models.simple_tokenizer(),
            lr=1e-9,
            max_steps=1,
            evaluation=None,
            output_dir=str(tmp_path / "run"),
        )
    assert result.words == [Word("an", 2, 0), Word("apple", 2, 0), Word("tangerine", 1, 0)]
    assert [each.word for each in result.words if each.is_common] == ["an", "apple"]
    printed = "".join(capsys.readouterr())
    assert "lost their meaning: an, apple, tangerine. Common words among them" in printed
    report = (tmp_path / "run" / "report.md").read_text()
    assert "- words that lost their meaning: **an** (2 forget pairs), **apple**" in report
    assert "tangerine (1 forget pair). Words in bold are common" in report


def test_words_that_were_put_back_are_not_named():
    model = make_model()
    found = run(model)
    model.module.load_state_dict(found.put_back(dict(model.module.state_dict())))
    assert not found.are_taken(model)
