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

from fasterase.errors import InputError
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.source import PairSource, Record, decode_image, read_image_file
from fasterase.progress import progress_bar

IMAGE_KEYS = ("image", "pixel_values", "filepath", "image_path", "path", "file_name", "filename")
TEXT_KEYS = ("text", "caption", "input_ids", "title", "texts", "captions")

# Items read twice to see whether a dataset is deterministic. One would miss a flip of probability
# 1/2 half of the time; eight miss it once in 256.
_PROBES = 8
# Items of which captions and a few pixels enter the manifest, if the others would need decoding.
_MANIFEST_ITEMS = 64


def open_objects(source: Any, name: str, image_key: str | None, text_key: str | None) -> ItemSource:
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
        source = [source]
    elif isinstance(source, tuple) and _is_batch_tuple(source):
        source = [source]
    elif random_access and hasattr(source, "select_columns"):
        return _open_hugging_face(source, name, image_key, text_key)
    if isinstance(source, IterableDataset) or not random_access:
        if not isinstance(source, Iterable):
            raise InputError(
                f"`{name}` must be a dataset, a data loader, an iterable of pairs, or a path; "
                f"found {type(source).__name__}"
            )
        source = _read_all(source, name)
    if isinstance(source, list | tuple):
        return _open_list(source, name, image_key, text_key)
    if len(source) > 0 and _first_is_batch(source, image_key, text_key):
        return _open_list(
            _read_all((source[i] for i in range(len(source))), name), name, image_key, text_key
        )
    in_memory = isinstance(source, TensorDataset)
    return ItemSource(name, source, image_key=image_key, text_key=text_key, in_memory=in_memory)


def _read_all(items: Iterable[Any], name: str) -> list[Any]:
    return list(progress_bar(f"reading {name}", items=items, unit="item", delay=2))


def _is_batch_tuple(source: tuple[Any, ...]) -> bool:
    return len(source) == 2 and isinstance(source[0], Tensor) and source[0].ndim == 4


def _first_is_batch(dataset: Any, image_key: str | None, text_key: str | None) -> bool:
    try:
        first = dataset[0]
    # It will be reported as a broken pair when it is read as one.
    except Exception:
        return False
    return is_batch(first, image_key, text_key)


def _open_list(
    items: Sequence[Any], name: str, image_key: str | None, text_key: str | None
) -> ItemSource:
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
    in_memory = not any(isinstance(pair, Item) and isinstance(pair.image, str) for pair in pairs)
    return ItemSource(name, pairs, in_memory=in_memory)


def _open_hugging_face(
    source: Any, name: str, image_key: str | None, text_key: str | None
) -> ItemSource:
    """Open a `datasets.Dataset`; captions and other columns are read without decoding images."""
    # A transform set by the user may need the image column for its outputs.
    if source.format["type"] == "custom":
        return ItemSource(name, source, image_key=image_key, text_key=text_key)
    found = list(source.column_names)
    image = choose_key(found, image_key, IMAGE_KEYS, "image_key")
    text = choose_key(found, text_key, TEXT_KEYS, "text_key")
    columns = source.select_columns([column for column in found if column != image])
    return ItemSource(name, source, image_key=image, text_key=text, columns=columns)


class ItemSource(PairSource):
    """The items of a map-style dataset, or a list of parsed items.

    Args:
        items: a map-style dataset of items, or a list of `Item` and `BrokenPair`.
        columns: the dataset without the image column, if it has columns (Hugging Face).
        in_memory: whether the images are held decoded in memory.
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
        self.in_memory = in_memory
        self._items = items
        self._columns = columns
        self._image_key = image_key
        self._text_key = text_key
        self.stable = isinstance(items, list) or self._is_deterministic()

    def __len__(self) -> int:
        return len(self._items)

    def id(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def _parse(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            item = self._items[index]
        # A dataset may fail on an item in any way; that item is a broken pair.
        except Exception as error:
            raise BrokenPair(self.id(index), f"{type(error).__name__}: {error}") from error
        if isinstance(item, BrokenPair):
            raise item
        if isinstance(item, Item):
            return item
        return parse_item(item, self._image_key, self._text_key, id=self.id(index))

    def __getitem__(self, index: int) -> Record:
        item = self._parse(index)
        image = item.image
        if isinstance(image, str):
            image = decode_image(read_image_file(image, id=self.id(index)), id=self.id(index))
        return Record(image, item.text, self.id(index), item.mask, item.meta)

    def texts(self, index: int) -> list[str] | Tensor:
        if self._columns is None:
            text = self._parse(index).text
        else:
            text = parse_text(self._columns[index][self._text_key], id=self.id(index))
        return [text] if isinstance(text, str) else text

    def meta(self, index: int) -> dict[str, Any]:
        if self._columns is None:
            return self._parse(index).meta
        return select_plain(self._columns[index], without=(self._text_key,))

    def _is_deterministic(self) -> bool:
        """Read a few items twice and compare; raise `InputError` if none can be read."""
        failure = None
        readable = False
        for index in _spread_indices(len(self), _PROBES):
            try:
                first, second = self[index], self[index]
            except BrokenPair as error:
                failure = error
                continue
            readable = True
            if _fingerprint(first, whole=True) != _fingerprint(second, whole=True):
                return False
        if failure is not None and not readable:
            raise InputError(f"`{self.name}`: no pair can be read; for example {failure}")
        return True

    def manifest(self) -> str:
        """Digest the length, the captions, and the shape and some pixel values of a few items.

        Captions are those of all items if reading them decodes no images, else of the same few.
        """
        digest = hashlib.blake2b(f"{len(self)}".encode(), digest_size=16)
        sampled = set(_spread_indices(len(self), _MANIFEST_ITEMS))
        all_captions = isinstance(self._items, list) or self._columns is not None
        for index in range(len(self)) if all_captions else sorted(sampled):
            try:
                if index in sampled:
                    digest.update(_fingerprint(self[index], whole=False))
                else:
                    digest.update(_serialize_text(self.texts(index)))
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
        values = np.asarray(image.convert("RGB")).reshape(-1)
    else:
        values = image.detach().cpu().reshape(-1).float().numpy()
    if not whole:
        values = values[_spread_indices(len(values), 16)]
    shape = image.size if isinstance(image, Image.Image) else tuple(image.shape)
    return repr(shape).encode() + values.tobytes() + _serialize_text(record.text)


class Item(NamedTuple):
    """A checked pair before decoding: `image` may be a path; `text` is str, list of str or ids."""

    image: Any
    text: Any
    mask: Tensor | None = None
    meta: dict[str, Any] = {}  # noqa: RUF012 (never modified)


def choose_key(found: list[str], given: str | None, usual: tuple[str, ...], option: str) -> str:
    """Choose the column to read: the one the user named, or the first usual name found."""
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


def select_plain(item: Mapping[str, Any], *, without: tuple[str | None, ...]) -> dict[str, Any]:
    """Return the entries that are plain values, for `Record.meta`."""
    return {
        key: value
        for key, value in item.items()
        if key not in without and isinstance(value, str | int | float | bool)
    }


def parse_item(item: Any, image_key: str | None, text_key: str | None, *, id: str) -> Item:
    """Check an item; a leading dimension of 1 on its tensors is dropped.

    Raises:
        InputError: the item's form is wrong (wrong keys, a batch, a class number as text, ...).
        BrokenPair: the form is right, but the image or caption is missing or blank.
    """
    image, text, mask, meta = _find_columns(item, image_key, text_key)
    text = parse_text(text, id=id)
    if mask is not None:
        mask = torch.as_tensor(mask).reshape(-1).long()
        if not isinstance(text, Tensor) or mask.shape != text.shape:
            raise InputError(
                f"{id}: attention_mask has {mask.numel()} entries for "
                f"{text.numel() if isinstance(text, Tensor) else 'no'} token ids"
            )
    return Item(_parse_image(image, id=id), text, mask, meta)


class _Columns(NamedTuple):
    """The parts of a pair or of a batch, not checked yet."""

    image: Any
    text: Any
    mask: Any
    meta: dict[str, Any]


def _find_columns(item: Any, image_key: str | None, text_key: str | None) -> _Columns:
    if isinstance(item, Mapping):
        keys = [str(key) for key in item]
        image = choose_key(keys, image_key, IMAGE_KEYS, "image_key")
        text = choose_key(keys, text_key, TEXT_KEYS, "text_key")
        mask = item.get("attention_mask") if text == "input_ids" else None
        return _Columns(item[image], item[text], mask, select_plain(item, without=(image, text)))
    if isinstance(item, tuple | list) and len(item) == 2:
        return _Columns(item[0], item[1], None, {})
    what = (
        f"{type(item).__name__} of {len(item)}"
        if isinstance(item, tuple | list)
        else _describe(item)
    )
    raise InputError(
        f"a pair must be (image, text), {{'image', 'text'}} or {{'pixel_values', 'input_ids'}}; "
        f"found {what}"
    )


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
            f"found {_describe(image)}"
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
        f"{id}: an image must be a tensor, a PIL image or a path; found {_describe(image)}{hint}"
    )


def parse_text(text: Any, *, id: str) -> str | list[str] | Tensor:
    """Check a caption, its alternatives or token ids [L]; raises as `parse_item` does."""
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
        f"found {_describe(text)}{hint}"
    )


def is_batch(item: Any, image_key: str | None, text_key: str | None) -> bool:
    """Tell whether `item` holds several pairs; a tensor batch of one counts as a pair."""
    if isinstance(item, list) and item and all(_is_plain_pair(part) for part in item):
        return True
    image = _find_columns(item, image_key, text_key).image
    if isinstance(image, Tensor):
        return image.ndim == 4 and image.shape[0] != 1
    return isinstance(image, tuple | list)


def _is_plain_pair(value: Any) -> bool:
    # Pairs of (path, caption) in a list do not count: DataLoader's default collation turns them
    # into a list of two tuples of strings, which are columns.
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
    """Split a batch into `(image, text)` or `{"pixel_values", "input_ids", ...}` items.

    Raises:
        InputError: the columns differ in length.
    """
    if isinstance(item, list) and item and all(_is_plain_pair(part) for part in item):
        return list(item)
    images, texts, masks, _ = _find_columns(item, image_key, text_key)
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


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    return f"{value!r}" if isinstance(value, int | float) else type(value).__name__
