"""Values of options, as Python, YAML or a command line gives them, in the type that is wanted."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from os import PathLike
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from fasterase.errors import InputError


def parse_value(name: str, value: Any, hint: Any) -> Any:
    """Convert `value` to the type that `hint` asks for.

    A string that spells a number is accepted as a float, since YAML reads `1e-5` as a string.

    Raises:
        InputError: no type in `hint` accepts the value; the message starts with `name`.
    """
    for kind in _kinds(hint):
        try:
            return _convert(value, kind)
        except (ValueError, OverflowError):
            continue
    null = " (null in YAML)" if type(None) in _kinds(hint) else ""
    raise InputError(f"{name}={value!r} is not usable: expected {describe_type(hint)}{null}.")


def parse_count(name: str, value: Any, *, least: int) -> int:
    """Return a whole number of whatever type, or raise `InputError` if it is below `least`."""
    try:
        is_whole = not isinstance(value, bool | str) and int(value) == value
    except (TypeError, ValueError, OverflowError):
        is_whole = False
    if not is_whole or value < least:
        raise InputError(f"{name}={value!r} must be a whole number of at least {least}.")
    return int(value)


def parse_text(name: str, text: str, hint: Any) -> Any:
    """Parse the text of a flag as the first of its readings that has the type `hint`.

    Besides the text itself these are no value, YAML (for numbers, booleans and dicts) and a comma-
    separated list. No value is False where it cannot be None.

    Raises:
        InputError: none has; the message starts with `name`.
    """
    import yaml

    try:
        in_yaml = yaml.safe_load(text)
    except Exception:  # not YAML; PyYAML also raises ValueError, KeyError, OverflowError ...
        in_yaml = text
    in_brackets = re.fullmatch(r"\s*[(\[](.*)[)\]]\s*", text, re.DOTALL)
    readings = [text, in_yaml, (in_brackets[1] if in_brackets else text).split(",")]
    if text.lower() in ("none", "null"):
        readings[:0] = None, False
    # Before the text, which a flag that also takes a path would accept.
    elif isinstance(in_yaml, dict):
        readings.insert(0, in_yaml)
    for reading in readings:
        with contextlib.suppress(InputError):
            return parse_value(name, reading, hint)
    return parse_value(name, text, hint)


def parse_named(name: str, entries: Any) -> dict[str, str]:
    """Parse NAME=WHERE, one or several, or the same as a mapping.

    Raises:
        InputError: an entry has another form, or a name is given twice.
    """
    entries = parse_value(name, entries, list[str] | dict[str, str] | str)
    named: dict[str, str] = {}
    if isinstance(entries, dict):
        pairs = [(str(key), str(where)) for key, where in entries.items()]
    else:
        listed = [entries] if isinstance(entries, str) else entries
        pairs = [each.partition("=")[::2] for each in listed]
    for key, where in pairs:
        if not (key and where):
            entry = f"{key}={where}" if where or not key else key
            raise InputError(f"--{name} {entry}: expected NAME=WHERE, such as neighbours=near.csv.")
        if key in named:
            raise InputError(f"--{name}: the name {key} is given twice.")
        named[key] = where
    return named


def describe_type(hint: Any) -> str:
    """Describe a type hint in words, such as "a finite number or 'auto' or None"."""
    words = {int: "a whole number", float: "a finite number", bool: "True or False", str: "text"}
    described = []
    for kind in _kinds(hint):
        container, items = get_origin(kind), get_args(kind)
        if isinstance(kind, str):
            described.append(repr(kind))
        elif kind is type(None):
            described.append("None")
        elif container is tuple:
            described.append(f"{len(items)} numbers")
        else:
            described.append(words.get(kind) or f"a {container.__name__}")
    return " or ".join(described)


def special_values(hint: Any) -> list[str | None]:
    """Return the words, and None, that a type hint allows beside its types."""
    kinds = [None if kind is type(None) else kind for kind in _kinds(hint)]
    return [kind for kind in kinds if kind is None or isinstance(kind, str)]


def suggest_names(name: object, known: Iterable[str], *, otherwise: str) -> str:
    """Return " Did you mean x?" with the names closest to `name`, or `otherwise` if none is."""
    close = get_close_matches(str(name), list(known), n=3)
    return f" Did you mean {' or '.join(close)}?" if close else f" {otherwise}"


def parse_names(argument: str, names: Any, known: Collection[str]) -> list[str]:
    """Return the distinct names of a list, in order.

    Raises:
        InputError: it is no list, or a name is not among `known`; names `argument`, a plural.
    """
    listed = f"Known: {', '.join(known)}."
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise InputError(f"{argument}={names!r}: expected a list of names. {listed}")
    for name in names:
        if name not in known:
            hint = suggest_names(name, known, otherwise=listed)
            raise InputError(f"{argument}: unknown {argument.removesuffix('s')} {name!r}.{hint}")
    return list(dict.fromkeys(names))


def _kinds(hint: Any) -> tuple[Any, ...]:
    """List the alternatives of a union: types, and the strings of a `Literal`."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return tuple(kind for part in get_args(hint) for kind in _kinds(part))
    return (hint,)


def _convert(value: Any, kind: Any) -> Any:
    """Return `value` as `kind`, one of `_kinds`; `ValueError` or `OverflowError` if it is not."""
    if get_origin(kind) is not None:
        return _convert_items(value, get_origin(kind), get_args(kind))
    if isinstance(kind, str):
        if isinstance(value, str) and value == kind:
            return value
    elif kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        number = float(value)
        if math.isfinite(number):
            return number
    elif kind is str and isinstance(value, PathLike):
        return str(value)
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise ValueError


def _convert_items(value: Any, container: Any, items: Sequence[Any]) -> Any:
    if container is tuple and isinstance(value, list | tuple) and len(value) == len(items):
        return tuple(_convert(item, part) for item, part in zip(value, items, strict=True))
    if container is list and isinstance(value, list):
        return [_convert(item, items[0]) for item in value]
    if container is dict and isinstance(value, Mapping):
        return dict(value)
    raise ValueError
