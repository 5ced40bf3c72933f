"""The arithmetic of the recipe comparison: what is chosen, and what is reported."""

from __future__ import annotations

import pytest

from benchmarks.recipes import __main__ as recipes
from benchmarks.recipes.runs import Ending, Run, Value


def value(recipe: str, subgroup: str, name: str, metric: str, after: float, **changes) -> Value:
    fields = {"lr": 1e-4, "keeping": 10.0, "steps": 60, "seed": 0, "original": 0.9, "chance": 0.02}
    fields |= {"recipe": recipe, "subgroup": subgroup, "set": name, "metric": metric}
    return Value(value=after, **(fields | changes))


def measured(recipe: str, subgroup: str, *, known: float, kept: float, **changes) -> list[Value]:
    """What one run reports: `known` of the concept, `kept` of the rest."""
    of = {"forget": known, "forget-unseen": known}
    return [
        value(recipe, subgroup, name, metric, of.get(name, kept), **changes)
        for name, metric in recipes.REPORTED
    ]


def test_tuning_and_test_subgroups_do_not_meet_and_there_are_enough():
    assert not set(recipes.VALIDATION) & set(recipes.TEST)
    assert len(set(recipes.TEST)) >= 8


def test_damage_counts_what_is_still_known_and_what_was_lost():
    assert recipes.damage(measured("a", "x", known=0.02, kept=0.9)) == pytest.approx(0)
    assert recipes.damage(measured("a", "x", known=0.12, kept=0.9)) == pytest.approx(2 * 0.10)
    assert recipes.damage(measured("a", "x", known=0.0, kept=0.8)) == pytest.approx(3 * 0.10)
    # Being below chance or above the original earns nothing.
    assert recipes.damage(measured("a", "x", known=0.0, kept=1.0)) == 0
    two = measured("a", "x", known=0, kept=0.8) + measured("a", "y", known=0, kept=0.9)
    assert recipes.damage(two) == pytest.approx(0.15)


def test_each_recipe_gets_its_own_best_setting_and_retain_only_ours():
    values = []
    for recipe, best in (("fixed rate", 1e-4), ("cliperase", 3e-5)):
        for lr in recipes.RATES:
            kept = 0.9 if lr == best else 0.5
            values += measured(recipe, "x", known=0, kept=kept, lr=lr)
    chosen = recipes.choose(values)
    assert chosen["fixed rate"] == (1e-4, 10.0, 60)
    assert chosen["cliperase"] == (3e-5, 10.0, 60)
    assert chosen["retain only"] == chosen["fixed rate"]
    assert chosen[recipes.UNTUNED] == (1e-4, 3.0, 90)


def test_summary_is_the_macro_mean_over_subgroups_with_its_interval():
    values = [
        row
        for recipe in recipes.RECIPES
        for subgroup, kept in (("x", 0.8), ("y", 0.9), ("z", 1.0))
        for row in measured(recipe, subgroup, known=0.0, kept=kept)
    ]
    rows = {(row["recipe"], row["set"], row["metric"]): row for row in recipes.summarise(values)}
    row = rows["fasterase", "retain", "image_to_text_recall@1"]
    assert row["mean"] == pytest.approx(0.9)
    assert row["change"] == pytest.approx(0.0)
    assert 0.8 <= row["low"] < 0.9 < row["high"] <= 1.0
    assert row["subgroups"] == 3
    text = recipes.table(list(rows.values()))
    assert len(text.splitlines()) == 1 + len(rows)


def test_runs_differ_in_name_and_use_their_settings():
    pairs = [(lr, weight) for lr in (1e-4, 2e-4) for weight in (10.0, 30.0)]
    grid = [Run("fixed rate", "x", lr, weight, (60, 100), 0) for lr, weight in pairs]
    assert len({run.name for run in grid}) == 4
    assert grid[1].config().anchor_weight == 30.0
    assert grid[1].config().max_steps == 100
    paper = Run("cliperase", "x", 3e-5, 9.0, (60,), 0).config()
    assert (paper.consistency_weight, paper.anchor_weight, paper.floor) == (9.0, 0.0, None)
    plain = Run("retain only", "x", 1e-4, 30.0, (60,), 0).config()
    assert (plain.forget_weight, plain.consistency_weight, plain.anchor_weight) == (0, 0, 0)
    own = Run("fasterase", "x", None, None, (), 0).config()
    less = Run("fasterase, plain", "x", None, None, (), 0).config()
    assert own.runs_until_forgotten
    assert (own.lr, own.forget_words, less.forget_words) == ("auto", True, False)
    assert (grid[0].config().cross_weight, less.cross_weight) == (0, 0)


def test_verdicts_are_counted_by_recipe_and_set():
    found = {"x": ("forgotten", 0.4), "y": ("forgotten", 0.6), "z": ("remembered", 0.8)}
    endings = [Ending("fasterase", name, 120, 0, "forget", *each) for name, each in found.items()]
    (line,) = recipes.count_verdicts(endings)
    assert "3 models: forgotten 2, remembered 1; residue 0.60 (0.40 to 0.80)" in line
