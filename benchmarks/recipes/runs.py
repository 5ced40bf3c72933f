"""Runs of the recipes on the demo's model: carried out once, measured and kept."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import fasterase
from benchmarks.command import TEST
from benchmarks.processes import call_all
from fasterase.config import UnlearnConfig
from fasterase.demo import emoji
from fasterase.demo.run import evaluate_sets, recipe_config, trained_pairs
from fasterase.demo.sets import build_sets
from fasterase.errors import InputError
from fasterase.evaluation.metrics import bootstrap_intervals
from fasterase.files import write_text
from fasterase.models.load import load_model
from fasterase.option_values import parse_named

# The term that protects everything else, and its candidate weights: the recipe's own and three
# times that.
KEEPING = {
    "fixed rate": ("anchor_weight", (10.0, 30.0)),
    "cliperase": ("consistency_weight", (3.0, 9.0)),
}
# The default without what it does to words and between towers; so is the fixed rate's.
PLAIN = {"forget_words": False, "cross_weight": 0.0}
# What the others are given besides batch sizes.
AUTOMATIC: dict[str, dict[str, Any]] = {"fasterase": {}, "fasterase, plain": PLAIN}
BASELINE = "fasterase"
# The default with other optimisers, which `benchmarks.systems.eight_bit` compares with it.
OPTIMIZERS = {f"fasterase, {name}": {"optimizer": name} for name in ("adamw8bit", "lion8bit")}
# The default where less than all is trained, which `benchmarks.recipes.tune` compares with it.
TUNES = {f"fasterase, {tune}": {"tune": tune} for tune in ("lora:8", "last:1")}
# Those that choose rate and steps themselves.
DECIDING: dict[str, dict[str, Any]] = {**AUTOMATIC, **OPTIMIZERS, **TUNES}
RETAIN_ONLY = {"forget_weight": 0.0, "consistency_weight": 0.0, "anchor_weight": 0.0}
UNTUNED = "cliperase, untuned"

KEEP_SETS = ("retain", "neighbour", "holdout")
FORGET_SETS = ("forget", "forget-unseen")

# Column -> (set, metric, whether the change from the original is meant).
MEASURED = {
    "forget hit@1": ("forget", "concept_hit@1", False),
    "forget-unseen hit@1": ("forget-unseen", "concept_hit@1", False),
    **{f"{name} recall@1 change": (name, "image_to_text_recall@1", True) for name in KEEP_SETS},
}

# Learning rate, weight of the keeping term, steps; None where the recipe chooses for itself.
Setting = tuple[float | None, float | None, int | None]


@dataclass(frozen=True)
class Run:
    """One erasure, measured at one or more step counts; without any, when it ends."""

    recipe: str
    subgroup: str
    lr: float | None
    keeping: float | None
    steps: tuple[int, ...]
    seed: int

    @property
    def name(self) -> str:
        rate = "auto" if self.lr is None else f"{self.lr:g}"
        steps = "-".join(map(str, self.steps)) or "auto"
        parts = (self.recipe, self.subgroup, rate, self.keeping, steps, self.seed)
        return "_".join(map(str, parts)).replace(" ", "-").replace(",", "").replace(":", "")

    @property
    def is_papers(self) -> bool:
        return self.recipe in ("cliperase", UNTUNED)

    def config(self) -> UnlearnConfig:
        """Return the run's recipe for the small model."""
        base = "cliperase" if self.is_papers else "fasterase"
        own: dict[str, Any] = {}
        if self.recipe in DECIDING:
            own = DECIDING[self.recipe]
        else:
            own = {"lr": self.lr, "max_steps": max(self.steps)}
            if self.recipe == "retain only":
                own |= {**RETAIN_ONLY, "floor": None}
            else:
                own |= PLAIN
                own[KEEPING["cliperase" if self.is_papers else self.recipe][0]] = self.keeping
        return recipe_config(base, small_model=True, **own, seed=self.seed)


@dataclass(frozen=True)
class Value:
    """A metric of a set after a run, with the original's value and the chance level."""

    recipe: str
    subgroup: str
    lr: float | None
    keeping: float | None
    steps: int
    seed: int
    set: str
    metric: str
    value: float
    original: float
    chance: float


@dataclass(frozen=True)
class Ending:
    """How a run ended: the verdict on a set to forget, and its mean residue.

    The recipes "original" and "retrained" are models that no run made.
    """

    recipe: str
    subgroup: str
    steps: int
    seed: int
    set: str
    verdict: str
    residue: float


@dataclass(frozen=True)
class Outcome:
    """The measurements of a run."""

    values: list[Value]
    endings: list[Ending]


def execute(run: Run, work: Path, retrained: dict[str, str]) -> Outcome:
    """Carry out a run, or read its result from `work` if it has already run.

    `retrained` maps subgroups to folders of models that were trained without them.
    """
    result = work / f"{run.name}.json"
    if result.is_file():
        stored = json.loads(result.read_text(encoding="utf-8"))
        return Outcome(
            [Value(**row) for row in stored["values"]], [Ending(**row) for row in stored["endings"]]
        )
    sets = build_sets(run.subgroup, original=str(emoji.BASE_MODEL), seed=run.seed)
    model = load_model(str(emoji.BASE_MODEL))
    references = {"retrained": retrained[run.subgroup]} if run.subgroup in retrained else {}
    values: list[Value] = []
    endings: list[Ending] = []

    def measure(steps: int) -> None:
        evaluation = evaluate_sets(
            model, sets, original=str(emoji.BASE_MODEL), progress=False, references=references
        )
        assert evaluation.original is not None
        here = (run.recipe, run.subgroup, run.lr, run.keeping, steps, run.seed)
        for name, scores in evaluation.scores.items():
            original, chance = evaluation.original[name], evaluation.chance[name]
            for metric, value in scores.items():
                values.append(Value(*here, name, metric, value, original[metric], chance[metric]))
        models = {"model": evaluation.scores, "original": evaluation.original}
        for model_name, scores_of in {**models, **evaluation.references}.items():
            for name, verdict in evaluation.set_verdicts[model_name].items():
                residue = evaluation.mean_residue(name, scores_of)
                assert residue is not None
                recipe = run.recipe if model_name == "model" else model_name
                ending = Ending(recipe, run.subgroup, steps, run.seed, name, verdict, residue)
                endings.append(ending)

    def measure_at(record: Any) -> None:
        if record.step in run.steps:
            measure(record.step)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "verdict: ")  # it is in the results
        erased = fasterase.unlearn(
            model.module,
            *trained_pairs(sets, "cliperase" if run.is_papers else "fasterase"),
            config=run.config().replace(progress=False),
            tokenizer=model.text_tokenizer,
            callback=measure_at,
        )
    if not run.steps:
        measure(len(erased.history))
    outcome = Outcome(values, endings)
    write_text(result, json.dumps(asdict(outcome)))
    return outcome


def execute_all(
    runs: Iterable[Run], work: Path, processes: int, retrained: dict[str, str]
) -> Outcome:
    """Carry out runs in parallel, each with one thread."""
    found = call_all(
        execute, runs, work, retrained, processes=processes, describe=lambda run: run.name
    )
    values = [value for outcome in found.values() for value in outcome.values]
    endings = [ending for outcome in found.values() for ending in outcome.endings]
    values.sort(key=lambda v: (v.recipe, v.subgroup, *map(str, setting(v)), v.seed))
    endings.sort(key=lambda e: (e.recipe, e.subgroup, e.steps, e.seed, e.set))
    return Outcome(values, endings)


def default_runs(recipes: Iterable[str], subgroups: Iterable[str], seeds: int) -> list[Run]:
    """Return runs of the default, and of variants of it, which choose rate and steps."""
    return [
        Run(recipe, subgroup, None, None, (), seed)
        for seed in range(seeds)
        for subgroup in subgroups
        for recipe in (BASELINE, *recipes)
    ]


def tabulate(outcome: Outcome, varied: str, default: str) -> list[dict[str, Any]]:
    """Return a row per run: its verdict, what is left of the concept, and the damage.

    The first column is the setting that varies, `default` in the default recipe.
    """
    rows: dict[tuple[str, str, int], dict[str, Any]] = {}
    for value in outcome.values:
        run = (value.recipe, value.subgroup, value.seed)
        row = rows.setdefault(run, {"steps": value.steps})
        for column, (name, metric, is_change) in MEASURED.items():
            if (value.set, value.metric) == (name, metric):
                row[column] = value.value - (value.original if is_change else 0.0)
    for ending in outcome.endings:
        found = rows.get((ending.recipe, ending.subgroup, ending.seed))
        if found is not None:  # not the original's
            found[f"{ending.set} verdict"] = ending.verdict
            found[f"{ending.set} residue"] = ending.residue
    return [
        {varied: DECIDING[recipe].get(varied, default), "subgroup": subgroup, "seed": seed, **row}
        for (recipe, subgroup, seed), row in sorted(rows.items())
    ]


def setting(value: Value) -> Setting:
    """Return the tuned settings of the run that a value belongs to."""
    return value.lr, value.keeping, value.steps


def interval(values: np.ndarray, resamples: int = 10_000) -> tuple[float, float]:
    """Bootstrap the 95 % percentile interval of the mean over subgroups (and seeds)."""
    return bootstrap_intervals({"mean": values}, resamples=resamples, seed=0)["mean"]


def add_retrained(parser: argparse.ArgumentParser) -> None:
    """Add the flag that `parse_retrained` reads."""
    text = "further models trained without a subgroup (tools.demo_assets.train)"
    parser.add_argument("--retrained", nargs="*", default=[], metavar="SUBGROUP=FOLDER", help=text)


def parse_retrained(entries: list[str]) -> dict[str, str]:
    """Read the SUBGROUP=FOLDER entries of --retrained, and add the packaged model."""
    given = parse_named("retrained", entries)
    for subgroup, folder in given.items():
        if subgroup not in TEST:
            raise InputError(f"--retrained {subgroup}: expected one of {', '.join(TEST)}.")
        if not Path(folder).is_dir():
            raise InputError(f"--retrained {subgroup}: there is no folder {folder}.")
    return {emoji.DEFAULT_FORGET: str(emoji.RETRAINED_MODEL), **given}
