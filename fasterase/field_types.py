"""Check and convert a setting's value against its type hint; errors name the setting."""

from __future__ import annotations

import math
from collections.abc import Mapping
from os import PathLike
from typing import Any, Literal, get_args, get_origin

from fasterase.errors import InputError


def coerced(name: str, value: Any, hint: Any) -> Any:
    """`value` as `hint` asks, so that YAML's `1e-5` (a string) and ints for floats are accepted."""
    for option in _options(hint):
        accepted, result = _as_option(value, option)
        if accepted:
            return result
    expected = " or ".join(_spelled(option) for option in _options(hint))
    raise InputError(f"{name}={value!r} is not usable: expected {expected}.")


def _options(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) is Literal:
        return tuple(get_args(hint))
    if get_origin(hint) is tuple or get_origin(hint) is dict:
        return (hint,)
    parts = get_args(hint)
    if not parts:
        return (hint,)
    return tuple(option for part in parts for option in _options(part))


def _as_option(value: Any, option: Any) -> tuple[bool, Any]:
    if isinstance(option, str):
        return value == option, value
    if option is type(None):
        return value is None, None
    if option is bool:
        return isinstance(value, bool), value
    if option is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if option is float:
        return _as_float(value)
    if get_origin(option) is tuple:
        if isinstance(value, (list, tuple)) and len(value) == len(get_args(option)):
            floats = [_as_float(item) for item in value]
            return all(ok for ok, _ in floats), tuple(item for _, item in floats)
        return False, None
    if get_origin(option) is dict:
        return isinstance(value, Mapping), dict(value) if isinstance(value, Mapping) else None
    if option is str and isinstance(value, PathLike):
        return True, str(value)
    return isinstance(value, option), value


def _as_float(value: Any) -> tuple[bool, float]:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return False, 0.0
    try:
        number = float(value)
    except ValueError:
        return False, 0.0
    return math.isfinite(number), number


def _spelled(option: Any) -> str:
    if isinstance(option, str):
        return repr(option)
    if option is type(None):
        return "None (null in YAML)"
    if get_origin(option) is tuple:
        return f"{len(get_args(option))} numbers"
    if get_origin(option) is dict:
        return "a dict"
    return {"int": "a whole number", "float": "a finite number", "bool": "True or False"}.get(
        option.__name__, "text"
    )
