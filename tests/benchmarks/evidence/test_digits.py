"""The benchmark on handwriting, whole, on a few scans and models that know none of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sklearn import datasets

from benchmarks.evidence import digits
from benchmarks.evidence.digits import DIGITS, Scans, trained_model
from fasterase.evaluation.attacks import weights
from tests.marks import SHORT_RUN

pytestmark = SHORT_RUN
FEW = 150


@pytest.fixture
def few(monkeypatch):
    whole = datasets.load_digits()
    some = SimpleNamespace(images=whole.images[:FEW], target=whole.target[:FEW])
    monkeypatch.setattr(datasets, "load_digits", lambda: some)
    monkeypatch.setattr(digits, "STEPS", 2)
    return some


def test_unseen_scans_are_others(few):
    scans = Scans()
    trained, unseen = scans.trained(range(10)), scans.unseen(range(10))
    assert (len(trained), len(unseen)) == (100, 50)
    named = [DIGITS.index(pair["text"][0].split()[-1]) for pair in trained + unseen]
    assert named == few.target.tolist()
    assert scans.trained([7]) == [pair for pair in trained if "seven" in pair["text"][0]]
    # Ink is bright: 0 to 16 becomes 0 to 240.
    assert max(pair["image"].getextrema()[0][1] for pair in trained) == 240


def test_a_model_is_trained_once(few, tmp_path, monkeypatch):
    scans = Scans()
    model = trained_model(scans, [1, 7], seed=0, work=tmp_path)
    assert not torch.equal(model.visual.proj, digits.build_model(0).visual.proj)
    monkeypatch.setattr(digits, "_train", None)
    again = trained_model(scans, [1, 7], seed=0, work=tmp_path)
    assert torch.equal(model.visual.proj, again.visual.proj)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:verdict")
def test_every_model_has_a_row(few, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "STEPS", 1)
    evaluation = digits.run((7, 0), tmp_path)
    assert digits.run((7, 0), tmp_path).scores == evaluation.scores
    rows = list(digits.rows_of("seven", 0, evaluation))
    assert [row["model"] for row in rows] == list(digits.MODELS)
    assert all(isinstance(row["relearned residue"], float) for row in rows)
    assert "| erased |" in digits.table(rows)
