"""Common words stay where the original has them, where a few pairs to keep cannot hold the rest."""

from __future__ import annotations

import pytest
import torch

from fasterase.engine import baseline, held_texts
from fasterase.engine.held_texts import HeldTexts
from tests.engine.test_decoys import learnt, pairs, tokenizer
from tests.tiny_model import erase

WORDS = ("bank", "river", "call", "window", "yesterday")
pytestmark = pytest.mark.filterwarnings("ignore:verdict", "ignore:no verdict", "ignore:retain")


@pytest.fixture(autouse=True)
def words(monkeypatch):
    monkeypatch.setattr(held_texts, "common_words", lambda: WORDS)


@pytest.fixture
def seen(monkeypatch):
    """What each run in the test holds."""
    found, plain = [], HeldTexts.of_words.__func__

    def of_words(cls, *given):
        found.append(plain(cls, *given))
        return found[-1]

    monkeypatch.setattr(HeldTexts, "of_words", classmethod(of_words))
    return found


def run(model=None, **settings):
    settings = {"anchor_weight": 30.0, "forget_augment": False, **settings}
    return erase(model or learnt(), pairs(range(6)), pairs(range(6, 24)), **settings)


def test_words_of_forget_captions_are_left_out(seen):
    run()
    (held,) = seen
    kept = [word for word in WORDS if word != "call"]
    texts = [*kept, *(f"a photo of {word}" for word in kept)]
    assert torch.equal(held.tokens.ids, tokenizer(texts).ids)
    torch.testing.assert_close(held.text, learnt().encode_text(tokenizer(texts)).detach())


def test_they_move_less(monkeypatch):
    tokens = tokenizer([word for word in WORDS if word != "call"])
    before = learnt().encode_text(tokens).detach()

    def moved(enough):
        monkeypatch.setattr(baseline, "ENOUGH_PAIRS", enough)
        model = learnt()
        run(model, lr=1e-2, max_steps=40)
        return (model.encode_text(tokens) - before).square().sum(1).mean()

    assert moved(19) < moved(18) / 2, "18 pairs are enough there"


@pytest.mark.parametrize("settings", [{"anchor_weight": 0.0}, {"erase": "link"}])
def test_none_are_held_for_links_and_where_the_caller_chooses_otherwise(settings, seen):
    run(**settings)
    assert not seen


def test_a_tokenizer_that_cannot_read_them_and_a_frozen_text_tower_hold_none(seen):
    assert run(tune="image").history
    model = learnt()

    def few_words(texts):
        if any("river" in text for text in texts):
            raise ValueError("unknown word")
        return tokenizer(texts)

    model.text_tokenizer = few_words
    assert run(model).history
    assert seen[1] is None
