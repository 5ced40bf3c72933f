"""Compare ways to forget, on concepts that none of them was tuned on.

    python -m benchmarks.evidence [--processes 2] [--seeds 3] [--methods TITLE ...]
    python -m benchmarks.evidence --settings benchmarks/results/evidence_settings.csv

Every method (trained.py, salient.py, closed_form.py) is given the demo's model and pairs. Its
settings are tried on the validation concepts with one seed; the one of least damage, hit@1 beyond
chance plus recall lost, erases the test concepts. Methods with nothing to choose and the best of
the others, by that damage, are finalists: they have several seeds, unless their method has one, and
the costly attacks. Methods and checkpoints are never chosen by the sets that are reported. Each
cell is kept in --work as soon as it is measured, so an interrupted command resumes; --merge leaves
the models of all methods but --methods as they are in --output. Writes evidence_settings.csv (what
was chosen, for --settings), evidence.csv (the summary), evidence_models.csv (every model) and
evidence.md (the table) to --output.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import TEST, VALIDATION, comparison_parser, exit_with
from benchmarks.evidence import cells, table
from benchmarks.evidence.attacks import attacks_of
from benchmarks.evidence.cells import METHODS, ORIGINAL, RETRAINED, Cell, as_text, check_methods
from benchmarks.evidence.table import ATTACKED, Chosen, describe_choice
from benchmarks.evidence.task import Method
from benchmarks.result_files import read_csv, write_csv
from fasterase.demo import emoji
from fasterase.errors import InputError
from fasterase.files import write_text
from fasterase.option_values import parse_named

SETTINGS, MODELS = "evidence_settings.csv", "evidence_models.csv"
RETRAINED_HELP = "further models trained without a subgroup (tools.demo_assets.train)"


def main(argv: Sequence[str] | None = None) -> None:
    parser = comparison_parser(__doc__, work="runs/evidence", seeds=3, subgroups=TEST)
    add = parser.add_argument
    add("--finalists", type=int, default=4, help="how many of the tuned methods")
    add("--methods", nargs="+", default=list(METHODS), metavar="TITLE")
    add("--validation", nargs="+", default=VALIDATION, choices=VALIDATION)
    add("--settings", type=Path, metavar="FILE", help="of an earlier run, in place of validation")
    add("--merge", action="store_true", help="keep what --output has of other methods")
    add("--attacks", nargs="*", default=[], choices=attacks_of(ATTACKED))
    add("--retrained", nargs="*", default=[], metavar="SUBGROUP=FOLDER", help=RETRAINED_HELP)
    options = parser.parse_args(argv)
    methods = check_methods(options.methods)
    retrained = parse_retrained(options.retrained)

    kept = cells.read_models(options.output / MODELS) if options.merge else []
    check_methods({row["method"] for row in kept} - {ORIGINAL, RETRAINED})
    chosen, tuned_on = choose_settings(methods, options)
    print(describe_choice(chosen), flush=True)

    in_final = finalists(methods, chosen, options.finalists)
    print(f"Finalists: {', '.join(in_final)}", flush=True)
    tested = method_cells(methods, chosen, in_final, options)
    known = set(map(cells.place_of, kept))
    others = other_cells(options, retrained)
    tested += [each for each in others if (each.method, each.subgroup, each.seed) not in known]
    found = cells.run_cells(tested, options.work, options.processes)
    found += [row for row in kept if row["method"] not in options.methods]
    order = [ORIGINAL, RETRAINED, *METHODS]
    found.sort(key=lambda row: (order.index(row["method"]), row["subgroup"], row["seed"]))

    rows = table.summarise(found)
    text = table.as_table(rows)
    if chosen:
        text += f"\nTuned on {tuned_on}:\n\n{describe_choice(chosen)}\n"
    beside = table.beside_retrained(found, "fasterase")
    if beside:
        text += f"\nBeside models that were trained without the concept:\n\n{beside}"
    write_csv(options.output / "evidence.csv", rows)
    models = [{key: value for key, value in row.items() if key != cells.TRACE} for row in found]
    write_csv(options.output / MODELS, models)
    write_text(options.output / "evidence.md", text)
    print(text)


def parse_retrained(entries: list[str]) -> dict[str, str]:
    """Read the SUBGROUP=FOLDER entries of --retrained, and add the packaged model."""
    given = parse_named("retrained", entries)
    for subgroup, folder in given.items():
        if subgroup not in TEST:
            raise InputError(f"--retrained {subgroup}: expected one of {', '.join(TEST)}.")
        if not Path(folder).is_dir():
            raise InputError(f"--retrained {subgroup}: there is no folder {folder}.")
    return {emoji.DEFAULT_FORGET: str(emoji.RETRAINED_MODEL), **given}


def choose_settings(methods: Sequence[Method], options: argparse.Namespace) -> tuple[Chosen, str]:
    """Return the settings of all methods with several, and what they were chosen on.

    With --merge those of methods that are not run are the ones in --output.
    """
    file = options.output / SETTINGS
    if options.settings is not None:
        chosen, tuned_on = read_settings(options.settings, methods)
    else:
        # Try all settings of the methods on the validation concepts.
        tried = [Cell(ORIGINAL, "{}", subgroup, 0) for subgroup in options.validation]
        tried += [
            Cell(method.title, as_text(setting), subgroup, 0)
            for method in methods
            if len(method.settings) > 1
            for setting in method.settings
            for subgroup in options.validation
        ]
        chosen = table.choose(cells.run_cells(tried, options.work, options.processes))
        tuned_on = " and ".join(options.validation)
    if options.merge:
        earlier_titles = [row["method"] for row in read_csv(file)]
        others = check_methods([title for title in earlier_titles if title not in chosen])
        earlier, earlier_tuned_on = read_settings(file, others)
        chosen, tuned_on = earlier | chosen, tuned_on or earlier_tuned_on
    if chosen and (options.merge or options.settings is None):
        write_csv(file, settings_table(chosen, tuned_on))
    return chosen, tuned_on


def other_cells(options: argparse.Namespace, retrained: Mapping[str, str]) -> list[Cell]:
    """Return the cells of models that no method made: the original, and the retrained ones."""
    attacks, seeds = tuple(options.attacks), range(options.seeds)
    found = [Cell(ORIGINAL, "{}", at, seed, attacks) for at in options.subgroups for seed in seeds]
    for place, folder in retrained.items():
        if place in options.subgroups:
            found += [Cell(RETRAINED, "{}", place, seed, attacks, folder) for seed in seeds]
    return found


def method_cells(
    methods: Sequence[Method], chosen: Chosen, in_final: Sequence[str], options: argparse.Namespace
) -> list[Cell]:
    """Return the cells of all methods; those in the final have all seeds and the costly attacks."""
    attacks = tuple(options.attacks)
    cheap = tuple(attack for attack in attacks if attack not in cells.COSTLY)
    found = []
    for method in methods:
        is_finalist = method.title in in_final
        seeds = range(options.seeds)[: method.most_seeds if is_finalist else 1]
        setting = final_setting(chosen, method.title)
        own = attacks if is_finalist else cheap
        found += [
            Cell(method.title, setting, place, seed, own)
            for place in options.subgroups
            for seed in seeds
        ]
    return found


def settings_table(chosen: Chosen, tuned_on: str) -> list[dict[str, Any]]:
    """Return the rows of evidence_settings.csv."""
    return [
        {"method": title, "setting": setting, "damage": damage, "tuned_on": tuned_on}
        for title, (setting, damage) in chosen.items()
    ]


def read_settings(file: Path, methods: Sequence[Method]) -> tuple[Chosen, str]:
    """Return what an earlier run chose for the methods, and on which concepts."""
    if not file.is_file():
        raise InputError(f"--settings: no file {file}. An earlier run writes {SETTINGS}.")
    rows = {row["method"]: row for row in read_csv(file)}
    wanted = [method.title for method in methods if len(method.settings) > 1]
    missing = [title for title in wanted if title not in rows]
    if missing:
        raise InputError(
            f"--settings: {file} has none of {', '.join(missing)}. Leave --settings out to tune "
            "them, or name other --methods."
        )
    chosen = {title: (rows[title]["setting"], float(rows[title]["damage"])) for title in wanted}
    return chosen, " and ".join(sorted({rows[title]["tuned_on"] for title in wanted}))


def finalists(methods: Sequence[Method], chosen: Chosen, count: int) -> list[str]:
    """Return the titles of methods that nothing was chosen for, and of the `count` best others."""
    best = sorted(chosen, key=lambda title: chosen[title][1])[:count]
    titles = [method.title for method in methods]
    return [title for title in titles if title in best or title not in chosen]


def final_setting(chosen: Chosen, title: str) -> str:
    """Return the setting of a method's test runs, with the chosen steps as its only ones."""
    if title not in chosen:
        return as_text(METHODS[title].settings[0])
    setting: dict[str, Any] = json.loads(chosen[title][0])
    if "steps" in setting:
        setting["steps"] = [setting["steps"]]
    return as_text(setting)


if __name__ == "__main__":
    exit_with(main)
