"""Pairs from Python objects: map-style datasets, data loaders, iterables, Hugging Face datasets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fasterase.errors import InputError
from fasterase.pairs.classes import find_classified, label_columns, name_labels
from fasterase.pairs.images import ImageFiles, decode_image, read_image_file, to_rgb
from fasterase.pairs.items import (
    IMAGE_KEYS,
    TEXT_KEYS,
    Item,
    Record,
    choose_key,
    is_batch,
    parse_item,
    parse_text,
    select_plain,
    unbatch,
)
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.table import PairTable, pack
from fasterase.progress import progress_bar

# Items read twice to see whether a dataset is deterministic. One would miss a flip of probability
# 1/2 half of the time; eight miss it once in 256.
_PROBES = 8
# Captions of this many items are remembered, where reading them again would decode images again.
_REMEMBERED = 1 << 20
# Items of which captions and a few pixels enter the manifest, if the others would need decoding.
_MANIFEST_ITEMS = 64


def open_objects(source: Any, name: str, image_key: str | None, text_key: str | None) -> PairTable:
    """Open a Python object of any accepted kind; raise `InputError` for others.

    A `DataLoader` is unwrapped to its dataset. Iterables without random access, and batches, are
    read to the end once and kept in memory, so this never returns for an endless iterable.
    """
    if isinstance(source, DataLoader):
        try:
            return open_objects(source.dataset, name, image_key, text_key)
        except InputError as error:
            raise InputError(
                f"{error} (A DataLoader is unwrapped to its dataset; if its collate_fn makes the "
                f"pairs, pass iter(loader) instead.)"
            ) from error
    random_access = hasattr(source, "__getitem__") and hasattr(source, "__len__")
    if isinstance(source, Mapping):
        if source and all(hasattr(value, "select_columns") for value in source.values()):
            raise InputError(
                f"`{name}` is a Hugging Face DatasetDict; choose one of its splits: "
                f"{[str(key) for key in source]}"
            )
        return _open_list([source], name, image_key, text_key)
    if isinstance(source, tuple) and _is_batch_tuple(source):
        return _open_list([source], name, image_key, text_key)
    if random_access and hasattr(source, "select_columns"):
        return _open_hugging_face(source, name, image_key, text_key)
    if isinstance(source, IterableDataset) or not random_access:
        return _open_stream(source, name, image_key, text_key)
    if isinstance(source, list | tuple):
        return _open_list(source, name, image_key, text_key)
    if text_key is None and (found := find_classified(source)) is not None:
        return ItemTable(name, found.items, "image", "text", found.captions, classes=found.classes)
    if len(source) > 0 and _first_is_batch(source, image_key, text_key):
        batches = _read_all((source[i] for i in range(len(source))), name)
        return _open_list(batches, name, image_key, text_key)
    in_memory = isinstance(source, TensorDataset)
    return ItemTable(name, source, image_key, text_key, in_memory=in_memory)


def _open_stream(source: Any, name: str, image_key: str | None, text_key: str | None) -> PairTable:
    if not isinstance(source, Iterable):
        raise InputError(
            f"`{name}` must be a dataset, a data loader, an iterable of pairs, or a path; "
            f"found {type(source).__name__}"
        )
    labels = label_columns(source)
    label = _choose_label(getattr(source, "column_names", None) or [], text_key, labels)
    if label is not None:
        source = name_labels(source, label, labels[label])
    opened = _open_list(_read_all(source, name), name, image_key, label or text_key)
    opened.classes = labels.get(label) if label is not None else None
    return opened


def _read_all(items: Iterable[Any], name: str) -> list[Any]:
    return list(progress_bar(f"reading {name}", items=items, unit="item", delay=2))


def _is_batch_tuple(source: tuple[Any, ...]) -> bool:
    return len(source) == 2 and isinstance(source[0], Tensor | np.ndarray) and source[0].ndim == 4


def _first_is_batch(dataset: Any, image_key: str | None, text_key: str | None) -> bool:
    try:
        first = dataset[0]
    # It will be reported as a broken pair when it is read as one.
    except Exception:
        return False
    return is_batch(first, image_key, text_key)


def _open_list(
    items: Sequence[Any], name: str, image_key: str | None, text_key: str | None
) -> PairTable:
    pairs: list[Item | BrokenPair] = []
    for item in items:
        # `unbatch` returns pairs in a standard form, so the keys no longer apply.
        batch = is_batch(item, image_key, text_key)
        keys = (None, None) if batch else (image_key, text_key)
        for part in unbatch(item, image_key, text_key) if batch else [item]:
            try:
                pairs.append(parse_item(part, *keys, id=f"{name}[{len(pairs)}]"))
            # Kept in the list, so that it is reported when it is drawn.
            except BrokenPair as error:
                pairs.append(error)
    files = [pair for pair in pairs if isinstance(pair, Item) and isinstance(pair.image, str)]
    if files and len(files) == len(pairs) and not any(isinstance(f.text, Tensor) for f in files):
        # As a table of them would be opened: told apart without reading the images.
        texts = ([file.text] if isinstance(file.text, str) else file.text for file in files)
        rows = ((file.image, text, file.meta) for file, text in zip(files, texts, strict=True))
        return PairTable(name, pack(rows), ImageFiles(Path()))
    return ItemTable(name, pairs, in_memory=not files)


def _open_hugging_face(
    source: Any, name: str, image_key: str | None, text_key: str | None
) -> ItemTable:
    """Open a `datasets.Dataset`; captions and other columns are read without decoding images."""
    labels = label_columns(source)
    found, columns = list(source.column_names), None
    # A transform set by the user may need the image column for its outputs.
    changes = source.format["type"] == "custom"
    if changes:
        found = _keys_of_first(source)
    label = _choose_label(found, text_key, labels)
    if not changes:
        image_key = choose_key(found, image_key, IMAGE_KEYS, "image_key")
        text_key = label or choose_key(found, text_key, TEXT_KEYS, "text_key")
        columns = source.select_columns([column for column in found if column != image_key])
    if label is None:
        return ItemTable(name, source, image_key, text_key, columns)
    classes = labels[label]
    source, columns = (
        None if rows is None else name_labels(rows, label, classes) for rows in (source, columns)
    )
    return ItemTable(name, source, image_key, label, columns, classes=classes)


def _keys_of_first(dataset: Any) -> list[str]:
    try:
        return list(dataset[0])
    # An empty dataset, or an item that will be reported as broken when it is drawn.
    except Exception:
        return []


def _choose_label(
    found: Sequence[str], text_key: str | None, labels: Mapping[str, list[str]]
) -> str | None:
    """Return the column of class numbers to take captions from; None if there are captions."""
    if text_key is not None:
        return text_key if text_key in labels else None
    if any(key in found for key in TEXT_KEYS):
        return None
    columns = [column for column in labels if column in found]
    return columns[0] if len(columns) == 1 else None


class ItemTable(PairTable):
    """The items of a map-style dataset, or a list of parsed items.

    Args:
        items: a map-style dataset of items, or a list of `Item` and `BrokenPair`.
        image_key, text_key: see `open_pairs`.
        columns: the items without their images, if they can be read so.
        classes: see `PairTable`.
        in_memory: whether the images are held decoded in memory.
    """

    def __init__(
        self,
        name: str,
        items: Any,
        image_key: str | None = None,
        text_key: str | None = None,
        columns: Any = None,
        *,
        classes: list[str] | None = None,
        in_memory: bool = False,
    ) -> None:
        self.name = self._label = name
        self.classes = classes
        self.in_memory = in_memory
        self._items = items
        self._columns = columns
        self._image_key = image_key
        self._text_key = text_key
        self._seen: dict[int, str | list[str]] = {}
        self.stable = isinstance(items, list) or self._is_deterministic()

    def _count(self) -> int:
        return len(self._items)

    def _id(self, row: int) -> str:
        return f"{self._label}[{row}]"

    def _parse(self, row: int) -> Item:
        try:
            item = self._items[row]
        except (InputError, BrokenPair):
            raise
        # A dataset may fail on an item in any way; that item is a broken pair.
        except Exception as error:
            raise BrokenPair(self._id(row), f"{type(error).__name__}: {error}") from error
        if isinstance(item, BrokenPair):
            raise item
        if isinstance(item, Item):
            return item
        return parse_item(item, self._image_key, self._text_key, id=self._id(row))

    def _record(self, row: int) -> Record:
        item, id = self._parse(row), self._id(row)
        image = item.image
        if isinstance(image, str):
            image = decode_image(read_image_file(image, id=id), id=id)
        self._remember(row, item.text)
        return Record(image, item.text, id, item.mask, item.meta)

    def _texts(self, row: int) -> list[str] | Tensor:
        if self._columns is not None:
            text = parse_text(self._columns[row][self._text_key], id=self._id(row))
        elif row in self._seen and self.stable:
            text = self._seen[row]
        else:
            text = self._parse(row).text
            self._remember(row, text)
        return [text] if isinstance(text, str) else text

    def _remember(self, row: int, text: str | list[str] | Tensor) -> None:
        """Keep captions that could not be read again without the image."""
        is_whole = self._columns is None and not isinstance(self._items, list)
        has_room = self.stable and len(self._seen) < _REMEMBERED
        if is_whole and has_room and not isinstance(text, Tensor):
            self._seen[row] = text

    def _meta(self, row: int) -> dict[str, Any]:
        if self._columns is None:
            return self._parse(row).meta
        return select_plain(self._columns[row], without=(self._text_key,))

    def _every_id(self) -> Iterator[str]:
        return map(self._id, range(self._count()))

    def _every_text(self) -> Iterator[list[str] | Tensor]:
        return map(self._texts_or_none, range(self._count()))

    def _is_deterministic(self) -> bool:
        """Read a few items twice and compare; raise `InputError` if none can be read."""
        failure = None
        readable = False
        for index in _spread_indices(self._count(), _PROBES):
            try:
                first, second = (_fingerprint(self._record(index), whole=True) for _ in range(2))
            except BrokenPair as error:
                failure = error
                continue
            readable = True
            if first != second:
                return False
        if failure is not None and not readable:
            raise InputError(f"`{self.name}`: no pair can be read; for example {failure}")
        return True

    @cached_property
    def _digest(self) -> str:
        """Digest the length, the captions, and the shape and some pixel values of a few items.

        Captions are those of all items if reading them decodes no images, else of the same few.
        """
        digest = hashlib.blake2b(f"{self._count()}".encode(), digest_size=16)
        sampled = set(_spread_indices(self._count(), _MANIFEST_ITEMS))
        all_captions = isinstance(self._items, list) or self._columns is not None
        for index in range(self._count()) if all_captions else sorted(sampled):
            try:
                if index in sampled:
                    digest.update(_fingerprint(self._record(index), whole=False))
                else:
                    digest.update(_serialize_text(self._texts(index)))
            except BrokenPair as error:
                digest.update(str(error).encode())
        return digest.hexdigest()


def _spread_indices(length: int, count: int) -> list[int]:
    """Return at most `count` evenly spaced indices below `length`."""
    return sorted({int(i) for i in np.linspace(0, length - 1, min(count, length))})


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
        values = values[_spread_indices(len(values), 16)]
    shape = image.size if isinstance(image, Image.Image) else tuple(image.shape)
    return repr(shape).encode() + values.tobytes() + _serialize_text(record.text)
