"""Words that only the forget set uses: which they are, and what becomes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fasterase
from fasterase.encode import PairEncoder
from fasterase.engine import words
from fasterase.engine.baseline import Baseline
from fasterase.engine.words import Word, forget_words, named_words
from fasterase.models.load import load_model
from fasterase.pairs.open import open_pairs
from tests import small_models
from tests.tiny_concepts import FORGOTTEN, KEPT, concept_pairs, knowing_model

PICTURE = torch.zeros(3, small_models.IMAGE_SIZE, small_models.IMAGE_SIZE)
FORGET = ["a zebra", ["a zebra on grass", "stripes"]]
RETAIN = ["a horse on grass", *(f"a dog {number}" for number in range(100))]
PLACES = {"a": 2, "on": 3, "grass": 4, "horse": 5, "dog": 6, "zebra": 7, "stripes": 8}


def word_tokenizer(texts):
    """Tokens of whole words, those not in `PLACES` all alike, in the small models' vocabulary."""
    start, end = (small_models.HF_VOCABULARY[mark] for mark in ("<start>", "<end>"))
    rows = [[start, *(PLACES.get(word, 1) for word in text.split())][:7] for text in texts]
    return torch.tensor([[*row, end, *[0] * (7 - len(row))] for row in rows])


MODELS = {
    "open_clip": (small_models.open_clip_vit, small_models.simple_tokenizer),
    "custom text": (small_models.open_clip_custom_text, small_models.simple_tokenizer),
    "CoCa": (small_models.open_clip_coca, small_models.simple_tokenizer),
    "transformers": (small_models.hf_clip, lambda: word_tokenizer),
    "SigLIP": (small_models.hf_siglip, lambda: word_tokenizer),
}


@pytest.fixture(autouse=True)
def few_captions_are_enough(monkeypatch):
    monkeypatch.setattr(words, "ENOUGH_CAPTIONS", 40)


def as_source(captions, name):
    return open_pairs([{"image": PICTURE, "text": text} for text in captions], name=name)


def ids_of(model, captions):
    return set(model.tokenize(captions).ids.flatten().tolist())


def run(model, *, forget=FORGET, retain=RETAIN, retain_rows=None, drawn=(), tune="all", **options):
    forget, retain = as_source(forget, "forget"), as_source(retain, "retain")
    if retain_rows is not None:
        retain = retain.select(retain_rows)
    table = model.word_table(tune)
    drawn = np.array(drawn, dtype=np.int64)
    encoder = PairEncoder(model)
    options = {"seed": 0, **options}
    return forget_words(encoder, forget, retain, drawn=drawn, table=table, **options)


def taken(**options):
    found = run(make_model(), **options)
    return [] if found is None else [each.word for each in found.words]


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
    model.module.token_embedding.requires_grad_(False)
    assert run(model, tune="text") is None
    model.module.token_embedding.requires_grad_(True)
    assert run(model, tune="text") is not None
    assert run(make_model(), tune="lora:2") is not None


def test_a_sample_of_the_retain_set_is_read_and_what_the_run_draws(monkeypatch):
    monkeypatch.setattr(words, "READ_PAIRS", 2)
    monkeypatch.setattr(words, "CONTRAST", 0.1)
    retain = [*RETAIN[1:91], "a zebra with stripes on grass"]
    assert run(make_model(), retain=retain, drawn=[90]) is None
    assert run(make_model(), retain=retain) is not None


def test_what_may_be_missing_among_the_kept_by_chance_is_left_alone():
    """A word in a smaller share of the forget pairs than 8 * 3 / n, of n captions to keep."""
    kept = [f"a dog {number}" for number in range(4000)]
    for share, n_kept, is_own in ((0.5, 49, True), (0.5, 47, False), (0.02, 1201, True)):
        forget = ["a zebra"] * int(100 * share) + ["a dog"] * int(100 * (1 - share))
        assert taken(forget=forget, retain=kept[:n_kept]) == ["zebra"] * is_own
    rare = ["a zebra"] + ["a dog"] * 150  # in less than 1 % of the forget pairs
    assert not taken(forget=rare, retain=kept)
    assert not taken(forget=["a zebra"], retain=kept[:5] * 1000)


def test_of_few_captions_to_keep_only_named_words_are_taken():
    few = RETAIN[:30]
    assert not taken(retain=few)
    assert taken(retain=few, named=["stripes"]) == ["stripes"]
    assert taken(named=["stripes"]) == ["zebra", "stripes"]
    assert taken(named=["stripes"], named_alone=True) == ["stripes"]


@pytest.mark.parametrize(
    ("wanted", "concept", "named"),
    [
        (True, "Octopus", ["octopus"]),
        (True, "dog", ["dog"]),
        (True, "a guide dog", []),
        (True, "snow-capped mountains", ["capped"]),
        (True, None, []),
        (False, "octopus", ["octopus"]),
        (["Guide dog"], "octopus", ["guide", "dog"]),
    ],
)
def test_named_words(wanted, concept, named):
    assert named_words(wanted, concept) == named


@pytest.mark.parametrize(
    ("caption", "own"),
    [
        ("snow-capped peak", ["capped"]),  # neither the hyphen nor a common word
        ("fire engine 7, !", []),
        ("the dog", []),  # function words and common ones
        ("ein Schneeleopard", ["ein", "schneeleopard"]),
        ("一个红苹果", []),  # no words without spaces
    ],
)
def test_what_english_needs_is_left_alone(caption, own):
    """Of words that only forget captions have."""
    kept = [f"two cats {number}" for number in range(100)]
    assert sorted(taken(forget=[caption] * 5, retain=kept)) == own


def test_tokens_that_other_words_have_stay():
    """ "octo" and "pus" are no words of their own here, and each is part of others."""
    pieces = {"octopus": [10, 11], "octo": [10], "pus": [11], "virus": [12, 11], "dog": [13]}

    def tokenizer(texts):
        rows = [
            [41, *(id for word in text.split() for id in pieces.get(word, [1]))] for text in texts
        ]
        return torch.tensor([[*row[:7], 42, *[0] * (7 - len(row))] for row in rows])

    def run_with(forget, retain):
        model = load_model(small_models.hf_clip(), tokenizer=tokenizer)
        return run(model, forget=forget, retain=retain, named=["octopus"])

    found = run_with(["octopus"], ["dog"])
    assert (found.tokens, found.shared) == ([10], [])  # "virus" is an English word, "octo" is none
    assert run_with(["octopus", "octo"], ["dog"]).shared == ["octopus"]
    assert run_with(["octopus"], ["octo dog"]).shared == ["octopus"]
    assert "need the tokens of octopus" in run_with(["octopus", "octo"], ["dog"]).describe()


def test_a_tokenizer_that_cannot_read_some_words_is_asked_for_each():
    """Of a closed vocabulary: of all English words like "octopus" it knows "virus" alone."""
    pieces = {
        word: [place] for place, word in enumerate(["a", "photo", "of", "cat", "dog"], start=20)
    }
    pieces |= {"octopus": [10, 11], "virus": [12, 11]}

    def tokenizer(texts):
        rows = [[41, *(id for word in text.split() for id in pieces[word])] for text in texts]
        return torch.tensor([[*row[:7], 42, *[0] * (7 - len(row))] for row in rows])

    model = load_model(small_models.hf_clip(), tokenizer=tokenizer)
    assert run(model, forget=["octopus"], retain=["dog"], named=["octopus"]).tokens == [10]


def test_an_article_that_no_caption_has_is_no_part_of_a_word():
    """Words are looked up as later ones of a text, after an "a", as well."""
    model = make_model()
    found = run(model, forget=["zebra"], retain=["dog"], named=["zebra"])
    assert found.tokens == sorted(ids_of(model, ["zebra"]) - ids_of(model, ["dog"]))


def test_a_word_that_no_caption_has_cannot_be_taken():
    with pytest.raises(fasterase.InputError, match=r"'octopuss'.*most frequent are: a, zebra"):
        run(make_model(), named=["octopuss"], named_alone=True)


def test_the_seed_decides_the_new_vectors():
    def table(seed):
        model = make_model()
        return model.module.state_dict()[run(model, seed=seed).table]

    assert torch.equal(table(0), table(0))
    assert not torch.equal(table(0), table(1))


def test_token_ids_are_no_words():
    forget, retain = (
        open_pairs(concept_pairs(which, 30, seed=3), name=name)
        for which, name in (([FORGOTTEN], "forget"), (KEPT, "retain"))
    )
    model = knowing_model()
    table = model.word_table("all")
    assert table is not None
    drawn = np.arange(3)
    assert not forget_words(PairEncoder(model), forget, retain, drawn=drawn, table=table, seed=0)


def erase(forget, retain, **options):
    return fasterase.unlearn(
        small_models.open_clip_vit(),
        forget,
        retain,
        tokenizer=small_models.simple_tokenizer(),
        lr=1e-9,
        max_steps=1,
        evaluation=None,
        **options,
    )


APPLES = [(PICTURE, "an apple"), (PICTURE + 0.5, ["an apple", "tangerine apple"])]
DOGS = [(PICTURE + number, f"a dog of {number}") for number in range(2, 62)]


@pytest.mark.filterwarnings("ignore:verdict")
@pytest.mark.parametrize("options", [{"forget_weight": 0.0}, {"forget_words": False}, {}])
def test_a_run_takes_them_unless_it_forgets_nothing_or_is_told_not_to(options, capsys, monkeypatch):
    monkeypatch.setattr(Baseline, "is_never_known", False)
    result = erase(APPLES, DOGS, concept="Apple", **options)
    taken = [Word("apple", 2, 0), Word("tangerine", 1, 0)]
    assert result.words == ([] if options else taken)
    assert ("2 tokens of the forget set alone" in "".join(capsys.readouterr())) == (not options)


@pytest.mark.filterwarnings("ignore:verdict")
def test_a_run_names_words_that_are_common_or_at_risk(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(Baseline, "is_never_known", False)
    output = str(tmp_path / "run")
    result = erase(
        [*APPLES, (PICTURE + 1, "apple garden")], DOGS, concept="apple", output_dir=output
    )
    assert [each.word for each in result.words if each.is_common] == ["apple"]
    printed = "".join(capsys.readouterr())
    assert "1 token of the forget set alone lost its meaning: apple. Common words of" in printed
    assert "nothing holds them: garden (1). If they are to stay, give retain pairs" in printed
    report = (tmp_path / "run" / "report.md").read_text()
    assert "- words that lost their meaning: **apple** (3 forget pairs)" in report
    assert "Words in bold are common" in report


@pytest.mark.filterwarnings("ignore:verdict")
def test_listed_words_alone_are_taken_and_a_change_is_another_run(tmp_path, monkeypatch):
    monkeypatch.setattr(Baseline, "is_never_known", False)
    options = {"output_dir": str(tmp_path), "forget_words": ["tangerine"]}
    assert erase(APPLES, DOGS, **options).words == [Word("tangerine", 1, 0)]
    with pytest.raises(fasterase.ResumeError, match="words to forget"):
        erase(APPLES, DOGS, **{**options, "forget_words": ["apple"]})
