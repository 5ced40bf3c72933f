"""Erase concepts one after the other from the demo's model: does damage add up, do they come back?

    python -m benchmarks.evidence.sequential [--subgroups food-fruit animal-bird drink] [--seeds 2]

Every erasure is the library's default and starts from the saved model of the one before, which it
takes for the original. Concepts that are erased later are retain pairs until then; those erased
before are left out, and nothing else is said of them. The subgroups are erased in the given order,
in the reverse one, each alone, and all at once: as a single forget set, and as a mapping of
concepts, each of which has a floor and a verdict of its own; with --mapping_only each alone and as
a mapping. All models of a seed are measured on the same sets: retain, neighbours and held-out hold
none of the subgroups. --work keeps models and measurements, so an interrupted command resumes.
Writes sequential.csv, a row per model and set, to --output, and prints the means over seeds.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import torch

import fasterase
from benchmarks.command import comparison_parser, exit_with
from benchmarks.evidence.task import KEEP_SETS, RECALL, keep_evaluation
from benchmarks.processes import call_all
from benchmarks.result_files import group_rows, group_table, sum_up, write_csv
from fasterase.demo import emoji
from fasterase.demo.run import recipe_config
from fasterase.demo.sets import DemoSets, Drawings, build_sets, open_teams
from fasterase.models.load import load_model
from fasterase.provenance import read_record
from fasterase.report.evaluation import Evaluation

HIT = "contest_hit@1"
RESIDUES = {
    "image->text residue": "image_to_text_residue",
    "text->image residue": "text_to_image_residue",
}
UNSEEN = ", unseen"
SUM = "sum of the single erasures"

# What was erased from the demo's model: one erasure after the other, each of some subgroups.
History = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class State:
    """A model: what was erased from it, and the seed of splits and runs."""

    erased: History
    seed: int
    is_mapping: bool = False  # whether the last erasure was given its subgroups as concepts

    @property
    def name(self) -> str:
        steps = ["+".join(step) for step in self.erased]
        end = ["mapping"] if self.is_mapping else []
        return "_".join([f"seed{self.seed}", *(steps or ["original"]), *end])

    @property
    def title(self) -> str:
        """What was erased, in words."""
        steps = ", then ".join(" + ".join(step) for step in self.erased) or "nothing"
        return steps + (", as a mapping" if self.is_mapping else "")

    @property
    def gone(self) -> set[str]:
        """The subgroups that were erased."""
        return {subgroup for step in self.erased for subgroup in step}


@dataclass(frozen=True)
class Concepts:
    """The pairs of all erasures of one seed."""

    own: Mapping[str, DemoSets]  # subgroup -> its sets, as if it were the only one to erase
    together: DemoSets  # sets of all subgroups as a single forget set
    neighbour: Drawings  # drawings of kept concepts that are neighbours of any subgroup

    def forget(self, subgroups: Collection[str]) -> Drawings:
        """Return the drawings of some subgroups, with all wordings."""
        names = {name for each in subgroups for name in self.own[each].concepts}
        return Drawings.of(open_teams(emoji.TRAIN_TEAMS), names, emoji.captions)

    def retain(self, erased: Collection[str]) -> Drawings:
        """Return what is kept when the subgroups in `erased` are gone or go: the others too."""
        later = [sets for subgroup, sets in self.own.items() if subgroup not in erased]
        kept = {name for sets in later for name in sets.concepts}
        kept.update(self.together.retain.names)
        return Drawings.of(open_teams(emoji.TRAIN_TEAMS), kept, emoji.captions)


def build_concepts(subgroups: Sequence[str], seed: int) -> Concepts:
    """Build the sets of the subgroups alone and together, with one split of what all keep."""
    base = str(emoji.BASE_MODEL)
    own = {each: build_sets(each, original=base, seed=seed) for each in subgroups}
    names = [re.escape(name) for sets in own.values() for name in sets.concepts]
    together = build_sets(f"^({'|'.join(names)})$", original=base, seed=seed)
    kept = {*together.retain.names, *together.holdout.names}
    near = {name for sets in own.values() for name in sets.neighbour.names}
    return Concepts(own, together, Drawings.of(open_teams(emoji.TRAIN_TEAMS), near & kept))


def plan(subgroups: Sequence[str], seeds: int) -> list[State]:
    """Return the models to make, parents first: both orders step by step, each alone, all at once.

    The first is the original.
    """
    single = [(each,) for each in subgroups]
    histories: list[History] = [(), (tuple(subgroups),), *((each,) for each in single)]
    for order in (single, single[::-1]):
        histories += [tuple(done) for done in accumulate([each] for each in order)]
    ordered = sorted(dict.fromkeys(histories), key=len)
    return [
        State(history, seed, is_mapping)
        for history in ordered
        for is_mapping in (False, True)
        for seed in range(seeds)
        if not is_mapping or len(history) == 1 < len(history[0])
    ]


def erase(
    model: str | Path,
    forget: Drawings | Mapping[str, Drawings],
    retain: Drawings,
    *,
    seed: int,
    folder: Path,
) -> None:
    """Erase with the default recipe from a model of the demo's size, and save the result."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "verdict: ")  # it is in the results
        result = fasterase.unlearn(
            str(model),
            forget,
            retain,
            config=recipe_config("fasterase", small_model=True, seed=seed, progress=False),
        )
    result.save(folder)


def run(state: State, subgroups: Sequence[str], work: Path) -> Evaluation:
    """Make a model from its parent's and measure it, unless an earlier command did."""
    return keep_evaluation(
        work / state.name / "evaluation.json", lambda: _make(state, subgroups, work)
    )


def _make(state: State, subgroups: Sequence[str], work: Path) -> Evaluation:
    model, concepts = model_of(state, work), build_concepts(subgroups, state.seed)
    if state.erased and read_record(model) is None:
        last = state.erased[-1]
        erase(
            model_of(State(state.erased[:-1], state.seed), work),
            {each: concepts.forget([each]) for each in last}
            if state.is_mapping
            else concepts.forget(last),
            concepts.retain(state.gone),
            seed=state.seed,
            folder=model,
        )
    return measure(model, concepts, seed=state.seed)


def measure(model: str | Path, concepts: Concepts, *, seed: int) -> Evaluation:
    """Measure each subgroup, on trained and unseen drawings, and everything that is kept."""
    together = concepts.together
    forget_sets = {name: sets.forget for name, sets in concepts.own.items()}
    forget_sets |= {name + UNSEEN: sets.unseen for name, sets in concepts.own.items()}
    return fasterase.evaluate(
        str(model),
        together.forget,
        together.retain,
        holdout=together.holdout,
        sets={"neighbour": concepts.neighbour},
        forget_sets=forget_sets,
        seed=seed,
        progress=False,
    )


def model_of(state: State, work: Path) -> Path:
    """Return the folder of a model."""
    return work / state.name / "model" if state.erased else emoji.BASE_MODEL


@torch.no_grad()
def crowding(model: Path, names: Sequence[str]) -> float:
    """Return the mean cosine of the captions of different concepts with each other."""
    encoder = load_model(str(model))
    text = encoder.encode_text(encoder.tokenize(list(names)))
    return float((text @ text.T).masked_select(~torch.eye(len(text), dtype=torch.bool)).mean())


def rows_of(
    state: State,
    evaluation: Evaluation,
    original: Evaluation,
    *,
    steps: int,
    crowded: Mapping[str, float],
) -> list[dict[str, Any]]:
    """Return a row per set of a model; changes are against the original, the demo's model.

    `steps` are those of the last erasure; `crowded` maps subgroups to `crowding` of their captions.
    """
    here: dict[str, Any] = {"seed": state.seed, "erased": state.title, "steps": steps}
    rows = []
    for name, verdict in evaluation.set_verdicts["model"].items():
        if name == "forget":  # all subgroups in one, which have rows of their own
            continue
        scores, subgroup = evaluation.scores[name], name.removesuffix(UNSEEN)
        row = {**here, "set": name, "wanted": "forget" if subgroup in state.gone else "keep"}
        row |= {"verdict": verdict, "hit@1": scores[HIT], "chance": evaluation.chance[name][HIT]}
        row["residue"] = evaluation.mean_residue(name)
        row |= {direction: scores[key] for direction, key in RESIDUES.items()}
        row["cosine"] = scores["matched_cosine"]
        rows.append({**row, "captions' mutual cosine": crowded[subgroup]})
    for name in KEEP_SETS:
        recall, before = evaluation.scores[name][RECALL], original.scores[name][RECALL]
        row = {**here, "set": name, "wanted": "keep", "recall@1": recall}
        rows.append({**row, "change": recall - before})
    return rows


def sum_singles(
    rows: Iterable[Mapping[str, Any]], subgroups: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the rows of a model in which the damage of the single erasures would add up."""
    single = (row for row in rows if row["erased"] in subgroups and row["set"] in KEEP_SETS)
    return [
        {"seed": seed, "erased": SUM, "set": name, "wanted": "keep"}
        | {"change": sum(row["change"] for row in those)}
        for (seed, name), those in group_rows(single, "seed", "set").items()
    ]


def table(rows: Sequence[Mapping[str, Any]], subgroups: Sequence[str]) -> str:
    """Format the means over seeds as Markdown, in percent: hit@1 / residue, then changes."""

    def cell(those: Sequence[Mapping[str, Any]], name: str) -> str:
        found = [row for row in those if row["set"] == name]
        if not found:
            return ""
        if name in KEEP_SETS:
            return sum_up(found, "change", "+.1f")
        return " / ".join(sum_up(found, key, ".0f") for key in ("hit@1", "residue"))

    places = [name + suffix for name in subgroups for suffix in ("", UNSEEN)]
    return group_table(rows, ["erased"], [*places, *KEEP_SETS], cell)


def main(arguments: Sequence[str] | None = None) -> None:
    default = ["food-fruit", "animal-bird", "drink"]
    parser = comparison_parser(__doc__, work="runs/sequential", seeds=2, subgroups=default)
    only = "each alone and as a mapping, nothing else"
    parser.add_argument("--mapping_only", action="store_true", help=only)
    options = parser.parse_args(arguments)
    work, subgroups = options.work, options.subgroups
    states = plan(subgroups, options.seeds)
    if options.mapping_only:
        states = [state for state in states if state.is_mapping or len(state.gone) < 2]
    found: dict[State, Evaluation] = {}
    # Those that wait for no other at the same time.
    for _, those in groupby(states, key=lambda state: len(state.erased)):
        found |= call_all(
            *(run, those, subgroups, work),
            processes=options.processes,
            describe=lambda state: f"seed {state.seed}, erased: {state.title}",
        )
    names = {each: sets.concepts for each, sets in build_concepts(subgroups, 0).own.items()}
    rows = []
    for state in states:
        model, evaluation = model_of(state, work), found[state]
        record = read_record(model)
        rows += rows_of(
            state,
            evaluation,
            found[State((), state.seed)],
            steps=record["outcome"]["steps"] if record else 0,
            crowded={each: crowding(model, those) for each, those in names.items()},
        )
        if evaluation.audit:
            print("\n".join([f"\nAudit, seed {state.seed}: {state.title}", *evaluation.audit]))
    rows += sum_singles(rows, subgroups)
    write_csv(options.output / "sequential.csv", rows)
    print(f"\n{table(rows, subgroups)}")


if __name__ == "__main__":
    exit_with(main)
