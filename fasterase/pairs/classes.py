"""Classification datasets: the name of a pair's class becomes its caption."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


class ClassNames(NamedTuple):
    """The captions of classes, by class number."""

    names: list[str]

    def of(self, number: Any) -> str | None:
        """Return the name of a class; None (no caption) for -1, which marks unlabelled items."""
        index = class_number(number)
        if index is None or index == -1:
            return None
        if not 0 <= index < len(self.names):
            raise InputError(f"the class number {index} is none of the {len(self.names)} classes")
        return self.names[index]


class ClassifiedItems:
    """A dataset of `(image, class number)` as one of `{"image", "text", "class"}`.

    Both `"text"` and `"class"` are the name of the class, None if the item has none.

    Args:
        items: the dataset.
        classes: the names of its classes.
        targets: the class numbers of all items if they are known without reading them, else None.
    """

    def __init__(self, items: Any, classes: ClassNames, targets: Sequence[Any] | None) -> None:
        self.classes = classes
        self.captions = None if targets is None else _ClassColumn(classes, targets)
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, number = self._items[index]
        return {"image": image, **_caption(self.classes, number)}


class _ClassColumn:
    """The captions of `ClassifiedItems`, found without reading an image."""

    def __init__(self, classes: ClassNames, targets: Sequence[Any]) -> None:
        self._classes = classes
        self._targets = targets

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _caption(self._classes, self._targets[index])


def _caption(classes: ClassNames, number: Any) -> dict[str, Any]:
    name = classes.of(number)
    return {"text": name, "class": name}


def find_classified(dataset: Any) -> ClassifiedItems | None:
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
    captions = [name if isinstance(name, str) else str(name[0]) for name in names]
    classes = ClassNames([normalize_class_name(caption) for caption in captions])
    targets = _known_targets(whole, rows)
    if targets is not None and class_number(targets[index]) != number:
        targets = None
    return ClassifiedItems(dataset, classes, targets)


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


class NamedLabels:
    """Rows of a Hugging Face dataset, the numbers of its `ClassLabel` column replaced by names.

    The name also becomes the row's `"class"`.
    """

    def __init__(self, rows: Any, column: str, classes: ClassNames) -> None:
        self._rows = rows
        self._column = column
        self._classes = classes

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._name(self._rows[index])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self._name, self._rows)

    def _name(self, row: dict[str, Any]) -> dict[str, Any]:
        name = self._classes.of(row[self._column])
        return {**row, self._column: name, "class": name}


def label_columns(dataset: Any) -> dict[str, ClassNames]:
    """Return the `ClassLabel` columns of a Hugging Face dataset, with the names of the classes."""
    features = getattr(dataset, "features", None) or {}
    return {
        column: ClassNames([normalize_class_name(name) for name in feature.names])
        for column, feature in features.items()
        if type(feature).__name__ == "ClassLabel"
    }
