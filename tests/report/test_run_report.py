"""The Markdown report of a run."""

from __future__ import annotations

import pytest
import yaml

from fasterase.config import UnlearnConfig
from fasterase.report.run_report import describe_recipe, run_report


def test_recipes_are_named_by_what_they_differ_in():
    assert describe_recipe(UnlearnConfig()) == "fasterase defaults"
    assert (
        describe_recipe(UnlearnConfig(lr=1e-4, output_dir="x")) == "fasterase defaults; lr=0.0001"
    )
    assert describe_recipe(UnlearnConfig.cliperase()) == "cliperase (the paper's)"
    paper = describe_recipe(UnlearnConfig.cliperase(epochs=5))
    assert paper == "cliperase (the paper's); epochs=5"


@pytest.mark.parametrize("steps", [0, 2])
def test_report(tmp_path, steps):
    terms = dict.fromkeys(("total", "forget", "retain", "consistency", "anchor"), 0.25)
    path = tmp_path / "new" / "report.md"
    run_report(
        path,
        config=UnlearnConfig(betas=(0.5, 0.75)),
        history=[terms] * steps,
        evaluation="a table",
        forgotten=False,
        floor=0.1,
        excess=0.034,
        skipped=[("retain[3]", "image holds NaN values")],
        removed_from_retain=["retain[5]"],
        seconds=12.0,
    )
    text = path.read_text()
    assert "forgotten: **no**" in text
    assert "+0.100: 0.0340" in text
    assert "- retain[3]: image holds NaN values" in text
    assert ("| last step | 0.2500 |" in text) == bool(steps)
    settings = yaml.safe_load(text.partition("```yaml")[2].partition("```")[0])
    assert UnlearnConfig(**settings) == UnlearnConfig(betas=(0.5, 0.75))
