"""Parse the command line: flags generated from dataclasses, their values checked by type."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, get_type_hints

import fasterase
from fasterase.cli.flags import DemoFlags, EvaluateFlags, PlanFlags, SplitFlags, UnlearnFlags
from fasterase.config import UnlearnConfig, read_yaml
from fasterase.errors import InputError
from fasterase.option_values import describe_type, parse_value, suggest_names

COMMANDS = {
    "unlearn": "make a CLIP model forget a set of image-text pairs",
    "evaluate": (
        "measure how well a model still knows the pairs to forget, to keep and in further sets"
    ),
    "plan": "tell memory, time and disk of an erasure beforehand, and how to run it",
    "split": "split pairs into those to forget and those to keep",
    "demo": "erase a concept from the small CLIP that ships with the package",
    "compile": "build the C++ kernels of the loss now instead of at first use",
}

_USAGE = {
    "unlearn": "--model M --forget F --retain R --output_dir D [--config FILE] [--field VALUE ...]",
    "evaluate": "--model M --forget F --retain R [--original M0] [options]",
    "plan": "--model M --pairs N [--gpus G] [options]",
    "split": "--data D --forget_expression REGEX --output_dir O [options]",
    "demo": "[--forget food-fruit] [--model M] [--output_dir D] [options]",
    "compile": "",
}

EXAMPLES = {
    "unlearn": """\
examples:
  fasterase unlearn --model ViT-B-32/laion2b_s34b_b79k --forget forget.csv \\
      --retain 'shards/{000..099}.tar' --output_dir runs/one
  fasterase unlearn --model ViT-B-32/laion2b_s34b_b79k --data pairs.csv \\
      --forget_expression '\\bapples?\\b' --output_dir runs/apples
  fasterase unlearn --config erase.yaml --lr 3e-6 --floor none
  fasterase unlearn --recipe cliperase --print_config > erase.yaml

The erased model is written to D/model, the losses of every step to D/history.jsonl, and the
measurement to D/evaluation.json. Run the same command again after an interruption to resume from
the last checkpoint. `-` and `_` in flags are the same, `none` and `null` mean no value, and a flag
overrides the same key in the YAML file.

exit codes: 0 done, 2 wrong input, 3 losses stayed non-finite, 4 done but the verdict is
"remembered", 75 preempted after a checkpoint (run again), 130 Ctrl-C (run again), 1 anything
else.""",
    "evaluate": """\
examples:
  fasterase evaluate --model runs/one/model --forget forget.csv --retain retain.csv
  fasterase evaluate --model runs/one/model --original ViT-B-32/laion2b_s34b_b79k \\
      --forget forget.csv --retain retain.csv --sets neighbours=near.csv \\
      --forget_sets unseen=unseen.csv --output report.md

exit codes: 0 done, 2 wrong input, 4 the verdict is "remembered", 1 anything else.""",
    "plan": """\
examples:
  fasterase plan --model ViT-B-32 --pairs 1_000_000
  fasterase plan --model ViT-bigG-14 --pairs 12_000_000 --forget 100_000 --gpus 8 --gpu-memory 80

The numbers come from the architecture alone: the training code runs on tensors without storage, and
its FLOPs and live memory are counted. docs/planning.md explains each of them.""",
    "split": """\
examples:
  fasterase split --data pairs.csv --forget_expression '\\bapples?\\b' --output_dir sets
  fasterase split --data photos --forget_classes apple,pear --output_dir sets

Give exactly one of --forget_expression, --forget_ids and --forget_classes. `fasterase unlearn`
takes them too and splits --data itself; this command shows what they select.""",
    "demo": """\
examples:
  fasterase demo
  fasterase demo --forget animal-bird --output_dir runs/birds
  fasterase demo --recipe cliperase""",
    "compile": """\
The library is cached in TORCH_EXTENSIONS_DIR, or else ~/.cache/torch_extensions, under a name that
depends on compiler flags, torch version and CPU type. Run this once per type of node if nodes share
a home folder. Needs a C++ compiler: c++ on PATH, or the one named by CXX.""",
}

# Flags that set no field of a dataclass.
_GENERAL = ("help", "version", "debug", "local_rank", "config", "print_config")

# The fields of `UnlearnConfig` that the demo takes. A run is limited by steps, not by epochs.
_DEMO_FIELDS = (
    "lr",
    "max_steps",
    "batch_size",
    "optimizer",
    "deepspeed",
    "seed",
    "num_workers",
    "progress",
)
# Those for which the demo does not use the default of `UnlearnConfig`.
_DEMO_TUNED = ("batch_size",)

# Those that a plan depends on.
_PLAN_FIELDS = (
    "negatives",
    "epochs",
    "max_steps",
    "batch_size",
    "forget_batch_size",
    "micro_batch_size",
    "lr",
    "optimizer",
    "tune",
    "train_logit_scale",
    "precision",
    "activation_checkpointing",
    "backend",
    "device",
)

_FLAGS = {"evaluate": EvaluateFlags, "split": SplitFlags}


class Parsed(NamedTuple):
    """A command, and the values given by flags and YAML; defaults are not filled in."""

    command: str
    values: dict[str, Any]


class Flag(NamedTuple):
    """A flag that sets one field of a dataclass."""

    name: str
    hint: Any
    default: Any
    group: str
    help: str


def parse(argv: Sequence[str]) -> Parsed:
    """Parse a command line.

    Raises:
        InputError: an unknown command or flag, or a value or file that cannot be used.
        SystemExit: after printing `--help` or `--version`.
    """
    argv = [re.sub(r"^--[^=]+", lambda flag: _with_underscores(flag[0]), token) for token in argv]
    _check_command(argv)
    found, unknown = _parser().parse_known_args(argv)
    texts = vars(found)
    command = texts.pop("command", None)
    flags = {flag.name: flag for flag in flags_of(command)} if command else {}
    if unknown:
        raise _unknown_argument(unknown[0], flags)
    if command is None:
        raise InputError(f"no command. Give one of {', '.join(COMMANDS)}; --help explains them.")
    texts.pop("local_rank", None)
    texts.pop("debug", None)
    values: dict[str, Any] = {}
    for file in texts.pop("config", []):
        values.update(_read_config(file, flags))
    if "print_config" in texts:
        values["print_config"] = texts.pop("print_config")
    for name, text in texts.items():
        values[name] = _parse_text(name, text, flags[name].hint)
    return Parsed(command, values)


def flags_of(command: str) -> list[Flag]:
    """List the flags of a sub-command in the order of its help."""
    if command == "unlearn":
        return [*_flags_from(UnlearnFlags), *_flags_from(UnlearnConfig)]
    if command in _FLAGS:
        return list(_flags_from(_FLAGS[command]))
    if command == "compile":
        return []
    if command == "plan":
        fields = [flag for flag in _flags_from(UnlearnConfig) if flag.name in _PLAN_FIELDS]
        return [*_flags_from(PlanFlags), *fields]
    fields = [flag for flag in _flags_from(UnlearnConfig) if flag.name in _DEMO_FIELDS]
    return [*_flags_from(DemoFlags), *map(_without_default, fields)]


def _without_default(flag: Flag) -> Flag:
    if flag.name not in _DEMO_TUNED:
        return flag
    text = f"{flag.help.split(';')[0].rstrip('.')}. Default: chosen for the shipped model."
    return flag._replace(default=None, help=text)


def _flags_from(cls: type) -> Iterator[Flag]:
    hints = get_type_hints(cls)
    documented = _read_docstring(cls)
    for field in dataclasses.fields(cls):
        group, text = documented.get(field.name, ("Settings", ""))
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        yield Flag(field.name, hints[field.name], default, group, text)


def _read_docstring(cls: type) -> dict[str, tuple[str, str]]:
    """Read the group and help text of each field: `> Group` lines, then `Args:` entries.

    Bases come first, so that a class may describe a field anew.
    """
    documented: dict[str, tuple[str, str]] = {}
    group, name = "", ""
    docstrings = [inspect.cleandoc(vars(base).get("__doc__") or "") for base in cls.__mro__]
    for line in "\n".join(reversed(docstrings)).splitlines():
        if line.startswith("> "):
            group = line[2:].strip()
        elif entry := re.match(r" {4}(\w+): (.*)", line):
            name = entry[1]
            documented[name] = (group, entry[2])
        elif name and line.startswith(" " * 8):
            documented[name] = (group, f"{documented[name][1]} {line.strip()}")
        elif line and not line.startswith(" "):
            name = ""
    return documented


class _ArgumentParser(argparse.ArgumentParser):
    """An argparse parser that raises `InputError`, and keeps only the flags that were given."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,
        )
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}. `{self.prog} --help` explains the usage.")


@functools.cache
def _parser() -> _ArgumentParser:
    parser = _ArgumentParser(
        prog="fasterase", description="Make a CLIP model forget chosen image-text associations."
    )
    parser.add_argument("--version", action="version", version=f"fasterase {fasterase.__version__}")
    parser.add_argument(
        "--local_rank", type=int, help="set by launchers such as deepspeed and torchrun"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for command, purpose in COMMANDS.items():
        _add_flags(
            commands.add_parser(
                command,
                help=purpose,
                usage=f"fasterase {command} {_USAGE[command]}".rstrip(),
                description=f"{purpose[0].upper()}{purpose[1:]}.",
                epilog=EXAMPLES[command],
            ),
            command,
        )
    return parser


def _add_flags(parser: argparse.ArgumentParser, command: str) -> None:
    parser.add_argument(
        "--config", action="append", metavar="FILE", help="YAML file whose keys are flags below"
    )
    if command == "unlearn":
        parser.add_argument(
            "--print_config",
            action="store_true",
            help="print the configuration as YAML for --config, and exit",
        )
    groups: dict[str, Any] = {}
    for flag in flags_of(command):
        if flag.group not in groups:
            groups[flag.group] = parser.add_argument_group(flag.group)
        groups[flag.group].add_argument(f"--{flag.name}", **_argparse_options(flag))


def _argparse_options(flag: Flag) -> dict[str, Any]:
    expected = describe_type(flag.hint)
    if isinstance(flag.default, list):
        # A flag that YAML may give as a mapping takes names and what they stand for.
        metavar = "NAME=WHERE" if "a dict" in expected else "NAME"
        return {"nargs": "+", "action": "extend", "metavar": metavar, "help": flag.help}
    details = [] if expected in ("text", "text or None", "a list or None") else [expected]
    if flag.default is not None:
        shown = (
            ",".join(map(str, flag.default)) if isinstance(flag.default, tuple) else flag.default
        )
        details.append(f"default: {shown}")
    text = f"{flag.help} ({'; '.join(details)})" if details else flag.help
    # argparse formats help texts with %.
    options = {"metavar": "VALUE", "help": text.replace("%", "%%")}
    return {**options, "nargs": "?", "const": "true"} if flag.hint is bool else options


def _read_config(file: str, flags: Mapping[str, Flag]) -> dict[str, Any]:
    values = read_yaml(file)
    for name in values:
        if name not in flags:
            hint = suggest_names(
                name, flags, otherwise="--help lists the flags, which are the keys."
            )
            raise InputError(f"config: unknown key `{name}` in {file}.{hint}")
    return {name: parse_value(name, value, flags[name].hint) for name, value in values.items()}


def _parse_text(name: str, text: str | list[str], hint: Any) -> Any:
    """Parse the text of a flag as the first of its readings that has the type `hint`.

    Besides the text itself these are no value, YAML (for numbers, booleans and dicts) and a comma-
    separated list.
    """
    if isinstance(text, list):
        return parse_value(name, text, hint)
    in_yaml = _read_yaml_scalar(text)
    readings = [text, in_yaml, text.strip("()[] ").split(",")]
    if text.lower() in ("none", "null"):
        readings.insert(0, None)
    # Before the text, which a flag that also takes a path would accept.
    elif isinstance(in_yaml, dict):
        readings.insert(0, in_yaml)
    for reading in readings:
        try:
            return parse_value(name, reading, hint)
        except InputError:
            continue
    return parse_value(name, text, hint)


def _read_yaml_scalar(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    # Not YAML: take the text itself. PyYAML also raises ValueError, KeyError, OverflowError ...
    except Exception:
        return text


def _unknown_argument(argument: str, flags: Mapping[str, Flag]) -> InputError:
    if not argument.startswith("-"):
        return InputError(f"unexpected argument {argument!r}. Values need a flag before them.")
    flag = argument.partition("=")[0]
    known = [f"--{name}" for name in (*flags, *_GENERAL)]
    hint = suggest_names(flag, known, otherwise="--help lists the flags.")
    return InputError(f"unknown flag {flag}.{hint}")


def _check_command(argv: Sequence[str]) -> None:
    """Check the word that stands first, apart from general flags.

    Raises:
        InputError: it is not the name of a command, or flags of a command stand before it.
    """
    tokens = iter(argv)
    for token in tokens:
        if not token.startswith("-"):
            if token not in COMMANDS:
                hint = suggest_names(
                    token, COMMANDS, otherwise=f"The commands are {', '.join(COMMANDS)}."
                )
                raise InputError(f"unknown command {token}.{hint}")
            return
        name = token.partition("=")[0].lstrip("-")
        if name == "local_rank" and "=" not in token:
            next(tokens, None)
        elif any(name == flag.name for command in COMMANDS for flag in flags_of(command)):
            raise InputError(
                f"{token} stands before the command. Write the command first: fasterase "
                f"{next((each for each in argv if each in COMMANDS), 'unlearn')} {token} ..."
            )


def _with_underscores(flag: str) -> str:
    return "--" + flag[2:].replace("-", "_")
