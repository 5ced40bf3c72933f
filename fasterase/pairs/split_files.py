"""Write the two parts of a split to files that `fasterase` reads back."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from fasterase.errors import InputError
from fasterase.files import replace_file
from fasterase.pairs.images import ImageFiles
from fasterase.pairs.items import IMAGE_KEYS, TEXT_KEYS
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.table import PairTable

_IMAGE, _TEXT = "filepath", "title"


class SplitFiles(NamedTuple):
    """What `write_split` wrote.

    Attributes:
        forget, retain: the files.
        tables: whether they are tables of pairs, or lists of ids.
    """

    forget: Path
    retain: Path
    tables: bool


def write_split(forget: PairTable, retain: PairTable, folder: Path) -> SplitFiles:
    """Write two parts of one source to `folder`, as tables or as lists of ids.

    Image files are listed in tables with their absolute paths, captions and other columns: CSV, or
    JSONL where a pair has several captions. Other columns that would be taken for the image or the
    caption are left out. Images that are no files cannot be named in a table: the files hold the
    ids of the pairs, for `fasterase.split(source, forget=path)`.

    Raises:
        InputError: a pair of each part has the same id, so that ids do not tell the parts apart.
    """
    parts = {"forget": forget, "retain": retain}
    tables = isinstance(forget.images, ImageFiles)
    if not tables:
        ending = ".txt"
        _check_ids(forget, retain)
    else:
        ending = ".jsonl" if any(map(_has_alternatives, parts.values())) else ".csv"
    paths = {name: folder / f"{name}{ending}" for name in parts}
    for name, path in paths.items():
        with replace_file(path) as temporary:
            if not tables:
                _write_lines(temporary, parts[name].every_id())
            elif ending == ".jsonl":
                _write_lines(temporary, map(json.dumps, _rows(parts[name])))
            else:
                _write_csv(temporary, list(_rows(parts[name])))
    return SplitFiles(paths["forget"], paths["retain"], tables)


def _check_ids(forget: PairTable, retain: PairTable) -> None:
    ids = set(forget.every_id())
    shared = next((id for id in retain.every_id() if id in ids), None)
    if shared is not None:
        raise InputError(
            f"the id {shared!r} belongs to pairs in both parts, so that a list of ids cannot hold "
            f"the split. Rename the shards, whose names and keys are the ids."
        )


def _has_alternatives(part: PairTable) -> bool:
    return any(len(_captions(part, index)) > 1 for index in range(len(part)))


def _captions(part: PairTable, index: int) -> list[str]:
    """Return the captions of a pair; none if it is broken, which is reported on loading."""
    try:
        return list(part.texts(index))
    except BrokenPair:
        return []


def _rows(part: PairTable) -> Iterable[dict[str, Any]]:
    assert isinstance(part.images, ImageFiles)
    for index in range(len(part)):
        captions = _captions(part, index)
        text = captions[0] if len(captions) == 1 else captions
        path = part.images.path(part.id(index))
        usual = (*IMAGE_KEYS, *TEXT_KEYS)
        meta = {key: value for key, value in part.meta(index).items() if key not in usual}
        yield {_IMAGE: path, _TEXT: text or "", **meta}


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
