"""CSV, TSV and JSONL files that list image files and captions."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fasterase.errors import InputError
from fasterase.pairs.objects import IMAGE_KEYS, TEXT_KEYS, choose_key
from fasterase.pairs.source import ImageFiles, PackedCaptions, PackedStrings

SEPARATORS = ("\t", ",", ";", "|")
JSON_ENDINGS = (".jsonl", ".ndjson", ".json")
# A column of token ids or pixels makes no sense in a table.
_IMAGE_COLUMNS = tuple(key for key in IMAGE_KEYS if key != "pixel_values")
_TEXT_COLUMNS = tuple(key for key in TEXT_KEYS if key != "input_ids")


def open_table(
    path: Path, *, name: str, image_key: str | None = None, text_key: str | None = None
) -> ImageFiles:
    """Read a table; relative image paths are resolved against its folder.

    A `.jsonl` file holds one JSON object a line, whose text may be a list of alternatives. Any
    other file is read as separated values with a header; tab, comma, semicolon or bar is sniffed
    from that header. Columns that are neither image nor text become the pairs' meta. A row without
    image or caption is kept as a broken pair.

    Raises:
        InputError: not such a table, or the columns are not there (lists those found).
    """
    ids, captions, metas = PackedStrings(), PackedCaptions(), PackedStrings()
    any_meta = False
    is_json = path.suffix.lower() in JSON_ENDINGS
    rows = _json_rows(path) if is_json else _separated_rows(path, image_key, text_key)
    image_column = text_column = None
    try:
        for row in rows:
            # JSON objects may leave out keys; a table's rows all have the header's columns.
            if image_column is None or text_column is None:
                found = list(row)
                image_column = choose_key(found, image_key, _IMAGE_COLUMNS, "image_key")
                text_column = choose_key(found, text_key, _TEXT_COLUMNS, "text_key")
            image, text = row.pop(image_column, None), row.pop(text_column, None)
            named = isinstance(image, str) and image
            ids.append(image if named else f"{path.name}, row {len(ids) + 1} without an image")
            captions.append(_captions(text))
            any_meta = any_meta or bool(row)
            metas.append(json.dumps(row))
    except UnicodeDecodeError as error:
        raise InputError(f"`{name}`: {path} is not a UTF-8 text file: {error.reason}") from error
    except OSError as error:
        raise InputError(f"`{name}`: {path} cannot be read: {error.strerror}") from error
    except InputError as error:
        raise InputError(f"`{name}`: {path}: {error}") from error
    return ImageFiles(
        name, root=path.parent, ids=ids, captions=captions, metas=metas if any_meta else None
    )


def _captions(text: Any) -> list[str]:
    if isinstance(text, str):
        return [text]
    return [t for t in text if isinstance(t, str)] if isinstance(text, list) else []


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"line {number} is not a JSON object: {error.msg}") from error
            if not isinstance(row, dict):
                raise InputError(
                    f"line {number} must hold one JSON object; found a {type(row).__name__}"
                )
            yield row


def _separated_rows(
    path: Path, image_key: str | None, text_key: str | None
) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        if not header.strip():
            raise InputError("the file has no header line")
        separator = sniff_separator(header, image_key, text_key)
        names = _names(header, separator)
        reader = csv.reader(file, delimiter=separator)
        try:
            for row in reader:
                if row:
                    yield dict.fromkeys(names) | dict(zip(names, row, strict=False))
        except csv.Error as error:
            raise InputError(
                f"line {reader.line_num + 1}: {error}; an unclosed quote, perhaps?"
            ) from error


def sniff_separator(header: str, image_key: str | None, text_key: str | None) -> str:
    """The separator under which the header has the wanted columns, else the most columns."""
    image_names = (image_key,) if image_key is not None else _IMAGE_COLUMNS
    text_names = (text_key,) if text_key is not None else _TEXT_COLUMNS

    def fit(separator: str) -> tuple[int, int]:
        names = _names(header, separator)
        wanted = any(n in image_names for n in names) + any(n in text_names for n in names)
        return wanted, len(names)

    return max(SEPARATORS, key=fit)


def _names(header: str, separator: str) -> list[str]:
    return [name.strip() for name in next(csv.reader([header], delimiter=separator))]
