"""From the command line to plain values: jsonargparse over the flags, with messages that help."""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter

import fasterase
from fasterase.cli.flags import Flag, flags_of
from fasterase.config import coerced
from fasterase.errors import InputError

COMMANDS = {
    "unlearn": "make a CLIP model forget a set of image-text pairs",
    "evaluate": "measure what a model knows of forget, retain and further pairs",
    "demo": "erase a concept from the small CLIP that ships with the package",
    "compile": "build the C++ kernels of the loss now instead of at first use",
}

_USAGE = {
    "unlearn": "--model M --forget F --retain R --output_dir D [--config FILE] [--field VALUE ...]",
    "evaluate": "--model M --forget F --retain R [--original M0] [options]",
    "demo": "[--forget food-fruit] [--model M] [--output_dir D] [options]",
    "compile": "",
}

EXAMPLES = {
    "unlearn": """\
examples:
  fasterase unlearn --model ViT-B-32/laion2b_s34b_b79k --forget forget.csv \\
      --retain 'shards/{000..099}.tar' --output_dir runs/one
  fasterase unlearn --config erase.yaml --lr 3e-6 --floor none
  fasterase unlearn --recipe cliperase --print_config > erase.yaml

D/model holds the erased model afterwards, D/history.jsonl the losses of every step and
D/evaluation.json the measurement. The same command after an interruption goes on from the last
checkpoint. `-` and `_` in flags are the same, `none` and `null` mean no value, and a flag wins over
the same key in the YAML file.

exit codes: 0 done, 2 wrong input, 3 losses stayed non-finite, 75 preempted after a checkpoint
(run again), 130 Ctrl-C (run again), 1 anything else.""",
    "evaluate": """\
examples:
  fasterase evaluate --model runs/one/model --forget forget.csv --retain retain.csv
  fasterase evaluate --model runs/one/model --original ViT-B-32/laion2b_s34b_b79k \\
      --forget forget.csv --retain retain.csv --sets neighbours=near.csv --output report.md""",
    "demo": """\
examples:
  fasterase demo
  fasterase demo --forget animal-bird --output_dir runs/birds
  fasterase demo --recipe cliperase""",
    "compile": """\
The library goes into TORCH_EXTENSIONS_DIR, or else ~/.cache/torch_extensions, under a name that
tells compilers' flags, torch versions and CPU types apart; run it once for each type of node that
shares a home folder. Needs a C++ compiler: c++ on PATH, or the one that CXX names.""",
}


class Parsed(NamedTuple):
    """A command with the values that flags or YAML gave, and no defaults among them."""

    command: str
    values: dict[str, Any]
    print_config: bool


class _Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """jsonargparse's help, with the examples left as they are written."""


def parse(argv: Sequence[str]) -> Parsed:
    """Parse a command line.

    Raises:
        InputError: an unknown command or flag, or a value or file that cannot be used.
        SystemExit: after printing `--help` or `--version`.
    """
    parser = _parser()
    command = next((token for token in argv if token in COMMANDS), None)
    flags = flags_of(command) if command else []
    try:
        found = parser.parse_args(_canonical(argv, flags), defaults=False)
    except argparse.ArgumentError as error:
        raise InputError(_explained(str(error), flags)) from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"a value or the config file cannot be read: {error}") from error
    given = found[found["command"]].as_dict()
    for name in ("config", "debug"):
        given.pop(name, None)
    return Parsed(found["command"], given, given.pop("print_config", False))


@functools.cache
def _parser() -> ArgumentParser:
    parser = _new_parser(
        prog="fasterase",
        description="Make a CLIP model forget chosen image-text associations.",
        version=fasterase.__version__,
    )
    parser.add_argument(
        "--local_rank", type=int, help="set by launchers such as deepspeed and torchrun"
    )
    _add_debug(parser)
    commands = parser.add_subcommands(dest="command", required=True, metavar="COMMAND")
    for command, purpose in COMMANDS.items():
        commands.add_subcommand(command, _command_parser(command, purpose), help=purpose)
    return parser


def _command_parser(command: str, purpose: str) -> ArgumentParser:
    parser = _new_parser(
        usage=f"fasterase {command} {_USAGE[command]}".rstrip(),
        description=f"{purpose[0].upper()}{purpose[1:]}.",
        epilog=EXAMPLES[command],
    )
    _add_debug(parser)
    parser.add_argument("--config", action="config", help="YAML file whose keys are flags below")
    if command == "unlearn":
        parser.add_argument(
            "--print_config",
            action="store_true",
            help="print all settings as YAML, fit for --config, and stop",
        )
    groups: dict[str, Any] = {}
    for flag in flags_of(command):
        if flag.group not in groups:
            groups[flag.group] = parser.add_argument_group(flag.group)
        groups[flag.group].add_argument(f"--{flag.name}", **_argument(flag))
    return parser


def _new_parser(**settings: Any) -> ArgumentParser:
    return ArgumentParser(
        exit_on_error=False,
        allow_abbrev=False,
        default_env=False,
        print_config=None,
        formatter_class=_Formatter,
        **settings,
    )


def _add_debug(parser: ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _argument(flag: Flag) -> dict[str, Any]:
    argument: dict[str, Any] = {
        "type": flag.hint,
        "default": flag.default,
        "help": flag.help,
    }
    if flag.hint is bool:
        argument.update(nargs="?", const=True)
    elif isinstance(flag.default, list):
        del argument["type"]
        argument.update(nargs="+", action="extend", metavar="NAME=WHERE")
    return argument


def _canonical(argv: Sequence[str], flags: Sequence[Flag]) -> list[str]:
    """Spell flags with `_`, None as YAML's null and a pair of numbers as YAML's list."""
    hints = {flag.name: flag.hint for flag in flags}
    canonical: list[str] = []
    current = ""
    for token in argv:
        if token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            current = name.replace("-", "_")
            _check_known(current, flags)
            canonical.append(f"--{current}{equals}{_value(value, hints.get(current))}")
        else:
            canonical.append(_value(token, hints.get(current)))
            current = ""
    return canonical


def _value(text: str, hint: Any) -> str:
    if text.lower() in ("none", "null") and type(None) in get_args(hint):
        return "null"
    if get_origin(hint) is tuple and text[:1] not in ("", "[", "("):
        return f"[{text}]"
    return text


_GENERAL = ("help", "version", "debug", "local_rank", "config", "print_config")


def _check_known(name: str, flags: Sequence[Flag]) -> None:
    known = [flag.name for flag in flags]
    if name in known or name in _GENERAL:
        return
    raise InputError(f"unknown flag --{name}.{_near(name, known)}")


def _near(name: str, known: Sequence[str]) -> str:
    close = get_close_matches(name, [*known, *_GENERAL], n=3)
    if close:
        return f" Did you mean {' or '.join(f'--{match}' for match in close)}?"
    return " The flag --help lists what there is."


def _explained(message: str, flags: Sequence[Flag]) -> str:
    """jsonargparse's message as one line that names the flag, what was found and what to do."""
    hints = {flag.name: flag.hint for flag in flags}
    if unknown := re.search(r"does not accept (?:option|nested key) '([^']+)'", message):
        name = unknown[1]
        return f"config: unknown key `{name}`.{_near(name, list(hints))}"
    if message.startswith("Unexpected config"):
        return "config: expected a YAML mapping, one `name: value` a line."
    where = re.search(r'Parser key "(?:\w+\.)?(\w+)":?', message)
    found = re.search(r"(?:Given value|Got value): (.*)", message)
    if where and found and where[1] in hints:
        # As text first: what YAML reads differently is refused for its type, with its own message.
        for value in (found[1], _read(found[1])):
            coerced(where[1], value, hints[where[1]])
    if where:
        message = message.replace(where[0], f"--{where[1]}:")
    return " ".join(message.split())


def _read(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
