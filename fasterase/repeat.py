"""`config.yaml`, which repeats a run: its settings, and the model and the data it was given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike, fspath
from typing import Any

from fasterase.config import COMMAND_KEYS, UnlearnConfig, format_yaml
from fasterase.errors import InputError, hide_secrets

# In the place of an argument that a file cannot hold.
OBJECT = "(an object in Python)"
# What `hide_secrets` leaves of them in a URL.
_HIDDEN = ("://***@", "?***", "=***")
# Arguments of `unlearn` that are no flags.
_NO_FLAGS = ("tokenizer", "preprocess", "callback")


def describe_run(arguments: Mapping[str, Any], config: UnlearnConfig) -> str:
    """Return YAML for `fasterase unlearn --config`: the `arguments` of a call and its settings.

    A set that was made from other arguments names them in its `flags`, and these are written in its
    place. Passwords and signatures of URLs are left out.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    values: dict[str, Any] = {}
    for name in COMMAND_KEYS:
        if name in given:
            _add(values, name, given[name])
    hidden = {name: _hide(value) for name, value in values.items()}
    notes = [
        "Repeats the run: `fasterase unlearn --config` of this file, with another --output_dir, "
        "from the folder that it was started in."
    ]
    if lost := [name for name, value in values.items() if _has_one(value, [OBJECT])]:
        notes.append(f"Objects in Python, to be given anew: {', '.join(lost)}.")
    if others := [name for name in _NO_FLAGS if name in given]:
        notes.append(f"Given in Python alone, where no flag stands for it: {', '.join(others)}.")
    if hidden != values:
        notes.append("`***` stands for passwords and signatures of URLs, to be given anew.")
    heading = "".join(f"# {note}\n" for note in notes)
    return heading + format_yaml({**hidden, **config.to_dict()})


def check_repeatable(values: Mapping[str, Any]) -> None:
    """Raise `InputError` for values of `config.yaml` that are to be given anew."""
    for marks, what in (((OBJECT,), "an object in Python"), (_HIDDEN, "a URL with a secret")):
        lost = [f"--{name}" for name, value in values.items() if _has_one(value, marks)]
        if lost:
            raise InputError(
                f"config: the run that wrote the file was given {what} for {', '.join(lost)}, "
                "which a file does not hold. Give each as a flag, which overrides the file."
            )


def _add(values: dict[str, Any], name: str, value: Any) -> None:
    """Put an argument into `values` as text, or the flags that it was made from."""
    if isinstance(value, str | PathLike):
        values[name] = str.__str__(fspath(value))
    elif isinstance(made := getattr(value, "flags", None), Mapping):
        values |= made
    elif isinstance(value, Mapping) and name in ("forget", "sets", "forget_sets"):
        named: dict[str, Any] = {}
        for key, each in value.items():
            if isinstance(made := getattr(each, "flags", None), Mapping):
                values |= made
            else:
                _add(named, str.__str__(key) if isinstance(key, str) else key, each)
        if named:
            values[name] = named
    else:
        values[name] = OBJECT


def _has_one(value: Any, marks: Iterable[str]) -> bool:
    """Whether a text, or one of several, has one of the marks; names of texts may have them."""
    if isinstance(value, Mapping):
        return any(_has_one(each, marks) for each in value.values())
    if isinstance(value, list):
        return any(_has_one(each, marks) for each in value)
    return any(mark in value for mark in marks) if isinstance(value, str) else False


def _hide(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _hide(each) for name, each in value.items()}
    return hide_secrets(value) if isinstance(value, str) else value
