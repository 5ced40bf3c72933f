"""The way in: whatever a user calls a set of pairs becomes a `PairSource`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fasterase.errors import InputError
from fasterase.pairs.folders import open_folder
from fasterase.pairs.item_source import open_items
from fasterase.pairs.pair_source import PairSource, Subset
from fasterase.pairs.tables import open_table
from fasterase.pairs.tars import TAR_ENDINGS, expand_pattern, is_tar_pattern, open_tars

__all__ = ["PairSource", "Subset", "open_pairs"]


def open_pairs(
    source: Any, *, name: str, image_key: str | None = None, text_key: str | None = None
) -> PairSource:
    """Open a set of image-text pairs.

    Args:
        source: one of
            - a map-style `Dataset`, a `DataLoader` (unwrapped to its dataset), or any iterable, of
              `(image, text)` pairs, `{"image", "text"}` dicts, `{"pixel_values", "input_ids"[,
              "attention_mask"]}` dicts, or batches of these; a Hugging Face dataset;
            - the path of a CSV, TSV or JSONL table, of a class-per-folder directory, of a folder of
              `x.jpg` + `x.txt`, of a tar or a folder of tars; a WebDataset pattern;
            - a `PairSource`, such as `fasterase.split` returns, which is passed through.
        name: the argument's name, for messages and ids.
        image_key, text_key: column, dict key or tar ending, where it is not the usual one.

    Raises:
        InputError: nothing of the kind, not there, or empty; names `name` and what was found.
    """
    try:
        opened = _open(source, name, image_key, text_key)
    except InputError as error:
        if f"`{name}`" in str(error):
            raise
        raise type(error)(f"`{name}`: {error}") from error
    if len(opened) == 0:
        raise InputError(f"`{name}` is empty; it needs at least one image-text pair")
    return opened


def _open(source: Any, name: str, image_key: str | None, text_key: str | None) -> PairSource:
    if isinstance(source, PairSource):
        return source
    if not isinstance(source, str | os.PathLike):
        return open_items(source, name, image_key, text_key)
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
        return open_table(path, name=name, image_key=image_key, text_key=text_key)
    if is_tar_pattern(text):
        shards = expand_pattern(text, name=name)
        return open_tars(shards, name=name, image_key=image_key, text_key=text_key)
    raise InputError(
        f"`{name}`: no file or folder {text!r}. A path must be a CSV, TSV or JSONL table, a folder "
        f"of images or shards, or a shard pattern such as 'shards/{{000..099}}.tar'."
    )
