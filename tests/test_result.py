"""The report of a run: a Markdown file, or a folder with pictures."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image
from torch import nn

import fasterase
from fasterase.config import UnlearnConfig
from fasterase.engine.history import StepRecord
from fasterase.engine.words import Word
from fasterase.evaluation.verdict import Trace
from fasterase.pairs.skips import Skip
from fasterase.report.evaluation import Evaluation
from tests import small_models
from tests.test_page import HOSTILE, Outline
from tests.tiny_model import same_weights

QUIET = {"progress": False, "evaluation": None}
TRACE = Trace(0.7, 0.5, 0.1, 0.02, 0.3, 0.05, 38)


def run(model, *, filters="ignore", name="apple", **fields):
    """A short run on pictures with captions."""
    forget = [(Image.new("RGB", (40, 30), (200, i, 9)), f"{name} {i}") for i in range(4)]
    retain = [(Image.new("RGB", (40, 30), (9, i, 200)), f"boat {i}") for i in range(20)]
    options = {"tokenizer": small_models.simple_tokenizer(), "max_steps": 2}
    with warnings.catch_warnings():
        warnings.simplefilter(filters)
        return fasterase.unlearn(model, forget, retain, **options, **{**QUIET, **fields})


@pytest.fixture(scope="module")
def result():
    return run(small_models.open_clip_vit())


def steps(count: int) -> list[StepRecord]:
    terms = dict.fromkeys(("total", "forget", "retain", "consistency", "anchor"), 0.25)
    return [StepRecord(terms)] * count


@pytest.mark.parametrize(
    ("verdict", "forgotten"),
    [
        ("forgotten", True),
        ("never known", True),
        ("over-erased", False),
        ("remembered", False),
        (None, False),
    ],
)
def test_only_no_trace_is_forgotten(result, verdict, forgotten):
    assert replace(result, verdict=verdict).forgotten is forgotten


@pytest.mark.parametrize("count", [0, 2])
def test_report(result, tmp_path, count):
    path = tmp_path / "new" / "report.md"
    measured = Evaluation({}, {}, {}, {}, {"model": "m", "candidates": 9})
    shown = replace(
        result,
        history=steps(count),
        evaluation=measured,
        verdict="forgotten",
        traces={"forget": TRACE},
        config=UnlearnConfig(betas=(0.5, 0.75)),
        skipped=[Skip("retain[3]", "image holds NaN values")],
        words=[Word("apple", 1, 0)],
    )
    assert shown.report(path) == path
    text = path.read_text()
    assert "lost their meaning: **apple** (1 forget pair)" in text
    assert "verdict: **forgotten**" in text
    assert "- concept: not stated" in text
    assert measured.table() in text
    assert r"- retain\[3\]: image holds NaN values" in text
    assert ("| last step | 0.2500 |" in text) == bool(count)
    settings = yaml.safe_load(text.partition("```yaml")[2].partition("```")[0])
    assert UnlearnConfig(**settings) == UnlearnConfig(betas=(0.5, 0.75))


def test_a_folder_gets_the_report_the_plot_and_the_pictures(result, tmp_path):
    folder = tmp_path / "new" / "report"
    before = {name: tensor.clone() for name, tensor in result.model.state_dict().items()}
    assert result.report(folder) == folder
    reports = {"report.md", "report.html", "losses.png", "pictures.png"}
    assert {path.name for path in folder.iterdir()} == reports
    alone = result.report(tmp_path / "page.html").read_text(encoding="utf-8")
    assert alone.startswith("<!doctype html>")
    assert alone.count("data:image/jpeg") == 4 + 8 + 8
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
    (tmp_path / "notes").touch()
    assert result.report(tmp_path / "notes").read_text().startswith("# Erasure report")
    with pytest.raises(fasterase.InputError, match="path: "):
        result.report(tmp_path / "notes" / "report")


def test_concept_and_request_stand_in_report_and_provenance_and_the_card_names_one(tmp_path):
    result = run(small_models.open_clip_vit(), concept="apples", request="REQ-17")
    assert result.concept == "apples"
    assert "concept: apples" in repr(result)
    text = result.report(tmp_path / "report.md").read_text()
    assert "- concept: apples" in text
    assert "- Request:\n  - REQ-17\n" in text
    saved = result.save(tmp_path / "model")
    assert "- concept: apples" in (saved / "README.md").read_text()
    assert "REQ-17" not in (saved / "README.md").read_text()
    record = json.loads((saved / "provenance.json").read_text())
    assert (record["concept"], record["request"]) == ("apples", "REQ-17")


@pytest.mark.parametrize("concept", ["", " ", 3, ["apples"]], ids=repr)
def test_a_concept_is_words_and_so_is_a_request(concept):
    with pytest.raises(fasterase.InputError, match=r"^concept=.*must say in words"):
        run(None, concept=concept)
    with pytest.raises(fasterase.InputError, match=r"^request=.*must name what asked"):
        run(None, request=concept)


def test_without_matplotlib_all_but_the_plot_is_written(result, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(fasterase.MissingExtraError, match=r"fasterase\[eval\]"):
        result.report(tmp_path)
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"report.md", "report.html", "pictures.png"}
    assert "losses.png" not in (tmp_path / "report.md").read_text()


@pytest.mark.filterwarnings("ignore:verdict", "ignore:retain")
def test_a_run_does_not_end_with_its_pictures(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("no room for the original")

    monkeypatch.setattr("fasterase.result.example_rows", fail)
    model = small_models.open_clip_vit()
    with pytest.warns(UserWarning, match=r"no pictures \(OutOfMemoryError: no room"):
        run(model, output_dir=tmp_path, filters="default")
    assert (tmp_path / "model").is_dir()
    assert "No pictures" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("value", [None, 3, ["a"]], ids=str)
def test_what_is_no_path_is_refused_by_name(result, value):
    found = f"expected a path, found {type(value).__name__}"
    for argument, write in (("folder", result.save), ("path", result.report)):
        with pytest.raises(fasterase.InputError, match=f"^{argument}: {found}"):
            write(value)
    with pytest.raises(fasterase.InputError, match=f"^folder: {found}"):
        fasterase.apply_delta(nn.Identity(), value)


@pytest.fixture
def judged(result):
    """A result whose pictures and measurement stand for others."""
    return replace(
        result,
        history=steps(2000),
        evaluation=SimpleNamespace(_repr_html_=lambda: "<table>EVALUATION</table>"),
        verdict="forgotten",
        traces={"forget": TRACE},
        seconds=12.0,
        encoder=SimpleNamespace(public_name="ViT-B-32/<tag>"),
        sets={},
    )


def test_repr_fits_one_screen(judged):
    saved = replace(judged, config=UnlearnConfig(output_dir="runs/apples"))
    assert repr(saved).splitlines() == [
        "UnlearnResult:",
        "  model: ViT-B-32/<tag>",
        "  verdict: forgotten",
        "  residue: 0.60",
        "  steps: 2,000",
        "  seconds: 12.0",
        "  saved in: runs/apples",
    ]
    unjudged = repr(replace(judged, verdict=None, traces={}))
    assert "verdict: none" in unjudged
    assert "residue" not in unjudged
    assert "saved" not in unjudged


def test_a_notebook_shows_what_there_is_when_the_pictures_are_gone(judged):
    shown = judged._repr_html_()
    assert "The model has forgotten what it was to forget." in shown
    assert "ViT-B-32/&lt;tag&gt;" in shown
    assert '<td style="text-align: left">forgotten</td>' in shown
    assert "no pictures" in shown
    assert shown.endswith("<table>EVALUATION</table>")
    assert "EVALUATION" not in replace(judged, evaluation=None)._repr_html_()


def test_a_notebook_shows_pictures_and_what_strangers_wrote_adds_no_element():
    outlines = []
    for name in ("apple", HOSTILE):
        result = run(small_models.open_clip_vit(), name=name, concept=name, evaluation="quick")
        shown = result._repr_html_()
        assert shown.count('<img src="data:image/jpeg;base64,') == 4 + 8 + 8
        assert "alert(2)" in shown or name == "apple"
        assert shown.count("before: <bdi>") == 20
        assert shown.count("<table>") == 2
        shown.encode()
        outlines.append(Outline(shown).tags)
    assert outlines[0] == outlines[1]


def test_a_half_precision_model_is_shown_too(tmp_path):
    result = run(small_models.open_clip_vit().half())
    assert (result.report(tmp_path / "report") / "pictures.png").is_file()
    assert next(result.model.parameters()).dtype == torch.float16
