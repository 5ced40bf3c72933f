"""The scripts in examples/ run as they are shown, on the pairs and models of the package."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import open_clip
import pytest

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
        "erase_a_class",
        "measure_forgetting",
        "train_with_clip_loss",
    }


@pytest.mark.filterwarnings("ignore:verdict")
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
