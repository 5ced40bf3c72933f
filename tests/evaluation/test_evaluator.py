"""The evaluator's numbers against loops written from the metrics' definitions."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from fasterase.encode import PairEncoder
from fasterase.errors import InputError
from fasterase.evaluation import scores
from fasterase.evaluation.evaluator import Evaluator, sampled_rows
from fasterase.pairs.open import open_pairs
from fasterase.pairs.table import PairTable
from fasterase.report.evaluation import Evaluation, compare
from tests.evaluation.lookup_model import LookupModel, open_sets, picture

WIDTH = 6
# Set -> the captions of each pair. "cat" and "dog" have many images; some pairs have several
# captions, of which the first is the pair's own and others stand in the pool through other pairs.
CAPTIONS: dict[str, list[list[str]]] = {
    "forget": [["cat"]] * 4 + [["kitten", "cat"], ["lynx", "puma"], ["puma", "cougar"]],
    "retain": [["dog"]] * 5 + [[f"thing {i}"] for i in range(14)] + [["wolf", "dog"]],
    "forget-unseen": [["tiger", "lynx"], ["cat"], ["cougar"]],
    "holdout": [[f"other {i}", f"thing {i}"] for i in range(9)],
}
FORGET_SETS = ("forget", "forget-unseen")
TEXTS = sorted({caption for pairs in CAPTIONS.values() for c in pairs for caption in c})
IMAGES = sum(map(len, CAPTIONS.values()))


def sources() -> dict[str, PairTable]:
    return open_sets(CAPTIONS)


def lookup_model(seed: int, *, name: str = "fake", texts: list[str] = TEXTS) -> LookupModel:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(IMAGES, WIDTH, generator=generator)
    text = torch.randn(len(texts), WIDTH, generator=generator)
    # Nearer to its own caption than to others, but not always.
    own = [c[0] for pairs in CAPTIONS.values() for c in pairs]
    image += 1.5 * text[[texts.index(caption) for caption in own]]
    return LookupModel(image, text, texts, name)


def encoder(seed: int) -> PairEncoder:
    return PairEncoder(lookup_model(seed))


def evaluate(
    model: LookupModel, opened: dict[str, PairTable] | None = None, **options: Any
) -> Evaluation:
    evaluator = Evaluator(opened or sources(), **options)
    return compare(evaluator, evaluator.measure(PairEncoder(model)))


def among(right: int, candidates: int, k: int) -> float:
    """How likely one of the right ones is among the first k in a random order."""
    return 1 - math.comb(candidates - right, k) / math.comb(candidates, k)


def brute_force(model: LookupModel) -> tuple[dict[str, dict[str, float]], ...]:
    """Set -> metric -> value, and likewise chance level."""
    image = normalize(model.module.image.detach().double(), dim=1).numpy()
    text = normalize(model.module.text.detach().double(), dim=1).numpy()
    vector = {caption: text[i] for i, caption in enumerate(TEXTS)}
    numbers = itertools.count()
    numbered = {name: [(next(numbers), each) for each in CAPTIONS[name]] for name in CAPTIONS}
    pool = sorted({captions[0] for pairs in CAPTIONS.values() for captions in pairs})
    concept = {caption for captions in CAPTIONS["forget"] for caption in captions}
    result, chance = {}, {}
    for name, pairs in numbered.items():
        rows: dict[str, list[tuple[float, float]]] = {}
        for i, captions in pairs:
            order = sorted(pool, key=lambda c, i=i: -image[i] @ vector[c])
            candidates = pairs if name == "retain" else pairs + numbered["retain"]
            query = vector[captions[0]]
            images = sorted(candidates, key=lambda pair, q=query: -image[pair[0]] @ q)
            wrong = [image[i] @ vector[c] for c in pool if c not in captions]
            values = {
                "median_rank": (order.index(captions[0]) + 1, (len(pool) + 1) / 2),
                "matched_cosine": (image[i] @ query, np.mean(wrong)),
            }
            own = len(pool) - len(wrong)
            right = [captions[0] in others for _, others in images]
            for k in (1, 5, 10):
                hit = bool(set(captions) & set(order[:k]))
                values[f"image_to_text_recall@{k}"] = hit, among(own, len(pool), k)
                by_chance = among(sum(right), len(images), k)
                values[f"text_to_image_recall@{k}"] = any(right[:k]), by_chance
            same = [n for n, others in candidates if others[0] == captions[0] and n != i]
            if same:
                others = [n for n, _ in candidates if n != i]
                nearest = max(others, key=lambda n, i=i: image[i] @ image[n])
                by_chance = among(len(same), len(others), 1)
                values["image_to_image_recall@1"] = nearest in same, by_chance
            for k in (1, 5):
                by_chance = among(len(concept & set(pool)), len(pool), k)
                values[f"concept_hit@{k}"] = bool(concept & set(order[:k])), by_chance
            if name in FORGET_SETS:
                values |= judged_by_hand(i, query, image, vector, numbered["retain"])
            for key, (value, by_chance) in values.items():
                rows.setdefault(key, []).append((float(value), by_chance))
        average = {key: np.median if key == "median_rank" else np.mean for key in rows}
        result[name] = {
            key: float(average[key]([v for v, _ in those])) for key, those in rows.items()
        }
        chance[name] = {key: float(np.mean([c for _, c in those])) for key, those in rows.items()}
    return result, chance


def judged_by_hand(
    i: int, query: np.ndarray, image: np.ndarray, vector: dict[str, np.ndarray], retain: list
) -> dict[str, tuple[float, float]]:
    """All of retain is unrelated, so few captions that the contest holds only the pair's own."""
    matched = image[i] @ query
    rivals = [image[i] @ vector[c] for c in {captions[0] for _, captions in retain}]
    total, better = 1 + len(rivals), sum(rival > matched for rival in rivals)
    return {
        "image_to_text_residue": (1 - better / len(rivals), 0.5),
        "text_to_image_residue": (np.mean([matched > query @ image[n] for n, _ in retain]), 0.5),
        "contest_hit@1": (better == 0, 1 / total),
        "contest_hit@5": (better < 5, among(1, total, 5)),
    }


def test_new_captions_are_searched_in_the_originals_images() -> None:
    original, model = lookup_model(0), lookup_model(1)
    mixed = LookupModel(original.module.image.detach(), model.module.text.detach(), TEXTS, "mixed")
    evaluator = Evaluator(sources())
    before = evaluator.measure(PairEncoder(original))
    after = evaluator.measure(PairEncoder(model), original=before)
    found = compare(evaluator, after, original=before, references={"same": before})
    expected, _ = brute_force(mixed)
    key = "text_to_original_image_recall@1"
    assert found.original is not None
    for name, values in expected.items():
        assert found.scores[name][key] == pytest.approx(values["text_to_image_recall@1"])
        assert found.chance[name][key] == found.chance[name]["text_to_image_recall@1"]
        assert found.original[name][key] == found.original[name]["text_to_image_recall@1"]
    assert len({found.scores[name][key] for name in expected}) > 1
    assert "text->old image ranks" in found.table()
    alone = evaluate(model)
    assert key not in alone.scores["forget"]
    assert "old image" not in alone.table()


@pytest.mark.parametrize("chunk", [40, 4_000_000])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_number_equals_the_loops(
    seed: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "CHUNK_ELEMENTS", chunk)
    evaluator = Evaluator(sources(), forget_sets=["forget-unseen"])
    model = lookup_model(seed)
    measured = compare(evaluator, evaluator.measure(PairEncoder(model, batch_size=3)))
    found, (expected, chance) = measured.to_dict(), brute_force(model)
    assert list(found) == ["forget", "forget-unseen", "retain", "holdout"]
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, abs=1e-6), name
        assert measured.chance[name] == pytest.approx(chance[name], abs=1e-6), name
        for key, (low, high) in measured.intervals[name].items():
            assert low <= found[name][key] <= high
        if name in FORGET_SETS:
            residues = values["image_to_text_residue"], values["text_to_image_residue"]
            assert measured.mean_residue(name) == pytest.approx(np.mean(residues), abs=1e-6)
    assert measured.residue == measured.mean_residue("forget")
    assert measured.mean_residue("holdout") is None


def test_images_of_one_caption_are_each_other_s_right_answers() -> None:
    """Of the forget set four show a cat; its other captions no two images of it have."""
    found = evaluate(lookup_model(0))
    assert found.chance["forget"]["image_to_image_recall@1"] == pytest.approx(3 / 26)
    assert "image->image R@1, %" in found.table()
    assert "image->image ranks these too" in found.table()
    texts = [f"own {i}" for i in range(4)]
    alone = open_sets({"forget": texts[:2], "retain": texts[2:]})
    found = evaluate(LookupModel(torch.eye(4), torch.eye(4), texts, "fake"), alone)
    assert "image->image" not in found.table()


def test_a_set_is_to_be_forgotten_only_if_it_is_said_to_be() -> None:
    found = evaluate(lookup_model(0))
    assert found.forget_sets == ["forget"]
    assert list(found.to_dict()) == ["forget", "retain", "forget-unseen", "holdout"]
    assert "image_to_text_residue" not in found.to_dict()["forget-unseen"]
    assert "forget-unseen (3 pairs, to keep)" in found.table()


def test_a_collapsed_model_is_at_chance_everywhere() -> None:
    same = torch.ones(IMAGES, WIDTH), torch.ones(len(TEXTS), WIDTH)
    found = evaluate(LookupModel(*same, TEXTS, "flat"))
    for name, values in found.to_dict().items():
        assert values == pytest.approx(found.chance[name], abs=1e-6)


def test_the_original_and_references_stand_beside_the_model() -> None:
    evaluator = Evaluator(sources())
    measured = {seed: evaluator.measure(encoder(seed)) for seed in (0, 1, 2)}
    found = compare(evaluator, measured[0], original=measured[1], references={"re": measured[2]})
    assert found.to_dict() == compare(evaluator, measured[0]).to_dict()
    assert found.original == compare(evaluator, measured[1]).to_dict()
    assert found.references == {"re": compare(evaluator, measured[2]).to_dict()}
    assert compare(evaluator, measured[0]).original is None


def test_other_pairs_cannot_be_compared() -> None:
    evaluator = Evaluator(sources())
    other = Evaluator(sources(), max_pairs=2)
    with pytest.raises(InputError, match="original: measured on other pairs of 'forget'"):
        compare(evaluator, evaluator.measure(encoder(0)), original=other.measure(encoder(0)))


def test_max_pairs_draws_a_seeded_sample_of_each_set() -> None:
    def ids(seed: int, **sets: Any) -> dict[str, list[str]]:
        evaluator = Evaluator({**sources(), **sets}, max_pairs=5, seed=seed)
        return {name: s.ids for name, s in evaluator.measure(encoder(0)).sets.items()}

    first = ids(0)
    assert [len(first[name]) for name in CAPTIONS] == [5, 5, 3, 5]
    assert first == ids(0)
    assert first["retain"] != ids(1)["retain"]
    more = ids(0, other=open_pairs([(picture(0), "cat")], name="other"))
    assert {name: more[name] for name in first} == first
    assert len(np.unique(sampled_rows(50, 20, seed=3))) == 20


def test_captions_of_unsampled_forget_pairs_count_as_the_concept() -> None:
    # One forget pair is drawn; "b" stands in the pool only through forget-unseen.
    model = LookupModel(torch.eye(4), torch.eye(4), list("abcd"), "fake")
    sets = {
        "forget": [(picture(0), "a"), (picture(1), "b")],
        "forget-unseen": [(picture(1), "b")],
        "retain": [(picture(2), "c")],
    }
    for seed in range(4):
        opened = {name: open_pairs(pairs, name=name) for name, pairs in sets.items()}
        found = evaluate(model, opened, max_pairs=1, seed=seed).to_dict()
        assert found["forget-unseen"]["concept_hit@1"] == 1
        assert found["retain"]["concept_hit@1"] == 0


def test_quick_takes_fewer_pairs_and_resamples() -> None:
    settings = evaluate(lookup_model(0), quick=True, max_pairs=None).settings
    assert (settings["max_pairs"], settings["resamples"]) == (1000, 200)
    assert Evaluator(sources(), quick=True, max_pairs=7).max_pairs == 7


def test_token_ids_need_no_tokenizer_and_name_captions_alike() -> None:
    model = lookup_model(0)
    expected = evaluate(model).to_dict()
    as_ids = open_sets(
        {n: [torch.tensor([TEXTS.index(c[0])]) for c in pairs] for n, pairs in CAPTIONS.items()}
    )
    model.text_tokenizer = None
    found = evaluate(model, as_ids).to_dict()
    # Only first captions are there: what stands on the others may differ.
    for name, values in found.items():
        for key in ("median_rank", "matched_cosine"):
            assert values[key] == pytest.approx(expected[name][key])
    with pytest.raises(InputError, match="tokenizer"):
        Evaluator(sources()).measure(PairEncoder(model))


def test_accuracy_of_classes_that_captions_name() -> None:
    texts = [*TEXTS, "a photo of a cat.", "a photo of a dog."]
    model = lookup_model(0, texts=texts)
    found = evaluate(model, class_names=["cat", "dog"])
    image = normalize(model.module.image.detach(), dim=1)
    text = normalize(model.module.text.detach(), dim=1)
    nearest = (image @ text[-2:].T).argmax(dim=1)
    # forget: "cat" x 4 and "kitten, cat"; retain: "dog" x 5 and "wolf, dog".
    assert found.to_dict()["forget"]["zero_shot_accuracy"] == pytest.approx(
        float((nearest[[0, 1, 2, 3, 4]] == 0).double().mean())
    )
    assert found.to_dict()["retain"]["zero_shot_accuracy"] == pytest.approx(
        float((nearest[[7, 8, 9, 10, 11, 26]] == 1).double().mean())
    )
    assert found.chance["forget"]["zero_shot_accuracy"] == 0.5
    assert "zero_shot_accuracy" not in found.to_dict()["holdout"]
    assert "zero_shot_accuracy" in found.intervals["retain"]


def test_classes_that_the_sources_carry_need_no_names() -> None:
    texts = [*TEXTS, "the cat", "the dog"]
    opened = sources()
    for name, classes in (("forget", ["cat"]), ("retain", ["dog"])):
        opened[name].classes = classes
    found = evaluate(lookup_model(0, texts=texts), opened, templates=["the {}"])
    assert 0 <= found.scores["forget"]["zero_shot_accuracy"] <= 1
    assert found.chance["forget"]["zero_shot_accuracy"] == 1 / 2


def test_class_names_that_no_pair_has_are_an_error() -> None:
    evaluator = Evaluator(sources(), class_names=["zebra", "gnu"])
    with pytest.raises(InputError, match=r"class_names: no pair of forget, .* zebra, gnu"):
        evaluator.measure(encoder(0))


@pytest.mark.filterwarnings("ignore:.*broken pairs? (is|are) skipped")
def test_broken_pairs_are_left_out() -> None:
    opened = sources()
    broken = [(picture(0), "cat"), (torch.full((3, 1, 1), torch.nan), "puma"), (picture(1), "cat")]
    opened["forget"] = open_pairs(broken, name="forget")
    measured = Evaluator(opened).measure(encoder(0))
    assert measured.sets["forget"].ids == ["forget[0]", "forget[2]"]


def test_features_that_are_not_finite_are_an_error() -> None:
    model = lookup_model(0)
    with torch.no_grad():
        model.module.image[2] = torch.nan
    with pytest.raises(InputError, match=r"not finite for 1 of 7 inputs.*forget\[2\]"):
        Evaluator(sources()).measure(PairEncoder(model))


def test_measuring_leaves_the_module_as_it_was() -> None:
    model = lookup_model(0)
    model.module.train()
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    training = evaluate(model)
    assert model.module.dropout.training  # and yet Dropout was off:
    model.module.eval()
    assert training.to_dict() == evaluate(model).to_dict()
    assert not model.module.training
    for name, value in model.module.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.requires_grad for parameter in model.module.parameters())


def test_a_caption_that_differs_on_each_read_is_named():
    class Changing:
        """A dataset that draws one of its captions itself."""

        reads = itertools.count()

        def __len__(self):
            return 5

        def __getitem__(self, row):
            return picture(7 + row), ("dog", "thing 0", "thing 1")[next(self.reads) % 3]

    opened = {**sources(), "retain": open_pairs(Changing(), name="retain")}
    with pytest.raises(InputError, match=r"retain\[0\]: its caption was '.*' on a second read"):
        evaluate(lookup_model(0), opened)
