"""Words that only the forget set uses: which they are, and what becomes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fasterase.encode import PairEncoder
from fasterase.engine import words
from fasterase.engine.baseline import Baseline
from fasterase.engine.optim import Trained
from fasterase.engine.words import Word, forget_words
from fasterase.models.load import load_model
from fasterase.pairs.open import open_pairs
from fasterase.pairs.table import PairTable
from tests import small_models, tiny_concepts
from tests.tiny_concepts import FORGOTTEN, KEPT, concept_pairs, knowing_model
from tests.tiny_model import erase, same_weights

PICTURE = torch.zeros(3, small_models.IMAGE_SIZE, small_models.IMAGE_SIZE)
FORGET = ["a zebra", ["a zebra on grass", "stripes"]]
RETAIN = ["a horse on grass", *(f"a dog {number}" for number in range(100))]


def make_model(kind="open_clip_vit"):
    named = small_models.simple_tokenizer if "open_clip" in kind else small_models.hf_tokenizer
    return load_model(getattr(small_models, kind)(), tokenizer=named())


def as_source(captions, name):
    return open_pairs([{"image": PICTURE, "text": text} for text in captions], name=name)


def ids_of(model, captions):
    return set(model.tokenize(captions).ids.flatten().tolist())


def run(model, *, forget=FORGET, retain=RETAIN, drawn=(), tune="all", seed=0):
    sets = (
        given if isinstance(given, PairTable) else as_source(given, name)
        for name, given in (("forget", forget), ("retain", retain))
    )
    trained = Trained.choose(model, tune, logit_scale=False)
    drawn = np.array(drawn, dtype=np.int64)
    return forget_words(PairEncoder(model), *sets, drawn=drawn, trained=trained, seed=seed)


@pytest.mark.parametrize(
    "kind",
    ["open_clip_vit", "open_clip_custom_text", "open_clip_coca", "hf_clip", "hf_siglip"],
)
def test_only_the_vectors_of_lone_tokens_change(kind):
    model = make_model(kind)
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
    model.module.load_state_dict(weights)
    assert not found.are_taken(model)


def test_nothing_changes_that_is_not_trained_or_has_nothing_to_be_kept():
    model = make_model()
    before = {name: weight.clone() for name, weight in model.module.state_dict().items()}
    for tune in ("image", "projections", "last:1"):
        assert run(model, tune=tune) is None
    assert run(model, retain=as_source(RETAIN, "retain").select([])) is None
    assert run(model, forget=["a dog"]) is None
    assert same_weights(before, dict(model.module.state_dict()))
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
    forget = open_pairs(concept_pairs([FORGOTTEN], 30, seed=3), name="forget")
    retain = open_pairs(concept_pairs(KEPT, 30, seed=3), name="retain")
    tables = []
    for seed in (0, 0, 1):
        model = knowing_model()
        before = model.weights()
        found = run(model, forget=forget, retain=retain, drawn=range(3), seed=seed)
        assert len(found.tokens) == 2  # the concept's own
        changed = {n: w for n, w in model.weights().items() if not torch.equal(w, before[n])}
        ((name, table),) = changed.items()
        rows = (table != before[name]).any(1).nonzero().flatten()
        assert rows.tolist() == [2 * FORGOTTEN + 1, 2 * FORGOTTEN + 2]
        tables.append(table)
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


@pytest.mark.filterwarnings("ignore:verdict")
@pytest.mark.parametrize("forget_weight", [0.0, 3.0])
def test_a_run_begins_with_it_unless_it_forgets_nothing_and_says_so(forget_weight, capsys):
    erased = knowing_model()
    original = erased.weights()
    options = {"forget_weight": forget_weight, "lr": 1e-9, "progress": True}
    erase(erased, tiny_concepts.FORGET, tiny_concepts.RETAIN, **options)
    moved = {n: (w - original[n]).abs().amax().item() for n, w in erased.weights().items()}
    large = [name for name, distance in moved.items() if distance > 1e-3]
    assert len(large) == (forget_weight > 0)
    printed = "".join(capsys.readouterr())
    assert "training draws at most 24 of 140 retain pairs" in printed
    said = "2 tokens of the forget set alone lost their meaning"
    assert (said in printed) == (forget_weight > 0)


def test_a_run_names_the_words_and_which_are_common(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(Baseline, "is_never_known", False)
    forget = [(PICTURE, "an apple"), (PICTURE + 0.5, ["an apple", "tangerine apple"])]
    retain = [(PICTURE + number, f"a dog of {number}") for number in range(2, 62)]
    options = {"tokenizer": small_models.simple_tokenizer(), "output_dir": str(tmp_path / "run")}
    options |= {"lr": 1e-9, "max_steps": 1, "progress": True}
    with pytest.warns(UserWarning, match="verdict"):
        result = erase(small_models.open_clip_vit(), forget, retain, **options)
    assert result.words == [Word("an", 2, 0), Word("apple", 2, 0), Word("tangerine", 1, 0)]
    assert [each.word for each in result.words if each.is_common] == ["an", "apple"]
    printed = "".join(capsys.readouterr())
    assert "lost their meaning: an, apple, tangerine. Common words among them" in printed
    report = (tmp_path / "run" / "report.md").read_text()
    assert "- words that lost their meaning: **an** (2 forget pairs), **apple**" in report
    assert "tangerine (1 forget pair). Words in bold are common" in report
