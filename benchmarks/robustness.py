"""Does the automatic recipe end within its margins, whatever the model, the start and the CPU?

    python -m benchmarks.robustness [--models vit resnet siglip] [--concepts food-fruit] [--seeds 3]

Erases a digit from small CLIPs of handwriting (a ViT, a ResNet and a SigLIP, each trained from
several initialisations) and concepts from the demo's model, with several seeds, with 1 and 2
threads, and with the instructions that torch chooses on this CPU and with AVX2 alone. Models are
trained anew in every setting: a start that differs in its last bits is the case that is tested.
--work keeps measurements, so an interrupted command resumes. Writes robustness.csv, a row per
erasure, to --output. It prints the least distance of a residue to a threshold of the verdict for
each model, and exits with 1 if an erasure is not "forgotten" or rests outside the margins.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

import fasterase
from benchmarks.command import comparison_parser, exit_with
from benchmarks.result_files import device_name, group_rows, markdown_table, write_csv
from fasterase.demo import emoji
from fasterase.demo.run import recipe_config, trained_pairs
from fasterase.demo.sets import build_sets
from fasterase.engine.findings import RESTING
from fasterase.evaluation.verdict import OVER_ERASED_RESIDUE, REMEMBERED_RESIDUE
from fasterase.files import write_text
from fasterase.result import UnlearnResult
from tests import digits

CONCEPTS = ("food-fruit", "animal-bird")
OWN = "own"  # the instructions that torch chooses
CAPABILITIES = (OWN, "avx2", "default")
THREADS = (1, 2)
COLUMNS = ("erased from", "erasures", "forgotten", "steps", "to a threshold, trained", "unseen")
DIRECTIONS = ("image_to_text", "text_to_image")


@dataclass(frozen=True)
class Case:
    """The erasures of one start in one setting, which one process makes."""

    model: str  # one of `digits.KINDS`, or a concept of the demo's model
    start: int  # seed of the model's initialisation
    threads: int  # of torch
    capability: str | None  # value of ATEN_CPU_CAPABILITY; None leaves it unset

    @property
    def name(self) -> str:
        return f"{self.model}_{self.start}_{self.capability or 'own'}_{self.threads}"

    def run(self, seeds: int, work: Path) -> list[dict[str, Any]]:
        """Return the rows of all seeds, of which a process of its own makes what is missing."""
        file = work / f"{self.name}.json"
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        if len(found) < seeds:
            environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
            if self.capability is not None:
                environment["ATEN_CPU_CAPABILITY"] = self.capability
            case = json.dumps({**asdict(self), "seeds": seeds})
            command = [sys.executable, "-m", "benchmarks.robustness", "--case", case]
            made = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
            found = json.loads(made.stdout)
            write_text(file, made.stdout.decode())
        return found[:seeds]


def erase(case: Case, seeds: int) -> Iterator[dict[str, Any]]:
    """Yield a row per seed, in this process."""
    warnings.filterwarnings("ignore", "verdict: ")  # it is in the rows
    erasures = _digit_erasures if case.model in digits.KINDS else _concept_erasures
    for seed, (result, extra) in enumerate(erasures(case, seeds)):
        row = {**asdict(case), "seed": seed, "cpu": device_name("cpu"), "torch": torch.__version__}
        row |= {"verdict": result.verdict, "steps": len(result.history)}
        for name, trace in result.traces.items():
            row |= {f"{name} {each}": getattr(trace, each) for each in (*DIRECTIONS, "hit")}
        yield row | extra


def _digit_erasures(case: Case, seeds: int) -> Iterator[tuple[UnlearnResult, dict[str, float]]]:
    trained, others = digits.Digits.load()
    digit = digits.KINDS[case.model].erased
    kept = [each for each in range(10) if each != digit]
    model = digits.trained_model(case.model, trained, seed=case.start)
    before = digits.accuracy(model, others)
    for seed in range(seeds):
        result = fasterase.unlearn(
            model,
            trained.pairs({digit}),
            trained.pairs(set(kept)),
            forget_sets={"unseen": others.pairs({digit})},
            tokenizer=digits.tokenizer(),
            copy=True,
            seed=seed,
            **digits.OPTIONS,
        )
        after = digits.accuracy(result.model, others)
        yield result, {"kept": float(after[kept].mean() - before[kept].mean())}


def _concept_erasures(case: Case, seeds: int) -> Iterator[tuple[UnlearnResult, dict[str, float]]]:
    for seed in range(seeds):
        sets = build_sets(case.model, original=str(emoji.BASE_MODEL), seed=seed)
        result = fasterase.unlearn(
            str(emoji.BASE_MODEL),
            *trained_pairs(sets, "fasterase"),
            forget_sets={"unseen": sets.unseen},
            config=recipe_config("fasterase", small_model=True, seed=seed, progress=False),
        )
        yield result, {}


def distance(row: dict[str, Any], low: float, high: float, sets: Sequence[str]) -> float:
    """Return how far the residues of a row are inside an interval; negative outside."""
    residues = [row[f"{name} {each}"] for name in sets for each in DIRECTIONS]
    return min(min(residue - low, high - residue) for residue in residues)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a line of Markdown per model: verdicts, and the least distances to thresholds."""
    lines = []
    thresholds = OVER_ERASED_RESIDUE, REMEMBERED_RESIDUE
    for (model,), those in group_rows(rows, "model").items():
        forgotten = sum(row["verdict"] == "forgotten" for row in those)
        steps = [row["steps"] for row in those]
        counts = (str(len(those)), str(forgotten), f"{min(steps)}-{max(steps)}")
        least = (
            min(distance(row, *thresholds, [name]) for row in those)
            for name in ("forget", "unseen")
        )
        lines.append([model, *counts, *(f"{each:.3f}" for each in least)])
    return markdown_table(COLUMNS, lines)


def faults(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line per erasure that is not "forgotten", or rests outside the margins."""
    found = []
    for row in rows:
        inside = distance(row, *RESTING, ["forget"])
        if row["verdict"] != "forgotten" or inside < 0:
            case = Case(*(row[key] for key in ("model", "start", "threads", "capability")))
            found.append(f"{case.name} seed {row['seed']}: {row['verdict']}, {inside:+.3f}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Make what is missing, write the results, and return 1 if an erasure is not as promised."""
    parser = comparison_parser(__doc__, work="runs/robustness", seeds=3)
    kinds = tuple(digits.KINDS)
    add = parser.add_argument
    add("--models", nargs="*", default=kinds, choices=kinds, metavar="MODEL")
    add("--concepts", nargs="*", default=CONCEPTS, metavar="CONCEPT", help="of the demo's model")
    add("--starts", type=int, default=3, help="initialisations of each model")
    add("--threads", nargs="+", type=int, default=THREADS)
    text = "ATEN_CPU_CAPABILITY, or own: those that torch chooses, avx2 on many CPUs"
    own = (OWN, "avx2")
    add("--instructions", nargs="+", default=own, choices=CAPABILITIES, metavar="SET", help=text)
    add("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.case is not None:
        seeds = options.case.pop("seeds")
        json.dump(list(erase(Case(**options.case), seeds)), sys.stdout)
        return 0
    for concept in options.concepts:
        build_sets(concept, original=str(emoji.BASE_MODEL), seed=0)  # refuses an unknown one
    cases = [
        Case(model, start, threads, None if instructions == OWN else instructions)
        for instructions in options.instructions
        for threads in options.threads
        for model in (*options.models, *options.concepts)
        for start in range(options.starts if model in kinds else 1)
    ]
    # More threads than cores wait for each other.
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(max(1, options.processes // max(options.threads))) as pool:
        made = pool.map(Case.run, cases, repeat(options.seeds), repeat(options.work))
        for case, those in zip(cases, made, strict=True):
            rows += those
            print(case.name, flush=True)
    write_csv(options.output / "robustness.csv", rows)
    wrong = faults(rows)
    print("\n".join([f"\n{table(rows)}", *wrong]))
    return int(bool(wrong))


if __name__ == "__main__":
    exit_with(main)
