"""The demo is the public `unlearn` on the shipped pairs: its sets, its outputs, its errors."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from types import SimpleNamespace

import open_clip
import pytest
import torch
from PIL import Image

import fasterase
from fasterase.config import UnlearnConfig
from fasterase.demo import emoji
from fasterase.demo.run import RECIPES, print_result, recipe_config, run_demo, summary
from fasterase.demo.sets import HOLDOUT_SHARE, build_sets
from fasterase.report.evaluation import Evaluation


@pytest.fixture(scope="module")
def fruit():
    return build_sets("food-fruit", original=str(emoji.BASE_MODEL), seed=0)


def test_kept_concepts_are_split_by_concept_and_others_are_in_neither(fruit):
    retain, holdout, forget = (set(s.names) for s in (fruit.retain, fruit.holdout, fruit.forget))
    assert forget == set(fruit.concepts)
    assert not forget & (retain | holdout)
    assert not retain & holdout
    share = len(holdout) / (len(retain) + len(holdout))
    assert abs(share - HOLDOUT_SHARE) < 0.01
    outside = {record["concept"] for record, _ in emoji.samples("noto") if not record["member"]}
    assert outside
    assert not outside & (retain | holdout | forget)


def test_neighbours_are_kept_concepts_that_resemble_the_forgotten(fruit):
    neighbours = set(fruit.neighbour.names)
    kept = set(fruit.retain.names) | set(fruit.holdout.names)
    assert neighbours <= kept
    group = {record["concept"]: record["group"] for record, _ in emoji.samples("noto")}

    def share_of_food(names: set[str]) -> float:
        return sum(group[name] == "food-drink" for name in names) / len(names)

    assert share_of_food(neighbours) > 2 * share_of_food(kept)


def test_drawings_to_forget_have_many_captions_and_unseen_ones_are_of_the_same_concepts(fruit):
    assert set(fruit.unseen.names) == set(fruit.concepts)
    assert len(fruit.unseen) == len(fruit.concepts)
    assert len(fruit.forget) == len(emoji.TRAIN_TEAMS) * len(fruit.concepts)
    pair = fruit.forget[0]
    assert isinstance(pair["image"], Image.Image)
    assert pair["text"][0] == fruit.forget.names[0]
    assert len(pair["text"]) > 3
    assert fruit.forget.reworded(emoji.name_only)[0]["text"] == [fruit.forget.names[0]]


@pytest.mark.parametrize("expression", ["no such thing", ".", "("])
def test_an_expression_that_chooses_nothing_or_everything_is_refused(expression):
    with pytest.raises(fasterase.InputError, match="forget"):
        build_sets(expression, original=str(emoji.BASE_MODEL), seed=0)


def test_unknown_recipe_is_refused():
    with pytest.raises(fasterase.InputError, match="recipe"):
        recipe_config("magic", small_model=True)


def test_recipes_are_the_public_ones_and_only_the_papers_has_numbers_for_the_small_model():
    own, papers = (recipe_config(recipe, small_model=True) for recipe in RECIPES)
    batches = {"batch_size": own.batch_size, "forget_batch_size": own.forget_batch_size}
    assert own == UnlearnConfig(evaluation=None, **batches)
    assert papers.lr > recipe_config("cliperase", small_model=False).lr
    assert not papers.forget_augment


@pytest.mark.slow
def test_the_demo_leaves_what_it_says(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fasterase.progress, "LOG_SECONDS", 1e9)  # on a slow machine too
    with pytest.warns(UserWarning, match="verdict: remembered") as caught:
        evaluation = run_demo(forget="lemon|melon", max_steps=2, forget_words=False)
    own, other = (str(w.message) for w in caught if "verdict" in str(w.message))
    assert own.startswith("verdict: remembered")
    assert other.startswith("paper's recipe (comparison): verdict: remembered")
    tmp_path /= "runs/demo-lemon_melon"
    shown, said = capsys.readouterr()
    assert "\r" not in shown + said
    before = shown.partition(summary(evaluation, "fasterase"))[0].splitlines()
    # Of at most 25, ten are left for the lines of five minutes, one for a word's lost meaning.
    assert len(before) + len(said.splitlines()) + len(caught) <= 14
    for phase in ("erasing from", "original measured", "trained", "erased model measured"):
        assert said.count(f"fasterase: {phase}") == 2
    assert summary(evaluation, "fasterase") in shown
    assert shown.endswith("Read runs/demo-lemon_melon/report.html\n")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "The model still knows lemon|melon." in page
    assert "cliperase recipe" in page, "beside the reference"
    assert page.count("data:image/jpeg") > 10
    assert len(page) < 3_000_000
    assert evaluation.table() not in shown
    assert evaluation.table() in (tmp_path / "evaluation.txt").read_text(encoding="utf-8")
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text.count("## Evaluation\n") == 1
    assert evaluation.table() in text, "the demo's own, not the run's smaller one"
    assert set(evaluation.references) == {"cliperase recipe"}
    assert {"forget", "retain", "holdout", "forget-unseen", "neighbour"} <= set(evaluation.scores)
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 2
    stored = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    assert stored
    for name in ("losses.png", "pictures.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 300
    erased, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'model'}")
    base, _, _ = open_clip.create_model_and_transforms(f"local-dir:{emoji.BASE_MODEL}")
    changed = [
        name
        for name, weight in erased.state_dict().items()
        if not torch.equal(weight, base.state_dict()[name])
    ]
    assert changed


def test_a_missing_matplotlib_is_told_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(fasterase.MissingExtraError, match="eval"):
        run_demo(output_dir=str(tmp_path / "demo"))
    assert not (tmp_path / "demo").exists()


def test_a_model_that_never_knew_the_concept_has_no_losses_to_plot(tmp_path, monkeypatch):
    untouched = SimpleNamespace(history=[])
    evaluation = SimpleNamespace(table=lambda: "", to_json=lambda path: None)
    monkeypatch.setattr(fasterase, "unlearn", lambda *args, **kwargs: untouched)
    monkeypatch.setattr(fasterase, "evaluate", lambda *args, **kwargs: evaluation)
    for shown in ("draw_sheet", "print_result"):
        monkeypatch.setattr(f"fasterase.demo.run.{shown}", lambda *args, **kwargs: None)
    assert run_demo(output_dir=str(tmp_path)) is evaluation


NAMED, RIGHT = "concept_hit@1", "image_to_text_recall@1"


@pytest.fixture
def evaluation() -> Evaluation:
    """An evaluation whose values differ by model: 0.9 the original, 0.1 the model, 0.3, 0.2."""

    def scores(value: float) -> dict[str, dict[str, float]]:
        names = ("forget", "forget-unseen", "retain", "holdout", "neighbour")
        return {name: {RIGHT: value, NAMED: value / 2} for name in names}

    return Evaluation(
        scores=scores(0.1),
        intervals={name: dict.fromkeys(values, (0.0, 1.0)) for name, values in scores(0).items()},
        chance=scores(0.042),
        pairs=dict.fromkeys(scores(0), 7),
        settings={"model": "m", "candidates": 9},
        forget_sets=["forget", "forget-unseen"],
        original=scores(0.9),
        references={"cliperase recipe": scores(0.3), "retrained without it": scores(0.2)},
    )


def test_summary_is_six_lines_of_at_most_100_columns(evaluation):
    lines = summary(evaluation, "fasterase").splitlines()
    assert len(lines) == 6
    assert max(map(len, lines)) <= 100
    assert lines[0].split("  ")[-3:] == ["fasterase", "paper's recipe", "retrained without it"]
    for line in lines[1:3]:  # any name of the erased concept counts
        assert line.startswith("forget")
        assert re.findall(r"[\d.]+ %", line)[-4:] == ["45.0 %", "5.0 %", "15.0 %", "10.0 %"]
    assert "by chance: 2.1 %" in lines[1]
    for line in lines[3:]:
        assert re.findall(r"[\d.]+ %", line) == ["90.0 %", "10.0 %", "30.0 %", "20.0 %"]
    other = dataclasses.replace(evaluation, references={"fasterase recipe": evaluation.scores})
    assert summary(other, "cliperase").splitlines()[0].endswith("  paper's recipe  fasterase")


@pytest.mark.parametrize("full", [False, True])
def test_the_long_table_is_printed_only_if_wanted(evaluation, capsys, tmp_path, full):
    evaluation = dataclasses.replace(
        evaluation, set_verdicts={"model": {"forget": "forgotten", "forget-unseen": "remembered"}}
    )
    for name, residue in (("forget", 0.4), ("forget-unseen", 0.8)):
        for direction in ("image_to_text", "text_to_image"):
            evaluation.scores[name][f"{direction}_residue"] = residue
            evaluation.intervals[name][f"{direction}_residue"] = (0.0, 1.0)
            evaluation.chance[name][f"{direction}_residue"] = 0.5
    print_result(evaluation, tmp_path, recipe="fasterase", full=full)
    shown = capsys.readouterr().out
    assert shown.lstrip().startswith(summary(evaluation, "fasterase"))
    assert (evaluation.table() in shown) == full
    assert str(tmp_path / "evaluation.txt") in shown
    assert ("--full" in shown) != full
    verdicts = "forget forgotten (residue 0.40), forget-unseen remembered (residue 0.80)."
    assert f"Verdict on fasterase: {verdicts}" in shown
