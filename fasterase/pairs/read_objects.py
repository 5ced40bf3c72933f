"""Pairs from Python objects: map-style datasets, data loaders, iterables, Hugging Face datasets.

The name of a pair's class becomes its caption, where a dataset has class numbers. DataFrames, which
have columns, are read by `read_files.py`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from fasterase.errors import InputError
from fasterase.pairs.images import (
    ImageFiles,
    Images,
    ImagesInMemory,
    decode_image,
    read_image_file,
    to_rgb,
)
from fasterase.pairs.items import (
    TEXT_KEYS,
    USUAL,
    Columns,
    Keys,
    Record,
    class_number,
    normalize_class_name,
    parse_item,
    parse_text,
    select_plain,
    unbatch,
)
from fasterase.pairs.sampler import spread_indices
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.table import PairTable, pack
from fasterase.progress import Progress

# Items read twice to see whether a dataset is deterministic. One would miss a flip of probability
# 1/2 half of the time; eight miss it once in 256.
_PROBES = 8
# Captions of this many items are remembered, where reading them again would decode images again.
_REMEMBERED = 1 << 20
# Items of which captions and a few pixels enter the manifest, if the others would need decoding.
_MANIFEST_ITEMS = 64
_MANIFEST_ITEMS_IN_MEMORY = 4096
# Where torchvision's datasets keep the class numbers of all their items.
_TARGETS = ("targets", "labels", "_labels")


def open_objects(source: Any, name: str, keys: Keys) -> PairTable:
    """Open a Python object of any accepted kind; raise `InputError` for others.

    Iterables without random access, and batches, are read to the end once and kept in memory.
    """
    if isinstance(source, DataLoader):
        try:
            return open_objects(source.dataset, name, keys)
        except InputError as error:
            raise InputError(
                f"{error} (A DataLoader is unwrapped to its dataset; if its collate_fn makes the "
                f"pairs, pass iter(loader) instead.)"
            ) from error
    is_indexed = hasattr(source, "__getitem__") and hasattr(source, "__len__")
    if _is_one_batch(source):
        return open_list([source], name, keys)
    if is_indexed and hasattr(source, "select_columns"):
        return _open_hugging_face(source, name, keys)
    if isinstance(source, list | tuple):
        return open_list(source, name, keys)
    if isinstance(source, IterableDataset) or not is_indexed:
        if not isinstance(source, Iterable):
            raise InputError(
                f"`{name}` must be a dataset, a data loader, an iterable of pairs, or a path; "
                f"found {type(source).__name__}"
            )
        columns = getattr(source, "column_names", None) or []
        keys, classes = _choose_label(source, columns, keys)
        return open_list(_read_all(source, name), name, keys, classes)
    if keys.text is None and (found := _find_classes(source)) is not None:
        classes, targets = found
        return ItemTable(name, source, columns=targets, classes=classes)
    first = _first_readable(source)[1]
    if first is not None and unbatch(first, keys) is not None:
        return open_list(_read_all((source[i] for i in range(len(source))), name), name, keys)
    return ItemTable(name, source, keys, in_memory=isinstance(source, TensorDataset))


def _is_one_batch(source: Any) -> bool:
    if isinstance(source, Mapping):
        if source and all(hasattr(value, "select_columns") for value in source.values()):
            raise InputError(
                f"it is a Hugging Face DatasetDict; choose one of its splits: "
                f"{[str(key) for key in source]}"
            )
        return True
    is_pair = isinstance(source, tuple) and len(source) == 2
    return is_pair and isinstance(source[0], Tensor | np.ndarray) and source[0].ndim == 4


def _read_all(items: Iterable[Any], name: str) -> list[Any]:
    return list(Progress(f"reading {name}", items=items, unit="item", delay=2))


def _first_readable(dataset: Any) -> tuple[int, Any]:
    """Return the index of the first item that can be read, and the item; None if there is none."""
    for index in range(min(len(dataset), 8)):
        try:
            return index, dataset[index]
        # An item may be broken in any way; it will be reported when it is drawn.
        except Exception:
            continue
    return 0, None


def open_list(
    items: Iterable[Any],
    name: str,
    keys: Keys = USUAL,
    classes: list[str] | None = None,
    *,
    label: str | None = None,
    root: str | os.PathLike[str] = "",
) -> PairTable:
    """Open items and batches of them, in memory; files alone, or encoded images, as a plain table.

    Args:
        items: see `open_pairs`.
        classes: names of the classes, if the texts are class numbers.
        label: what the ids of pairs begin with that are no files; None: the name.
        root: the folder of relative paths.
    """
    pairs: list[Record | BrokenPair] = []
    for item in items:
        batch = unbatch(item, keys)
        for part in [item] if batch is None else batch:
            id = f"{label or name}[{len(pairs)}]"
            try:
                pairs.append(parse_item(part, keys, id=id, classes=classes))
            # Kept in the list, so that it is reported when it is drawn.
            except BrokenPair as error:
                pairs.append(error)
    readable = [pair for pair in pairs if isinstance(pair, Record)]
    kinds = {type(pair.image) for pair in readable}
    is_coded = any(isinstance(pair.text, Tensor) for pair in readable)
    if kinds not in ({str}, {bytes}) or is_coded:
        in_memory = str not in kinds
        return ItemTable(name, pairs, classes=classes, in_memory=in_memory, root=root, label=label)
    # Told apart without decoding the images.
    images: Images = ImageFiles(root)
    if kinds == {bytes}:
        images = ImagesInMemory([getattr(pair, "image", None) for pair in pairs])
    broken = {row: pair.reason for row, pair in enumerate(pairs) if isinstance(pair, BrokenPair)}
    return PairTable(name, pack(map(_to_row, pairs)), images, classes=classes, broken=broken)


def _to_row(pair: Record | BrokenPair) -> tuple[str, list[str], dict[str, Any] | None]:
    if isinstance(pair, BrokenPair):
        return pair.id, [], None
    captions = [pair.text] if isinstance(pair.text, str) else pair.text
    return pair.image if isinstance(pair.image, str) else pair.id, captions, pair.meta


def _open_hugging_face(source: Any, name: str, keys: Keys) -> ItemTable:
    """Open a `datasets.Dataset`; captions and other columns are read without decoding images."""
    # A transform set by the user may need the image column for its outputs.
    changes = source.format["type"] == "custom"
    found = list((_first_readable(source)[1] or ()) if changes else source.column_names)
    keys, classes = _choose_label(source, found, keys)
    columns = None
    if not changes:
        keys = Keys(*keys.choose(found))
        columns = source.select_columns([column for column in found if column != keys.image])
    return ItemTable(name, source, keys, columns, classes=classes)


def _choose_label(dataset: Any, found: Sequence[str], keys: Keys) -> tuple[Keys, list[str] | None]:
    """Choose the text column of a Hugging Face dataset: of class numbers (`ClassLabel`) if it is
    named, or the only one and there are no captions. Then also return the names of its classes."""
    labels = {
        column: [normalize_class_name(name) for name in feature.names]
        for column, feature in (getattr(dataset, "features", None) or {}).items()
        if type(feature).__name__ == "ClassLabel"
    }
    if keys.text is None and not any(key in found for key in TEXT_KEYS):
        usable = [column for column in labels if column in found]
        keys = keys._replace(text=usable[0] if len(usable) == 1 else None)
    return keys, None if keys.text is None else labels.get(keys.text)


def _find_classes(dataset: Any) -> tuple[list[str], list[Any] | None] | None:
    """Return the classes of a dataset with `.classes` whose items are `(image, class number)`, such
    as torchvision's, or of `Subset`s of it; and the numbers of all items, if these are known
    without reading images."""
    whole, rows = dataset, np.arange(len(dataset))
    while isinstance(whole, Subset):
        rows = np.asarray(whole.indices)[rows]
        whole = whole.dataset
    names = getattr(whole, "classes", None)
    if not isinstance(names, Sequence) or isinstance(names, str) or len(dataset) == 0:
        return None
    index, item = _first_readable(dataset)
    is_pair = isinstance(item, tuple | list) and len(item) == 2
    if not is_pair or (number := class_number(item[1])) is None:
        return None
    if getattr(whole, "target_transform", None) is not None:
        raise InputError(
            "the dataset has `classes` and a target_transform that returns numbers, which may not "
            "be those of the classes. Remove it, or let it return the name of the class."
        )
    # torchvision's ImageNet has several names for a class; the first is the usual one.
    classes = [normalize_class_name(name if isinstance(name, str) else name[0]) for name in names]
    for attribute in _TARGETS:
        targets = getattr(whole, attribute, None)
        if isinstance(targets, list | np.ndarray | Tensor) and len(targets) == len(whole):
            values = targets if isinstance(targets, list) else targets.tolist()
            numbers = [values[row] for row in rows.tolist()]
            return classes, numbers if class_number(numbers[index]) == number else None
    return classes, None


class ItemTable(PairTable):
    """The items of a map-style dataset, or a list of `Record` and `BrokenPair`; see `open_list`.

    Args:
        columns: the items without their images, or their class numbers alone, if these can be read
            so.
    """

    def __init__(
        self,
        name: str,
        items: Any,
        keys: Keys = USUAL,
        columns: Any = None,
        *,
        classes: list[str] | None = None,
        in_memory: bool = False,
        root: str | os.PathLike[str] = "",
        label: str | None = None,
    ) -> None:
        self.name, self._label = name, label or name
        self.classes = classes
        self.in_memory = in_memory
        self._items = items
        self._count = len(items)
        self._columns = columns
        self._keys = keys
        self._root = os.path.abspath(root)
        self._seen: dict[int, str | list[str]] = {}
        self.stable = isinstance(items, list) or self._is_deterministic()

    def id(self, index: int) -> str:
        return f"{self._label}[{self._row(index)}]"

    def _parse(self, index: int) -> Record:
        row = self._row(index)
        try:
            item = self._items[row]
        except (InputError, BrokenPair):
            raise
        # A dataset may fail on an item in any way; that item is a broken pair.
        except Exception as error:
            raise BrokenPair(self.id(index), f"{type(error).__name__}: {error}") from error
        if isinstance(item, BrokenPair):
            raise item
        record = parse_item(item, self._keys, id=self.id(index), classes=self.classes)
        # Captions that could not be read again without the image.
        is_whole = self._columns is None and not isinstance(self._items, list)
        if is_whole and len(self._seen) < _REMEMBERED and not isinstance(record.text, Tensor):
            self._seen[row] = record.text
        return record

    def _without_image(self, index: int) -> Record | Columns:
        """Return at least text and metadata, if possible without reading the image."""
        if self._columns is None:
            return self._parse(index)
        found, text_key = self._columns[self._row(index)], self._keys.text
        columns = Columns(None, found)
        if isinstance(found, Mapping):
            meta = select_plain(found, without=(text_key,))
            columns = Columns(None, found[text_key], meta=meta)
        return columns.with_class_name(self.classes)

    def _record(self, index: int) -> Record:
        record = self._parse(index)
        image = record.image
        if isinstance(image, str):
            image = read_image_file(os.path.join(self._root, image), id=record.id)
        if isinstance(image, bytes):
            image = decode_image(image, id=record.id)
        return Record(image, record.text, record.id, record.mask, record.meta)

    def texts(self, index: int) -> list[str] | Tensor:
        text: Any = self._seen.get(self._row(index)) if self.stable else None
        if text is None:
            text = parse_text(self._without_image(index).text, id=self.id(index))
        return [text] if isinstance(text, str) else text

    def meta(self, index: int) -> dict[str, Any]:
        return self._without_image(index).meta

    def _is_deterministic(self) -> bool:
        """Read a few items twice and compare; raise `InputError` if none can be read."""
        failures, indices = [], spread_indices(self._count, _PROBES)
        for index in indices:
            try:
                first, second = (_fingerprint(self._record(index), whole=True) for _ in range(2))
            except BrokenPair as error:
                failures.append(error)
                continue
            if first != second:
                return False
        if failures and len(failures) == len(indices):
            raise InputError(f"`{self.name}`: no pair can be read; for example {failures[-1]}")
        return True

    @cached_property
    def _digest(self) -> str:
        """Of the length, the shape and some pixel values of a few items, and their captions: those
        of all items if reading them decodes no images."""
        digest = hashlib.blake2b(f"{self._count}".encode(), digest_size=16)
        most = _MANIFEST_ITEMS_IN_MEMORY if self.in_memory else _MANIFEST_ITEMS
        sampled = set(spread_indices(self._count, most))
        all_captions = isinstance(self._items, list) or self._columns is not None
        for index in range(self._count) if all_captions else sorted(sampled):
            try:
                if index in sampled:
                    digest.update(_fingerprint(self._record(index), whole=False))
                else:
                    digest.update(_serialize_text(self.texts(index)))
            except BrokenPair as error:
                digest.update(str(error).encode())
        return digest.hexdigest()


def _serialize_text(text: Any) -> bytes:
    return repr(text.tolist() if isinstance(text, Tensor) else text).encode("utf-8", "replace")


def _fingerprint(record: Record, *, whole: bool) -> bytes:
    """Serialize text, shape and pixels of a record: all pixel values, or 16 of them."""
    image = record.image
    if isinstance(image, Image.Image):
        values = np.asarray(to_rgb(image, id=record.id)).reshape(-1)
    else:
        values = image.detach().cpu().reshape(-1).float().numpy()
    if not whole:
        values = values[spread_indices(len(values), 16)]
    shape = image.size if isinstance(image, Image.Image) else tuple(image.shape)
    return repr(shape).encode() + values.tobytes() + _serialize_text(record.text)
