"""The sets of pairs that a command line asks for: two sources, or one that is split by a rule."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fasterase
from fasterase.errors import InputError

RULES = ("forget_expression", "forget_ids", "forget_classes")


def check_sets(command: str, values: Mapping[str, Any]) -> None:
    """Check that `values` name either two sets, or one source and one rule that splits it.

    Raises:
        InputError: some of these flags are missing, or do not go together.
    """
    rules = [f"--{name}" for name in RULES if values.get(name) is not None]
    sets = [f"--{name}" for name in ("forget", "retain") if values.get(name) is not None]
    either = f"one of {', '.join(f'--{name}' for name in RULES)}"
    if values.get("data") is None:
        if rules:
            raise InputError(
                f"{rules[0]} splits the pairs of --data, which is missing. Give --data"
                + ("" if command == "split" else ", or the two sets as --forget and --retain")
                + "."
            )
        if command == "split":
            raise InputError(f"split needs --data, the pairs to split, and {either}.")
        return
    if sets:
        raise InputError(
            f"--data and {' and '.join(sets)} exclude each other. Give --data and {either}, or "
            f"--forget and --retain."
        )
    if len(rules) != 1:
        found = " and ".join(rules) if rules else "none"
        raise InputError(f"--data needs {either}, which says what to forget; found {found}.")


def split_data(values: Mapping[str, Any]) -> tuple[Any, Any]:
    """Split the pairs of `--data`; return those to forget and those to keep.

    Raises:
        InputError: the source or the rule cannot be used; the message names the flag.
    """
    name = next(name for name in RULES if values.get(name) is not None)
    rule: Any = values[name]
    if name == "forget_ids":
        rule = Path(rule)
    elif name == "forget_expression":
        try:
            rule = re.compile(rule, re.IGNORECASE)
        except re.error as error:
            raise InputError(
                f"--forget_expression={rule!r} is not a regular expression: {error}"
            ) from error
    try:
        return fasterase.split(
            values["data"],
            forget=rule,
            image_key=values.get("image_key"),
            text_key=values.get("text_key"),
        )
    except InputError as error:
        message = str(error).replace("`source`", "--data").replace("`forget`", f"--{name}")
        raise type(error)(message) from error
