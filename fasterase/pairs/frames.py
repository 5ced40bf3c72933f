"""Pairs in the columns of a pandas DataFrame or of a Parquet file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fasterase.errors import InputError, import_extra
from fasterase.pairs.items import IMAGE_KEYS, TEXT_KEYS, check_columns, choose_key, select_plain
from fasterase.pairs.objects import open_objects
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.source import (
    ImageFiles,
    ListedSource,
    PackedCaptions,
    PackedStrings,
    PairSource,
)
from fasterase.pairs.tables import parse_captions

PARQUET_ENDINGS = (".parquet", ".pq")


def is_frame(source: Any) -> bool:
    """Tell whether `source` is a pandas DataFrame, without importing pandas."""
    return any(
        cls.__name__ == "DataFrame" and cls.__module__.partition(".")[0] == "pandas"
        for cls in type(source).__mro__
    )


def open_frame(
    frame: Any, *, name: str, image_key: str | None = None, text_key: str | None = None
) -> PairSource:
    """Open a DataFrame; relative image paths are resolved against the working folder.

    Raises:
        InputError: it lacks the columns, or has two of one name; lists those found.
    """
    columns: dict[str, list[Any]] = {}
    check_columns([str(label) for label in frame.columns])
    # By position, since empty names may repeat.
    for position, label in enumerate(frame.columns):
        values = frame.iloc[:, position]
        # pandas marks missing text by NaN, NA or NaT.
        columns[str(label)] = values.astype(object).where(values.notna(), None).tolist()
    return _open_columns(columns, name, name, Path.cwd(), image_key, text_key)


def open_parquet(
    path: Path, *, name: str, image_key: str | None = None, text_key: str | None = None
) -> PairSource:
    """Read a Parquet file; relative image paths are resolved against its folder.

    Its images are paths, the bytes of image files, or `{"bytes", "path"}` as Hugging Face writes
    them. Bytes are kept in memory.

    Raises:
        InputError: it is no Parquet file, or lacks the columns, or has two of one name; lists those
            found.
        MissingExtraError: pyarrow is not installed.
    """
    parquet = import_extra("pyarrow.parquet", "parquet", f"`{name}`: reading {path}")
    try:
        check_columns(parquet.read_schema(str(path)).names)
        table = parquet.read_table(str(path))
        columns = {column: table.column(column).to_pylist() for column in table.column_names}
        return _open_columns(columns, name, path.name, path.parent, image_key, text_key)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    # pyarrow's own errors are ValueErrors and OSErrors.
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read as Parquet: {error}") from error


def _open_columns(
    columns: dict[str, list[Any]],
    name: str,
    label: str,
    root: Path,
    image_key: str | None,
    text_key: str | None,
) -> PairSource:
    """Open columns of equal length as image files, encoded images or decoded items.

    Args:
        label: what the ids of images without a path start with.
        root: the folder of relative paths.
    """
    found = list(columns)
    image_column = choose_key(found, image_key, IMAGE_KEYS, "image_key")
    text_column = choose_key(found, text_key, TEXT_KEYS, "text_key")
    images = [_unpack_image(cell) for cell in columns[image_column]]
    texts = [_unpack_text(cell) for cell in columns[text_column]]
    others = [column for column in found if column not in (image_column, text_column)]
    metas = [
        select_plain(dict(zip(others, cells, strict=True)), without=())
        for cells in zip(*(columns[column] for column in others), strict=True)
    ] or [{} for _ in images]
    if not all(_is_captions(text) for text in texts) or not (
        _hold_only(images, str) or _hold_only(images, bytes)
    ):
        items = [
            {**meta, "image": _resolve(image, root), "text": text}
            for image, text, meta in zip(images, texts, metas, strict=True)
        ]
        return open_objects(items, name, "image", "text")
    captions = PackedCaptions(parse_captions(text) for text in texts)
    packed = PackedStrings(map(json.dumps, metas)) if others else None
    ids = (f"{label}[{row}]" for row in range(len(images)))
    if _hold_only(images, str):
        paths = (image or id for image, id in zip(images, ids, strict=True))
        return ImageFiles(
            name, root=root, ids=PackedStrings(paths), captions=captions, metas=packed
        )
    return EncodedImages(
        name, images=images, ids=PackedStrings(ids), captions=captions, metas=packed
    )


def _unpack_image(cell: Any) -> Any:
    if isinstance(cell, Mapping) and {"bytes", "path"} >= set(cell):
        cell = cell.get("bytes") or cell.get("path")
    return os.fspath(cell) if isinstance(cell, os.PathLike) else cell


def _unpack_text(cell: Any) -> Any:
    return cell.tolist() if isinstance(cell, np.ndarray) else cell


def _hold_only(cells: list[Any], kind: type) -> bool:
    """Tell whether all cells that are not empty are of `kind`."""
    return all(cell is None or isinstance(cell, kind) for cell in cells)


def _is_captions(text: Any) -> bool:
    """Tell whether a cell is a caption, alternative captions or empty: anything but token ids."""
    if isinstance(text, list | tuple):
        return all(each is None or isinstance(each, str) for each in text)
    return text is None or isinstance(text, str)


def _resolve(image: Any, root: Path) -> Any:
    return os.path.join(root, image) if isinstance(image, str) else image


class EncodedImages(ListedSource):
    """Pairs whose encoded images are held in memory."""

    def __init__(
        self,
        name: str,
        *,
        images: list[bytes | None],
        ids: PackedStrings,
        captions: PackedCaptions,
        metas: PackedStrings | None,
    ) -> None:
        super().__init__(name, ids=ids, captions=captions, metas=metas)
        self._images = images

    def encoded_sizes(self) -> np.ndarray:
        sizes = (-1 if image is None else len(image) for image in self._images)
        return np.fromiter(sizes, dtype=np.int64, count=len(self._images))

    def encoded_image(self, index: int) -> bytes:
        image = self._images[index]
        if image is None:
            raise BrokenPair(self.id(index), "no image")
        return image

    def encoded_location(self, index: int) -> str:
        # Two files of the same name may hold different images under the same id.
        return f"{id(self._images)}[{index}]"
