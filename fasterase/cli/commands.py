"""The sub-commands: the flags that each takes, and what it does with their values."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import fasterase
from fasterase.config import UnlearnConfig, format_yaml
from fasterase.errors import InputError, MissingExtraError


@dataclass(frozen=True)
class UnlearnFlags:
    """Flags of `fasterase unlearn` other than the fields of `UnlearnConfig`.

    > Model and pairs

    Args:
        model: the model to change: an open_clip name/tag (`ViT-B-32/laion2b_s34b_b79k`),
            `hf-hub:org/name` (open_clip), `hf:org/name` (transformers), or a folder.
        forget: pairs to forget: a CSV, TSV or JSONL file (columns `filepath` and `title`), a folder
            of `x.jpg` + `x.txt`, a class-per-folder directory, or a WebDataset pattern
            (`shards/{000..099}.tar`).
        retain: pairs to keep, in any of the same forms.
        holdout: pairs used only to measure the model before and after, in any of the same forms.
        image_key: column or tar entry of the image, if it does not have one of the usual names.
        text_key: column or tar entry of the caption, if it does not have one of the usual names.
        recipe: defaults to start from: `fasterase`, or `cliperase` for the paper's. Flags and YAML
            keys override the recipe.
    """

    model: str | None = None
    forget: str | None = None
    retain: str | None = None
    holdout: str | None = None
    image_key: str | None = None
    text_key: str | None = None
    recipe: Literal["fasterase", "cliperase"] = "fasterase"


@dataclass(frozen=True)
class EvaluateFlags:
    """Flags of `fasterase evaluate`.

    > Model and pairs

    Args:
        model: the model to measure, named as for `fasterase unlearn`.
        forget: the pairs that were to be forgotten, in any form that `fasterase unlearn` takes.
        retain: the pairs that were to be kept.
        holdout: pairs that no run has seen.
        sets: further sets of pairs, each as NAME=PATH (in YAML also a mapping).
        image_key: column or tar entry of the image, if it does not have one of the usual names.
        text_key: column or tar entry of the caption, if it does not have one of the usual names.

    > Comparison

    Args:
        original: the model before erasing, for comparison.
        references: further models to compare with, each as NAME=MODEL, such as one retrained
            without the forget set.

    > Measuring

    Args:
        class_names: text file with one class name per line, for zero-shot accuracy.
        max_pairs: number of pairs to measure per set, drawn with `seed`.
        seed: seed of the draw and of the bootstrap intervals.
        output: also write the result to this file: the values as `.json`, or the report as `.md`.
    """

    model: str | None = None
    forget: str | None = None
    retain: str | None = None
    holdout: str | None = None
    sets: list[str] | dict[str, str] | str = dataclasses.field(default_factory=list)
    image_key: str | None = None
    text_key: str | None = None
    original: str | None = None
    references: list[str] | dict[str, str] | str = dataclasses.field(default_factory=list)
    class_names: str | None = None
    max_pairs: int = 5000
    seed: int = 0
    output: str | None = None


@dataclass(frozen=True)
class DemoFlags:
    """Flags of `fasterase demo` other than a few fields of `UnlearnConfig`.

    > Demo

    Args:
        forget: what to erase: a group (`food-drink`), a subgroup (`food-fruit`) or a regular
            expression on the names.
        model: erase from this model, named as for `fasterase unlearn`, instead of the one that
            ships with the package.
        recipe: `fasterase`, or `cliperase` for the paper's; the other one is shown for comparison.
        output_dir: folder for the erased model, history, plot and picture sheet. `none`:
            `runs/demo-` followed by what is erased.
        full: also print the table of every metric, which is always in `evaluation.txt`.
    """

    forget: str = "food-fruit"
    model: str | None = None
    recipe: Literal["fasterase", "cliperase"] = "fasterase"
    output_dir: str | None = None
    full: bool = False


def run_command(command: str, values: dict[str, Any]) -> None:
    """Run a sub-command.

    Args:
        command: `"unlearn"`, `"evaluate"`, `"demo"` or `"compile"`.
        values: the values of the flags that were given, by name.

    Raises:
        InputError: a required flag is missing, or a value cannot be used.
    """
    if command == "unlearn":
        _unlearn(values)
    elif command == "evaluate":
        _evaluate(values)
    elif command == "demo":
        _run_demo(values)
    else:
        _compile_kernels()


def _unlearn(values: dict[str, Any]) -> None:
    """Erase and print the evaluation; with `print_config` only print the configuration."""
    only_print = values.pop("print_config", False)
    inputs, fields = _split_values(values, UnlearnFlags)
    flags = UnlearnFlags(**inputs)
    recipe = UnlearnConfig.cliperase if flags.recipe == "cliperase" else UnlearnConfig
    config = recipe(**fields)
    if only_print:
        print(format_yaml({**inputs, **config.to_dict()}), end="")
        return
    model, forget, retain, _ = _require_flags(
        "unlearn", values, ("model", "forget", "retain", "output_dir")
    )
    result = fasterase.unlearn(
        model,
        forget,
        retain,
        config=config,
        holdout=flags.holdout,
        image_key=flags.image_key,
        text_key=flags.text_key,
    )
    if result.evaluation is not None:
        print(result.evaluation.table())
    _write_report(result, Path(config.output_dir or ""))
    state = "forgotten" if result.forgotten else "not forgotten, see the warning"
    print(
        f"Done in {result.seconds:.0f} s: {state}. Model, history and report: {config.output_dir}"
    )


def _write_report(result: fasterase.UnlearnResult, output_dir: Path) -> None:
    """Write the report with its pictures; without matplotlib, the plot is left out."""
    try:
        result.report(output_dir / "report")
    except MissingExtraError as error:
        warnings.warn(f"The report has no loss plot: {error}", stacklevel=2)


def _evaluate(values: dict[str, Any]) -> None:
    """Measure, print the table, and write it to `output` if given."""
    from fasterase.evaluation.evaluation import check_report_path
    from fasterase.pairs.open import open_pairs

    flags = EvaluateFlags(**values)
    model, forget, retain = _require_flags("evaluate", values, ("model", "forget", "retain"))
    paths = {"forget": forget, "retain": retain}
    if flags.holdout is not None:
        paths["holdout"] = flags.holdout
    further = _parse_named("sets", flags.sets)
    for name in further:
        if name in ("forget", "retain", "holdout"):
            raise InputError(f"--sets: the name {name} is taken; use --{name}.")
    if flags.output is not None:
        check_report_path(Path(flags.output), argument="--output")
    sources = {
        name: open_pairs(path, name=name, image_key=flags.image_key, text_key=flags.text_key)
        for name, path in {**paths, **further}.items()
    }
    evaluation = fasterase.evaluate(
        model,
        sources["forget"],
        sources["retain"],
        holdout=sources.get("holdout"),
        sets={name: sources[name] for name in further},
        original=flags.original,
        references=_parse_named("references", flags.references),
        class_names=None if flags.class_names is None else _read_lines(flags.class_names),
        max_pairs=flags.max_pairs,
        seed=flags.seed,
    )
    print(evaluation.table())
    if flags.output is not None:
        print(f"Written to {evaluation.report(flags.output)}.")


def _run_demo(values: dict[str, Any]) -> None:
    """Run the demo; flags that are not its own override fields of its `UnlearnConfig`."""
    from fasterase.demo.run import run_demo

    inputs, fields = _split_values(values, DemoFlags)
    run_demo(**dataclasses.asdict(DemoFlags(**inputs)), **fields)


def _compile_kernels() -> None:
    """Build the C++ kernels and print the path of the library."""
    from fasterase.ops.contrastive.cpu import BuildError, build_library, load_kernels

    library = build_library()
    reason = load_kernels()
    if reason is not None:
        raise BuildError(f"built {library}, but it cannot be loaded: {reason}")
    print(f"The C++ kernels are ready: {library}")


def _split_values(values: dict[str, Any], flags: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split `values` into those that are fields of the dataclass `flags`, and the others."""
    names = {field.name for field in dataclasses.fields(flags)}
    own = {name: value for name, value in values.items() if name in names}
    return own, {name: value for name, value in values.items() if name not in names}


def _require_flags(command: str, values: dict[str, Any], names: Sequence[str]) -> list[str]:
    missing = [f"--{name}" for name in names if values.get(name) is None]
    if missing:
        raise InputError(
            f"{command} needs {', '.join(missing)}. Give each as a flag, or without the dashes as "
            f"a key of the YAML file of --config; `fasterase {command} --help` explains them."
        )
    return [values[name] for name in names]


def _parse_named(flag: str, entries: list[str] | dict[str, str] | str) -> dict[str, str]:
    """Parse NAME=WHERE entries from the command line, or a mapping from YAML."""
    if isinstance(entries, Mapping):
        entries = [f"{name}={where}" for name, where in entries.items()]
    named: dict[str, str] = {}
    for entry in entries if isinstance(entries, list) else [entries]:
        name, _, where = entry.partition("=")
        if not (name and where):
            raise InputError(f"--{flag} {entry}: expected NAME=WHERE, such as neighbours=near.csv.")
        if name in named:
            raise InputError(f"--{flag}: the name {name} is given twice.")
        named[name] = where
    return named


def _read_lines(file: str) -> list[str]:
    path = Path(file)
    if not path.is_file():
        raise InputError(f"class_names: no file {path}. Give a text file with one name per line.")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
