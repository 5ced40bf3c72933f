"""Probes against those of scikit-learn, and what they need."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from fasterase.errors import MissingExtraError
from fasterase.evaluation.attacks.features import assign_folds
from fasterase.evaluation.findings import Findings
from tests.evaluation.lookup_model import LookupModel, attack, picture

FORGET, RETAIN, UNSEEN, WIDTH = 23, 160, 11, 6
CAPTIONS = [f"{kind} {i}" for kind, n in (("cat", FORGET), ("thing", RETAIN)) for i in range(n)]
PAIRS = [(picture(i), caption) for i, caption in enumerate(CAPTIONS)]
OTHERS = [(picture(len(PAIRS) + i), "cat 0") for i in range(UNSEEN)]


def probe(image: torch.Tensor, *, unseen: int = UNSEEN) -> Findings:
    model = LookupModel(image, torch.randn(len(CAPTIONS), image.shape[1]), CAPTIONS, "fake")
    sets = {"unseen": OTHERS[:unseen]}
    found = attack("probe", model, PAIRS[:FORGET], PAIRS[FORGET:], forget_sets=sets)
    return found.attacks["probe"]


def test_figures_equal_those_of_scikit_learn() -> None:
    given = torch.randn(len(PAIRS) + UNSEEN, WIDTH, generator=torch.Generator().manual_seed(0))
    given[:FORGET, 0] += 1.5
    given[len(PAIRS) :, 0] += 1.5
    figures = probe(given)
    image = torch.nn.functional.normalize(given, dim=1).double().numpy()
    forget, retain, unseen = np.split(image, [FORGET, len(PAIRS)])
    places = [assign_folds(len(those), 5, seed=0) for those in (forget, retain, unseen)]
    parts: dict[str, list[tuple[float, int, int]]] = {}
    for fold in range(5):
        train = np.concatenate([forget[places[0] != fold], retain[places[1] != fold]])
        is_forget = np.arange(len(train)) < (places[0] != fold).sum()
        scale = StandardScaler().fit(train)
        linear = LogisticRegression(class_weight="balanced", max_iter=1000)
        linear.fit(scale.transform(train), is_forget)
        means = [train[is_forget].mean(0), train[~is_forget].mean(0)]
        for name, those, place in (("forget", forget, places[0]), ("unseen", unseen, places[2])):
            tested = np.concatenate([those[place == fold], retain[places[1] == fold]])
            count = (place == fold).sum()
            near, far = (tested @ mean / np.linalg.norm(mean) for mean in means)
            for key, scores in (
                ("linear_probe", linear.decision_function(scale.transform(tested))),
                ("prototypes", near - far),
            ):
                auc = roc_auc_score(np.arange(len(tested)) < count, scores)
                limit = np.sort(scores[count:])[-2]  # 32 unrelated images: one may score higher
                found = int((scores[:count] > limit).sum())
                parts.setdefault(f"{name}/{key}", []).append((auc, count, found))
    for key, those in parts.items():
        total = sum(count for _, count, _ in those)
        auc = sum(auc * count for auc, count, _ in those) / total
        figure = figures[f"{key}/auc"]
        assert figure.value == pytest.approx(auc)
        assert figure.low <= figure.value <= figure.high
        assert 0.6 < auc < 0.99
        assert figures[f"{key}/found"].value == sum(found for *_, found in those) / total
        assert figures[f"{key}/found"].chance == pytest.approx(2 / 33)


def test_copies_of_what_is_judged_are_not_learnt_from() -> None:
    noise = torch.randn(len(PAIRS) + UNSEEN, 64, generator=torch.Generator().manual_seed(0))
    model = LookupModel(noise, torch.randn(len(CAPTIONS), 64), CAPTIONS, "fake")
    forget, retain = PAIRS[:FORGET], PAIRS[FORGET:]
    sets = {"again": forget, "unseen": OTHERS}
    found = attack("probe", model, [*forget, *forget], retain, forget_sets=sets).attacks["probe"]
    for name in ("forget", "again", "unseen"):
        assert found[f"{name}/linear_probe/auc"].value < 0.7, "features of noise"


def test_a_set_of_fewer_images_than_folds_is_scored() -> None:
    given = torch.randn(len(PAIRS) + UNSEEN, WIDTH, generator=torch.Generator().manual_seed(0))
    figures = probe(given, unseen=2)
    assert 0 <= figures["unseen/linear_probe/auc"].value <= 1


def test_a_missing_package_is_named_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    imported = importlib.import_module

    def without_sklearn(name: str) -> object:
        if name.startswith("sklearn"):
            raise ImportError(f"No module named {name!r}")
        return imported(name)

    monkeypatch.setattr(importlib, "import_module", without_sklearn)
    model = LookupModel(torch.eye(3), torch.eye(3), ["cat", "dog", "hen"], "fake")
    with pytest.raises(MissingExtraError, match=r"'probe' needs `sklearn`.*fasterase\[eval\]"):
        attack("probe", model, "no file", PAIRS)
