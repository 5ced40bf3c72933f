"""Open any form of image-text pairs as a `PairTable`, and several of them as one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from fasterase.errors import InputError
from fasterase.pairs.items import Keys
from fasterase.pairs.read_files import is_frame, open_file, open_folder, open_frame
from fasterase.pairs.read_objects import open_objects
from fasterase.pairs.read_tars import TAR_ENDINGS, expand_pattern, is_tar_pattern, open_tars
from fasterase.pairs.remote import shard_name
from fasterase.pairs.table import PairTable


def open_pairs(
    source: Any,
    *,
    name: str,
    image_key: str | None = None,
    text_key: str | None = None,
    may_be_empty: bool = False,
) -> PairTable:
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
            - a `PairTable`, such as `fasterase.split` returns, which is returned unchanged, or a
              `torch.utils.data.Subset` of one.
        name: the name of the argument, for messages and ids.
        image_key, text_key: column, dict key or tar entry, if it does not have a usual name.
        may_be_empty: accept a table, dataset or list without a pair.

    Raises:
        InputError: the source has none of these forms, is missing or is empty; the message starts
            with `name` and says what was found.
    """
    try:
        opened = _open(source, name, Keys(image_key, text_key))
    except InputError as error:
        if f"`{name}`" in str(error):
            raise
        raise type(error)(f"`{name}`: {error}") from error
    place = os.fspath(source) if isinstance(source, str | os.PathLike) else None
    if len(opened) == 0 and not may_be_empty:
        named = "" if place is None else f" ({place})"
        raise InputError(f"`{name}` is empty{named}; it needs at least one image-text pair")
    if opened is not source and opened.origin is None:
        kind = type(source).__name__
        opened.origin = f"{'an' if kind[0] in 'AEIOU' else 'a'} {kind}"
        if place is not None:
            opened.origin = shard_name(place.rstrip("/")) or place
    return opened


def _open(source: Any, name: str, keys: Keys) -> PairTable:
    if (view := _find_view(source)) is not None:
        return view
    if (tars := _find_tars(source)) is not None:
        return open_tars(tars, name, keys)
    if is_frame(source):
        return open_frame(source, name, keys)
    if not isinstance(source, str | os.PathLike):
        if hasattr(source, "to_pandas") and not hasattr(source, "select_columns"):
            kind = f"{type(source).__module__.partition('.')[0]} {type(source).__name__}"
            raise InputError(f"`{name}` is a {kind}; pass its .to_pandas(), a pandas DataFrame")
        return open_objects(source, name, keys)
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        return open_folder(path, name)
    if os.path.isfile(path):
        return open_file(path, name, keys)
    raise InputError(
        f"no file or folder {os.fspath(source)!r}. A path must be a CSV, TSV, JSONL, JSON or "
        f"Parquet table, a folder of images or shards, or a shard pattern such as "
        f"'shards/{{000..099}}.tar'."
    )


def _find_view(source: Any) -> PairTable | None:
    """Return the `PairTable` that `source` is, loads from, or is a `torch` `Subset` of."""
    if isinstance(source, DataLoader):
        return _find_view(source.dataset)
    if isinstance(source, torch.utils.data.Subset):
        whole = _find_view(source.dataset)
        return None if whole is None else whole.select(source.indices)
    return source if isinstance(source, PairTable) else None


def _find_tars(source: Any) -> list[str] | None:
    """Return the shards that `source` names: a pattern, a tar, a folder of tars, or a list of them.

    Raises:
        InputError: shards are missing, it is a list of other paths or an empty path.
    """
    if isinstance(source, list | tuple):
        if not source or not all(isinstance(each, str | os.PathLike) for each in source):
            return None
        patterns = list(map(os.fspath, source))
        other = next((each for each in patterns if not is_tar_pattern(each)), None)
        if other is not None:
            raise InputError(
                f"a list of paths must name tars; found {other!r}. Give a table or folder as one "
                f"path, and pairs as (image, text)."
            )
        return [shard for pattern in patterns for shard in expand_pattern(pattern)]
    if not isinstance(source, str | os.PathLike):
        return None
    if not (text := os.fspath(source)):
        raise InputError("the path is empty")
    path = Path(os.path.expanduser(text))
    if path.is_dir():
        return sorted(str(each) for each in path.glob("*.tar") if each.is_file()) or None
    if os.path.isfile(path):
        return [str(path)] if path.name.lower().endswith(TAR_ENDINGS) else None
    return expand_pattern(text) if is_tar_pattern(text) else None
