"""One pair as a Python object: its forms, and what is wrong with others; batches and classes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fasterase.errors import InputError
from fasterase.pairs.skips import BrokenPair

IMAGE_KEYS = (
    *("image", "pixel_values", "filepath", "image_path"),
    *("path", "file_name", "filename", "img"),
)
TEXT_KEYS = ("text", "caption", "input_ids", "title", "texts", "captions")


class Keys(NamedTuple):
    """The columns (keys, endings) of images and captions that the user names, or None."""

    image: str | None = None
    text: str | None = None

    def choose(
        self,
        found: list[str],
        usual_images: tuple[str, ...] = IMAGE_KEYS,
        usual_texts: tuple[str, ...] = TEXT_KEYS,
    ) -> tuple[str, str]:
        """Return the columns to read: those the user named, or the first usual names found."""
        return (
            _choose_key(found, self.image, usual_images, "image_key"),
            _choose_key(found, self.text, usual_texts, "text_key"),
        )


USUAL = Keys()


def _choose_key(found: list[str], given: str | None, usual: tuple[str, ...], option: str) -> str:
    if given is not None and given not in found:
        raise InputError(f"`{option}`: no column {given!r}; the columns found are {found}")
    key = given or next((key for key in usual if key in found), None)
    if key is None:
        raise InputError(
            f"no column named {', '.join(usual)}; the columns found are {found}. "
            f"Name the right one with `{option}`."
        )
    return key


class Record(tuple[Any, Any]):
    """A decoded pair: a tuple `(image, text)` that also knows where it comes from.

    Attributes:
        image: PIL image, uint8 tensor [3, H, W], or float tensor [3, H, W] (already preprocessed);
            from `parse_item` also the path of an image file, or its bytes.
        text: a caption, a list of alternative captions, or token ids [L] int64.
        id: stable and readable: a file path, `shard.tar/key`, or `forget[12]`.
        mask: attention mask [L] that came with the token ids.
        meta: the json entry of a tar sample, other columns, or `{"class": name}`.
    """

    image = property(itemgetter(0))
    text = property(itemgetter(1))
    id: str
    mask: Tensor | None
    meta: dict[str, Any]

    def __new__(
        cls,
        image: Any,
        text: Any,
        id: str,
        mask: Tensor | None = None,
        meta: dict[str, Any] | None = None,
    ) -> Record:
        record = super().__new__(cls, (image, text))
        record.id = id
        record.mask = mask
        record.meta = {} if meta is None else meta
        return record

    def __getnewargs__(self) -> tuple[Any, ...]:
        return self.image, self.text, self.id, self.mask, self.meta

    def __repr__(self) -> str:
        return f"Record(image={self.image!r}, text={self.text!r}, id={self.id!r})"


def select_plain(item: Mapping[str, Any], *, without: tuple[str | None, ...]) -> dict[str, Any]:
    """Return the entries that are plain values, for `Record.meta`."""
    return {
        key: value
        for key, value in item.items()
        if key not in without and isinstance(value, str | int | float | bool)
    }


class Columns(NamedTuple):
    """The parts of a pair or of a batch, not checked yet."""

    image: Any
    text: Any
    mask: Any = None
    meta: dict[str, Any] = {}  # noqa: RUF012 (never modified)

    def with_class_name(self, classes: Sequence[str] | None) -> Columns:
        """Return columns whose text, a class number, is the name of the class, if there are any."""
        if classes is None:
            return self
        number = class_number(self.text)
        if number is None or number == -1:  # unlabelled
            return self._replace(text=None)
        if not 0 <= number < len(classes):
            raise InputError(f"the class number {number} is none of the {len(classes)} classes")
        name = classes[number]
        return self._replace(text=name, meta={**self.meta, "class": name})


def normalize_class_name(name: str) -> str:
    """Return the name of a class or of its folder as a caption, with spaces for underscores."""
    return " ".join(name.replace("_", " ").split())


def class_number(value: Any) -> int | None:
    """Return `value` as an int if it is a whole number (an int, or 0-d array or tensor)."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        return None
    return int(value)


def parse_item(item: Any, keys: Keys, *, id: str, classes: Sequence[str] | None = None) -> Record:
    """Check an item in any form, and drop a leading dimension of 1 of its tensors; do not decode.

    If there are `classes`, the text is the number of one.

    Raises:
        InputError: the item's form is wrong (wrong keys, a batch, a class number as text, ...).
        BrokenPair: the form is right, but the image or caption is missing or blank.
    """
    if isinstance(item, Record):
        return Record(item.image, item.text, id, item.mask, item.meta)
    columns = _find_columns(item, keys).with_class_name(classes)
    text, mask = parse_text(columns.text, id=id), columns.mask
    if mask is not None:
        mask = torch.as_tensor(mask).reshape(-1).long()
        if not isinstance(text, Tensor) or mask.shape != text.shape:
            raise InputError(
                f"{id}: attention_mask has {mask.numel()} entries for "
                f"{text.numel() if isinstance(text, Tensor) else 'no'} token ids"
            )
    return Record(_parse_image(columns.image, id=id), text, id, mask, columns.meta)


def _find_columns(item: Any, keys: Keys) -> Columns:
    if isinstance(item, Columns):
        return item
    if isinstance(item, Mapping):
        image, text = keys.choose([str(key) for key in item])
        mask = item.get("attention_mask") if text == "input_ids" else None
        return Columns(item[image], item[text], mask, select_plain(item, without=(image, text)))
    if isinstance(item, tuple | list) and len(item) == 2:
        return Columns(*item)
    raise InputError(
        f"a pair must be (image, text), {{'image', 'text'}} or {{'pixel_values', 'input_ids'}}; "
        f"found {_describe(item)}"
    )


def _parse_image(image: Any, *, id: str) -> Any:
    if _is_missing(image):
        raise BrokenPair(id, "no image")
    if isinstance(image, Tensor):
        if image.ndim == 4 and image.shape[0] == 1:
            image = image[0]
        is_bytes = image.dtype == torch.uint8 and image.shape[:1] == (3,)
        if image.ndim == 3 and (image.is_floating_point() or is_bytes):
            return image
        what = "an image tensor must be uint8 or float of shape [3, height, width]"
        raise InputError(f"{id}: {what}; found {_describe(image)}")
    if isinstance(image, Image.Image | bytes):
        return image
    if isinstance(image, np.ndarray):
        return _image_from_array(image, id=id)
    if isinstance(image, str | os.PathLike):
        return str(os.fspath(image))
    hint = "; for a Hugging Face dataset use with_format('torch')" * isinstance(image, list)
    raise InputError(
        f"{id}: an image must be a tensor, a NumPy array, a PIL image or a path; found "
        f"{_describe(image)}{hint}"
    )


def _image_from_array(image: np.ndarray, *, id: str) -> Image.Image:
    """Return the picture of a uint8 array [H, W, 3], or grey [H, W] or [H, W, 1]."""
    grey = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
    is_picture = grey.ndim == 2 or (grey.ndim == 3 and grey.shape[2] == 3)
    if grey.dtype != np.uint8:
        hint = (
            "Scale it to 0..255 and use image.astype('uint8'); if it is preprocessed already, pass "
            "torch.from_numpy(image), float of shape [3, height, width]"
        )
    elif is_picture and grey.size > 0:
        return Image.fromarray(np.ascontiguousarray(grey))
    elif grey.ndim == 3 and grey.shape[0] == 3:
        hint = "Move the channels last: image.transpose(1, 2, 0)"
    else:
        hint = "Drop other channels, such as alpha: image[..., :3]"
    raise InputError(
        f"{id}: an image array must be uint8 of shape [height, width, 3], or [height, width] for "
        f"grey; found {_describe(image)}. {hint}."
    )


def parse_text(text: Any, *, id: str) -> str | list[str] | Tensor:
    """Check a caption, its alternatives or token ids [L]; raises as `parse_item` does."""
    if isinstance(text, str):
        if not text.strip():
            raise BrokenPair(id, "caption is blank")
        return text
    if _is_missing(text):
        raise BrokenPair(id, "no caption")
    if isinstance(text, np.ndarray) and text.dtype.kind in "OU":
        text = text.tolist()
    if isinstance(text, tuple | list) and all(isinstance(t, str) or _is_missing(t) for t in text):
        captions = [t for t in text if isinstance(t, str) and t.strip()]
        if not captions:
            raise BrokenPair(id, "no caption in the list")
        return captions if len(captions) > 1 else captions[0]
    if (ids := _token_ids(text)) is not None:
        return ids
    hint = ""
    if class_number(text) is not None:
        hint = ": that looks like a class number, give the class name as caption instead"
    elif isinstance(text, Image.Image):
        hint = ": a pair is (image, text), in this order"
    raise InputError(
        f"{id}: a text must be a str, a list of str or token ids [length]; "
        f"found {_describe(text)}{hint}"
    )


def _token_ids(text: Any) -> Tensor | None:
    is_list = isinstance(text, tuple | list)
    if isinstance(text, np.ndarray) or (
        is_list and all(isinstance(each, int | np.integer) for each in text)
    ):
        text = torch.as_tensor(np.asarray(text))
    if not isinstance(text, Tensor) or text.is_floating_point() or text.dtype == torch.bool:
        return None
    if text.ndim == 2 and text.shape[0] == 1:
        text = text[0]
    return text.long() if text.ndim == 1 and text.numel() > 0 else None


def _is_missing(value: Any) -> bool:
    """Tell whether it is None, or the NaN by which pandas and NumPy mark a missing cell."""
    return value is None or (isinstance(value, float | np.floating) and bool(np.isnan(value)))


def unbatch(item: Any, keys: Keys) -> list[Any] | None:
    """Split a batch into items; None for one item. A tensor batch of one counts as an item.

    Raises:
        InputError: the columns differ in length.
    """
    if isinstance(item, list) and item and all(map(_is_plain_pair, item)):
        return item
    images, texts, masks, _ = _find_columns(item, keys)
    if isinstance(images, Tensor | np.ndarray):
        if images.ndim != 4 or images.shape[0] == 1:
            return None
    elif not isinstance(images, tuple | list):
        return None
    masks = [None] * len(images) if masks is None else masks
    for column, values in (("texts", texts), ("attention masks", masks)):
        if not isinstance(values, tuple | list | Tensor | np.ndarray):
            raise InputError(
                f"a batch of {len(images)} images needs as many {column}; found "
                f"{_describe(values)}. If it is one pair: the image comes first, then the text."
            )
        if len(values) != len(images):
            raise InputError(
                f"a batch holds {len(images)} images and {len(values)} {column}; the numbers must "
                "agree"
            )
    return [Columns(*columns) for columns in zip(images, texts, masks, strict=True)]


def _is_plain_pair(value: Any) -> bool:
    # Pairs of (path, caption) in a list do not count: DataLoader's default collation turns them
    # into a list of two tuples of strings, which are columns.
    if not isinstance(value, tuple) or len(value) != 2:
        return isinstance(value, Mapping)
    image, text = value
    if isinstance(text, Image.Image) or (isinstance(text, Tensor) and text.is_floating_point()):
        return False
    return isinstance(image, Tensor | np.ndarray | Image.Image)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, np.ndarray):
        return f"an array {list(value.shape)} of {value.dtype}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {len(value)}"
    return f"{value!r}" if isinstance(value, int | float) else type(value).__name__


def parse_meta(data: bytes | None, *, id: str) -> dict[str, Any]:
    """Return a JSON object, {} for None and other values; raise `BrokenPair` for what is none."""
    try:
        meta = {} if data is None else json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BrokenPair(id, f"json cannot be read: {error}") from error
    return meta if isinstance(meta, dict) else {}
