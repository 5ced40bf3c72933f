"""The report of a run: a Markdown file, or a folder with pictures."""

from __future__ import annotations

import sys
import warnings
from types import SimpleNamespace

import pytest
import yaml
from PIL import Image
from torch import nn

import fasterase
from fasterase.config import UnlearnConfig
from fasterase.engine.history import StepRecord
from fasterase.pairs.skips import Skip
from fasterase.result import UnlearnResult
from tests import small_models
from tests.tiny_model import same_weights

QUIET = {"progress": False, "evaluation": None}


@pytest.mark.parametrize("steps", [0, 2])
def test_report(tmp_path, steps):
    terms = dict.fromkeys(("total", "forget", "retain", "consistency", "anchor"), 0.25)
    path = tmp_path / "new" / "report.md"
    result = UnlearnResult(
        model=nn.Identity(),
        history=[StepRecord(terms)] * steps,
        evaluation=SimpleNamespace(table=lambda: "THE TABLE"),  # type: ignore[arg-type]
        forgotten=False,
        config=UnlearnConfig(betas=(0.5, 0.75)),
        skipped=[Skip("retain[3]", "image holds NaN values")],
        floor=0.1,
        excess=0.034,
        removed_from_retain=["retain[5]"],
        seconds=12.0,
        encoder=None,  # type: ignore[arg-type]
        original_weights={},
        sets={},
    )
    assert result.report(path) == path
    text = path.read_text()
    assert "forgotten: **no**" in text
    assert "+0.100: 0.0340" in text
    assert "THE TABLE" in text
    assert "- retain[3]: image holds NaN values" in text
    assert ("| last step | 0.2500 |" in text) == bool(steps)
    settings = yaml.safe_load(text.partition("```yaml")[2].partition("```")[0])
    assert UnlearnConfig(**settings) == UnlearnConfig(betas=(0.5, 0.75))


@pytest.fixture(scope="module")
def result():
    """A short run on pictures with captions."""
    model = small_models.open_clip_vit()
    forget = [(Image.new("RGB", (40, 30), (200, i, 9)), f"apple {i}") for i in range(4)]
    retain = [(Image.new("RGB", (40, 30), (9, i, 200)), f"boat {i}") for i in range(20)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fasterase.unlearn(
            model, forget, retain, tokenizer=small_models.simple_tokenizer(), max_steps=2, **QUIET
        )


def test_a_folder_gets_the_report_the_plot_and_the_pictures(result, tmp_path):
    folder = tmp_path / "new" / "report"
    before = {name: tensor.clone() for name, tensor in result.model.state_dict().items()}
    assert result.report(folder) == folder
    assert {path.name for path in folder.iterdir()} == {"report.md", "losses.png", "pictures.png"}
    text = (folder / "report.md").read_text()
    assert "](losses.png)" in text
    assert "](pictures.png)" in text
    for name in ("losses.png", "pictures.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 300
    assert same_weights(before, result.model.state_dict())
    (tmp_path / "v1.0").mkdir()
    result.report(tmp_path / "v1.0")
    assert (tmp_path / "v1.0" / "report.md").is_file()


def test_without_matplotlib_all_but_the_plot_is_written(result, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(fasterase.MissingExtraError, match=r"fasterase\[eval\]"):
        result.report(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "pictures.png"}
    assert "losses.png" not in (tmp_path / "report.md").read_text()
