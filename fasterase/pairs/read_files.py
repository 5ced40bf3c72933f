"""Read pairs from files of columns (CSV, JSON, Parquet), DataFrames and folders of images."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from pyarrow import parquet

from fasterase.errors import InputError
from fasterase.numerals import counted
from fasterase.pairs.images import ImageFiles, read_regular_file
from fasterase.pairs.items import (
    IMAGE_KEYS,
    TEXT_KEYS,
    USUAL,
    Columns,
    Keys,
    normalize_class_name,
    select_plain,
)
from fasterase.pairs.read_objects import open_list
from fasterase.pairs.table import PairTable, pack

_NAMES = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "bar"}
SEPARATORS = tuple(_NAMES)
JSON_ENDINGS = (".jsonl", ".ndjson", ".json")
PARQUET_ENDINGS = (".parquet", ".pq")
# Text holds neither pixels nor token ids.
_IMAGE_COLUMNS = tuple(key for key in IMAGE_KEYS if key != "pixel_values")
_TEXT_COLUMNS = tuple(key for key in TEXT_KEYS if key != "input_ids")
# Of a cell: captions and metadata of web pages are long.
csv.field_size_limit(max(csv.field_size_limit(), 1 << 30))
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def open_file(path: Path, name: str, keys: Keys = USUAL) -> PairTable:
    """Read a file of columns; relative image paths are resolved against its folder.

    A `.jsonl` file has one JSON object per line, a `.json` file the same or one array of objects;
    their text may be a list of alternative captions. The images of a Parquet file are paths, the
    bytes of image files (kept in memory), or `{"bytes", "path"}` as Hugging Face writes them. Any
    other file has a header, from which its separator (tab, comma, semicolon or bar) is detected.
    Other columns become the `meta` of the pairs. A row without image or caption is a broken pair.

    Raises:
        InputError: the file is not of that kind, or lacks the columns (lists those found) or has
            them twice; a row has more or fewer cells than the header, or an unclosed quote (names
            the line).
    """
    ending = path.suffix.lower()
    try:
        if ending in PARQUET_ENDINGS:
            return _open_columns(*_read_parquet(path), keys, name, path.name, path.parent)
        is_json = ending in JSON_ENDINGS
        rows = _read_json(path) if is_json else _read_separated(path, keys)
        return PairTable(name, pack(_find_pairs(rows, keys, path.name)), ImageFiles(path.parent))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a UTF-8 text file: {error.reason}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except RecursionError as error:
        raise InputError(f"{path}: a row of JSON is nested too deeply") from error


def is_frame(source: Any) -> bool:
    """Tell whether `source` is a pandas DataFrame, without importing pandas."""
    return any(
        cls.__name__ == "DataFrame" and cls.__module__.partition(".")[0] == "pandas"
        for cls in type(source).__mro__
    )


def open_frame(frame: Any, name: str, keys: Keys) -> PairTable:
    """Open a DataFrame; relative image paths are resolved against the working folder.

    Raises:
        InputError: it lacks the columns (lists those found), or has them twice.
    """
    columns = (frame.iloc[:, place] for place in range(frame.shape[1]))
    # pandas marks missing text by NaN, NA or NaT.
    cells = [each.astype(object).where(each.notna(), None).tolist() for each in columns]
    names = [str(label) for label in frame.columns]
    return _open_columns(names, cells, keys, name, name, Path.cwd())


def _check_distinct(found: list[str]) -> None:
    # Those without a name may be several: programs write them where a line ends in separators.
    repeated = next((name for name in found if name and found.count(name) > 1), None)
    if repeated is not None:
        raise InputError(
            f"{found.count(repeated)} columns are named {repeated!r}; the columns found are "
            f"{found}. Rename or remove all but one of them."
        )


def _find_pairs(
    rows: Iterator[dict[str, Any]], keys: Keys, label: str
) -> Iterator[tuple[str, list[str], dict[str, Any]]]:
    columns = None
    for number, row in enumerate(rows, 1):
        # The first row decides; JSON objects after it may lack keys.
        columns = columns or keys.choose(list(row), _IMAGE_COLUMNS, _TEXT_COLUMNS)
        image, text = (row.pop(column, None) for column in columns)
        named = isinstance(image, str) and image
        texts = text if isinstance(text, list) else [text]
        captions = [each for each in texts if isinstance(each, str)]
        yield image if named else f"{label}, row {number} without an image", captions, row


def _read_parquet(path: Path) -> tuple[list[str], list[list[Any]]]:
    try:
        with parquet.ParquetFile(path) as file:
            table = file.read()
    # pyarrow's own errors are ValueErrors and OSErrors.
    except (ValueError, OSError) as error:
        raise InputError(f"it cannot be read as Parquet: {error}") from error
    return table.column_names, [column.to_pylist() for column in table.columns]


def _open_columns(
    names: list[str], cells: list[list[Any]], keys: Keys, name: str, label: str, root: Path
) -> PairTable:
    """Open columns of equal length, by their names; for `label` and `root` see `open_list`."""
    _check_distinct(names)
    image_key, text_key = keys.choose(names)

    def items() -> Iterator[Columns]:
        for values in zip(*cells, strict=True):
            row = dict(zip(names, values, strict=True))
            image = row[image_key]
            if isinstance(image, Mapping) and {"bytes", "path"} >= set(image):
                image = image.get("bytes") or image.get("path")
            yield Columns(
                image, row[text_key], meta=select_plain(row, without=(image_key, text_key))
            )

    return open_list(items(), name, label=label, root=root)


def _read_json(path: Path) -> Iterator[dict[str, Any]]:
    # Arrow would demand one type a column, but a text is a str or a list of them.
    with open(path, encoding="utf-8-sig") as file:
        first = next((line.lstrip()[0] for line in file if line.strip()), "")
        file.seek(0)
        rows: Iterator[tuple[str, Any]]
        if first == "[" and path.suffix.lower() == ".json":
            entries = enumerate(_parse_json(file.read()), 1)
            rows = ((f"entry {number} of the array", entry) for number, entry in entries)
        else:
            lines = ((number, line.strip()) for number, line in enumerate(file, 1) if line.strip())
            rows = ((f"line {number}", _parse_json(line, number)) for number, line in lines)
        for where, row in rows:
            if not isinstance(row, dict):
                raise InputError(f"{where} must hold one JSON object; found a {type(row).__name__}")
            yield row


def _parse_json(text: str, line: int = 1) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise InputError(f"line {line} of JSON is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"line {line + error.lineno - 1} is not valid JSON: {error.msg}. A file holds one "
            f"object per line, or (.json) one array of objects."
        ) from error


def _read_separated(path: Path, keys: Keys) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        if not header.strip():
            raise InputError("the file has no header line")
        separator = detect_separator(header, keys)
        names = _split_header(header, separator)
        file_name = next(
            (each for each in names if each and os.path.isfile(path.parent / each)), None
        )
        if file_name is not None:
            raise InputError(
                f"the first line is a pair, not a header ({file_name!r} is a file). Put the names "
                f"of the columns there, such as: {separator.join(('filepath', 'title'))!r}"
            )
        _check_distinct(names)
        keys.choose(names)  # an unsuited header is an error without rows too
        for number, cells in _read_cells(file, separator):
            if len(cells) == len(names):
                yield dict(zip(names, cells, strict=True))
            elif "".join(cells).strip():
                count = len(cells)
                raise InputError(
                    f"line {number} has {counted(count, 'cell')}, but the header has "
                    f"{len(names)} ({', '.join(names)}). Put cells that hold a "
                    f"{_NAMES[separator]} or a line break in double quotes, and leave none out."
                )


def _read_cells(file: TextIO, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the first line of each row after the header, and its cells.

    A quote that is not closed would make one caption of all lines up to the next quote.
    """
    line = ""

    def lines() -> Iterator[str]:
        nonlocal line
        for line in file:  # noqa: UP028 (the last one is needed below)
            yield line

    reader = csv.reader(lines(), delimiter=separator, strict=True)
    while True:
        first = reader.line_num + 2
        try:
            yield first, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "expected after" in str(error) and reader.line_num + 1 == first:
                # `"d" e` in one line loses nothing.
                yield first, next(csv.reader([line], delimiter=separator))
                continue
            hint = (
                "; a double quote that begins a cell is not closed. Close it, or write the cell in "
                'double quotes and each quote inside it twice ("").'
            )
            is_quote = "expected after" in str(error) or "end of data" in str(error)
            raise InputError(f"line {first}: {error}{hint * is_quote}") from error


def detect_separator(header: str, keys: Keys) -> str:
    """Return the separator that gives the header the wanted columns, or else most columns."""
    images = _IMAGE_COLUMNS if keys.image is None else (keys.image,)
    texts = _TEXT_COLUMNS if keys.text is None else (keys.text,)

    def score(separator: str) -> tuple[int, int]:
        names = set(_split_header(header, separator))
        return sum(not names.isdisjoint(each) for each in (images, texts)), len(names)

    return max(SEPARATORS, key=score)


def _split_header(header: str, separator: str) -> list[str]:
    return [name.strip() for name in next(csv.reader([header], delimiter=separator))]


def open_folder(folder: Path, name: str) -> PairTable:
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
        stem, ending = os.path.splitext(relative)
        if ending.lower() in IMAGE_ENDINGS:
            images.append(relative)
        elif ending == ".txt":
            captioned.add(stem)
    if not images:
        endings = ", ".join(IMAGE_ENDINGS)
        raise InputError(f"folder {folder} holds neither images ({endings}) nor .tar shards")
    stems = [os.path.splitext(image)[0] for image in images]
    if not captioned.isdisjoint(stems):
        captions = (_read_caption(folder / f"{stem}.txt") for stem in stems)
        rows = ((image, texts, None) for image, texts in zip(images, captions, strict=True))
        return PairTable(name, pack(rows), ImageFiles(folder))
    loose = next((image for image in images if os.sep not in image), None)
    if loose is not None:
        raise InputError(
            f"{folder} holds images with neither a .txt caption beside them nor a class folder "
            f"around them, such as {loose}"
        )
    classes = [normalize_class_name(image.split(os.sep, 1)[0]) for image in images]
    pairs = zip(images, classes, strict=True)
    parts = pack((image, [each], {"class": each}) for image, each in pairs)
    return PairTable(name, parts, ImageFiles(folder), classes=list(dict.fromkeys(classes)))


def _walk(folder: Path) -> Iterator[str]:
    """Yield the relative paths of all files in sorted order, without hidden files and folders.

    Links are followed, but not back to a folder that they are in.
    """
    around: dict[str, frozenset[tuple[int, int]]] = {}  # folder -> those that it is in
    for parent, folders, files in os.walk(folder, followlinks=True):
        status, outer = os.stat(parent), around.pop(parent, frozenset())
        place = status.st_dev, status.st_ino
        if place in outer:
            folders.clear()
            continue
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__MACOSX")))
        around |= {os.path.join(parent, each): outer | {place} for each in folders}
        relative = os.path.relpath(parent, folder)
        for file in sorted(files):
            if not file.startswith("."):
                yield file if relative == "." else os.path.join(relative, file)


def _read_caption(path: Path) -> list[str]:
    try:
        return [read_regular_file(path).decode("utf-8-sig")]
    # As without a caption, the pair is broken.
    except (OSError, UnicodeDecodeError):
        return []
