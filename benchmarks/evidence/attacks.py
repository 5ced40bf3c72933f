"""Attack models that forgot a subgroup of the demo's emoji: does the concept come back?

    python -m benchmarks.evidence.attacks [--erased NAME=FOLDER ...]

Runs every attack on the demo's model, which knows all emoji, on the one that was trained without
food-fruit, and on models that forgot it: `--erased demo=runs/demo-food-fruit/model` after
`fasterase demo`. The first two are the levels to compare an erased model with. Writes attacks.csv
to --output, one row per attack, figure and model, and draws the attacks to --plots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fasterase
from benchmarks.command import exit_with, new_parser
from benchmarks.result_files import RESULTS, code_version, device_name, write_csv
from fasterase.demo import emoji
from fasterase.demo.sets import Drawings, build_sets, open_teams
from fasterase.errors import InputError
from fasterase.evaluation.examiner import ATTACKS
from fasterase.option_values import parse_named
from fasterase.report.evaluation import Evaluation

ORIGINAL, RETRAINED = "demo's model", "retrained without it"


class Attacked(NamedTuple):
    """A figure of an attack, and the title of its column."""

    attack: str
    key: str
    title: str


SWAPPED = (
    Attacked("swap", "forget/original_images/contest_hit@1", "its texts, original's images: hit@1"),
    Attacked("swap", "forget/original_texts/contest_hit@1", "its images, original's texts: hit@1"),
)
PROBED = (Attacked("probe", "forget/linear_probe/auc", "probe AUC"),)
RELEARNED = (
    Attacked("relearn", "forget/area/residue", "relearned residue"),
    Attacked("relearn", "forget/area/contest_hit@1", "relearned hit@1"),
)
QUANTISED = (
    Attacked("quantise", "forget/4_bits/image_to_text_residue", "in 4 bits: residue"),
    Attacked("quantise", "forget/4_bits/contest_hit@1", "in 4 bits: hit@1"),
)
PROMPTED = (
    Attacked("prompt", "forget/prompt/auc", "best prompt: AUC"),
    Attacked("prompt", "forget-unseen/prompt/auc", "best prompt, unseen: AUC"),
)
MEMBERS = (
    Attacked("membership", "forget/cosine/auc", "member: AUC"),
    Attacked("membership", "forget-unseen/cosine/auc", "member, unseen: AUC"),
)


def attacks_of(figures: tuple[Attacked, ...]) -> tuple[str, ...]:
    """Return the names of the attacks behind some figures, each once."""
    return tuple(dict.fromkeys(each.attack for each in figures))


def non_members() -> Drawings:
    """Return the training teams' drawings of the concepts that neither model was trained on."""
    trained = open_teams(emoji.TRAIN_TEAMS)
    records = (trained.meta(row) for row in range(len(trained)))
    return Drawings.of(trained, {each["concept"] for each in records if not each["member"]})


def rows_of(evaluation: Evaluation, model: str, **given: Any) -> Iterator[dict[str, Any]]:
    """Yield a row per attack, finding and model, with its interval; `model` names the first one."""
    titles = {"model": model, "original": ORIGINAL}
    for attack, findings in evaluation.attacks.items():
        for finding in findings.values():
            for name, (value, low, high) in finding.by_model().items():
                row: dict[str, Any] = {"attack": attack, "figure": finding.key}
                row["wanted"] = finding.wanted
                row |= {"model": titles.get(name, name), "value": value, "low": low, "high": high}
                yield {**row, "chance": finding.chance, **given}


def parse_models(entries: Sequence[str]) -> dict[str, str]:
    """Read NAME=FOLDER entries."""
    models = parse_named("erased", list(entries))
    for name in (ORIGINAL, RETRAINED):
        if name in models:
            raise InputError(f"--erased {name}: this is another model. Choose another name.")
    return models


def main(argv: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--erased", nargs="+", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--max_pairs", type=int, default=5000, help="pairs measured per set")
    parser.add_argument("--plots", type=Path, help="also draw the attacks on each model here")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(argv)

    models = {**parse_models(options.erased), RETRAINED: str(emoji.RETRAINED_MODEL)}
    first, *others = models
    sets = build_sets(emoji.DEFAULT_FORGET, original=str(emoji.BASE_MODEL), seed=0)
    evaluation = fasterase.evaluate(
        models[first],
        sets.forget,
        sets.retain,
        forget_sets={"forget-unseen": sets.unseen},
        original=str(emoji.BASE_MODEL),
        references={name: models[name] for name in others},
        attacks=tuple(ATTACKS),
        non_members=non_members(),
        max_pairs=options.max_pairs,
        device="cpu",
    )
    print(f"The model is {first!r}.\n{evaluation.table()}")
    rows = list(rows_of(evaluation, first, device=device_name("cpu"), code=code_version()))
    write_csv(options.output / "attacks.csv", rows)
    if options.plots is not None:
        evaluation.plot(options.plots)


if __name__ == "__main__":
    exit_with(main)
