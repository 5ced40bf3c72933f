"""What each sub-command does with its parsed values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fasterase
from fasterase.cli.flags import DemoFlags, EvaluateFlags, UnlearnFlags
from fasterase.config import UnlearnConfig
from fasterase.errors import InputError


def unlearn(values: dict[str, Any], *, print_config: bool) -> None:
    """Erase, and say where the result lies; or only print the settings."""
    inputs, fields = _parted(values, UnlearnFlags)
    flags = UnlearnFlags(**inputs)
    recipe = UnlearnConfig.cliperase if flags.recipe == "cliperase" else UnlearnConfig
    config = recipe(**fields)
    if print_config:
        print(_yaml({**inputs, **config.to_dict()}), end="")
        return
    given = _required("unlearn", values, ("model", "forget", "retain", "output_dir"))
    result = fasterase.unlearn(
        given["model"],
        given["forget"],
        given["retain"],
        config=config,
        holdout=flags.holdout,
        image_key=flags.image_key,
        text_key=flags.text_key,
    )
    if result.evaluation is not None:
        print(result.evaluation.table())
    state = "forgotten" if result.forgotten else "not forgotten, see the warning"
    print(
        f"Done in {result.seconds:.0f} s: {state}. Model, history and report: {config.output_dir}"
    )


def evaluate(values: dict[str, Any]) -> None:
    """Measure, print the table, and write it where `output` says."""
    from fasterase.evaluation.evaluation import check_report_path
    from fasterase.pairs.open import open_pairs

    flags = EvaluateFlags(**values)
    given = _required("evaluate", values, ("model", "forget", "retain"))
    paths = {"forget": given["forget"], "retain": given["retain"]}
    if flags.holdout is not None:
        paths["holdout"] = flags.holdout
    named = _named("sets", flags.sets)
    for name in named:
        if name in ("forget", "retain", "holdout"):
            raise InputError(f"--sets: the name {name} is taken; use --{name}.")
    if flags.output is not None:
        check_report_path(Path(flags.output), argument="--output")
    sources = {
        name: open_pairs(path, name=name, image_key=flags.image_key, text_key=flags.text_key)
        for name, path in {**paths, **named}.items()
    }
    evaluation = fasterase.evaluate(
        given["model"],
        sources["forget"],
        sources["retain"],
        holdout=sources.get("holdout"),
        sets={name: sources[name] for name in named},
        original=flags.original,
        references=_named("references", flags.references),
        class_names=None if flags.class_names is None else _lines(flags.class_names),
        max_pairs=flags.max_pairs,
        seed=flags.seed,
    )
    print(evaluation.table())
    if flags.output is not None:
        print(f"Written to {evaluation.report(flags.output)}.")


def demo(values: dict[str, Any]) -> None:
    """Run the demo; what is no flag of its own goes on as a field of `UnlearnConfig`."""
    from fasterase.demo.run import run_demo

    inputs, fields = _parted(values, DemoFlags)
    run_demo(**dataclasses.asdict(DemoFlags(**inputs)), **fields)


def compile_kernels() -> None:
    """Build the C++ kernels and say where they lie."""
    from fasterase.ops.contrastive import build

    library = build.build()
    reason = build.problem()
    if reason is not None:
        raise build.BuildError(f"built {library}, but it cannot be loaded: {reason}")
    print(f"The C++ kernels are ready: {library}")


def _parted(values: dict[str, Any], flags: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """`values` of the fields of `flags`, and the others."""
    names = {field.name for field in dataclasses.fields(flags)}
    own = {name: value for name, value in values.items() if name in names}
    return own, {name: value for name, value in values.items() if name not in names}


def _required(command: str, values: dict[str, Any], names: Sequence[str]) -> dict[str, str]:
    missing = [f"--{name}" for name in names if values.get(name) is None]
    if missing:
        raise InputError(
            f"{command} needs {', '.join(missing)}. Give each as a flag, or without the dashes as "
            f"a key of the YAML file of --config; `fasterase {command} --help` explains them."
        )
    return {name: values[name] for name in names}


def _named(flag: str, entries: Any) -> dict[str, str]:
    """NAME=WHERE entries of a command line, or a mapping or list of YAML, as a mapping."""
    if isinstance(entries, Mapping):
        entries = [f"{name}={where}" for name, where in entries.items()]
    named: dict[str, str] = {}
    for entry in entries if isinstance(entries, list) else [entries]:
        name, _, where = str(entry).partition("=")
        if not (name and where):
            raise InputError(f"--{flag} {entry}: expected NAME=WHERE, such as neighbours=near.csv.")
        if name in named:
            raise InputError(f"--{flag}: the name {name} is given twice.")
        named[name] = where
    return named


def _lines(file: str) -> list[str]:
    path = Path(file)
    if not path.is_file():
        raise InputError(f"class_names: no file {path}. Give a text file with one name a line.")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _yaml(values: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
