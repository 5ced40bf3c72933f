"""The sub-commands: what each does with the values of its flags."""

from __future__ import annotations

import dataclasses
import shlex
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fasterase
from fasterase.cli.flags import DemoFlags, EvaluateFlags, PlanFlags, SplitFlags, UnlearnFlags
from fasterase.cli.sets import check_sets, split_data
from fasterase.config import UnlearnConfig, format_yaml
from fasterase.errors import InputError, MissingExtraError
from fasterase.files import check_creatable, check_writable


def run_command(command: str, values: dict[str, Any]) -> str | None:
    """Run a sub-command; return the verdict, if it comes to one.

    Args:
        command: `"unlearn"`, `"evaluate"`, `"plan"`, `"split"`, `"demo"` or `"compile"`.
        values: the values of the flags that were given, by name.

    Raises:
        InputError: a required flag is missing, or a value cannot be used.
    """
    if command == "unlearn":
        return _unlearn(values)
    if command == "evaluate":
        return _evaluate(values)
    if command == "split":
        _split(values)
    elif command == "plan":
        _plan(values)
    elif command == "demo":
        _run_demo(values)
    else:
        _compile_kernels()
    return None


def _unlearn(values: dict[str, Any]) -> str | None:
    """Erase and print the evaluation; with `print_config` only print the configuration."""
    only_print = values.pop("print_config", False)
    inputs, fields = _split_values(values, UnlearnFlags)
    flags = UnlearnFlags(**inputs)
    recipe = UnlearnConfig.cliperase if flags.recipe == "cliperase" else UnlearnConfig
    config = recipe(**fields)
    if only_print:
        print(format_yaml({**inputs, **config.to_dict()}), end="")
        return None
    model, forget, retain = _require_sets("unlearn", values, further=("output_dir",))
    result = fasterase.unlearn(
        model,
        forget,
        retain,
        config=config,
        model_name=flags.model_name,
        holdout=flags.holdout,
        sets=_parse_named("sets", flags.sets),
        forget_sets=_parse_named("forget_sets", flags.forget_sets),
        image_key=flags.image_key,
        text_key=flags.text_key,
    )
    if result.evaluation is not None:
        print(result.evaluation.table())
    _write_report(result, Path(config.output_dir or ""))
    verdict = result.verdict or "no verdict"
    print(
        f"Done in {result.seconds:.0f} s: {verdict}. Model, history and report: {config.output_dir}"
    )
    return result.verdict


def _write_report(result: fasterase.UnlearnResult, output_dir: Path) -> None:
    """Write the report with its pictures; without matplotlib, the plot is left out."""
    try:
        result.report(output_dir / "report")
    except MissingExtraError as error:
        warnings.warn(f"The report has no loss plot: {error}", stacklevel=2)


def _evaluate(values: dict[str, Any]) -> str | None:
    """Measure, print the table, and write it to `output` if given."""
    from fasterase.evaluation.evaluation import check_report_path
    from fasterase.report.losses import require_matplotlib

    flags = EvaluateFlags(**values)
    model, forget, retain = _require_sets("evaluate", values)
    if flags.output is not None:
        check_report_path(Path(flags.output), argument="--output")
    if flags.plots is not None:
        check_creatable(Path(flags.plots), argument="--plots")
        require_matplotlib()
    evaluation = fasterase.evaluate(
        model,
        forget,
        retain,
        model_name=flags.model_name,
        holdout=flags.holdout,
        sets=_parse_named("sets", flags.sets),
        forget_sets=_parse_named("forget_sets", flags.forget_sets),
        image_key=flags.image_key,
        text_key=flags.text_key,
        original=flags.original,
        references=_parse_named("references", flags.references),
        class_names=None if flags.class_names is None else _read_lines(flags.class_names),
        tasks=[flags.tasks] if isinstance(flags.tasks, str) else flags.tasks,
        attacks=[flags.attacks] if isinstance(flags.attacks, str) else flags.attacks,
        non_members=flags.non_members,
        max_pairs=flags.max_pairs,
        seed=flags.seed,
        device=flags.device,
        num_workers=flags.num_workers,
        progress=flags.progress,
    )
    print(evaluation.table())
    if flags.output is not None:
        print(f"Written to {evaluation.report(flags.output)}.")
    if flags.plots is not None:
        print(f"Plots: {', '.join(map(str, evaluation.plot(flags.plots)))}.")
    return evaluation.verdict


def _split(values: dict[str, Any]) -> None:
    """Write the pairs to forget and those to keep to files, and print how to use them."""
    from fasterase.pairs.split_files import write_split

    flags = SplitFlags(**values)
    check_sets("split", values)
    data, output = _require_flags("split", values, ("data", "output_dir"))
    folder = Path(output)
    if Path(data).resolve().parent == folder.resolve() and Path(data).stem in ("forget", "retain"):
        raise InputError(f"--output_dir={output!r}: the split would replace --data={data!r}.")
    check_writable(folder, argument=f"--output_dir={output!r}")
    forget, retain = split_data(values)
    files = write_split(forget, retain, folder)
    print(f"{forget!r}: {files.forget}\n{retain!r}: {files.retain}")
    if files.tables:
        sets = ["--forget", str(files.forget), "--retain", str(files.retain)]
    else:
        sets = ["--data", data, "--forget_ids", str(files.forget)]
    for name in ("image_key", "text_key"):
        if not files.tables and getattr(flags, name) is not None:
            sets += [f"--{name}", getattr(flags, name)]
    print(f"Next: fasterase unlearn --model MODEL --output_dir RUN {shlex.join(sets)}")


def _plan(values: dict[str, Any]) -> None:
    """Print the plan of an erasure; flags that are not its own override fields of the config."""
    inputs, fields = _split_values(values, PlanFlags)
    _require_flags("plan", inputs, ("model", "pairs"))
    flags = dataclasses.asdict(PlanFlags(**inputs))
    model, pairs = flags.pop("model"), flags.pop("pairs")
    print(fasterase.plan(model, pairs, **flags, config=UnlearnConfig(**fields)))


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


def _require_sets(
    command: str, values: dict[str, Any], *, further: Sequence[str] = ()
) -> tuple[str, Any, Any]:
    """Return the model, the pairs to forget and those to keep; check that `further` are given."""
    check_sets(command, values)
    if values.get("data") is None:
        model, forget, retain, *_ = _require_flags(
            command, values, ("model", "forget", "retain", *further)
        )
        return model, forget, retain
    model, *_ = _require_flags(command, values, ("model", *further))
    return model, *split_data(values)


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
