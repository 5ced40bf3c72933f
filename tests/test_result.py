"""The Markdown report of a run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import yaml
from torch import nn

from fasterase.config import UnlearnConfig
from fasterase.engine.history import StepRecord
from fasterase.pairs.skips import Skip
from fasterase.result import UnlearnResult


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
