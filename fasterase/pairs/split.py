"""Split pairs into a forget and a retain set, and write both to files that are read back."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from fasterase.errors import InputError
from fasterase.files import replace_file, to_json
from fasterase.pairs.images import ImageFiles
from fasterase.pairs.items import IMAGE_KEYS, TEXT_KEYS, Record, normalize_class_name
from fasterase.pairs.open import open_pairs
from fasterase.pairs.processes import count_processes, process_pool
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.table import PairTable, Part
from fasterase.progress import Progress

# What a person decides about a pair; see `read_decisions`.
DECISIONS = ("forget", "retain", "unsure")
# How lists of ids hold names of files that are no text.
_NO_TEXT = "surrogateescape"


def split(
    source: Any,
    *,
    forget: str
    | os.PathLike[str]
    | re.Pattern[str]
    | Sequence[str]
    | np.ndarray
    | Callable[[Any], bool],
    image_key: str | None = None,
    text_key: str | None = None,
) -> tuple[PairTable, PairTable]:
    """Split pairs into `(forget, retain)`, both accepted by `fasterase.unlearn`.

    Both are sequences of records: `(image, text)` tuples with `.id` and `.meta`. `unlearn` also
    accepts their slices, and a `torch.utils.data.Subset` or `DataLoader` of them.

    Args:
        source: pairs in any form that `unlearn` takes.
        forget: selects the pairs of the forget set:
            - a list of str: class names. In a class-per-folder source they must be its classes; in
              others they are compared with whole captions. Case and underscores do not matter.
            - a str: the path of a file of ids, if that file exists; else the name of a class, if
              the source has such a class; else a regular expression that must match anywhere in one
              of the pair's captions, ignoring case (`"apple"` also matches "pineapple";
              `r"\\bapple\\b"` does not).
            - a compiled pattern: the same, with its own flags.
            - a `Path`: a file with one id per line, or, where no pair has it, with the end of ids
              after a `/`. Or the decisions that a page of `Found.review` saves (see
              `read_decisions`): what is "unsure" there is in neither set.
            - an array of int64: caption hashes (`fasterase.pairs.prepare.hash_captions`). It
              selects the pairs with one of these captions, unfolded.
            - a callable that gets the record (`.image`, `.text`, `.id`, `.mask`, `.meta`) and
              returns true for pairs to forget. The image is decoded only if it is accessed.

    Raises:
        InputError: a class, id or caption hash is unknown, the expression is invalid, or all or no
            pairs match.
    """
    pairs = open_pairs(source, name="source", image_key=image_key, text_key=text_key)
    unsure = np.zeros(len(pairs), bool)
    if (file := _find_file(forget)) is None:
        matches = _select(pairs, forget)
    elif (decided := read_decisions(pairs, file)) is None:
        ids = {line.strip() for line in _read_ids(file, "forget").splitlines()} - {""}
        matches = _match_ids(pairs, ids, file, "forget")
    else:
        matches, unsure = decided["forget"], decided["unsure"]
    if matches.all() or not matches.any():
        share, empty = ("every", "retain") if matches.any() else ("no", "forget")
        no_file = isinstance(forget, str) and not matches.any()
        hint = ", and there is no file of ids of that name" if no_file else ""
        rule: Any = os.fspath(forget) if isinstance(forget, os.PathLike) else forget
        if isinstance(forget, np.ndarray):
            rule = f"{len(forget)} caption hashes"
        elif isinstance(forget, re.Pattern):
            rule = forget.pattern
        raise InputError(
            f"`forget`={rule!r} matches {share} pair of {len(pairs)}, so the {empty} set would be "
            f"empty{hint}"
        )
    return pairs.where(matches, name="forget"), pairs.where(~(matches | unsure), name="retain")


def read_decisions(
    pairs: PairTable, path: Path, *, argument: str = "forget"
) -> dict[str, np.ndarray] | None:
    """Return decision -> which pairs it is about, [n] bool; None if `path` is a list of ids.

    The file is a CSV with the columns id and decision: "forget", "retain" or "unsure". Where
    several pairs have an id and decisions differ, it is to be forgotten, or else unsure.

    Raises:
        InputError: it cannot be read, or holds another decision, or an id that no pair has; names
            `argument`.
    """
    text = _read_ids(path, argument)
    rows = list(csv.reader(io.StringIO(text, newline="")))
    if not rows or rows[0] != ["id", "decision"]:
        return None
    ids: dict[str, set[str]] = {name: set() for name in DECISIONS}
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != 2 or row[1] not in ids:
            raise InputError(
                f"`{argument}`: row {number} of {path} must be an id and one of "
                f"{', '.join(DECISIONS)}; found {row}"
            )
        ids[row[1]].add(row[0])
    decided = {name: _match_ids(pairs, wanted, path, argument) for name, wanted in ids.items()}
    decided["unsure"] &= ~decided["forget"]
    decided["retain"] &= ~(decided["forget"] | decided["unsure"])
    return decided


def _find_file(forget: Any) -> Path | None:
    """Return the file that the rule `forget` is, if it is one."""
    if not isinstance(forget, str | os.PathLike):
        return None
    path = os.path.expanduser(forget)
    return Path(path) if isinstance(forget, os.PathLike) or os.path.isfile(path) else None


def _read_ids(path: Path, argument: str) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig", _NO_TEXT)
    except OSError as error:
        raise InputError(f"`{argument}`: the file of ids {path} cannot be read: {error}") from error


def _select(pairs: PairTable, forget: Any) -> np.ndarray:
    """Return which pairs a rule that is no file selects, [n] bool."""
    if isinstance(forget, str) and _fold(forget) in map(_fold, pairs.classes or ()):
        return _match_classes(pairs, [forget])
    if isinstance(forget, str | re.Pattern):
        return _match_captions(pairs, forget)
    if isinstance(forget, np.ndarray) and forget.dtype == np.int64 and forget.ndim == 1:
        return _match_hashes(pairs, forget)
    if callable(forget):
        return _match_records(pairs, forget)
    if isinstance(forget, Sequence) and forget and all(isinstance(name, str) for name in forget):
        return _match_classes(pairs, forget)
    raise InputError(
        f"`forget` must be class names, a regular expression, a callable on the record, a file of "
        f"ids or an array of caption hashes; found {forget!r}"
    )


def _mark(pairs: PairTable, matches: Iterable[bool]) -> np.ndarray:
    """Collect whether each pair matches, [n] bool, with a progress bar."""
    name, total = f"splitting {pairs.name}", len(pairs)
    bar = Progress(name, total=total, items=matches, unit="pair", delay=2)
    return np.fromiter(bar, dtype=bool, count=total)


def _fold(name: str) -> str:
    return normalize_class_name(name).casefold()


def _match_classes(pairs: PairTable, names: Sequence[str]) -> np.ndarray:
    if pairs.classes is not None:
        unknown = [name for name in names if _fold(name) not in map(_fold, pairs.classes)]
        if unknown:
            raise InputError(
                f"`forget`: no class {unknown[0]!r}; the classes are {', '.join(pairs.classes)}"
            )
    # Where there are classes, they are the captions.
    captions = (map(_fold, texts) for texts in _every_captions(pairs))
    chosen, missing = _match_names(pairs, captions, set(map(_fold, names)))
    if missing and chosen.any() and pairs.classes is None:
        name = next(name for name in names if _fold(name) in missing)
        raise InputError(
            f"`forget`: {name!r} is no caption of the {len(pairs)} pairs, nor their class. "
            "Names are compared with whole captions; give a regular expression to search in them"
        )
    return chosen


def _match_names(
    pairs: PairTable, every: Iterable[Iterable[str]], wanted: set[str]
) -> tuple[np.ndarray, set[str]]:
    """Return which pairs have a name that is wanted, [n] bool, and the names that none has."""
    missing = set(wanted)

    def matches(names: Iterable[str]) -> bool:
        matched = wanted.intersection(names)
        missing.difference_update(matched)
        return bool(matched)

    return _mark(pairs, map(matches, every)), missing


def _every_captions(pairs: PairTable) -> Iterator[list[str]]:
    """Yield the captions of each pair; none if it is broken, which is reported on loading."""
    for index, texts in enumerate(pairs.every_text()):
        if isinstance(texts, Tensor):
            raise InputError(
                f"`forget`: the captions of {pairs.id(index)} are token ids, which names and "
                f"expressions cannot match; give a callable or a file of ids"
            )
        yield texts


def _match_captions(pairs: PairTable, expression: str | re.Pattern[str]) -> np.ndarray:
    try:
        flags = re.IGNORECASE if isinstance(expression, str) else 0
        pattern = re.compile(expression, flags)
    except re.error as error:
        raise InputError(f"`forget`={expression!r} is not a regular expression: {error}") from error
    # Rows in memory would be copied to the other processes.
    is_view = pairs.images is None or pairs.indices is not None
    files = [] if is_view else [part for part in pairs.parts.every if part.path is not None]
    workers = count_processes(len(files))
    if workers < 2:
        return _mark(pairs, (any(map(pattern.search, texts)) for texts in _every_captions(pairs)))
    with process_pool(workers) as pool:
        found = pool.map(partial(_search_part, pattern), pairs.parts.every)
        return _mark(pairs, chain.from_iterable(found))


def _search_part(pattern: re.Pattern[str], part: Part) -> list[bool]:
    return [any(map(pattern.search, captions)) for captions in part.every_captions()]


def _match_hashes(pairs: PairTable, wanted: np.ndarray) -> np.ndarray:
    hashes, rows = pairs.caption_hashes()
    missing = np.setdiff1d(wanted, hashes)
    if len(missing):
        raise InputError(
            f"`forget`: {len(missing)} of the {len(np.unique(wanted))} caption hashes belong to no "
            f"pair, such as {missing[0]}"
        )
    chosen = np.zeros(len(pairs), bool)
    chosen[rows[np.isin(hashes, wanted)]] = True
    return chosen


def _match_ids(pairs: PairTable, wanted: set[str], path: Path, argument: str) -> np.ndarray:
    if not wanted:
        return np.zeros(len(pairs), bool)
    chosen, missing = _match_names(pairs, ([id] for id in pairs.every_id()), wanted)
    if missing:
        # Of an id a/b/c: c, b/c, a/b/c.
        ends = (accumulate(id.split("/")[::-1], "{1}/{0}".format) for id in pairs.every_id())
        by_end, missing = _match_names(pairs, ends, missing)
        chosen |= by_end
    if missing:
        raise InputError(
            f"`{argument}`: {len(missing)} of the {len(wanted)} ids in {path} name no pair, such "
            f"as {min(missing)!r}; the first pair's id is {pairs.id(0)!r}"
        )
    return chosen


def _match_records(pairs: PairTable, rule: Callable[[Any], Any]) -> np.ndarray:
    def holds(row: int) -> bool:
        try:
            return bool(rule(_LazyRecord(pairs, row)))
        except BrokenPair:  # reported on loading
            return False

    return _mark(pairs, map(holds, range(len(pairs))))


class _LazyRecord:
    """Stands in for a `Record`; reads captions, other data and the image when they are accessed."""

    def __init__(self, pairs: PairTable, index: int) -> None:
        self._pairs, self._index = pairs, index
        self.id = pairs.id(index)

    @cached_property
    def meta(self) -> dict[str, Any]:
        return self._pairs.meta(self._index)

    @cached_property
    def text(self) -> str | list[str] | Tensor:
        texts = self._pairs.texts(self._index)
        return texts[0] if isinstance(texts, list) and len(texts) == 1 else texts

    @cached_property
    def _record(self) -> Record:
        return self._pairs[self._index]

    def __getattr__(self, name: str) -> Any:
        if name not in ("image", "mask"):
            raise AttributeError(f"a record has no {name!r}")
        return getattr(self._record, name)


class SplitFiles(NamedTuple):
    """What `write_split` wrote: tables of pairs, or lists of ids."""

    forget: Path
    retain: Path
    tables: bool


def write_split(
    forget: PairTable, retain: PairTable, folder: Path, **others: PairTable
) -> SplitFiles:
    """Write parts of one source to `folder`, as tables or as lists of ids.

    Image files are listed in tables with their absolute paths, captions and other columns (but
    those with usual names of images and captions): CSV, or JSONL where a pair has several captions
    or something is no text, as names of files may be.
    Of other images, the files hold the ids, for `fasterase.split(source, forget=path)`.

    Raises:
        InputError: a pair of forget and one of retain have the same id, so that ids do not tell
            them apart.
    """
    parts = {"forget": forget, "retain": retain, **others}
    tables = isinstance(forget.images, ImageFiles)
    if not tables and (shared := set(forget.every_id()).intersection(retain.every_id())):
        raise InputError(
            f"the id {min(shared)!r} belongs to pairs in both parts, so that a list of ids "
            f"cannot hold the split. Rename the shards, whose names and keys are the ids."
        )
    ending = ".csv" if tables else ".txt"
    if tables and any(len(texts) > 1 for part in parts.values() for texts in part.every_text()):
        ending = ".jsonl"
    try:
        _write_parts(parts, folder, ending)
    except UnicodeEncodeError:  # JSON escapes what is no text
        for name in parts:
            (folder / f"{name}.csv").unlink(missing_ok=True)
        ending = ".jsonl"
        _write_parts(parts, folder, ending)
    return SplitFiles(folder / f"forget{ending}", folder / f"retain{ending}", tables)


def _write_parts(parts: Mapping[str, PairTable], folder: Path, ending: str) -> None:
    errors = "strict" if ending == ".csv" else _NO_TEXT
    for name, part in parts.items():
        with (
            replace_file(folder / f"{name}{ending}") as temporary,
            open(temporary, "w", encoding="utf-8", errors=errors, newline="") as file,
        ):
            if ending == ".csv":
                rows = list(_rows(part))
                columns = dict.fromkeys(name for row in rows for name in row)
                writer = csv.DictWriter(file, columns or ["filepath", "title"])
                writer.writeheader()
                writer.writerows(rows)
            else:
                lines = part.every_id() if ending == ".txt" else map(to_json, _rows(part))
                file.writelines(f"{line}\n" for line in lines)


def _rows(part: PairTable) -> Iterator[dict[str, Any]]:
    assert isinstance(part.images, ImageFiles)
    for index, (id, texts) in enumerate(zip(part.every_id(), part.every_text(), strict=True)):
        text = texts[0] if len(texts) == 1 else texts or ""
        meta = {k: v for k, v in part.meta(index).items() if k not in (*IMAGE_KEYS, *TEXT_KEYS)}
        yield {"filepath": part.images.path(id), "title": text, **meta}
