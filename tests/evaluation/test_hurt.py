"""What erasing hurt, by name: groups of pictures, and everyday things by their neighbours."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fasterase
from fasterase import vocabulary
from fasterase.evaluation import hurt
from fasterase.evaluation.hurt import (
    Hurt,
    Outside,
    Remaining,
    choose_things,
    find_remaining,
    hurt_groups,
    worst_first,
)
from fasterase.evaluation.metrics import CONTEST_HIT
from fasterase.evaluation.scores import SetScores
from fasterase.report.evaluation import Evaluation
from tests import small_models

RECALL = hurt.RECALL


def scores(ids, values, metric=RECALL):
    return SetScores(ids, {metric: np.array(values, dtype=float)}, {metric: 0.1})


def test_pictures_of_a_caption_count_once_over_all_sets():
    original = {"retain": scores(["a", "b", "c"], [1, 1, 1]), "near": scores(["c", "d"], [1, 0])}
    model = {"retain": scores(["a", "b", "c"], [0, 1, 0]), "near": scores(["c", "d"], [0, 1])}
    names = {"retain": ["ant", "ant", "bee"], "near": ["bee", "cow"]}
    found = worst_first(hurt_groups("caption", names, model, original, RECALL))
    assert found == [Hurt("bee", "caption", 1.0, 0.0, 1), Hurt("ant", "caption", 1.0, 0.5, 2)]
    assert found[1].describe() == "ant 100 -> 50 % of 2 pictures"
    assert found[0].describe() == "bee 100 -> 0 % of 1 picture"
    assert not list(hurt_groups("class", {"near": [None, None]}, model, original, RECALL))
    assert not list(hurt_groups("class", names, model, original, "zero_shot_accuracy"))


def test_worst_first_puts_pictures_before_texts():
    found = [
        Hurt("dog", "word", 1.0, 0.0, 10),
        Hurt("ant", "caption", 1.0, 0.0, 1),
        Hurt("bee", "caption", 1.0, 0.0, 2),
        Hurt("cat", "word", 1.0, 0.4, 10),
    ]
    assert [each.name for each in worst_first(found)] == ["bee", "ant", "dog", "cat"]


def test_a_moved_thing_is_hurt_and_a_common_rotation_is_not():
    numbers = torch.Generator().manual_seed(0)
    before = torch.nn.functional.normalize(torch.randn(40, 16, generator=numbers), dim=1)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=numbers)).Q
    things = [f"thing {number}" for number in range(40)]
    turned = Outside.compare(before @ rotation, before)
    assert turned.neighbours.min() == 1
    assert turned.cosine.max() < 0.9
    assert not list(turned.hurt(things))
    after = before.clone()
    after[7] = -before[7]
    moved = Outside.compare(after, before)
    assert moved.cosine[7] == pytest.approx(-1)
    (found,) = moved.hurt(things)
    assert (found.name, found.kind, found.before, found.count) == ("thing 7", "word", 1.0, 10)
    assert found.after < 0.5
    summary = moved.summary()
    assert (summary["things"], summary["hurt"]) == (40, 1 / 40)
    assert summary["cosine"] == pytest.approx(1 - 2 / 40)
    assert summary["neighbours"] < 1
    narrow = Outside.compare(before[:, :8], before)
    assert np.isnan(narrow.cosine).all()
    assert set(narrow.summary()) == {"things", "neighbours", "hurt"}
    json.dumps(narrow.summary(), allow_nan=False)


def test_a_tokenizer_of_few_words_is_a_warning(monkeypatch):
    monkeypatch.setattr(hurt, "everyday_things", lambda: ("ant", "bee", "cow"))
    size = small_models.IMAGE_SIZE
    pairs = [(torch.full((3, size, size), float(n)), f"a {n}") for n in range(6)]
    simple = small_models.simple_tokenizer()

    def tokenizer(texts):
        if any("ant" in text for text in texts):
            raise KeyError("ant")
        return simple(texts)

    model = small_models.open_clip_vit()
    options = {"tokenizer": tokenizer, "progress": False}
    with pytest.warns(UserWarning, match=r"everyday words are not measured.*KeyError: 'ant'"):
        found = fasterase.evaluate(model, pairs[:2], pairs[2:], original=model, **options)
    assert found.outside == {}
    # Without an original there is nothing to compare them with.
    assert fasterase.evaluate(model, pairs[:2], pairs[2:], **options).outside == {}


def test_a_device_that_fails_is_no_tokenizer_that_does():
    def fail(texts):
        raise torch.OutOfMemoryError("no room")

    model = SimpleNamespace(text_tokenizer=object(), name="x")
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        hurt.encode_things(SimpleNamespace(model=model, texts=fail), ["ant", "bee"])


def test_things_near_the_captions_are_chosen_and_the_concept_is_not(monkeypatch):
    monkeypatch.setattr(hurt, "everyday_things", vocabulary.everyday_things)
    every = choose_things(["a guide dog", "Castle"], None)
    assert "castle" not in every
    assert len(every) == 1999
    some = choose_things(["a guide dog", "Castle"], 20)
    assert {"dog", "dog sled", "hot dog"} <= set(some) <= set(every)
    assert some == choose_things(["Castle", "a guide dog"], 20)
    assert len(choose_things([], 5)) == 5


def test_a_run_names_what_it_hurt(capsys, tmp_path, monkeypatch):
    """A large learning rate on one picture ruins the others."""
    monkeypatch.setattr(hurt, "everyday_things", lambda: ("ant", "bee", "cow", "dog", "emu"))
    size = small_models.IMAGE_SIZE
    numbers = torch.Generator().manual_seed(0)
    pictures = torch.randn(6, 3, size, size, generator=numbers)
    names = ["ant", "bee", "cow", "dog", "emu", "fox"]
    pairs = [(picture, f"a {name}") for picture, name in zip(pictures, names, strict=True)]
    model = small_models.open_clip_vit()
    options = dict.fromkeys(("retain_weight", "consistency_weight", "anchor_weight"), 0.0)
    options |= {"forget_words": False, "lr": 0.05, "max_steps": 5}
    options["tokenizer"] = small_models.simple_tokenizer()
    with pytest.warns(UserWarning, match="verdict"):
        result = fasterase.unlearn(model, pairs[:1], pairs[1:], **options)
    evaluation = result.evaluation
    assert evaluation.outside["things"] == 5
    assert evaluation.outside["cosine"] < 0.99
    for each in evaluation.hurt:
        assert each.after < each.before
    expected = [each for each in evaluation.hurt if each.kind == "caption"]
    before, after = evaluation.original["retain"], evaluation.scores["retain"]
    if after[RECALL] < before[RECALL]:
        assert expected
    said = evaluation.hurt[0].describe() if evaluation.hurt else ""
    assert said in evaluation.table()
    assert said in "".join(capsys.readouterr())
    evaluation.to_json(tmp_path / "evaluation.json")
    assert Evaluation.from_json(tmp_path / "evaluation.json") == evaluation


def test_captions_that_are_still_found_are_named():
    captions = {"forget": ["octopus", "octopus", "squid", "bus"], "unseen": ["octopus", "bus"]}
    sets = {
        "forget": scores(["a", "b", "c", "d"], [1, 0, 0, np.nan], CONTEST_HIT),
        "unseen": scores(["e", "f"], [1, 0.5], CONTEST_HIT),
    }
    found = find_remaining(captions, sets)
    assert found == [Remaining("octopus", 2 / 3, 3), Remaining("bus", 0.5, 1)]
    assert [each.describe() for each in found] == [
        "octopus 67 % of 3 pictures",
        "bus 50 % of 1 picture",
    ]
