"""The notebook of the demo is its script, runs, and shows pictures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

jupytext = pytest.importorskip("jupytext", reason="extra `dev`")

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "demo.py"


def cells(notebook: Any) -> list[tuple[str, str, list[str]]]:
    return [(c.cell_type, c.source, c.metadata.get("tags", [])) for c in notebook.cells]


def test_it_is_what_the_script_makes():
    script, notebook = (jupytext.read(SCRIPT.with_suffix(end)) for end in (".py", ".ipynb"))
    assert cells(script) == cells(notebook), "run `jupytext --to ipynb examples/demo.py`"
    assert all(c.outputs == [] for c in notebook.cells if c.cell_type == "code")


@pytest.mark.slow
def test_it_runs_away_from_the_repository_and_shows_pictures(tmp_path):
    from nbclient import NotebookClient

    notebook = jupytext.read(SCRIPT.with_suffix(".ipynb"))
    (parameters,) = (c for c in notebook.cells if c.metadata.get("tags") == ["parameters"])
    parameters.source = (
        'CONCEPT, CALLED = "lemon|melon", "<i>lemons</i>"\n'
        'SETTINGS = {"batch_size": 64, "forget_batch_size": 4, "max_steps": 2}\n'
        'SETTINGS |= {"forget_words": False}'
    )
    client = NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = {c.source.partition("\n")[0]: c.outputs for c in notebook.cells if "outputs" in c}
    drawn = next(found for source, found in outputs.items() if source.startswith("sets = "))
    assert sum("image/png" in each.get("data", ()) for each in drawn) == 3
    (shown,) = outputs["result"]
    page = shown.data["text/html"]
    assert "The model still knows &lt;i&gt;lemons&lt;/i&gt;." in page
    assert page.count('<img src="data:image/jpeg;base64,') > 20
    assert re.search(r'<th colspan="\d" [^>]*>forget-unseen \(\d+ pairs, to forget\)', page)
    text = {
        source: "".join(each.get("text", "") for each in found) for source, found in outputs.items()
    }
    (said,) = (found for source, found in text.items() if source.startswith("result = "))
    assert said.count("fasterase: erased model measured: remembered") == 1
    assert "\r" not in said
    assert "lost something. The worst:" in text["evaluation = result.evaluation"]
    assert "Verdict: model remembered" in text["print(evaluation.table())"]
    assert not [*tmp_path.iterdir()], "it leaves nothing"
