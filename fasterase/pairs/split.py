"""Split pairs into a forget and a retain set, and keep the two from overlapping."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from fasterase.errors import InputError
from fasterase.pairs.classes import normalize_class_name
from fasterase.pairs.open import open_pairs
from fasterase.pairs.pictures import to_rgb
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.source import PairSource, Record, Subset

Rule = Callable[[int], bool]

# Comparing decoded images reads the whole set; a million would take hours.
_MAX_DECODED = 20_000


def split(
    source: Any,
    *,
    forget: str | os.PathLike[str] | re.Pattern[str] | Sequence[str] | Callable[[Any], bool],
    image_key: str | None = None,
    text_key: str | None = None,
) -> tuple[Subset, Subset]:
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
            - a callable that gets the record (`.image`, `.text`, `.id`, `.mask`, `.meta`) and
              returns true for pairs to forget. The image is decoded only if it is accessed.

    Raises:
        InputError: a class or id is unknown, the expression is invalid, or all or no pairs match.
    """
    pairs = open_pairs(source, name="source", image_key=image_key, text_key=text_key)
    rule = _make_rule(pairs, forget)
    matches = np.fromiter((rule(i) for i in range(len(pairs))), dtype=bool, count=len(pairs))
    for outcome, empty in ((not matches.any(), "forget"), (matches.all(), "retain")):
        if outcome:
            share = "no pair" if empty == "forget" else "every pair"
            no_file = empty == "forget" and isinstance(forget, str)
            hint = ", and there is no file of ids of that name" if no_file else ""
            raise InputError(
                f"`forget`={_format_rule(forget)} matches {share} of {len(pairs)}, so the {empty} "
                f"set would be empty{hint}"
            )
    return (
        Subset(pairs, np.flatnonzero(matches), name="forget"),
        Subset(pairs, np.flatnonzero(~matches), name="retain"),
    )


def remove_overlap(retain: PairSource, forget: PairSource) -> tuple[PairSource, list[str]]:
    """Remove from `retain` the pairs with an image of `forget`, whatever their captions.

    Image files and tar entries are compared by size, then by location, then by content, so only
    files of equal size are read. Decoded images are compared by their pixels (RGB or tensor
    values); if that means decoding more than 20,000 items, a warning says that they were not.

    Returns:
        The remaining pairs, and the ids of those removed.

    Raises:
        InputError: nothing would be left of `retain`.
    """
    mine, others = retain.encoded_sizes(), forget.encoded_sizes()
    if mine is not None and others is not None:
        duplicates = _find_same_files(retain, mine, forget, others)
    else:
        duplicates = _find_same_pixels(retain, forget)
    if not duplicates:
        return retain, []
    if len(duplicates) == len(retain):
        raise InputError(
            f"`retain`: all {len(retain)} pairs show images that are in `forget` too; give pairs "
            f"that the model should keep"
        )
    keep = np.setdiff1d(np.arange(len(retain)), duplicates)
    return Subset(retain, keep, name=retain.name), [retain.id(row) for row in duplicates]


def _format_rule(forget: Any) -> str:
    if isinstance(forget, re.Pattern):
        return repr(forget.pattern)
    return repr(os.fspath(forget) if isinstance(forget, os.PathLike) else forget)


def _make_rule(pairs: PairSource, forget: Any) -> Rule:
    if isinstance(forget, os.PathLike) or (isinstance(forget, str) and os.path.isfile(forget)):
        return _match_ids(pairs, Path(forget))
    if isinstance(forget, str):
        if _fold(forget) in map(_fold, pairs.classes or ()):
            return _match_classes(pairs, [forget])
        return _match_captions(pairs, forget)
    if isinstance(forget, re.Pattern):
        return _match_captions(pairs, forget)
    if callable(forget):
        return lambda index: bool(forget(_LazyRecord(pairs, index)))
    if isinstance(forget, Sequence) and forget and all(isinstance(name, str) for name in forget):
        return _match_classes(pairs, forget)
    raise InputError(
        f"`forget` must be class names, a regular expression, a callable on the record or a file "
        f"of ids; found {forget!r}"
    )


def _fold(name: str) -> str:
    """Return the form in which class names are compared."""
    return normalize_class_name(name).casefold()


def _get_captions(pairs: PairSource, index: int) -> list[str]:
    """Return the captions of a pair; none if it is broken, which is reported on loading."""
    try:
        texts = pairs.texts(index)
    except BrokenPair:
        return []
    if isinstance(texts, Tensor):
        raise InputError(
            f"`forget`: the captions of {pairs.id(index)} are token ids, which names and "
            f"expressions cannot match; give a callable or a file of ids"
        )
    return texts


def _match_classes(pairs: PairSource, names: Sequence[str]) -> Rule:
    wanted = {_fold(name) for name in names}
    if pairs.classes is not None:
        unknown = [name for name in names if _fold(name) not in map(_fold, pairs.classes)]
        if unknown:
            raise InputError(
                f"`forget`: no class {unknown[0]!r}; the classes are {', '.join(pairs.classes)}"
            )
        return lambda index: _fold(pairs.meta(index)["class"]) in wanted
    chosen: set[int] = set()
    found: set[str] = set()
    for index in range(len(pairs)):
        matched = {_fold(text) for text in _get_captions(pairs, index)} & wanted
        if matched:
            chosen.add(index)
            found |= matched
    missing = [name for name in names if _fold(name) not in found]
    if missing and found:
        raise InputError(
            f"`forget`: {missing[0]!r} is no caption of the {len(pairs)} pairs, nor their class. "
            "Names are compared with whole captions; give a regular expression to search in them"
        )
    return chosen.__contains__


def _match_captions(pairs: PairSource, expression: str | re.Pattern[str]) -> Rule:
    try:
        flags = re.IGNORECASE if isinstance(expression, str) else 0
        pattern = re.compile(expression, flags)
    except re.error as error:
        raise InputError(f"`forget`={expression!r} is not a regular expression: {error}") from error
    return lambda index: any(pattern.search(text) for text in _get_captions(pairs, index))


def _match_ids(pairs: PairSource, path: Path) -> Rule:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"`forget`: the file of ids {path} cannot be read: {error}") from error
    wanted = {line.strip() for line in lines} - {""}
    chosen: set[int] = set()
    found: set[str] = set()
    for index in range(len(pairs)):
        parts = pairs.id(index).split("/")
        names = {"/".join(parts[i:]) for i in range(len(parts))} & wanted
        if names:
            chosen.add(index)
            found |= names
    missing = sorted(wanted - found)
    if missing:
        raise InputError(
            f"`forget`: {len(missing)} of the {len(wanted)} ids in {path} name no pair, such as "
            f"{missing[0]!r}; the first pair's id is {pairs.id(0)!r}"
        )
    return chosen.__contains__


class _LazyRecord:
    """Stands in for a `Record`; reads each part when it is accessed."""

    def __init__(self, pairs: PairSource, index: int) -> None:
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


def _find_same_files(
    retain: PairSource, retain_sizes: np.ndarray, forget: PairSource, forget_sizes: np.ndarray
) -> list[int]:
    """Return the rows of `retain` whose image file is also in `forget`."""
    sizes = np.unique(forget_sizes[forget_sizes >= 0])
    candidates = np.flatnonzero(np.isin(retain_sizes, sizes)).tolist()
    if not candidates:
        return []
    shared = np.unique(retain_sizes[candidates])
    known = np.flatnonzero(np.isin(forget_sizes, shared)).tolist()
    locations = {forget.encoded_location(row) for row in known}
    contents = {digest for row in known if (digest := _digest_file(forget, row)) is not None}
    return [
        row
        for row in candidates
        if retain.encoded_location(row) in locations or _digest_file(retain, row) in contents
    ]


def _digest_file(source: PairSource, row: int) -> bytes | None:
    try:
        return hashlib.blake2b(source.encoded_image(row), digest_size=16).digest()
    except BrokenPair:
        return None


def _find_same_pixels(retain: PairSource, forget: PairSource) -> list[int]:
    """Return the rows of `retain` whose decoded image is also in `forget`."""
    for source in (retain, forget):
        too_many = not source.in_memory and len(source) > _MAX_DECODED
        if too_many or not source.stable:
            reason = "is too large to decode for that" if too_many else "differs on every read"
            warnings.warn(
                f"`retain` is not checked for images that are in `forget` too: `{source.name}` "
                f"{reason}",
                stacklevel=2,
            )
            return []
    known = {_digest_pixels(forget, row) for row in range(len(forget))} - {None}
    return [row for row in range(len(retain)) if _digest_pixels(retain, row) in known]


def _digest_pixels(source: PairSource, row: int) -> bytes | None:
    try:
        image = source[row].image
        if isinstance(image, Image.Image):
            image = to_rgb(image, id=source.id(row))
    except BrokenPair:
        return None
    if isinstance(image, Image.Image):
        values = np.asarray(image).transpose(2, 0, 1)
    else:
        values = (image.float() if image.is_floating_point() else image).detach().cpu().numpy()
    digest = hashlib.blake2b(f"{values.dtype} {values.shape}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(values).tobytes())
    return digest.digest()
