"""Pairs from Python objects: map-style datasets, data loaders, iterables, Hugging Face datasets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from tqdm import tqdm

from fasterase.errors import InputError
from fasterase.pairs.items import (
    IMAGE_KEYS,
    TEXT_KEYS,
    Item,
    choose_key,
    is_batch,
    parse_item,
    parse_text,
    plain_values,
    unbatch,
)
from fasterase.pairs.pair_source import PairSource
from fasterase.pairs.records import Record, decode_image, read_image_file
from fasterase.pairs.skips import BrokenPair

# Items read twice to see whether a dataset is deterministic. One would miss a flip of
# probability 1/2 half of the time, eight miss it once in 256.
_PROBES = 8
# Items whose captions and a few pixels enter the manifest of a dataset that must decode to tell.
_MANIFEST_ITEMS = 64


class ItemSource(PairSource):
    """Items of a map-style dataset, or a list of parsed ones.

    Args:
        items: a map-style dataset of items, or a list of `Item` and `BrokenPair`.
        columns: the dataset without its images, giving dicts, where that exists (Hugging Face).
        in_memory: the items lie decoded in memory.
    """

    def __init__(
        self,
        name: str,
        items: Any,
        *,
        image_key: str | None = None,
        text_key: str | None = None,
        columns: Any = None,
        in_memory: bool = False,
    ) -> None:
        self.name = name
        self.cheap_pixels = in_memory
        self._items = items
        self._columns = columns
        self._image_key = image_key
        self._text_key = text_key
        self.stable = isinstance(items, list) or self._reads_alike()

    def __len__(self) -> int:
        return len(self._items)

    def id(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def _item(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            item = self._items[index]
        # A user's dataset may fail on one item in any way; that is a broken pair.
        except Exception as error:
            raise BrokenPair(self.id(index), f"{type(error).__name__}: {error}") from error
        if isinstance(item, BrokenPair):
            raise item
        if isinstance(item, Item):
            return item
        return parse_item(item, self._image_key, self._text_key, id=self.id(index))

    def __getitem__(self, index: int) -> Record:
        item = self._item(index)
        image = item.image
        if isinstance(image, str):
            image = decode_image(read_image_file(image, id=self.id(index)), id=self.id(index))
        return Record(image, item.text, self.id(index), item.mask, item.meta)

    def texts(self, index: int) -> list[str] | Tensor:
        if self._columns is None:
            text = self._item(index).text
        else:
            text = parse_text(self._columns[index][self._text_key], id=self.id(index))
        return [text] if isinstance(text, str) else text

    def meta(self, index: int) -> dict[str, Any]:
        if self._columns is None:
            return self._item(index).meta
        return plain_values(self._columns[index], without=(self._text_key,))

    def _reads_alike(self) -> bool:
        """Read a few items twice; raise where none can be read at all."""
        failure = None
        readable = False
        for index in _spread(len(self), _PROBES):
            try:
                first, second = self[index], self[index]
            except BrokenPair as error:
                failure = error
                continue
            readable = True
            if _sample(first, whole=True) != _sample(second, whole=True):
                return False
        if failure is not None and not readable:
            raise InputError(f"`{self.name}`: no pair can be read; for example {failure}")
        return True

    def manifest(self) -> str:
        """Length, captions and shapes of all items where that needs no decoding, else of a few.

        A few items also give a few pixel values, so that equal captions on other images differ.
        """
        digest = hashlib.blake2b(f"{len(self)}".encode(), digest_size=16)
        sampled = set(_spread(len(self), _MANIFEST_ITEMS))
        all_captions = isinstance(self._items, list) or self._columns is not None
        for index in range(len(self)) if all_captions else sorted(sampled):
            try:
                if index in sampled:
                    digest.update(_sample(self[index], whole=False))
                else:
                    digest.update(_text_bytes(self.texts(index)))
            except BrokenPair as error:
                digest.update(str(error).encode())
        return digest.hexdigest()


def _spread(length: int, count: int) -> list[int]:
    return sorted({int(i) for i in np.linspace(0, length - 1, min(count, length))})


def _text_bytes(text: Any) -> bytes:
    return repr(text.tolist() if isinstance(text, Tensor) else text).encode("utf-8", "replace")


def _sample(record: Record, *, whole: bool) -> bytes:
    """Text, shape and pixels of a record (`whole`) or 16 values of them."""
    image = record.image
    if isinstance(image, Image.Image):
        values = np.asarray(image.convert("RGB")).reshape(-1)
    else:
        values = image.detach().cpu().reshape(-1).float().numpy()
    if not whole:
        values = values[_spread(len(values), 16)]
    shape = image.size if isinstance(image, Image.Image) else tuple(image.shape)
    return repr(shape).encode() + values.tobytes() + _text_bytes(record.text)


def open_items(source: Any, name: str, image_key: str | None, text_key: str | None) -> ItemSource:
    """A source from any Python object of the accepted kinds; `InputError` for others.

    A `DataLoader` is unwrapped to its dataset. Iterables without random access, and batches, are
    read to the end once and kept in memory: an endless iterable never returns from here.
    """
    if isinstance(source, DataLoader):
        try:
            return open_items(source.dataset, name, image_key, text_key)
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
        source = [source]
    elif isinstance(source, tuple) and _is_one_batch(source):
        source = [source]
    elif random_access and hasattr(source, "select_columns"):
        return _open_hugging_face(source, name, image_key, text_key)
    if isinstance(source, IterableDataset) or not random_access:
        if not isinstance(source, Iterable):
            raise InputError(
                f"`{name}` must be a dataset, a data loader, an iterable of pairs, or a path; "
                f"found {type(source).__name__}"
            )
        source = _spool(source, name)
    if isinstance(source, list | tuple):
        return _open_list(source, name, image_key, text_key)
    if len(source) > 0 and _first_is_batch(source, image_key, text_key):
        return _open_list(
            _spool((source[i] for i in range(len(source))), name), name, image_key, text_key
        )
    in_memory = isinstance(source, TensorDataset)
    return ItemSource(name, source, image_key=image_key, text_key=text_key, in_memory=in_memory)


def _spool(items: Iterable[Any], name: str) -> list[Any]:
    return list(tqdm(items, desc=f"reading {name}", unit=" items", delay=2))


def _is_one_batch(source: tuple[Any, ...]) -> bool:
    return len(source) == 2 and isinstance(source[0], Tensor) and source[0].ndim == 4


def _first_is_batch(dataset: Any, image_key: str | None, text_key: str | None) -> bool:
    try:
        first = dataset[0]
    # Counted and named as a broken pair when it is read for real.
    except Exception:
        return False
    return is_batch(first, image_key, text_key)


def _open_list(
    items: Sequence[Any], name: str, image_key: str | None, text_key: str | None
) -> ItemSource:
    pairs: list[Item | BrokenPair] = []
    for item in items:
        # The parts of a batch come in the usual form, whatever the keys were.
        batch = is_batch(item, image_key, text_key)
        keys = (None, None) if batch else (image_key, text_key)
        for part in unbatch(item, image_key, text_key) if batch else [item]:
            try:
                pairs.append(parse_item(part, *keys, id=f"{name}[{len(pairs)}]"))
            # Stays in the list, so that it is counted and named when it is drawn.
            except BrokenPair as error:
                pairs.append(error)
    in_memory = not any(isinstance(pair, Item) and isinstance(pair.image, str) for pair in pairs)
    return ItemSource(name, pairs, in_memory=in_memory)


def _open_hugging_face(
    source: Any, name: str, image_key: str | None, text_key: str | None
) -> ItemSource:
    """A `datasets.Dataset`; captions and other columns are read without decoding images."""
    # A transform set by the user may need the image column to make its outputs.
    if source.format["type"] == "custom":
        return ItemSource(name, source, image_key=image_key, text_key=text_key)
    found = list(source.column_names)
    image = choose_key(found, image_key, IMAGE_KEYS, "image_key")
    text = choose_key(found, text_key, TEXT_KEYS, "text_key")
    columns = source.select_columns([column for column in found if column != image])
    return ItemSource(name, source, image_key=image, text_key=text, columns=columns)
