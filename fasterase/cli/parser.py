"""Parse the command line: flags and their help come from the dataclasses of the commands."""

from __future__ import annotations

import argparse
import inspect
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, get_args, get_type_hints

import fasterase
from fasterase.cli.commands import COMMANDS
from fasterase.config import UnlearnConfig, read_yaml
from fasterase.errors import InputError
from fasterase.option_values import (
    describe_type,
    parse_named,
    parse_text,
    parse_value,
    suggest_names,
)

# Flags of paths that a home folder may begin.
_PATHS = ("output_dir", "reference_cache", "output", "plots", "class_names", "found", "forget_ids")


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

    @property
    def may_be_named(self) -> bool:
        """Whether it takes one value, or several with names."""
        return dict[str, str] in get_args(self.hint)


def parse(argv: Sequence[str]) -> Parsed:
    """Parse a command line.

    Raises:
        InputError: an unknown command or flag, or a value or file that cannot be used.
        SystemExit: after printing `--help` or `--version`; without a command, the list of them.
    """
    argv = [
        re.sub(r"^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), token)
        for token in argv
    ]
    # The command is the first word that is no flag, nor the value of a launcher's flag.
    words = (
        place
        for place, token in enumerate(argv)
        if not token.startswith("-") and argv[place - 1 : place] != ["--local_rank"]
    )
    place = next(words, len(argv))
    general = general_parser()
    _parse_known(general, argv[:place])
    if place == len(argv):
        general.print_help()
        general.exit()
    command = argv[place]
    if command not in COMMANDS:
        known = f"The commands are {', '.join(COMMANDS)}."
        hint = suggest_names(command, COMMANDS, otherwise=known)
        raise InputError(f"unknown command {command}.{hint}")
    flags = {flag.name: flag for flag in flags_of(command)}
    rest, positional = argv[place + 1 :], COMMANDS[command].positional
    if positional is not None and rest and not rest[0].startswith("-"):
        rest = [f"--{positional}", *rest]
    parser = command_parser(command, flags.values(), everything="--help_all" in rest)
    given = _parse_known(parser, rest)
    given.pop("debug", None)
    values: dict[str, Any] = {}
    for file in given.pop("config", []):
        values |= _read_config(file, flags)
    for name, found in given.items():
        if isinstance(found, str):
            values[name] = parse_text(name, found, flags[name].hint)
        else:  # the words of a flag that takes several; of `print_config`, which no YAML has, True
            values[name] = _parse(flags[name], found) if name in flags else found
    at_home = {n: values[n] for n in _PATHS if isinstance(values.get(n), str)}
    values |= {name: os.path.expanduser(path) for name, path in at_home.items()}
    return Parsed(command, values)


def flags_of(command: str) -> list[Flag]:
    """List the flags of a command in the order of its help."""
    cls = COMMANDS[command]
    settings = [flag for flag in _flags_from(UnlearnConfig) if flag.name in cls.config_fields]
    return [*_flags_from(cls), *settings]


def _flags_from(cls: type) -> list[Flag]:
    hints, documented = get_type_hints(cls), _read_docstring(cls)
    # Without docstrings (python -OO) flags work all the same.
    return [
        Flag(name, hints[name], default, *documented.get(name, ("Settings", "")))
        for name, default in vars(cls()).items()
    ]


def _read_docstring(cls: type) -> dict[str, tuple[str, str]]:
    """Read the group and help text of each field: `> Group` lines, then `Args:` entries.

    Bases come first, so that a class may describe a field anew.
    """
    documented: dict[str, tuple[str, str]] = {}
    group = name = ""
    docstrings = [inspect.cleandoc(vars(base).get("__doc__") or "") for base in cls.__mro__]
    for line in "\n".join(reversed(docstrings)).splitlines():
        if line.startswith("> "):
            group = line[2:]
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


def _parse_known(parser: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    found, unknown = parser.parse_known_args(argv)
    if not unknown:
        return vars(found)
    flag = unknown[0].partition("=")[0]
    if not flag.startswith("-"):
        raise InputError(f"unexpected argument {unknown[0]!r}. Values need a flag before them.")
    known = parser._option_string_actions
    hint = suggest_names(flag, known, otherwise="--help lists the flags.")
    order = " Those of a command stand after it." if parser.prog == "fasterase" else ""
    raise InputError(f"unknown flag {flag}.{hint}{order}")


def general_parser() -> _ArgumentParser:
    """Return the parser of what stands before a command."""
    commands = [f"  {name:<12}{cls.purpose()}" for name, cls in COMMANDS.items()]
    parser = _ArgumentParser(
        prog="fasterase",
        usage="fasterase COMMAND [--flag VALUE ...]",
        description="Make a CLIP model forget chosen image-text associations.",
        epilog="\n".join(["commands, each with a --help of its own:", *commands]),
    )
    version = f"fasterase {fasterase.__version__}"
    parser.add_argument("-V", "--version", action="version", version=version)
    parser.add_argument("--local_rank", help="set by launchers such as deepspeed and torchrun")
    return parser


def command_parser(
    command: str, flags: Iterable[Flag], *, everything: bool = True
) -> _ArgumentParser:
    """Return the parser of a command, whose help shows its basic flags or `everything`."""
    cls = COMMANDS[command]
    needs = "".join(f" --{name} {name[0].upper()}" for name in cls.needs)
    parser = _ArgumentParser(
        prog=f"fasterase {command}",
        usage=f"fasterase {command}{needs} [--flag VALUE ...]",
        description=cls.purpose(),
        epilog="examples:\n" + inspect.cleandoc(cls.__doc__ or "").partition("Examples:\n")[2],
    )
    text = "YAML file whose keys are flags below"
    parser.add_argument("--config", action="append", metavar="FILE", help=text)
    if cls.hidden:
        text = "show every flag, not only the basic ones here"
        parser.add_argument("--help_all", action="help", help=text)
    if command == "unlearn":
        text = "print the configuration as YAML for --config, and exit"
        parser.add_argument("--print_config", action="store_true", help=text)
    groups: dict[str, Any] = {}
    for flag in flags:
        if flag.group not in groups:
            groups[flag.group] = parser.add_argument_group(flag.group)
        options = _argparse_options(flag)
        if not (everything or cls.shows(flag.name)):
            options["help"] = argparse.SUPPRESS
        groups[flag.group].add_argument(f"--{flag.name}", **options)
    return parser


def _argparse_options(flag: Flag) -> dict[str, Any]:
    metavars: dict[type, str] = {list: "NAME", dict: "NAME=WHERE"}
    metavar = metavars.get(type(flag.default), "VALUE")
    # argparse formats help texts with %.
    options = {"metavar": metavar, "help": flag.help.replace("%", "%%")}
    if metavar != "VALUE" or flag.may_be_named:
        return {**options, "nargs": "+", "action": "extend"}
    expected, default = describe_type(flag.hint), flag.default
    details = [] if expected in ("text", "text or None", "a list or None") else [expected]
    if default is not None:
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        details.append(f"default: {shown}")
    if details:
        options["help"] += f" ({'; '.join(details)})"
    return {**options, "nargs": "?", "const": "true"} if isinstance(default, bool) else options


def _read_config(file: str, flags: Mapping[str, Flag]) -> dict[str, Any]:
    values = read_yaml(file)
    for name, value in values.items():
        if name not in flags:
            otherwise = "--help lists the flags, which are the keys."
            hint = suggest_names(name, flags, otherwise=otherwise)
            raise InputError(f"config: unknown key `{name}` in {file}.{hint}")
        values[name] = _parse(flags[name], value)
    return values


def _is_place(text: str) -> bool:
    """Tell a path or pattern from NAME=WHERE: it may have a = itself, as in date=2024/0.tar."""
    path = os.path.expanduser(text)
    name, equals, where = path.partition("=")
    if not equals or "://" in name or name.startswith("pipe:") or os.path.exists(path):
        return True
    if "/" in name:
        return not os.path.exists(os.path.expanduser(where))
    folder = os.path.dirname(path)
    return "=" in folder and os.path.isdir(folder)


def _parse(flag: Flag, value: Any) -> Any:
    """Parse what YAML gives, or a command line for flags that take several values."""
    if isinstance(flag.default, dict):
        return parse_named(flag.name, value)
    if flag.may_be_named and value is not None:
        only = value[0] if isinstance(value, list) and len(value) == 1 else value
        return only if isinstance(only, str) and _is_place(only) else parse_named(flag.name, value)
    if isinstance(flag.default, list):
        value = parse_value(flag.name, value, list[str] | str)
        return [value] if isinstance(value, str) else value
    return parse_value(flag.name, value, flag.hint)
