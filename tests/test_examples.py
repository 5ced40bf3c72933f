"""The scripts in examples/ run as they are shown, on the pairs and models of the package."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from types import ModuleType

import open_clip
import pytest
import torch
from torch.nn.functional import normalize

import fasterase

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "demo",  # tests/test_notebook.py
        "erase_a_class",
        "measure_forgetting",
        "the_method",
        "train_with_clip_loss",
    }


# One picture to keep, a tamale, does look like those to be forgotten.
@pytest.mark.filterwarnings("ignore:verdict", "ignore:retain.* look like those to be forgotten")
def test_erase_a_class(tmp_path, capsys):
    result = load("erase_a_class").main(["--max_steps", "2", "--output", str(tmp_path / "run")])
    assert len(result.history) == 2
    printed = capsys.readouterr().out
    assert "8 pairs to forget, 1007 to keep" in printed
    assert "forget: concept_hit@1 100.0% ->" in printed
    # What it says it leaves is there, and open_clip loads it under another name.
    moved = shutil.move(tmp_path / "run" / "model", tmp_path / "elsewhere")
    open_clip.create_model_and_transforms(f"local-dir:{moved}")


def test_measure_forgetting(tmp_path, capsys):
    report = tmp_path / "report.md"
    evaluation = load("measure_forgetting").main(["--max_pairs", "120", "--report", str(report)])
    scores, original = evaluation.to_dict(), evaluation.original
    assert list(scores) == ["forget", "unseen", "retain", "neighbour"]
    assert original["forget"]["concept_hit@1"] == 1.0
    assert scores["forget"]["concept_hit@1"] < 0.2, "trained without fruit"
    assert scores["neighbour"]["image_to_text_recall@1"] > 0.8
    assert report.read_text().startswith("# Evaluation of")
    assert "unseen (19 pairs, to forget)" in capsys.readouterr().out


def test_train_with_clip_loss(capsys):
    losses = load("train_with_clip_loss").main(["--steps", "8", "--batch_size", "64"])
    assert losses[-1] < losses[0]
    ours, theirs = capsys.readouterr().out.splitlines()[0].removeprefix("first loss ").split(", ")
    assert float(ours) == pytest.approx(float(theirs.removeprefix("open_clip's ")), abs=1e-5)


@pytest.mark.parametrize("weights", [(3.0, 1.0, 3.0), (0.5, 2.0, 0.25)])
def test_the_loss_on_one_page_is_erase_loss(weights):
    page = load("the_method")
    torch.manual_seed(0)

    def features(scale):
        image, text = normalize(torch.randn(2, 30, 12, dtype=torch.float64), dim=2)
        return page.Features(image, text, torch.tensor(scale, dtype=torch.float64))

    now, original = features(14.3), features(20.0)
    labels = torch.randint(20, (30,))
    for each in now:
        each.requires_grad_()
    names = ("forget_weight", "retain_weight", "consistency_weight")
    options = {"n_forget": 11, "labels": labels, "backend": "dense"}
    options |= dict(zip(names, weights, strict=True))
    ours = fasterase.erase_loss(*now, *original, **options)
    theirs = page.erase_loss(now, original, labels, 11, weights)
    torch.testing.assert_close(theirs, ours.total, rtol=1e-12, atol=0)
    gradients = zip(
        torch.autograd.grad(theirs, now), torch.autograd.grad(ours.total, now), strict=True
    )
    for one, other in gradients:
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def test_the_method(capsys):
    load("the_method").main(["--steps", "10", "--lr", "1e-4"])
    before, after = re.findall(r": ([\d.]+)% of .* known, ([\d.]+)%", capsys.readouterr().out)
    assert float(before[0]) == 100
    assert float(after[0]) < 50
    assert float(after[1]) > float(before[1]) - 10
