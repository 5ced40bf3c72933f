"""Membership inference against scikit-learn, and what it needs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch.nn.functional import normalize

from tests.evaluation.lookup_model import LookupModel, attack, picture

MEMBERS, KEPT, STRANGERS, WIDTH = 40, 30, 320, 16
COUNT = MEMBERS + KEPT + STRANGERS
CAPTIONS = [f"thing {i}" for i in range(COUNT)]
PAIRS = [(picture(i), caption) for i, caption in enumerate(CAPTIONS)]
FORGET, RETAIN, OTHERS = PAIRS[:MEMBERS], PAIRS[MEMBERS:-STRANGERS], PAIRS[-STRANGERS:]


def model(*, forget: float, kept: float, seed: int = 0) -> LookupModel:
    """A model whose members are more similar than its non-members, by the given pull."""
    numbers = torch.Generator().manual_seed(seed)
    text = normalize(torch.randn(COUNT, WIDTH, generator=numbers), dim=1)
    image = normalize(torch.randn(COUNT, WIDTH, generator=numbers), dim=1)
    pull = torch.tensor([forget] * MEMBERS + [kept] * KEPT + [0.0] * STRANGERS)[:, None]
    return LookupModel(image + pull * text, text, CAPTIONS, "fake")


def cosines(of: LookupModel) -> np.ndarray:
    image, text = of.module.image.detach().double(), of.module.text.detach().double()
    return torch.cosine_similarity(image, text).numpy()


def test_figures_are_those_of_scikit_learn(tmp_path: Path) -> None:
    erased, original = model(forget=0.3, kept=1), model(forget=1, kept=1, seed=1)
    given = {"original": original, "non_members": OTHERS}
    found = attack("membership", erased, FORGET, RETAIN, **given)
    figures = found.attacks["membership"]
    now, before = cosines(erased), cosines(original)
    for key, score in (("cosine", now), ("change", now - before)):
        for name, those in (("forget", score[:MEMBERS]), ("retain", score[MEMBERS:-STRANGERS])):
            scores = np.concatenate([those, score[-STRANGERS:]])
            truth = np.arange(len(scores)) < len(those)
            auc, tpr = figures[f"{name}/{key}/auc"], figures[f"{name}/{key}/tpr"]
            assert auc.value == pytest.approx(roc_auc_score(truth, scores), abs=1e-4)
            assert auc.low < auc.value < auc.high
            false, true, _ = roc_curve(truth, scores)
            assert tpr.value == pytest.approx(true[false <= 0.01].max())
    assert figures["forget/cosine/auc"].original == pytest.approx(
        roc_auc_score(np.arange(COUNT - KEPT) < MEMBERS, np.delete(before, range(MEMBERS, 70))),
        abs=1e-4,
    )
    assert figures["forget/change/auc"].original is None
    histogram = next(s for s in found.series["membership"] if s.line == "non-members")
    assert sum(histogram.y) == pytest.approx(100)
    assert histogram.panel == "model: matched cosine"
    assert found.plot(tmp_path)[0].stat().st_size > 10_000


def test_few_non_members_give_no_rate_at_one_percent() -> None:
    of = model(forget=0, kept=5)
    given = attack("membership", of, FORGET, RETAIN, non_members=OTHERS[:299])
    found = given.attacks["membership"]
    assert "forget/cosine/auc" in found
    assert "forget/cosine/tpr" not in found
