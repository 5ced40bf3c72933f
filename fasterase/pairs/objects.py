"""Pairs from Python objects: map-style datasets, data loaders, iterables, Hugging Face datasets."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from tqdm import tqdm

from fasterase.errors import InputError
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.source import PairSource, Record, decode_image, read_image_file

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


IMAGE_KEYS = ("image", "pixel_values", "filepath", "image_path", "path", "file_name", "filename")
TEXT_KEYS = ("text", "caption", "input_ids", "title", "texts", "captions")


class Item(NamedTuple):
    """One pair, not decoded: `image` may be a path, `text` is a str, list of str or ids [L]."""

    image: Any
    text: Any
    mask: Tensor | None = None
    meta: dict[str, Any] = {}  # noqa: RUF012 (never written to)


class _Columns(NamedTuple):
    image: Any
    text: Any
    mask: Any
    meta: dict[str, Any]


def choose_key(found: list[str], given: str | None, usual: tuple[str, ...], option: str) -> str:
    """The column to read: the one the user named, or the first usual name that is there."""
    if given is not None:
        if given not in found:
            raise InputError(f"`{option}`: no column {given!r}; the columns found are {found}")
        return given
    for key in usual:
        if key in found:
            return key
    raise InputError(
        f"no column named {', '.join(usual)}; the columns found are {found}. "
        f"Name the right one with `{option}`."
    )


def plain_values(item: Mapping[str, Any], *, without: tuple[str | None, ...]) -> dict[str, Any]:
    """The entries that are plain values, as `Record.meta` keeps them."""
    return {
        key: value
        for key, value in item.items()
        if key not in without and isinstance(value, str | int | float | bool)
    }


def _columns(item: Any, image_key: str | None, text_key: str | None) -> _Columns:
    if isinstance(item, Mapping):
        keys = [str(key) for key in item]
        image = choose_key(keys, image_key, IMAGE_KEYS, "image_key")
        text = choose_key(keys, text_key, TEXT_KEYS, "text_key")
        mask = item.get("attention_mask") if text == "input_ids" else None
        return _Columns(item[image], item[text], mask, plain_values(item, without=(image, text)))
    if isinstance(item, tuple | list) and len(item) == 2:
        return _Columns(item[0], item[1], None, {})
    what = (
        f"{type(item).__name__} of {len(item)}" if isinstance(item, tuple | list) else _name(item)
    )
    raise InputError(
        f"a pair must be (image, text), {{'image', 'text'}} or {{'pixel_values', 'input_ids'}}; "
        f"found {what}"
    )


def _name(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    return f"{value!r}" if isinstance(value, int | float) else type(value).__name__


def parse_item(item: Any, image_key: str | None, text_key: str | None, *, id: str) -> Item:
    """One item in its checked form; a leading dimension of 1 on its tensors is dropped.

    Raises:
        InputError: the item's form is wrong (wrong keys, a batch, a class number as text, ...).
        BrokenPair: the form is right but this image or caption is missing or blank.
    """
    image, text, mask, meta = _columns(item, image_key, text_key)
    text = parse_text(text, id=id)
    if mask is not None:
        mask = torch.as_tensor(mask).reshape(-1).long()
        if not isinstance(text, Tensor) or mask.shape != text.shape:
            raise InputError(
                f"{id}: attention_mask has {mask.numel()} entries for "
                f"{text.numel() if isinstance(text, Tensor) else 'no'} token ids"
            )
    return Item(_parse_image(image, id=id), text, mask, meta)


def _parse_image(image: Any, *, id: str) -> Any:
    if image is None:
        raise BrokenPair(id, "no image")
    if isinstance(image, Tensor):
        if image.ndim == 4 and image.shape[0] == 1:
            image = image[0]
        usable = image.ndim == 3 and (image.is_floating_point() or image.dtype == torch.uint8)
        if usable and (image.is_floating_point() or image.shape[0] == 3):
            return image
        raise InputError(
            f"{id}: an image tensor must be uint8 or float of shape [3, height, width]; "
            f"found {_name(image)}"
        )
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, str | os.PathLike):
        return os.fspath(image)
    hint = ""
    if isinstance(image, np.ndarray):
        hint = "; use PIL.Image.fromarray or torch.from_numpy"
    elif isinstance(image, list):
        hint = "; for a Hugging Face dataset use with_format('torch')"
    raise InputError(
        f"{id}: an image must be a tensor, a PIL image or a path; found {_name(image)}{hint}"
    )


def parse_text(text: Any, *, id: str) -> str | list[str] | Tensor:
    """A caption, its alternatives or token ids [L]; raises as `parse_item` does."""
    if isinstance(text, str):
        if not text.strip():
            raise BrokenPair(id, "caption is blank")
        return text
    if text is None:
        raise BrokenPair(id, "no caption")
    if isinstance(text, tuple | list) and all(isinstance(t, str) or t is None for t in text):
        captions = [t for t in text if t is not None and t.strip()]
        if not captions:
            raise BrokenPair(id, "no caption in the list")
        return captions if len(captions) > 1 else captions[0]
    if isinstance(text, np.ndarray) or (
        isinstance(text, tuple | list) and all(isinstance(t, int | np.integer) for t in text)
    ):
        text = torch.as_tensor(np.asarray(text))
    if isinstance(text, Tensor) and not text.is_floating_point() and text.dtype != torch.bool:
        if text.ndim == 2 and text.shape[0] == 1:
            text = text[0]
        if text.ndim == 1 and text.numel() > 0:
            return text.long()
    hint = ""
    if isinstance(text, int | np.integer) or (isinstance(text, Tensor) and text.ndim == 0):
        hint = ": that looks like a class number, give the class name as caption instead"
    raise InputError(
        f"{id}: a text must be a str, a list of str or token ids [length]; "
        f"found {_name(text)}{hint}"
    )


def is_batch(item: Any, image_key: str | None, text_key: str | None) -> bool:
    """Whether `item` holds several pairs; a tensor batch of one is taken for a pair."""
    if isinstance(item, list) and item and all(_is_plain_pair(part) for part in item):
        return True
    image = _columns(item, image_key, text_key).image
    if isinstance(image, Tensor):
        return image.ndim == 4 and image.shape[0] != 1
    return isinstance(image, tuple | list)


def _is_plain_pair(value: Any) -> bool:
    # A tuple of strings may as well be a column, so pairs of (path, caption) inside a list do not
    # count: a list of path columns is what a DataLoader's default collation makes of them.
    if isinstance(value, Mapping):
        return True
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and isinstance(value[0], Tensor | Image.Image)
        and not isinstance(value[1], Image.Image)
        and not (isinstance(value[1], Tensor) and value[1].is_floating_point())
    )


def unbatch(item: Any, image_key: str | None, text_key: str | None) -> list[Any]:
    """The items of a batch, as `(image, text)` or `{"pixel_values", "input_ids", ...}`.

    Raises:
        InputError: the columns differ in length.
    """
    if isinstance(item, list) and item and all(_is_plain_pair(part) for part in item):
        return list(item)
    images, texts, masks, _ = _columns(item, image_key, text_key)
    for column, values in (("texts", texts), ("attention masks", masks)):
        if values is None and column != "texts":
            continue
        count = len(values) if isinstance(values, tuple | list | Tensor | np.ndarray) else 1
        if count != len(images):
            raise InputError(
                f"a batch holds {len(images)} images and {count} {column}; the numbers must agree"
            )
    if masks is None:
        return list(zip(images, texts, strict=True))
    return [
        {"pixel_values": image, "input_ids": ids, "attention_mask": mask}
        for image, ids, mask in zip(images, texts, masks, strict=True)
    ]
