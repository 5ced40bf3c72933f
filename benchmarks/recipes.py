"""Compare erasing recipes on concepts that none of them was tuned on.

    python -m benchmarks.recipes [--processes 2]

The learning rate, the number of steps and the weight of the keeping term (fasterase: the anchor;
the paper: consistency) are chosen in the same way for each recipe, on the validation subgroups. The
chosen settings then run on the test subgroups; the mean over those is reported with a 95 % interval
(bootstrap over subgroups). "retain only" is the retain loss alone on fasterase's budget: what
fine-tuning does without erasing. --work keeps every run, so an interrupted command resumes.
Writes recipes.csv (every number), recipes_summary.csv and recipes.txt (the table) to --output.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fasterase
from benchmarks.result_files import RESULTS, write_csv
from fasterase.config import UnlearnConfig
from fasterase.demo import emoji
from fasterase.demo.run import forget_pairs, recipe_config
from fasterase.demo.sets import build_sets
from fasterase.files import write_text
from fasterase.models.load import load_model

VALIDATION = ("animal-marine", "food-asian")
TEST = (
    "food-fruit",
    "animal-bird",
    "food-sweet",
    "drink",
    "transport-air",
    "musical-instrument",
    "plant-flower",
    "sport",
)
RATES = (3e-5, 1e-4, 2e-4)
STEPS = (60, 100)
# The term that protects everything else, and its candidate weights: the recipe's own and three
# times that.
KEEPING = {
    "fasterase": ("anchor_weight", (10.0, 30.0)),
    "cliperase": ("consistency_weight", (3.0, 9.0)),
}

TUNED = tuple(KEEPING)
RETAIN_ONLY = {"forget_weight": 0.0, "consistency_weight": 0.0, "anchor_weight": 0.0}
RECIPES = (*TUNED, "retain only")

KEEP_SETS = ("retain", "neighbour", "holdout")
FORGET_SETS = ("forget", "forget-unseen")
REPORTED = (
    ("forget", "image_to_text_recall@1"),
    ("forget", "concept_hit@1"),
    ("forget-unseen", "image_to_text_recall@1"),
    ("forget-unseen", "concept_hit@1"),
    ("retain", "image_to_text_recall@1"),
    ("neighbour", "image_to_text_recall@1"),
    ("holdout", "image_to_text_recall@1"),
)

Setting = tuple[float, float, int]  # learning rate, weight of the keeping term, steps


@dataclass(frozen=True)
class Run:
    """One erasure, measured at one or more step counts."""

    recipe: str
    subgroup: str
    lr: float
    keeping: float
    steps: tuple[int, ...]
    seed: int

    @property
    def name(self) -> str:
        steps = "-".join(map(str, self.steps))
        parts = (self.recipe, self.subgroup, f"{self.lr:g}", f"{self.keeping:g}", steps, self.seed)
        return "_".join(map(str, parts)).replace(" ", "-")

    def config(self) -> UnlearnConfig:
        """Return the run's recipe for the small model."""
        if self.recipe == "retain only":
            base, own = "fasterase", RETAIN_ONLY
        else:
            base, own = self.recipe, {KEEPING[self.recipe][0]: self.keeping}
        return recipe_config(
            base, small_model=True, **own, lr=self.lr, max_steps=max(self.steps), seed=self.seed
        )


@dataclass(frozen=True)
class Value:
    """A metric of a set after a run, with the original's value and the chance level."""

    recipe: str
    subgroup: str
    lr: float
    keeping: float
    steps: int
    seed: int
    set: str
    metric: str
    value: float
    original: float
    chance: float


def execute(run: Run, work: Path) -> list[Value]:
    """Carry out a run, or read its result if it has already run."""
    result = work / f"{run.name}.json"
    if result.is_file():
        return [Value(**row) for row in json.loads(result.read_text(encoding="utf-8"))]
    torch.set_num_threads(1)
    wording = "cliperase" if run.recipe == "cliperase" else "fasterase"
    sets = build_sets(run.subgroup, original=str(emoji.BASE_MODEL), seed=run.seed)
    model = load_model(str(emoji.BASE_MODEL))
    values: list[Value] = []

    def measure(record: Any) -> None:
        if record.step not in run.steps:
            return
        evaluation = fasterase.evaluate(
            model,
            sets.forget,
            sets.retain,
            holdout=sets.holdout,
            sets=sets.sets,
            original=str(emoji.BASE_MODEL),
        )
        assert evaluation.original is not None
        for name, scores in evaluation.scores.items():
            for metric, value in scores.items():
                values.append(
                    Value(
                        run.recipe,
                        run.subgroup,
                        run.lr,
                        run.keeping,
                        record.step,
                        run.seed,
                        name,
                        metric,
                        value,
                        evaluation.original[name][metric],
                        evaluation.chance[name][metric],
                    )
                )

    with tempfile.TemporaryDirectory() as cache:
        fasterase.unlearn(
            model.module,
            forget_pairs(sets, wording),
            sets.retain,
            config=run.config().replace(progress=False, reference_cache=cache),
            tokenizer=model.text_tokenizer,
            callback=measure,
        )
    write_text(result, json.dumps([asdict(value) for value in values]))
    return values


def execute_all(runs: Iterable[Run], work: Path, processes: int) -> list[Value]:
    """Carry out runs in parallel, each with one thread."""
    values: list[Value] = []
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        pending = {pool.submit(execute, run, work): run for run in runs}
        for number, done in enumerate(as_completed(pending), start=1):
            values += done.result()
            print(f"[{number}/{len(pending)}] {pending[done].name}", flush=True)
    return sorted(values, key=lambda v: (v.recipe, v.subgroup, *setting(v), v.seed))


def setting(value: Value) -> Setting:
    """Return the tuned settings of the run that a value belongs to."""
    return value.lr, value.keeping, value.steps


def damage(values: list[Value]) -> float:
    """Return what tuning minimises: the trace of the concept plus the loss of everything else.

    It is the sum of the concept hit@1 beyond chance on forget and forget-unseen and of the recall@1
    lost on retain, neighbour and holdout, averaged over subgroups. All are shares, 0 to 1.
    """
    terms = []
    for value in values:
        if value.set in FORGET_SETS and value.metric == "concept_hit@1":
            terms.append(max(value.value - value.chance, 0.0))
        if value.set in KEEP_SETS and value.metric == "image_to_text_recall@1":
            terms.append(max(value.original - value.value, 0.0))
    return sum(terms) / len({value.subgroup for value in values})


def choose(values: list[Value]) -> dict[str, Setting]:
    """Choose for each recipe the setting of least damage on the validation subgroups."""
    chosen: dict[str, Setting] = {}
    for recipe in TUNED:
        by_setting: dict[Setting, list[Value]] = {}
        for value in values:
            if value.recipe == recipe:
                by_setting.setdefault(setting(value), []).append(value)
        scores = {tried: damage(those) for tried, those in by_setting.items()}
        chosen[recipe] = min(scores, key=lambda tried: scores[tried])
        for tried, score in sorted(scores.items()):
            lr, keeping, steps = tried
            mark = "  <- chosen" if tried == chosen[recipe] else ""
            name = f"{recipe:10} lr {lr:g}, {KEEPING[recipe][0]} {keeping:g}, {steps:3} steps"
            print(f"{name}: damage {score:.3f}{mark}")
    return {**chosen, "retain only": chosen["fasterase"]}


def summarise(values: list[Value]) -> list[dict[str, Any]]:
    """Average each reported metric and its change over subgroups, with 95 % intervals of both."""
    rows = []
    for recipe in RECIPES:
        for name, metric in REPORTED:
            found = [v for v in values if (v.recipe, v.set, v.metric) == (recipe, name, metric)]
            after = np.array([v.value for v in found])
            change = after - np.array([v.original for v in found])
            low, high = interval(after)
            change_low, change_high = interval(change)
            rows.append(
                {
                    "recipe": recipe,
                    "lr": found[0].lr,
                    "keeping": found[0].keeping,
                    "steps": found[0].steps,
                    "set": name,
                    "metric": metric,
                    "subgroups": len({v.subgroup for v in found}),
                    "chance": float(np.mean([v.chance for v in found])),
                    "original": float(np.mean([v.original for v in found])),
                    "mean": float(after.mean()),
                    "low": low,
                    "high": high,
                    "change": float(change.mean()),
                    "change_low": change_low,
                    "change_high": change_high,
                }
            )
    return rows


def interval(values: np.ndarray, resamples: int = 10_000) -> tuple[float, float]:
    """Bootstrap the 95 % percentile interval of the mean over subgroups (and seeds)."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(0, len(values), (resamples, len(values)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def table(rows: list[dict[str, Any]]) -> str:
    """Format the summary as text, in percent."""
    lines = [
        f"{'recipe':12} {'set':14} {'metric':22} {'chance':>6} {'original':>8} {'after':>6} "
        f"{'95 % interval':>16} {'change':>7}"
    ]
    for row in rows:
        span = f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"
        lines.append(
            f"{row['recipe']:12} {row['set']:14} {row['metric']:22} {100 * row['chance']:6.1f} "
            f"{100 * row['original']:8.1f} {100 * row['mean']:6.1f} {span:>16} "
            f"{100 * row['change']:+7.1f}"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Tune, test and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--processes", type=int, default=2, help="number of parallel runs, each with one thread"
    )
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds of the test runs")
    parser.add_argument("--work", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    tuning = [
        Run(recipe, subgroup, lr, keeping, STEPS, seed=0)
        for recipe in TUNED
        for subgroup in VALIDATION
        for lr in RATES
        for keeping in KEEPING[recipe][1]
    ]
    tuned = execute_all(tuning, options.work, options.processes)
    chosen = choose(tuned)
    testing = [
        Run(recipe, subgroup, lr, keeping, (steps,), seed)
        for recipe, (lr, keeping, steps) in chosen.items()
        for subgroup in TEST
        for seed in range(options.seeds)
    ]
    tested = execute_all(testing, options.work, options.processes)
    rows = summarise(tested)
    every = [{"phase": "validation", **asdict(value)} for value in tuned]
    every += [{"phase": "test", **asdict(value)} for value in tested]
    write_csv(options.output / "recipes.csv", every)
    write_csv(options.output / "recipes_summary.csv", rows)
    text = table(rows)
    write_text(options.output / "recipes.txt", text)
    print(text)


if __name__ == "__main__":
    main()
