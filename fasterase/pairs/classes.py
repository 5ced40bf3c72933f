"""Classification datasets: the name of a pair's class becomes its caption."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import Subset

from fasterase.errors import InputError

# Where torchvision's datasets keep the class numbers of all their items.
_TARGETS = ("targets", "labels", "_labels")


def normalize_class_name(name: str) -> str:
    """Turn the name of a class or of its folder into a caption: underscores become spaces."""
    return " ".join(name.replace("_", " ").split())


def class_number(value: Any) -> int | None:
    """Return `value` as an int if it is a whole number (an int, or 0-d array or tensor)."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        return None
    return int(value)


def class_name(names: Sequence[str], number: Any) -> str | None:
    """Return the name of a class; None (no caption) for -1, which marks unlabelled items."""
    index = class_number(number)
    if index is None or index == -1:
        return None
    if not 0 <= index < len(names):
        raise InputError(f"the class number {index} is none of the {len(names)} classes")
    return names[index]


class Mapped:
    """A dataset, a sequence or a stream, of which each item is turned into another."""

    def __init__(self, items: Any, function: Callable[[Any], dict[str, Any]]) -> None:
        self._items = items
        self._function = function

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._function(self._items[index])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self._function, self._items)


class Classified(NamedTuple):
    """Items whose `"text"` and `"class"` are the name of their class.

    Attributes:
        items: with their images.
        classes: the names of all classes.
        captions: the items without their images, if they are known without reading those.
    """

    items: Mapped
    classes: list[str]
    captions: Mapped | None


def name_labels(rows: Any, column: str, classes: Sequence[str]) -> Mapped:
    """Replace the class numbers in a column of a Hugging Face dataset by names.

    The name also becomes the row's `"class"`.
    """
    return Mapped(rows, partial(_name_label, column, classes))


def label_columns(dataset: Any) -> dict[str, list[str]]:
    """Return the `ClassLabel` columns of a Hugging Face dataset, with the names of the classes."""
    features = getattr(dataset, "features", None) or {}
    return {
        column: [normalize_class_name(name) for name in feature.names]
        for column, feature in features.items()
        if type(feature).__name__ == "ClassLabel"
    }


def find_classified(dataset: Any) -> Classified | None:
    """Recognise a dataset with `.classes` whose items are `(image, class number)`.

    Such are torchvision's `ImageFolder`, `DatasetFolder`, `CIFAR10`, ..., and `Subset`s of them.

    Raises:
        InputError: a `target_transform` changes the class numbers, so that they name no class.
    """
    whole, rows = dataset, None
    while isinstance(whole, Subset):
        rows = np.asarray(whole.indices)[slice(None) if rows is None else rows]
        whole = whole.dataset
    names = getattr(whole, "classes", None)
    if not isinstance(names, Sequence) or isinstance(names, str) or len(dataset) == 0:
        return None
    index, number = _first_number(dataset)
    if number is None:
        return None
    if getattr(whole, "target_transform", None) is not None:
        raise InputError(
            "the dataset has `classes` and a target_transform that returns numbers, which may not "
            "be those of the classes. Remove it, or let it return the name of the class."
        )
    # torchvision's ImageNet has several names for a class; the first is the usual one.
    classes = [normalize_class_name(name if isinstance(name, str) else name[0]) for name in names]
    targets = _known_targets(whole, rows)
    known = targets is not None and class_number(targets[index]) == number
    return Classified(
        Mapped(dataset, partial(_name_pair, classes)),
        classes,
        Mapped(targets, partial(_caption, classes)) if known else None,
    )


def _name_label(column: str, classes: Sequence[str], row: dict[str, Any]) -> dict[str, Any]:
    name = class_name(classes, row[column])
    return {**row, column: name, "class": name}


def _name_pair(classes: Sequence[str], pair: tuple[Any, Any]) -> dict[str, Any]:
    return {"image": pair[0], **_caption(classes, pair[1])}


def _caption(classes: Sequence[str], number: Any) -> dict[str, Any]:
    name = class_name(classes, number)
    return {"text": name, "class": name}


def _first_number(dataset: Any) -> tuple[int, int | None]:
    """Return the first readable item's index and class number; None if it has no such number."""
    for index in range(min(len(dataset), 8)):
        try:
            item = dataset[index]
        # An item may be broken in any way; it will be reported when it is drawn.
        except Exception:
            continue
        is_pair = isinstance(item, tuple | list) and len(item) == 2
        return index, class_number(item[1]) if is_pair else None
    return 0, None


def _known_targets(whole: Any, rows: np.ndarray | None) -> list[Any] | None:
    for attribute in _TARGETS:
        targets = getattr(whole, attribute, None)
        if isinstance(targets, list | np.ndarray | Tensor) and len(targets) == len(whole):
            values = targets if isinstance(targets, list) else targets.tolist()
            return values if rows is None else [values[int(row)] for row in rows]
    return None
