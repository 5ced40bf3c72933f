"""Tasks against scikit-learn and counts by hand, on models that know, forgot and never knew."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.preprocessing import StandardScaler
from torch.nn.functional import normalize

import fasterase
from fasterase.evaluation.findings import Findings
from tests.evaluation.lookup_model import LookupModel, picture

CLASSES = ["cat", "dog", "hen", "owl", "fox"]
PER_CLASS, WIDTH = 8, 6
# Image i is of class i // PER_CLASS; its captions are a sentence of its own and a paraphrase.
CAPTIONS = [[f"a {name} {i}", f"{name} number {i}"] for name in CLASSES for i in range(PER_CLASS)]
PROMPTS = [f"a photo of a {name}." for name in CLASSES]
TEXTS = [*(text for those in CAPTIONS for text in those), *PROMPTS]
PAIRS = [(picture(i), those) for i, those in enumerate(CAPTIONS)]
FORGET, RETAIN = PAIRS[:PER_CLASS], PAIRS[PER_CLASS : 4 * PER_CLASS]
HELD_OUT = PAIRS[4 * PER_CLASS :]
LABELS = np.arange(len(PAIRS)) // PER_CLASS


def model(*, noise: float, knows_cats: bool = True) -> LookupModel:
    numbers = torch.Generator().manual_seed(0)
    classes = torch.randn(len(CLASSES), WIDTH, generator=numbers)
    labels = torch.from_numpy(LABELS)
    image = classes[labels] + noise * torch.randn(len(PAIRS), WIDTH, generator=numbers)
    text = torch.cat([classes[labels].repeat_interleave(2, 0), classes])
    text = text + 0.3 * torch.randn(text.shape, generator=numbers)
    if not knows_cats:
        image[:PER_CLASS] = torch.randn(PER_CLASS, WIDTH, generator=numbers)
    return LookupModel(image, text, TEXTS, "fake")


def run(of: LookupModel, task: str, **options: Any) -> Findings:
    options = {"holdout": HELD_OUT, "class_names": CLASSES, **options}
    found = fasterase.evaluate(of, FORGET, RETAIN, tasks=[task], progress=False, **options)
    assert f"task {task}: forget\n" in found.table()
    return found.tasks[task]


def features(of: LookupModel) -> tuple[np.ndarray, np.ndarray]:
    return tuple(
        normalize(each.detach(), dim=1).double().numpy()
        for each in (of.module.image, of.module.text)
    )


SETS = {"forget": slice(0, 8), "retain": slice(8, 32), "holdout": slice(32, 40)}


def test_zero_shot_is_that_of_scikit_learn() -> None:
    noisy = model(noise=1.2)
    found = run(noisy, "zero_shot", original=model(noise=0.1))
    image, text = features(noisy)
    scores = image @ text[-len(CLASSES) :].T
    for name, rows in SETS.items():
        figure = found[f"{name}/accuracy@1"]
        expected = top_k_accuracy_score(LABELS[rows], scores[rows], k=1, labels=range(5))
        assert figure.value == pytest.approx(expected)
        assert figure.chance == 1 / 5
        assert figure.original == 1
        assert figure.low <= figure.value <= figure.high
        assert figure.wanted == ("↓" if name == "forget" else "↑")
    assert "forget/accuracy@5" not in found  # five classes: always right


def test_probes_are_those_of_scikit_learn() -> None:
    noisy = model(noise=0.8, knows_cats=False)
    image, _ = features(noisy)
    order = np.arange(len(PAIRS))
    fold = order % 2  # the images of a class are in one set, in order
    for task in ("linear_probe", "prototypes"):
        right = np.empty(len(order))
        for half in (0, 1):
            train, test = fold != half, fold == half
            if task == "linear_probe":
                scale = StandardScaler().fit(image[train])
                fitted = LogisticRegression(max_iter=1000, tol=1e-3)
                fitted.fit(scale.transform(image[train]), LABELS[train])
                predicted = fitted.predict(scale.transform(image[test]))
            else:
                centres = NearestCentroid().fit(image[train], LABELS[train]).centroids_
                predicted = (image[test] @ normalize(torch.tensor(centres)).numpy().T).argmax(1)
            right[test] = predicted == LABELS[test]
        found = run(noisy, task)
        for name, rows in SETS.items():
            assert found[f"{name}/accuracy"].value == pytest.approx(right[rows].mean())
        assert found["forget/accuracy"].value < 0.6 < found["retain/accuracy"].value


def test_a_copy_in_another_set_leaves_a_class_its_two_halves() -> None:
    forget, other = (
        [(picture(0), "cat"), (picture(1), "cat")],
        [(picture(0), "d"), (picture(2), "d")],
    )
    texts, noise = ["cat", "d", "hen"], torch.randn(8, 4)
    of = LookupModel(noise, torch.randn(3, 4), texts, "fake")
    options = {"sets": {"other": other}, "tasks": ["prototypes"], "progress": False}
    found = fasterase.evaluate(of, forget, [(picture(3), "hen")], **options)
    assert found.tasks["prototypes"]["other/accuracy"].chance == 0.5


@pytest.mark.parametrize("task", ["linear_probe", "prototypes"])
def test_a_probe_learns_nothing_from_copies_of_what_it_judges(task: str) -> None:
    found = run(model(noise=1000.0), task, sets={"again": RETAIN})
    for name in ("retain", "again"):
        assert found[f"{name}/accuracy"].value < 0.5, "pictures that show nothing, chance 0.2"


def test_image_retrieval_is_that_of_nearest_neighbours() -> None:
    noisy = model(noise=0.9)
    image, _ = features(noisy)
    found = run(noisy, "image_retrieval")
    for name, rows in SETS.items():
        gallery = image[rows] if name == "retain" else np.concatenate([image[rows], image[8:32]])
        labels = LABELS[rows]
        if name != "retain":
            labels = np.concatenate([labels, LABELS[8:32]])
        neighbours = KNeighborsClassifier(n_neighbors=1, metric="cosine").fit(gallery, labels)
        # Of a query that is in the gallery, the nearest is itself.
        _, nearest = neighbours.kneighbors(image[rows], n_neighbors=6)
        same = labels[nearest[:, 1:]] == LABELS[rows][:, None]
        assert found[f"{name}/recall@1"].value == pytest.approx(same[:, 0].mean())
        assert found[f"{name}/recall@5"].value == pytest.approx(same.any(1).mean())


def test_retrieval_counts_every_caption_of_the_set_by_itself() -> None:
    noisy = model(noise=0.5)
    image, text = features(noisy)
    found = run(noisy, "retrieval")
    for name, rows in SETS.items():
        numbers = np.arange(len(PAIRS))[rows]
        captions = np.repeat(numbers, 2)
        scores = image[numbers] @ text[np.sort(np.r_[2 * numbers, 2 * numbers + 1])].T
        for k in (1, 5):
            best = captions[np.argsort(-scores, axis=1)[:, :k]]
            expected = (best == numbers[:, None]).any(1).mean()
            assert found[f"{name}/image_to_text@{k}"].value == pytest.approx(expected)
            best = numbers[np.argsort(-scores.T, axis=1)[:, :k]]
            expected = (best == captions[:, None]).any(1).mean()
            assert found[f"{name}/text_to_image@{k}"].value == pytest.approx(expected)
    assert found["holdout/text_to_image@1"].chance == pytest.approx(1 / 8)
    assert "holdout/text_to_image@10" not in found


def test_paraphrases_are_ranked_among_unrelated_pairs() -> None:
    forgetting, knowing = model(noise=0.3, knows_cats=False), model(noise=0.3)
    found = run(forgetting, "paraphrases", original=knowing)
    image, text = features(forgetting)
    others, firsts = image[8:32], text[2 * np.arange(8, 32)]
    own = (image[:8] * text[2 * np.arange(8) + 1]).sum(1)
    expected = ((image[:8] @ firsts.T) < own[:, None]).mean()
    assert found["forget/image_to_text_residue"].value == pytest.approx(expected, abs=1e-3)
    expected = ((text[2 * np.arange(8) + 1] @ others.T) < own[:, None]).mean()
    assert found["forget/text_to_image_residue"].value == pytest.approx(expected, abs=1e-3)
    assert found["forget/image_to_text_residue"].original > 0.9
    assert found["forget/image_to_text_residue"].value < 0.8
    assert found["holdout/image_to_text_residue"].value > 0.9
