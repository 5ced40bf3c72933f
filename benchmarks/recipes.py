"""Compare erasing recipes on concepts that none of them was tuned on.

    python -m benchmarks.recipes [--processes 2]

"fasterase" is the library's default: no learning rate, no number of steps; "plain" goes without
what it does to words and between the towers. The others need numbers: learning rate, steps and the
weight of the keeping term (fixed rate: the anchor; the paper: consistency) are chosen in the same
way for each, on the validation subgroups. All run on the test subgroups; the mean over those is
reported with a 95 % interval (bootstrap over subgroups and seeds). "retain only" is the retain loss
alone on the budget of "fixed rate": what fine-tuning does without erasing. "cliperase, untuned" is
the paper's objective and weights at lr 1e-4 for 90 steps. --work keeps every run, so an interrupted
command resumes. Writes recipes.csv (every number), recipes_verdicts.csv (how each run ended),
recipes_summary.csv and recipes.txt (the table) to --output.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fasterase
from benchmarks.command import exit_with
from benchmarks.result_files import RESULTS, write_csv
from fasterase.config import UnlearnConfig
from fasterase.demo import emoji
from fasterase.demo.run import evaluate_sets, forget_pairs, recipe_config
from fasterase.demo.sets import build_sets
from fasterase.errors import InputError
from fasterase.evaluation.metrics import bootstrap_intervals
from fasterase.files import write_text
from fasterase.models.load import load_model
from fasterase.option_values import parse_named

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
    "fixed rate": ("anchor_weight", (10.0, 30.0)),
    "cliperase": ("consistency_weight", (3.0, 9.0)),
}
TUNED = tuple(KEEPING)
# The default without what it does to words and between towers; so is the fixed rate's.
PLAIN = {"forget_words": False, "cross_weight": 0.0}
# What the others are given besides batch sizes.
AUTOMATIC: dict[str, dict[str, Any]] = {
    "fasterase": {},
    "fasterase, plain": PLAIN,
}
# The default with other optimisers, which `benchmarks.eight_bit` compares with it.
OPTIMIZERS = {f"fasterase, {name}": {"optimizer": name} for name in ("adamw8bit", "lion8bit")}
# The default where less than all is trained, which `benchmarks.tune` compares with it.
TUNES = {f"fasterase, {tune}": {"tune": tune} for tune in ("lora:8", "last:1")}
RETAIN_ONLY = {"forget_weight": 0.0, "consistency_weight": 0.0, "anchor_weight": 0.0}
UNTUNED = "cliperase, untuned"
RECIPES = (*AUTOMATIC, *TUNED, UNTUNED, "retain only")
# Seeds of the default, which decides for itself when to stop.
DEFAULT_SEEDS = 3

KEEP_SETS = ("retain", "neighbour", "holdout")
FORGET_SETS = ("forget", "forget-unseen")
REPORTED = (
    ("forget", "image_to_text_recall@1"),
    ("forget", "concept_hit@1"),
    ("forget", "image_to_text_residue"),
    ("forget", "text_to_image_residue"),
    ("forget-unseen", "image_to_text_recall@1"),
    ("forget-unseen", "concept_hit@1"),
    ("forget-unseen", "image_to_text_residue"),
    ("forget-unseen", "text_to_image_residue"),
    ("retain", "image_to_text_recall@1"),
    ("neighbour", "image_to_text_recall@1"),
    ("holdout", "image_to_text_recall@1"),
)

# Learning rate, weight of the keeping term, steps; None where the recipe chooses for itself.
Setting = tuple[float | None, float | None, int | None]
UNTUNED_SETTING: Setting = (1e-4, 3.0, 90)


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
        automatic = {**AUTOMATIC, **OPTIMIZERS, **TUNES}
        if self.recipe in automatic:
            own = automatic[self.recipe]
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
    """Carry out a run, or read its result if it has already run.

    Args:
        run: the erasure.
        work: folder of the results.
        retrained: subgroup -> folder of a model that was trained without it.
    """
    result = work / f"{run.name}.json"
    if result.is_file():
        stored = json.loads(result.read_text(encoding="utf-8"))
        return Outcome(
            [Value(**row) for row in stored["values"]], [Ending(**row) for row in stored["endings"]]
        )
    torch.set_num_threads(1)
    sets = build_sets(run.subgroup, original=str(emoji.BASE_MODEL), seed=run.seed)
    model = load_model(str(emoji.BASE_MODEL))
    references = {"retrained": retrained[run.subgroup]} if run.subgroup in retrained else {}
    values: list[Value] = []
    endings: list[Ending] = []

    def measure(steps: int) -> None:
        evaluation = evaluate_sets(
            model,
            sets,
            original=str(emoji.BASE_MODEL),
            progress=False,
            references=references,
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

    with tempfile.TemporaryDirectory() as cache, warnings.catch_warnings():
        # The verdict is in the results.
        warnings.filterwarnings("ignore", "verdict: ")
        erased = fasterase.unlearn(
            model.module,
            forget_pairs(sets, "cliperase" if run.is_papers else "fasterase"),
            sets.retain,
            config=run.config().replace(progress=False, reference_cache=cache),
            tokenizer=model.text_tokenizer,
            callback=measure_at,
        )
    if not run.steps:
        measure(len(erased.history))
    stored = {
        "values": [asdict(value) for value in values],
        "endings": [asdict(ending) for ending in endings],
    }
    write_text(result, json.dumps(stored))
    return Outcome(values, endings)


def execute_all(
    runs: Iterable[Run], work: Path, processes: int, retrained: dict[str, str]
) -> Outcome:
    """Carry out runs in parallel, each with one thread."""
    values: list[Value] = []
    endings: list[Ending] = []
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        pending = {pool.submit(execute, run, work, retrained): run for run in runs}
        for number, done in enumerate(as_completed(pending), start=1):
            outcome = done.result()
            values += outcome.values
            endings += outcome.endings
            print(f"[{number}/{len(pending)}] {pending[done].name}", flush=True)
    values.sort(key=lambda v: (v.recipe, v.subgroup, *map(str, setting(v)), v.seed))
    endings.sort(key=lambda e: (e.recipe, e.subgroup, e.steps, e.seed, e.set))
    return Outcome(values, endings)


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
    return {**chosen, "retain only": chosen["fixed rate"], UNTUNED: UNTUNED_SETTING}


def summarise(values: list[Value]) -> list[dict[str, Any]]:
    """Average each reported metric and its change over subgroups, with 95 % intervals of both."""
    rows = []
    for recipe in RECIPES:
        for name, metric in REPORTED:
            found = [v for v in values if (v.recipe, v.set, v.metric) == (recipe, name, metric)]
            if not found:
                continue
            after = np.array([v.value for v in found])
            change = after - np.array([v.original for v in found])
            low, high = interval(after)
            change_low, change_high = interval(change)
            automatic = recipe in AUTOMATIC
            rows.append(
                {
                    "recipe": recipe,
                    "lr": "auto" if automatic else found[0].lr,
                    "keeping": "" if automatic else found[0].keeping,
                    "steps": float(np.mean([v.steps for v in found])),
                    "set": name,
                    "metric": metric,
                    "subgroups": len({v.subgroup for v in found}),
                    "runs": len(found),
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


def count_verdicts(endings: list[Ending]) -> list[str]:
    """Describe how the runs of each recipe ended, one line per recipe and set to forget."""
    lines = []
    for recipe in (*RECIPES, "original", "retrained"):
        for name in FORGET_SETS:
            found = [e for e in endings if (e.recipe, e.set) == (recipe, name)]
            if not found:
                continue
            verdicts = Counter(ending.verdict for ending in found)
            listed = ", ".join(f"{verdict} {count}" for verdict, count in verdicts.most_common())
            residues = [ending.residue for ending in found]
            lines.append(
                f"{recipe:20} {name:14} {len(found):3} models: {listed}; residue "
                f"{np.mean(residues):.2f} ({min(residues):.2f} to {max(residues):.2f})"
            )
    return lines


def interval(values: np.ndarray, resamples: int = 10_000) -> tuple[float, float]:
    """Bootstrap the 95 % percentile interval of the mean over subgroups (and seeds)."""
    return bootstrap_intervals({"mean": values}, {}, resamples=resamples, seed=0)["mean"]


def table(rows: list[dict[str, Any]]) -> str:
    """Format the summary as text, in percent."""
    lines = [
        f"{'recipe':20} {'set':14} {'metric':22} {'chance':>6} {'original':>8} {'after':>6} "
        f"{'95 % interval':>16} {'change':>7}"
    ]
    for row in rows:
        span = f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"
        lines.append(
            f"{row['recipe']:20} {row['set']:14} {row['metric']:22} {100 * row['chance']:6.1f} "
            f"{100 * row['original']:8.1f} {100 * row['mean']:6.1f} {span:>16} "
            f"{100 * row['change']:+7.1f}"
        )
    return "\n".join(lines) + "\n"


def parse_retrained(entries: list[str]) -> dict[str, str]:
    """Read the SUBGROUP=FOLDER entries of --retrained, and add the packaged model.

    Raises:
        InputError: one has another form, or there is no such subgroup or folder.
    """
    given = parse_named("retrained", entries)
    for subgroup, folder in given.items():
        if subgroup not in TEST:
            raise InputError(f"--retrained {subgroup}: expected one of {', '.join(TEST)}.")
        if not Path(folder).is_dir():
            raise InputError(f"--retrained {subgroup}: there is no folder {folder}.")
    return {emoji.DEFAULT_FORGET: str(emoji.RETRAINED_MODEL), **given}


def main(arguments: list[str] | None = None) -> None:
    """Tune, test and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--processes", type=int, default=2, help="number of parallel runs, each with one thread"
    )
    parser.add_argument(
        "--seeds", type=int, default=1, help="number of seeds of the test runs with numbers"
    )
    parser.add_argument(
        "--retrained",
        nargs="*",
        default=[],
        metavar="SUBGROUP=FOLDER",
        help="further models trained without a subgroup (tools.demo_assets.train), to judge",
    )
    parser.add_argument("--work", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    retrained = parse_retrained(options.retrained)
    run_all = partial(
        execute_all, work=options.work, processes=options.processes, retrained=retrained
    )
    tuned = run_all(
        Run(recipe, subgroup, lr, keeping, STEPS, seed=0)
        for recipe in TUNED
        for subgroup in VALIDATION
        for lr in RATES
        for keeping in KEEPING[recipe][1]
    )
    testing = [
        Run(recipe, subgroup, None, None, (), seed)
        for recipe in AUTOMATIC
        for seed in range(DEFAULT_SEEDS if recipe == "fasterase" else options.seeds)
        for subgroup in TEST
    ]
    testing += [
        Run(recipe, subgroup, lr, keeping, (steps,) if steps else (), seed)
        for recipe, (lr, keeping, steps) in choose(tuned.values).items()
        for subgroup in TEST
        for seed in range(options.seeds)
    ]
    tested = run_all(testing)
    every = [{"phase": "validation", **asdict(value)} for value in tuned.values]
    every += [{"phase": "test", **asdict(value)} for value in tested.values]
    # Each run of a subgroup measures the original and the retrained model anew.
    endings = {
        (e.recipe, e.subgroup, e.set, *(() if e.recipe in ("original", "retrained") else (e,))): e
        for e in tested.endings
    }
    summary = summarise(tested.values)
    write_csv(options.output / "recipes.csv", every)
    write_csv(
        options.output / "recipes_verdicts.csv", [asdict(ending) for ending in endings.values()]
    )
    write_csv(options.output / "recipes_summary.csv", summary)
    counted = "\n".join(count_verdicts(list(endings.values())))
    text = f"{table(summary)}\n{counted}\n"
    write_text(options.output / "recipes.txt", text)
    print(text)


if __name__ == "__main__":
    exit_with(main)
