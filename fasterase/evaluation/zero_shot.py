"""Zero-shot classification: an image belongs to the class whose prompts it is closest to."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fasterase.encode import PairFeatures
from fasterase.errors import InputError
from fasterase.evaluation.scores import captions_of, search_candidates, spread_values
from fasterase.option_values import parse_value
from fasterase.pairs.table import PairTable

TEMPLATES: tuple[str, ...] = ("a photo of a {}.",)


def label_pairs(
    class_names: Sequence[str],
    sources: Mapping[str, PairTable],
    features: Mapping[str, PairFeatures],
) -> dict[str, np.ndarray]:
    """Return set -> [n] class number of each pair that has features; -1 if it has no class.

    Sets of which no pair has one are left out.
    """
    found: dict[str, np.ndarray] = {}
    if not class_names:
        return found
    label = labeller(class_names)
    for name, source in sources.items():
        rows = features[name].rows.tolist()
        labels = np.array([label(source.meta(row), captions_of(source, row)) for row in rows])
        if (labels >= 0).any():
            found[name] = labels
    return found


def labeller(class_names: Sequence[str]) -> Callable[[Mapping[str, Any], Sequence[str]], int]:
    """Return what tells the class number of a pair from its `meta` and captions; -1 for none.

    It is the class that its source gives (`meta["class"]`, as class-per-folder sources do), else
    the one class that a caption names as whole words; a caption that names several names none.
    "hot dog" is not "dog": the longer of overlapping names counts.
    """
    number = {name.casefold(): i for i, name in enumerate(class_names)}
    longest_first = sorted(map(re.escape, number), key=len, reverse=True)
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(longest_first)})(?!\w)")

    def label(meta: Mapping[str, Any], captions: Sequence[str]) -> int:
        given = {str(meta.get("class", "")).casefold()} & number.keys()
        named = (set(pattern.findall(caption.casefold())) for caption in captions)
        return next((number[each.pop()] for each in (given, *named) if len(each) == 1), -1)

    return label


def encode_classes(
    encode: Callable[[list[str]], Tensor], class_names: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """Return [C, D], the unit mean of each class's prompts; `encode` maps texts to unit rows."""
    prompts = [template.replace("{}", name) for name in class_names for template in templates]
    rows = encode(prompts).view(len(class_names), len(templates), -1)
    return normalize(rows.mean(dim=1), dim=-1)


def score_accuracy(
    image: Tensor,  # [n, D]
    classes: Tensor,  # [C, D]
    labels: np.ndarray,  # [n] class numbers; -1 for pairs without a class
) -> np.ndarray:
    """Return [n]: 1 if the nearest class is the label, else 0; NaN without a label."""
    known = labels >= 0
    right = labels[known, None].tolist()
    found = search_candidates(image[torch.from_numpy(known)], classes, right)
    return spread_values(found.hit(1), known)


def check_templates(templates: Sequence[str] | None) -> tuple[str, ...]:
    """Return `templates`, by default `TEMPLATES`; `InputError` if one has not one `{}`."""
    if templates is None:
        return TEMPLATES
    templates = [templates] if isinstance(templates, str) else list(templates)
    for template in parse_value("templates", templates, list[str]):
        if template.count("{}") != 1:
            raise InputError(
                f"templates: {template!r} must be text with one {{}} for the class name, "
                f"such as {TEMPLATES[0]!r}."
            )
    if not templates:
        raise InputError("templates is empty. Leave it out for the default, or give one or more.")
    return tuple(templates)


def carried_classes(sources: Mapping[str, PairTable]) -> list[str]:
    """Return the classes that the sources carry; none if there are fewer than two."""
    names = [name for source in sources.values() for name in source.classes or ()]
    distinct = list(dict.fromkeys(names))
    return distinct if len(distinct) > 1 else []


def check_class_names(class_names: Sequence[str] | None) -> list[str] | None:
    """Return `class_names` without repetitions; `InputError` for no list of two texts or more."""
    if class_names is None:
        return None
    given = list(class_names) if isinstance(class_names, tuple) else class_names
    first_spelling: dict[str, str] = {}
    for name in filter(str.strip, parse_value("class_names", given, list[str])):
        first_spelling.setdefault(name.casefold(), name)
    names = list(first_spelling.values())
    if len(names) < 2:
        raise InputError(
            f"class_names has {len(names)} distinct names; accuracy needs two or more. "
            "List all classes to choose from, kept ones too."
        )
    return names
