"""Split pairs into a forget and a retain set, in one pass over their captions or ids."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fasterase.errors import InputError
from fasterase.pairs.items import Record, normalize_class_name
from fasterase.pairs.open import open_pairs
from fasterase.pairs.parts import Part
from fasterase.pairs.processes import count_processes, process_pool
from fasterase.pairs.read_objects import ItemTable
from fasterase.pairs.table import PairTable
from fasterase.progress import progress_bar


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

    Both are sequences of records, which are `(image, text)` tuples with `.id` and `.meta`. Slices
    are views that `unlearn` accepts too, as is a `torch.utils.data.Subset` or `DataLoader` of them.

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
            - a `Path`: a file with one id per line. It selects the pairs with that id, or with an
              id that ends in `/` and that id.
            - an array of int64: caption hashes, as `fasterase.pairs.prepare.hash_captions` returns
              them. It selects the pairs with one of these captions, unfolded.
            - a callable that gets the record (`.image`, `.text`, `.id`, `.mask`, `.meta`) and
              returns true for pairs to forget. The image is decoded only if it is accessed.

    Raises:
        InputError: a class, id or caption hash is unknown, the expression is invalid, or all or no
            pairs match.
    """
    pairs = open_pairs(source, name="source", image_key=image_key, text_key=text_key)
    matches = _select(pairs, forget)
    for outcome, empty in ((not matches.any(), "forget"), (matches.all(), "retain")):
        if outcome:
            share = "no pair" if empty == "forget" else "every pair"
            no_file = empty == "forget" and isinstance(forget, str)
            hint = ", and there is no file of ids of that name" if no_file else ""
            raise InputError(
                f"`forget`={_format_rule(forget)} matches {share} of {len(pairs)}, so the {empty} "
                f"set would be empty{hint}"
            )
    return pairs.where(matches, name="forget"), pairs.where(~matches, name="retain")


def _format_rule(forget: Any) -> str:
    if isinstance(forget, re.Pattern):
        return repr(forget.pattern)
    if isinstance(forget, np.ndarray):
        return f"{len(forget)} caption hashes"
    return repr(os.fspath(forget) if isinstance(forget, os.PathLike) else forget)


def _select(pairs: PairTable, forget: Any) -> np.ndarray:
    """Return which pairs the rule `forget` selects, [n] bool."""
    if isinstance(forget, os.PathLike) or (isinstance(forget, str) and os.path.isfile(forget)):
        return _match_ids(pairs, Path(forget))
    if isinstance(forget, str):
        if _fold(forget) in map(_fold, pairs.classes or ()):
            return _match_classes(pairs, [forget])
        return _match_captions(pairs, forget)
    if isinstance(forget, re.Pattern):
        return _match_captions(pairs, forget)
    if isinstance(forget, np.ndarray) and forget.dtype == np.int64 and forget.ndim == 1:
        return _match_hashes(pairs, forget)
    if callable(forget):
        records = (_LazyRecord(pairs, index) for index in range(len(pairs)))
        return _mark(pairs, (bool(forget(record)) for record in records))
    if isinstance(forget, Sequence) and forget and all(isinstance(name, str) for name in forget):
        return _match_classes(pairs, forget)
    raise InputError(
        f"`forget` must be class names, a regular expression, a callable on the record, a file of "
        f"ids or an array of caption hashes; found {forget!r}"
    )


def _mark(pairs: PairTable, matches: Iterable[bool]) -> np.ndarray:
    """Collect whether each pair matches, [n] bool, with a progress bar."""
    total = len(pairs)
    bar = progress_bar(
        f"splitting {pairs.name}", total=total, items=matches, unit="pair", leave=False, delay=2
    )
    return np.fromiter(bar, dtype=bool, count=total)


def _fold(name: str) -> str:
    """Return the form in which class names are compared."""
    return normalize_class_name(name).casefold()


def _every_captions(pairs: PairTable) -> Iterator[list[str]]:
    """Yield the captions of each pair; none if it is broken, which is reported on loading."""
    for index, texts in enumerate(pairs.every_text()):
        if isinstance(texts, Tensor):
            raise InputError(
                f"`forget`: the captions of {pairs.id(index)} are token ids, which names and "
                f"expressions cannot match; give a callable or a file of ids"
            )
        yield texts


def _match_classes(pairs: PairTable, names: Sequence[str]) -> np.ndarray:
    wanted = {_fold(name) for name in names}
    if pairs.classes is not None:
        unknown = [name for name in names if _fold(name) not in map(_fold, pairs.classes)]
        if unknown:
            raise InputError(
                f"`forget`: no class {unknown[0]!r}; the classes are {', '.join(pairs.classes)}"
            )
        return _mark(pairs, (_fold(pairs.meta(i)["class"]) in wanted for i in range(len(pairs))))
    found: set[str] = set()

    def matches(texts: list[str]) -> bool:
        matched = wanted.intersection(map(_fold, texts))
        found.update(matched)
        return bool(matched)

    chosen = _mark(pairs, map(matches, _every_captions(pairs)))
    missing = [name for name in names if _fold(name) not in found]
    if missing and found:
        raise InputError(
            f"`forget`: {missing[0]!r} is no caption of the {len(pairs)} pairs, nor their class. "
            "Names are compared with whole captions; give a regular expression to search in them"
        )
    return chosen


def _match_captions(pairs: PairTable, expression: str | re.Pattern[str]) -> np.ndarray:
    try:
        flags = re.IGNORECASE if isinstance(expression, str) else 0
        pattern = re.compile(expression, flags)
    except re.error as error:
        raise InputError(f"`forget`={expression!r} is not a regular expression: {error}") from error
    if isinstance(pairs, ItemTable) or pairs.indices is not None:
        return _mark(pairs, (any(map(pattern.search, texts)) for texts in _every_captions(pairs)))
    parts = pairs.parts.every
    # Rows in memory would be copied to the other processes.
    workers = count_processes(len(parts)) if parts[0].path is not None else 1
    search = partial(_search_part, pattern)
    with nullcontext() if workers < 2 else process_pool(workers) as pool:
        found = map(search, parts) if pool is None else pool.map(search, parts)
        return _mark(pairs, chain.from_iterable(found))


def _search_part(pattern: re.Pattern[str], part: Part) -> list[bool]:
    return [any(map(pattern.search, captions)) for captions in part.every_captions()]


def _match_hashes(pairs: PairTable, wanted: np.ndarray) -> np.ndarray:
    hashes, rows = pairs.caption_hashes()
    unknown = np.setdiff1d(wanted, hashes)
    if len(unknown):
        raise InputError(
            f"`forget`: {len(unknown)} of the {len(np.unique(wanted))} caption hashes belong to no "
            f"pair, such as {unknown[0]}"
        )
    chosen = np.zeros(len(pairs), bool)
    chosen[rows[np.isin(hashes, wanted)]] = True
    return chosen


def _match_ids(pairs: PairTable, path: Path) -> np.ndarray:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"`forget`: the file of ids {path} cannot be read: {error}") from error
    wanted = {line.strip() for line in lines} - {""}
    found: set[str] = set()

    def matches(id: str) -> bool:
        start, matched = 0, False
        while True:
            name = id[start:]
            if name in wanted:
                found.add(name)
                matched = True
            start = id.find("/", start) + 1
            if start == 0:
                return matched

    chosen = _mark(pairs, map(matches, pairs.every_id()))
    missing = sorted(wanted - found)
    if missing:
        raise InputError(
            f"`forget`: {len(missing)} of the {len(wanted)} ids in {path} name no pair, such as "
            f"{missing[0]!r}; the first pair's id is {pairs.id(0)!r}"
        )
    return chosen


class _LazyRecord:
    """Stands in for a `Record`; reads each part when it is accessed."""

    def __init__(self, pairs: PairTable, index: int) -> None:
        self._pairs = pairs
        self._index = index

    @property
    def id(self) -> str:
        return self._pairs.id(self._index)

    @property
    def meta(self) -> dict[str, Any]:
        return self._pairs.meta(self._index)

    @cached_property
    def text(self) -> str | list[str] | Tensor:
        texts = self._pairs.texts(self._index)
        return texts[0] if isinstance(texts, list) and len(texts) == 1 else texts

    @cached_property
    def _record(self) -> Record:
        return self._pairs[self._index]

    @property
    def image(self) -> Any:
        return self._record.image

    @property
    def mask(self) -> Tensor | None:
        return self._record.mask
