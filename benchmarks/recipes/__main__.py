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

from dataclasses import asdict
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from benchmarks.command import TEST, VALIDATION, comparison_parser, exit_with
from benchmarks.recipes.runs import (
    AUTOMATIC,
    FORGET_SETS,
    KEEP_SETS,
    KEEPING,
    UNTUNED,
    Ending,
    Run,
    Setting,
    Value,
    add_retrained,
    execute_all,
    interval,
    parse_retrained,
    setting,
)
from benchmarks.result_files import count_words, write_csv
from fasterase.files import write_text

RATES = (3e-5, 1e-4, 2e-4)
STEPS = (60, 100)
TUNED = tuple(KEEPING)
RECIPES = (*AUTOMATIC, *TUNED, UNTUNED, "retain only")
# Seeds of the default, which decides for itself when to stop.
DEFAULT_SEEDS = 3
RECALL, HIT = "image_to_text_recall@1", "concept_hit@1"
TRACES = (RECALL, HIT, "image_to_text_residue", "text_to_image_residue")
REPORTED = (*product(FORGET_SETS, TRACES), *((name, RECALL) for name in KEEP_SETS))
UNTUNED_SETTING: Setting = (1e-4, 3.0, 90)


def damage(values: list[Value]) -> float:
    """Return what tuning minimises: the trace of the concept plus the loss of everything else.

    It is the sum of the concept hit@1 beyond chance on forget and forget-unseen and of the recall@1
    lost on retain, neighbour and holdout, averaged over subgroups. All are shares, 0 to 1.
    """
    terms = []
    for value in values:
        if value.set in FORGET_SETS and value.metric == HIT:
            terms.append(max(value.value - value.chance, 0.0))
        if value.set in KEEP_SETS and value.metric == RECALL:
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
            lr, keeping = found[0].lr, found[0].keeping
            row: dict[str, Any] = {"recipe": recipe, "lr": lr, "keeping": keeping}
            if recipe in AUTOMATIC:
                row |= {"lr": "auto", "keeping": ""}
            row |= {
                "steps": float(np.mean([v.steps for v in found])),
                "set": name,
                "metric": metric,
            }
            row |= {"subgroups": len({v.subgroup for v in found}), "runs": len(found)}
            for column in ("chance", "original"):
                row[column] = float(np.mean([getattr(v, column) for v in found]))
            row |= {"mean": float(after.mean()), "low": low, "high": high}
            row |= {"change": float(change.mean())}
            rows.append({**row, "change_low": change_low, "change_high": change_high})
    return rows


def count_verdicts(endings: list[Ending]) -> list[str]:
    """Describe how the runs of each recipe ended, one line per recipe and set to forget."""
    lines = []
    for recipe in (*RECIPES, "original", "retrained"):
        for name in FORGET_SETS:
            found = [e for e in endings if (e.recipe, e.set) == (recipe, name)]
            if not found:
                continue
            listed = count_words(ending.verdict for ending in found)
            residues = [ending.residue for ending in found]
            lines.append(
                f"{recipe:20} {name:14} {len(found):3} models: {listed}; residue "
                f"{np.mean(residues):.2f} ({min(residues):.2f} to {max(residues):.2f})"
            )
    return lines


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


def main(arguments: list[str] | None = None) -> None:
    parser = comparison_parser(__doc__, work="runs/recipes", seeds=1)
    add_retrained(parser)
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
    write_csv(options.output / "recipes_verdicts.csv", [*map(asdict, endings.values())])
    write_csv(options.output / "recipes_summary.csv", summary)
    text = "\n".join([table(summary), *count_verdicts(list(endings.values()))]) + "\n"
    write_text(options.output / "recipes.txt", text)
    print(text)


if __name__ == "__main__":
    exit_with(main)
