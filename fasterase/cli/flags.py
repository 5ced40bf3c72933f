"""The flags of each sub-command, derived from dataclasses: name, type, default, help and group."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_type_hints

from fasterase.config import UnlearnConfig


@dataclass(frozen=True)
class UnlearnFlags:
    """What `fasterase unlearn` takes beside the fields of `UnlearnConfig`.

    > Model and pairs

    Args:
        model: the model to change: open_clip name/tag (`ViT-B-32/laion2b_s34b_b79k`),
            `hf-hub:org/name` (open_clip), `hf:org/name` (transformers), or a folder.
        forget: pairs to forget: a CSV, TSV or JSONL file (columns `filepath` and `title`), a folder
            of `x.jpg` + `x.txt`, a class-per-folder directory, or a WebDataset pattern
            (`shards/{000..099}.tar`).
        retain: pairs whose association must stay, in any of the same forms.
        holdout: pairs that are only measured, before and after.
        image_key: column or tar ending of the image, where it is not the usual one.
        text_key: column or tar ending of the caption, where it is not the usual one.
        recipe: the defaults to start from: `fasterase`, or `cliperase` for the paper's. A flag or
            YAML key that is given wins over the recipe.
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
    """What `fasterase evaluate` takes.

    > Model and pairs

    Args:
        model: the model to measure, named as in `fasterase unlearn`.
        forget: the pairs that were to be forgotten, in any form that `fasterase unlearn` takes.
        retain: the pairs whose association was to stay.
        holdout: pairs that no run has seen.
        sets: further pair sets, each as NAME=PATH (in YAML also a mapping).
        image_key: column or tar ending of the image, where it is not the usual one.
        text_key: column or tar ending of the caption, where it is not the usual one.

    > Comparison

    Args:
        original: the model before erasing, shown beside.
        references: further models shown beside, each as NAME=MODEL: one retrained without the
            forget set, say.

    > Measuring

    Args:
        class_names: text file with one class name a line, for zero-shot accuracy.
        max_pairs: pairs measured of each set, drawn by `seed`.
        seed: of the draw and of the bootstrap intervals.
        output: also write the result to this file: `.json` the values, `.md` the report.
    """

    model: str | None = None
    forget: str | None = None
    retain: str | None = None
    holdout: str | None = None
    sets: list[str] | dict[str, str] = dataclasses.field(default_factory=list)
    image_key: str | None = None
    text_key: str | None = None
    original: str | None = None
    references: list[str] | dict[str, str] = dataclasses.field(default_factory=list)
    class_names: str | None = None
    max_pairs: int = 5000
    seed: int = 0
    output: str | None = None


@dataclass(frozen=True)
class DemoFlags:
    """What `fasterase demo` takes beside a few fields of `UnlearnConfig`.

    > Demo

    Args:
        forget: what to erase: a group (`food-drink`), a subgroup (`food-fruit`) or a regular
            expression on the names.
        model: erase from this model instead of the one that ships with the package, named as in
            `fasterase unlearn`.
        recipe: `fasterase`, or `cliperase` for the paper's; the other one is shown beside it.
        output_dir: folder for the erased model, history, plot and picture sheet. `null`:
            `runs/demo-` and what is erased.
        full: also print the table of every metric, which is always in `evaluation.txt`.
    """

    forget: str = "food-fruit"
    model: str | None = None
    recipe: Literal["fasterase", "cliperase"] = "fasterase"
    output_dir: str | None = None
    full: bool = False


class Flag(NamedTuple):
    """One flag: the field that it sets, with what help and checks need to know of it."""

    name: str
    hint: Any
    default: Any
    group: str
    help: str


# The ones that a visitor of the demo may want to turn. It runs by steps, so it has no `epochs`.
_DEMO_FIELDS = ("lr", "max_steps", "batch_size", "seed", "num_workers", "progress")
# Their defaults are not those of `UnlearnConfig`.
_DEMO_TUNED = ("lr", "max_steps", "batch_size")


def flags_of(command: str) -> list[Flag]:
    """The flags of a sub-command in the order of its help."""
    if command == "unlearn":
        return [*_fields(UnlearnFlags), *_fields(UnlearnConfig)]
    if command == "evaluate":
        return list(_fields(EvaluateFlags))
    if command == "compile":
        return []
    overrides = [flag for flag in _fields(UnlearnConfig) if flag.name in _DEMO_FIELDS]
    return [*_fields(DemoFlags), *map(_tuned, overrides)]


def _tuned(flag: Flag) -> Flag:
    if flag.name not in _DEMO_TUNED:
        return flag
    text = f"{flag.help.split(';')[0].rstrip('.')}. `null`: as tuned for the shipped model."
    return flag._replace(default=None, help=text)


def _fields(cls: type) -> Iterator[Flag]:
    hints = get_type_hints(cls)
    described = _described(cls)
    for field in dataclasses.fields(cls):
        group, text = described.get(field.name, ("Settings", ""))
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        yield Flag(field.name, hints[field.name], default, group, text)


def _described(cls: type) -> dict[str, tuple[str, str]]:
    """Group and help of each field, from the docstring: `> Group` lines, then `Args:` entries."""
    described: dict[str, tuple[str, str]] = {}
    group, name = "", ""
    for line in (inspect.getdoc(cls) or "").splitlines():
        if line.startswith("> "):
            group = line[2:].strip()
        elif entry := re.match(r" {4}(\w+): (.*)", line):
            name = entry[1]
            described[name] = (group, entry[2])
        elif name and line.startswith(" " * 8):
            described[name] = (group, f"{described[name][1]} {line.strip()}")
        elif line and not line.startswith(" "):
            name = ""
    return described
