"""Judging: residues against slow loops, the contest, and which pairs are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fasterase.encode import PairEncoder, PairFeatures
from fasterase.engine.job import undrawn_rows
from fasterase.evaluation import verdict
from fasterase.evaluation.evaluator import Evaluator, sampled_rows
from fasterase.evaluation.verdict import Judge, PairTraces, compare_pairs, decide
from fasterase.pairs.open import open_pairs
from fasterase.pairs.sampler import Sampler
from fasterase.pairs.table import PairTable
from fasterase.report.evaluation import compare
from tests.evaluation.lookup_model import LookupModel, open_sets, pair_features, picture

Captions = Sequence[str | list[str]]


def judge(
    sets: dict[str, PairTable],
    image: Tensor,  # [n, D] in the order of the sets
    text: Tensor,  # [m, D]
    texts: list[str],
) -> PairTraces:
    judge = Judge(sets, ["forget"], seed=0)
    encoder = PairEncoder(LookupModel(image, text, texts, "lookup"))
    return judge.judge(
        {name: encoder.pairs(sets[name], rows, description="") for name, rows in judge.rows.items()}
    )["forget"]


def words(name: str, count: int) -> list[str]:
    return [f"{name} {i}" for i in range(count)]


@pytest.mark.parametrize("seed", range(3))
def test_residues_equal_slow_loops(seed: int) -> None:
    forget: Captions = ["cat", ["kitten", "cat"], "cat", "lynx"]
    retain: Captions = ["dog", "dog", "cat", "kitten", *words("thing", 20), ["hen", "cat"]]
    firsts = [each if isinstance(each, str) else each[0] for each in (*forget, *retain)]
    texts = sorted({*firsts, "cat"})
    numbers = torch.Generator().manual_seed(seed)
    # Few distinct values in three dimensions, so that there are ties.
    image = torch.randint(-1, 2, (len(firsts), 3), generator=numbers).float()
    image[:, 2] += 2
    text = torch.randint(-1, 2, (len(texts), 3), generator=numbers).float()
    text[:, 0] += 2
    found = judge(open_sets({"forget": forget, "retain": retain}), image, text, texts)

    unit_image = normalize(image.double(), dim=1)
    unit_text = normalize(text.double(), dim=1)

    def cosine(pair: int, caption: str) -> float:
        return float(unit_image[pair] @ unit_text[texts.index(caption)])

    def share(own: float, others: list[float]) -> float:
        ties = [abs(own - other) < 1e-6 for other in others]
        less = [own > other for other in others]
        return float(np.mean([0.5 if tie else low for tie, low in zip(ties, less, strict=True)]))

    # Pairs whose first caption is one of the concept's are not unrelated; others of theirs may be.
    unrelated = [i for i in range(4, len(firsts)) if firsts[i] not in ("cat", "kitten", "lynx")]
    rivals = sorted({firsts[i] for i in unrelated})
    assert len(unrelated) == 23
    assert len(rivals) == 22
    for pair in range(4):
        own = cosine(pair, firsts[pair])
        by_caption = share(own, [cosine(pair, caption) for caption in rivals])
        by_image = share(own, [cosine(other, firsts[pair]) for other in unrelated])
        assert found.values["image_to_text_residue"][pair] == pytest.approx(by_caption)
        assert found.values["text_to_image_residue"][pair] == pytest.approx(by_image)
    assert list(found.rows) == [0, 1, 2, 3]
    summary = found.summary()
    assert summary.image_to_text == pytest.approx(found.values["image_to_text_residue"].mean())
    assert summary.residue == pytest.approx((summary.image_to_text + summary.text_to_image) / 2)
    assert summary.pairs == 4


def test_one_caption_for_the_whole_set() -> None:
    """Nothing inside the set may count as a mismatch: all its images are of its one caption."""
    forget, retain = ["cat"] * 25, words("dog", 40)
    texts = ["cat", *retain]
    image = torch.cat(
        [torch.tensor([[1.0, 0, 0]]).repeat(25, 1), torch.eye(3)[[1, 2]].repeat(20, 1)]
    )
    text = torch.cat([torch.eye(3)[:1], torch.eye(3)[[1, 2]].repeat(20, 1)])
    sets = open_sets({"forget": forget, "retain": retain})
    known = judge(sets, image, text, texts).summary()
    assert (known.image_to_text, known.text_to_image, known.hit, known.pairs) == (1, 1, 1, 25)
    assert known.is_remembered
    text[0] = torch.tensor([-1.0, 0, 0])
    absent = judge(sets, image, text, texts).summary()
    assert (absent.image_to_text, absent.text_to_image, absent.hit) == (0, 0, 0)
    assert decide({"forget": absent}) == "over-erased"


def contest(concept: Tensor, rivals: int, *, seed: int = 0) -> PairTraces:
    """Figures where image i has cosine `concept[i, j]` with caption j of n, and 0.5 with rivals."""
    n = len(concept)
    # An image has one axis per caption of the concept, and one for all rivals.
    image = torch.cat([torch.cat([concept, torch.full((n, 1), 0.5)], 1), torch.eye(n + 1)[:rivals]])
    # A last axis gives all images the same length.
    squares = image.square().sum(1, keepdim=True)
    image = torch.cat([image, (squares.max() - squares).sqrt()], 1)
    axes = torch.eye(n + 2)
    unrelated = pair_features(image[n:], axes[[n] * rivals])
    return compare_pairs(pair_features(image[:n], axes[:n]), unrelated, seed=seed)


@pytest.mark.parametrize("seed", range(4))
def test_the_own_caption_is_always_in_the_contest(seed: int) -> None:
    found = contest(torch.eye(60), 38, seed=seed)
    assert found.hit == pytest.approx(1.0)
    assert found.chance["contest_hit@1"] == 2 / 40


@pytest.mark.parametrize("seed", range(4))
def test_the_number_of_captions_in_the_contest_is_bounded(seed: int) -> None:
    """Sixty captions against 38 would win most images by chance: two do, the own and another."""
    other = contest(torch.eye(60).roll(1, dims=1), 38, seed=seed)
    assert 0 < other.hit.sum() <= 2, "each image is won by one other caption, and one was drawn"
    every = contest(1 - torch.eye(60), 38, seed=seed)
    assert every.hit == pytest.approx(1.0), "whichever was drawn, and not the own one twice"


@pytest.mark.parametrize("captions", [1, 4, 200])
@pytest.mark.parametrize("unrelated", [19, 40, 190])
def test_chance_is_what_random_features_score(captions: int, unrelated: int) -> None:
    hits, chances = [], set()
    for seed in range(8):
        numbers = torch.Generator().manual_seed(seed)
        vectors = torch.randn(200 + 2 * unrelated + captions, 12, generator=numbers)
        image, rivals, text, rival_texts = vectors.split([200, unrelated, captions, unrelated])
        sets = pair_features(image, text), pair_features(rivals, rival_texts)
        found = compare_pairs(*sets, seed=seed)
        hits.append(found.hit.mean())
        chances.add(found.chance["contest_hit@1"])
    (chance,) = chances
    assert chance <= 0.05
    assert np.mean(hits) == pytest.approx(chance, abs=0.03)


def test_unrelated_pairs_have_none_of_the_captions_to_forget() -> None:
    sets = open_sets(
        {
            "forget": ["cat", ["kitten", "small cat"]],
            "unseen": ["lynx"],
            "retain": ["dog", "small cat", "lynx", ["hen", "cat"], "dog"],
        }
    )
    assert list(Judge(sets, ["forget"], seed=0).rows["retain"]) == [0, 2, 3, 4]
    both = {k: list(v) for k, v in Judge(sets, ["forget", "unseen"], seed=0).rows.items()}
    assert both == {"forget": [0, 1], "unseen": [0], "retain": [0, 3, 4]}


def test_without_unrelated_pairs_there_is_no_verdict() -> None:
    sets = open_sets({"forget": ["cat", "lynx"], "retain": ["cat", "lynx", "cat"]})
    assert Judge(sets, ["forget"], seed=0).rows == {}
    model = LookupModel(torch.eye(5), torch.eye(5)[:2], ["cat", "lynx"], "lookup")
    evaluator = Evaluator(sets)
    found = compare(evaluator, evaluator.measure(PairEncoder(model)))
    assert (found.verdict, found.residue, found.verdicts) == (None, None, {})
    assert "Verdict: none. No retain pair" in found.table()


def test_at_most_so_many_pairs_are_judged_by_a_seeded_draw(monkeypatch: Any) -> None:
    monkeypatch.setattr(verdict, "JUDGED_PAIRS", 20)
    sets = open_sets({"forget": words("cat", 50), "retain": words("dog", 70)})
    first, again, other = (Judge(sets, ["forget"], seed=seed) for seed in (1, 1, 2))
    for name in ("forget", "retain"):
        assert len(first.rows[name]) == 20
        assert np.array_equal(first.rows[name], again.rows[name])
        assert not np.array_equal(first.rows[name], other.rows[name])
    given = Judge(sets, ["forget"], seed=1, rows={"forget": np.arange(3, 9)})
    assert list(given.rows["forget"]) == [3, 4, 5, 6, 7, 8]


def test_half_of_the_judged_pairs_are_those_that_training_never_draws() -> None:
    sampler = Sampler(40, 10, forget_batch_size=10, batch_size=5, seed=0)
    undrawn = undrawn_rows(sampler, 3)
    assert sorted([*undrawn, *(row for i in range(3) for row in sampler.draw(i).forget)]) == [
        *range(40)
    ]
    assert len(undrawn_rows(sampler, 4)) == len(undrawn_rows(sampler, 9)) == 0

    rows = sampled_rows(40, 16, seed=3, preferred=undrawn)
    assert len(set(rows)) == 16
    assert len(set(rows) & set(undrawn)) >= 8
    few = sampled_rows(40, 36, seed=3, preferred=undrawn)
    assert set(undrawn) < set(few), "all, where they are less than half"

    sets = open_sets({"forget": words("cat", 40), "retain": words("dog", 30)})
    evaluator = Evaluator(sets, max_pairs=16, preferred={"forget": undrawn})
    assert len(set(evaluator.judge.rows["forget"]) & set(undrawn)) >= 8


@pytest.mark.filterwarnings("ignore:1 broken pair is skipped")
def test_unreadable_pairs_are_not_judged() -> None:
    forget: list[Any] = [(picture(i), "cat") for i in range(3)]
    forget[1] = (torch.full((3, 1, 1), torch.nan), "cat")
    sets = open_sets({"forget": ["cat"] * 3, "retain": words("dog", 20)})
    sets["forget"] = open_pairs(forget, name="forget")
    image, text = torch.eye(23), torch.eye(23)[:21]
    found = judge(sets, image, text, ["cat", *words("dog", 20)])
    assert list(found.rows) == [0, 2]
    assert found.summary().pairs == 2


def test_each_tower_beside_the_original_s_other_one() -> None:
    """An eye that still sees the concept is found out, whatever its own texts say, and a mouth."""
    forget, retain = ["cat"] * 25, words("dog", 40)
    sets = open_sets({"forget": forget, "retain": retain})
    judge = Judge(sets, ["forget"], seed=0)
    image = torch.cat([torch.eye(3)[[0] * 25], torch.eye(3)[[1, 2]].repeat(20, 1)])
    text = torch.cat([torch.eye(3)[:1], torch.eye(3)[[1, 2]].repeat(20, 1)])
    blind, mute = image.clone(), text.clone()
    blind[:25] = torch.tensor([-1.0, 1.0, 1.0])
    mute[0] = torch.tensor([-1.0, 1.0, -1.0])

    def encode(image: Tensor, text: Tensor) -> dict[str, PairFeatures]:
        encoder = PairEncoder(LookupModel(image, text, ["cat", *retain], "lookup"))
        rows = judge.rows.items()
        return {name: encoder.pairs(sets[name], those, description="") for name, those in rows}

    original = encode(image, text)
    for images, texts, telling in (
        (image, mute, ["image"]),
        (blind, text, ["text"]),
        (blind, mute, []),
        (image, text, ["image", "text"]),
    ):
        traces = judge.judge(encode(images, texts), original)["forget"]
        found = traces.summary()
        assert found.telling_towers == telling
        assert {name: hit for name, (hit, _) in found.towers.items()} == {
            name: float(name in telling) for name in ("image", "text")
        }
        assert found.is_remembered == bool(telling)
        assert traces.values["image_tower_hit@1"].shape == (25,)
    assert not judge.judge(encode(image, mute))["forget"].summary().towers, "without the original"
    wider = torch.cat([image, image], 1), torch.cat([mute, mute], 1)
    assert not judge.judge(encode(*wider), original)["forget"].summary().towers, "of another width"
