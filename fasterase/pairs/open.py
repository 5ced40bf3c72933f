"""Open any form of image-text pairs as a `PairSource`; read folders of images."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from fasterase.errors import InputError
from fasterase.pairs.classes import normalize_class_name
from fasterase.pairs.frames import PARQUET_ENDINGS, is_frame, open_frame, open_parquet
from fasterase.pairs.objects import open_objects
from fasterase.pairs.source import ImageFiles, PackedCaptions, PackedStrings, PairSource, Subset
from fasterase.pairs.tables import open_table
from fasterase.pairs.tars import TAR_ENDINGS, expand_pattern, is_tar_pattern, open_tars

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def open_pairs(
    source: Any,
    *,
    name: str,
    image_key: str | None = None,
    text_key: str | None = None,
    may_be_empty: bool = False,
) -> PairSource:
    """Open a set of image-text pairs.

    Args:
        source: one of
            - a map-style `Dataset`, a `DataLoader` (unwrapped to its dataset), or any iterable, of
              `(image, text)` pairs, `{"image", "text"}` dicts, `{"pixel_values", "input_ids"[,
              "attention_mask"]}` dicts, or batches of these; a Hugging Face dataset;
            - a pandas DataFrame;
            - the path of a CSV, TSV, JSONL, JSON or Parquet table, of a class-per-folder directory,
              of a folder of `x.jpg` + `x.txt`, of a tar or a folder of tars; a WebDataset pattern;
            - a list of the paths or patterns of tars;
            - a `PairSource`, such as `fasterase.split` returns, which is returned unchanged, or a
              `torch.utils.data.Subset` of one.
        name: the name of the argument, for messages and ids.
        image_key, text_key: column, dict key or tar entry, if it does not have a usual name.
        may_be_empty: accept a table, dataset or list without a pair.

    Raises:
        InputError: the source has none of these forms, is missing or is empty; the message starts
            with `name` and says what was found.
    """
    try:
        opened = _open(source, name, image_key, text_key)
    except InputError as error:
        if f"`{name}`" in str(error):
            raise
        raise type(error)(f"`{name}`: {error}") from error
    if len(opened) == 0 and not may_be_empty:
        place = f" ({os.fspath(source)})" if isinstance(source, str | os.PathLike) else ""
        raise InputError(f"`{name}` is empty{place}; it needs at least one image-text pair")
    if opened is not source and opened.origin is None:
        opened.origin = _describe_origin(source)
    return opened


def _describe_origin(source: Any) -> str:
    if isinstance(source, str | os.PathLike):
        return os.path.basename(os.fspath(source).rstrip("/")) or os.fspath(source)
    kind = type(source).__name__
    return f"{'an' if kind[0] in 'AEIOU' else 'a'} {kind}"


def _open(source: Any, name: str, image_key: str | None, text_key: str | None) -> PairSource:
    view = _find_view(source)
    if view is not None:
        return view
    if not isinstance(source, str | os.PathLike):
        return _open_object(source, name, image_key, text_key)
    text = os.fspath(source)
    if not text:
        raise InputError(f"`{name}` is an empty path")
    path = Path(text).expanduser()
    if path.is_dir():
        shards = sorted(str(shard) for shard in path.glob("*.tar"))
        if shards:
            return open_tars(shards, name=name, image_key=image_key, text_key=text_key)
        return open_folder(path, name=name)
    if os.path.isfile(path):
        if path.name.lower().endswith(TAR_ENDINGS):
            return open_tars([str(path)], name=name, image_key=image_key, text_key=text_key)
        if path.name.lower().endswith(PARQUET_ENDINGS):
            return open_parquet(path, name=name, image_key=image_key, text_key=text_key)
        return open_table(path, name=name, image_key=image_key, text_key=text_key)
    if is_tar_pattern(text):
        shards = expand_pattern(text, name=name)
        return open_tars(shards, name=name, image_key=image_key, text_key=text_key)
    raise InputError(
        f"`{name}`: no file or folder {text!r}. A path must be a CSV, TSV, JSONL, JSON or Parquet "
        f"table, a folder of images or shards, or a shard pattern such as "
        f"'shards/{{000..099}}.tar'."
    )


def _find_view(source: Any) -> PairSource | None:
    """Return the `PairSource` that `source` is, loads from, or is a `torch` `Subset` of."""
    if isinstance(source, PairSource):
        return source
    if isinstance(source, DataLoader):
        return _find_view(source.dataset)
    if isinstance(source, torch.utils.data.Subset):
        whole = _find_view(source.dataset)
        if whole is not None:
            return Subset(whole, np.asarray(source.indices, dtype=np.int64), name=whole.name)
    return None


def _open_object(source: Any, name: str, image_key: str | None, text_key: str | None) -> PairSource:
    if is_frame(source):
        return open_frame(source, name=name, image_key=image_key, text_key=text_key)
    if hasattr(source, "to_pandas") and not hasattr(source, "select_columns"):
        kind = f"{type(source).__module__.partition('.')[0]} {type(source).__name__}"
        raise InputError(f"`{name}` is a {kind}; pass its .to_pandas(), a pandas DataFrame")
    if isinstance(source, list | tuple) and _lists_tars(source):
        shards = [
            shard
            for pattern in map(os.fspath, source)
            for shard in expand_pattern(pattern, name=name)
        ]
        return open_tars(shards, name=name, image_key=image_key, text_key=text_key)
    return open_objects(source, name, image_key, text_key)


def _lists_tars(source: Sequence[Any]) -> bool:
    """Tell whether `source` lists tars.

    Raises:
        InputError: it lists other paths.
    """
    if not source or not all(isinstance(each, str | os.PathLike) for each in source):
        return False
    other = next((each for each in source if not is_tar_pattern(os.fspath(each))), None)
    if other is not None:
        raise InputError(
            f"a list of paths must name tars; found {os.fspath(other)!r}. Give a table or folder "
            f"as one path, and pairs as (image, text)."
        )
    return True


def open_folder(folder: Path, *, name: str) -> ImageFiles:
    """Read a folder of images.

    If any image, at any depth, has a `.txt` file with the same stem beside it, the captions come
    from those files (one caption per file), and an image without one is a broken pair. Otherwise
    the first level of folders are classes, and the caption is the name of the folder with spaces
    for underscores.

    Raises:
        InputError: there are no images, or some are outside any class folder.
    """
    images: list[str] = []
    captioned: set[str] = set()
    for relative in _walk(folder):
        _, ending = os.path.splitext(relative)
        if ending.lower() in IMAGE_ENDINGS:
            images.append(relative)
        elif ending.lower() == ".txt":
            captioned.add(relative)
    if not images:
        raise InputError(
            f"`{name}`: folder {folder} holds neither images ({', '.join(IMAGE_ENDINGS)}) nor .tar "
            f"shards"
        )
    if any(_caption_path(image) in captioned for image in images):
        captions = PackedCaptions(
            _read_caption_file(folder / _caption_path(image))
            if _caption_path(image) in captioned
            else []
            for image in images
        )
        return ImageFiles(name, root=folder, ids=PackedStrings(images), captions=captions)
    return _open_class_folders(folder, images, name)


def _walk(folder: Path) -> Iterator[str]:
    """Yield the relative paths of all files in sorted order, without hidden files and folders."""
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__MACOSX")))
        relative = os.path.relpath(parent, folder)
        for file in sorted(files):
            if not file.startswith("."):
                yield file if relative == "." else os.path.join(relative, file)


def _caption_path(image: str) -> str:
    return os.path.splitext(image)[0] + ".txt"


def _read_caption_file(path: Path) -> list[str]:
    try:
        return [path.read_text(encoding="utf-8-sig")]
    # Like an unreadable image, an unreadable caption makes a broken pair.
    except (OSError, UnicodeDecodeError):
        return []


def _open_class_folders(folder: Path, images: list[str], name: str) -> ImageFiles:
    loose = [image for image in images if os.sep not in image]
    if loose:
        raise InputError(
            f"`{name}`: {folder} holds images with neither a .txt caption beside them nor a class "
            f"folder around them, such as {loose[0]}"
        )
    folders = [image.split(os.sep, 1)[0] for image in images]
    class_of = {each: normalize_class_name(each) for each in sorted(set(folders))}
    return ImageFiles(
        name,
        root=folder,
        ids=PackedStrings(images),
        captions=PackedCaptions([class_of[each]] for each in folders),
        metas=PackedStrings(json.dumps({"class": class_of[each]}) for each in folders),
        classes=list(dict.fromkeys(class_of.values())),
    )
