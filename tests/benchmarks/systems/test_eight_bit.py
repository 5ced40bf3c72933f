"""The comparison of optimisers: which runs are paired, and what is reported of them."""

from __future__ import annotations

import math

import pytest

from benchmarks.recipes.runs import FORGET_SETS, OPTIMIZERS, Ending, Outcome, Run, Value
from benchmarks.systems import eight_bit


def outcome(recipe: str, subgroup: str, seed: int, *, kept: float, residue: float) -> Outcome:
    values = [
        Value(recipe, subgroup, None, None, 50, seed, name, metric, kept, 0.9, 0.02)
        for name, metric, _ in eight_bit.MEASURED.values()
    ]
    ended = ("forgotten", residue)
    return Outcome(values, [Ending(recipe, subgroup, 50, seed, n, *ended) for n in FORGET_SETS])


def table(*outcomes: Outcome) -> list[dict]:
    values = [value for each in outcomes for value in each.values]
    endings = [ending for each in outcomes for ending in each.endings]
    endings.append(Ending("original", "x", 50, 0, "forget", "remembered", 1.0))
    return eight_bit.tabulate(Outcome(values, endings), "optimizer", "adamw")


def test_differences_are_paired_and_seeds_are_compared_within_a_subgroup():
    rows = table(
        outcome("fasterase", "x", 0, kept=0.80, residue=0.50),
        outcome("fasterase", "x", 1, kept=0.84, residue=0.52),
        outcome("fasterase", "y", 0, kept=0.30, residue=0.50),
        outcome("fasterase, adamw8bit", "x", 0, kept=0.81, residue=0.49),
        outcome("fasterase, adamw8bit", "x", 1, kept=0.85, residue=0.51),
        outcome("fasterase, adamw8bit", "z", 0, kept=0.10, residue=0.10),  # has no partner
    )
    assert [row["optimizer"] for row in rows].count("adamw8bit") == 3
    assert rows[0]["retain recall@1 change"] == pytest.approx(0.80 - 0.9)
    assert rows[0]["forget hit@1"] == 0.80
    assert rows[0]["forget verdict"] == "forgotten"
    lines = eight_bit.compare(rows).splitlines()
    (kept,) = (line.split() for line in lines if "retain recall@1 change" in line)
    assert kept[4:7] == ["-0.080", "-0.070", "+0.010"]
    assert kept[-1] == "0.040"
    (residue,) = (line.split() for line in lines if " forget residue" in line)
    assert residue[3:6] == ["0.510", "0.500", "-0.010"]
    assert any("3 runs: forgotten 3" in line for line in lines if line.startswith("adamw8bit"))


def test_one_seed_tells_nothing_of_chance():
    rows = table(
        outcome("fasterase", "x", 0, kept=0.8, residue=0.5),
        outcome("fasterase", "y", 0, kept=0.3, residue=0.5),
    )
    baseline = {(row["subgroup"], row["seed"]): row for row in rows}
    assert math.isnan(eight_bit.seed_distance(baseline, "forget residue"))


def test_runs_differ_from_the_default_only_in_the_optimizer():
    plain = Run("fasterase", "x", None, None, (), 0).config()
    for recipe, changed in OPTIMIZERS.items():
        config = Run(recipe, "x", None, None, (), 0).config()
        assert config == plain.replace(**changed)
        assert config != plain
