"""Read CSV, TSV, JSONL and JSON files that list image files and captions."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from fasterase.errors import InputError
from fasterase.pairs.items import IMAGE_KEYS, TEXT_KEYS, check_columns, choose_key
from fasterase.pairs.source import ImageFiles, PackedCaptions, PackedStrings

_NAMES = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "bar"}
SEPARATORS = tuple(_NAMES)
JSON_ENDINGS = (".jsonl", ".ndjson", ".json")
# Tables hold neither pixels nor token ids.
_IMAGE_COLUMNS = tuple(key for key in IMAGE_KEYS if key != "pixel_values")
_TEXT_COLUMNS = tuple(key for key in TEXT_KEYS if key != "input_ids")


def open_table(
    path: Path, *, name: str, image_key: str | None = None, text_key: str | None = None
) -> ImageFiles:
    """Read a table; relative image paths are resolved against its folder.

    A `.jsonl` file has one JSON object per line, a `.json` file the same or one array of objects;
    their text may be a list of alternative captions.
    Any other file is read as separated values with a header, from which the separator (tab, comma,
    semicolon or bar) is detected. Other columns become the `meta` of the pairs. A row whose image
    or caption is blank is kept as a broken pair.

    Raises:
        InputError: the file is not such a table, or lacks the columns (lists those found), or has
            two of one name; a row has more or fewer cells than the header, or an unclosed quote
            (names the line).
    """
    ids, captions, metas = PackedStrings(), PackedCaptions(), PackedStrings()
    any_meta = False
    is_json = path.suffix.lower() in JSON_ENDINGS
    rows = _read_json(path) if is_json else _read_separated(path, image_key, text_key)
    image_column = text_column = None
    try:
        for row in rows:
            # The first row decides; JSON objects after it may lack keys.
            if image_column is None or text_column is None:
                found = list(row)
                image_column = choose_key(found, image_key, _IMAGE_COLUMNS, "image_key")
                text_column = choose_key(found, text_key, _TEXT_COLUMNS, "text_key")
            image, text = row.pop(image_column, None), row.pop(text_column, None)
            named = isinstance(image, str) and image
            ids.append(image if named else f"{path.name}, row {len(ids) + 1} without an image")
            captions.append(parse_captions(text))
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


def parse_captions(text: Any) -> list[str]:
    """Return the captions in a cell: a str, or a list of str; none in any other."""
    if isinstance(text, str):
        return [text]
    return (
        [each for each in text if isinstance(each, str)] if isinstance(text, list | tuple) else []
    )


def _read_json(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file with one per line, or with one array of them."""
    with open(path, encoding="utf-8-sig") as file:
        if _first_character(file) == "[" and path.suffix.lower() == ".json":
            yield from _read_json_array(file)
            return
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(
                    f"line {number} is not a JSON object: {error.msg}. A file holds one object per "
                    f"line, or (.json) one array of objects."
                ) from error
            if not isinstance(row, dict):
                raise InputError(
                    f"line {number} must hold one JSON object; found a {type(row).__name__}"
                )
            yield row


def _first_character(file: TextIO) -> str:
    """Return the first character that is no white space, "" if there is none; rewind the file."""
    first = next((line.lstrip()[0] for line in file if line.strip()), "")
    file.seek(0)
    return first


def _read_json_array(file: TextIO) -> Iterator[dict[str, Any]]:
    try:
        rows = json.load(file)
    except json.JSONDecodeError as error:
        raise InputError(f"line {error.lineno} is not valid JSON: {error.msg}") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputError(
                f"entry {number} of the array must be a JSON object; found a {type(row).__name__}"
            )
        yield row


def _read_separated(
    path: Path, image_key: str | None, text_key: str | None
) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        if not header.strip():
            raise InputError("the file has no header line")
        separator = detect_separator(header, image_key, text_key)
        names = _split_header(header, separator)
        _check_header(names, path.parent, separator)
        check_columns(names)
        for line, row in _read_rows(file, separator):
            if len(row) != len(names):
                raise InputError(
                    f"line {line} has {_count_cells(row)}, but the header has {len(names)} "
                    f"({', '.join(names)}). Put cells that hold a {_NAMES[separator]} or a line "
                    "break in double quotes, and leave none out."
                )
            yield dict(zip(names, row, strict=True))


def _read_rows(file: TextIO, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows after the header, each with the number of its first line.

    Raises:
        InputError: a quote is not closed. The reader would make one caption of the rest of the
            file, or of all lines up to the next quote.
    """
    read: list[str] = []
    ended = False

    def lines() -> Iterator[str]:
        nonlocal ended
        for line in file:
            read.append(line)
            yield line
        ended = True

    reader = csv.reader(lines(), delimiter=separator)
    while True:
        first = reader.line_num + 2  # counted from 1, and after the header
        read.clear()
        try:
            row = next(reader, None)
            if row is None:
                return
            if ended or len(read) > 1:
                # Lenient reading takes `"two\nlines" and more` for one cell.
                next(csv.reader(read, delimiter=separator, strict=True))
        except csv.Error as error:
            raise InputError(
                f"line {first}: {error}; a double quote that begins a cell is not closed. Close "
                'it, or write the cell in double quotes and each quote inside it twice ("").'
            ) from error
        if len(row) > 1 or "".join(row).strip():
            yield first, row


def _check_header(names: list[str], folder: Path, separator: str) -> None:
    """Raise `InputError` if the first line names an image file, as a pair does."""
    for name in names:
        try:
            is_pair = bool(name) and (folder / name).is_file()
        except (OSError, ValueError):
            continue  # too long for a path, or with a null character
        if is_pair:
            raise InputError(
                f"the first line is a pair, not a header ({name!r} is a file). Put the names of "
                f"the columns there, such as: {separator.join(('filepath', 'title'))!r}"
            )


def _count_cells(row: list[str]) -> str:
    return f"{len(row)} cells" if len(row) != 1 else "1 cell"


def detect_separator(header: str, image_key: str | None, text_key: str | None) -> str:
    """Return the separator that gives the header the wanted columns, or else most columns."""
    image_names = (image_key,) if image_key is not None else _IMAGE_COLUMNS
    text_names = (text_key,) if text_key is not None else _TEXT_COLUMNS

    def score(separator: str) -> tuple[int, int]:
        names = _split_header(header, separator)
        wanted = any(n in image_names for n in names) + any(n in text_names for n in names)
        return wanted, len(names)

    return max(SEPARATORS, key=score)


def _split_header(header: str, separator: str) -> list[str]:
    return [name.strip() for name in next(csv.reader([header], delimiter=separator))]
