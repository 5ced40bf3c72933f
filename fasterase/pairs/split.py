"""Cut one set of pairs into what is to be forgotten and what is to be kept."""

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
from fasterase.pairs.open import class_name, open_pairs
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.source import PairSource, Record, Subset

Rule = Callable[[int], bool]


def split(
    source: Any,
    *,
    forget: str | os.PathLike[str] | re.Pattern[str] | Sequence[str] | Callable[[Any], bool],
    image_key: str | None = None,
    text_key: str | None = None,
) -> tuple[PairSource, PairSource]:
    """Split pairs into `(forget, retain)`, both accepted by `fasterase.unlearn`.

    Args:
        source: any set of pairs that `unlearn` takes.
        forget: which pairs go to the forget set:
            - a list of str: class names. In a class-per-folder source they must be its classes; in
              others they are whole captions. Case and underscores do not matter.
            - a str: the path of a file of ids, where such a file is there; else a class, where the
              source has classes and one is called so; else a regular expression that some caption
              of the pair must match anywhere, case ignored (`"apple"` also hits "pineapple";
              `r"\\bapple\\b"` does not).
            - a compiled pattern: as the expression, with its own flags.
            - a `Path`: a file with one id a line. An id names the pairs whose id equals it or ends
              with `/` and it.
            - a callable on the record (`.image`, `.text`, `.id`, `.mask`, `.meta`), true for pairs
              to forget. The image is decoded only if it is looked at.

    Raises:
        InputError: unknown class or id, bad expression, or nothing or everything matches.
    """
    pairs = open_pairs(source, name="source", image_key=image_key, text_key=text_key)
    rule = _rule(pairs, forget)
    matches = np.fromiter((rule(i) for i in range(len(pairs))), dtype=bool, count=len(pairs))
    for outcome, empty in ((not matches.any(), "forget"), (matches.all(), "retain")):
        if outcome:
            share = "no pair" if empty == "forget" else "every pair"
            no_file = empty == "forget" and isinstance(forget, str)
            hint = ", and there is no file of ids of that name" if no_file else ""
            raise InputError(
                f"`forget`={_shown(forget)} matches {share} of {len(pairs)}, so the {empty} set "
                f"would be empty{hint}"
            )
    return (
        Subset(pairs, np.flatnonzero(matches), name="forget"),
        Subset(pairs, np.flatnonzero(~matches), name="retain"),
    )


def _shown(forget: Any) -> str:
    if isinstance(forget, re.Pattern):
        return repr(forget.pattern)
    return repr(os.fspath(forget) if isinstance(forget, os.PathLike) else forget)


def _rule(pairs: PairSource, forget: Any) -> Rule:
    if isinstance(forget, os.PathLike) or (isinstance(forget, str) and os.path.isfile(forget)):
        return _by_ids(pairs, Path(forget))
    if isinstance(forget, str):
        names = {_folded(each) for each in pairs.classes or ()}
        return (
            _by_class(pairs, [forget]) if _folded(forget) in names else _by_caption(pairs, forget)
        )
    if isinstance(forget, re.Pattern):
        return _by_caption(pairs, forget)
    if callable(forget):
        return lambda index: bool(forget(LazyRecord(pairs, index)))
    if isinstance(forget, Sequence) and forget and all(isinstance(name, str) for name in forget):
        return _by_class(pairs, forget)
    raise InputError(
        f"`forget` must be class names, a regular expression, a callable on the record or a file "
        f"of ids; found {forget!r}"
    )


def _folded(name: str) -> str:
    return class_name(name).casefold()


def _captions(pairs: PairSource, index: int) -> list[str]:
    """Captions of a pair, none where it is broken: loading skips and names it later."""
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


def _by_class(pairs: PairSource, names: Sequence[str]) -> Rule:
    wanted = {_folded(name) for name in names}
    if pairs.classes is not None:
        unknown = [name for name in names if _folded(name) not in map(_folded, pairs.classes)]
        if unknown:
            raise InputError(
                f"`forget`: no class {unknown[0]!r}; the classes are {', '.join(pairs.classes)}"
            )
        return lambda index: _folded(pairs.meta(index)["class"]) in wanted
    return lambda index: any(_folded(text) in wanted for text in _captions(pairs, index))


def _by_caption(pairs: PairSource, expression: str | re.Pattern[str]) -> Rule:
    try:
        flags = re.IGNORECASE if isinstance(expression, str) else 0
        pattern = re.compile(expression, flags)
    except re.error as error:
        raise InputError(f"`forget`={expression!r} is not a regular expression: {error}") from error
    return lambda index: any(pattern.search(text) for text in _captions(pairs, index))


def _by_ids(pairs: PairSource, path: Path) -> Rule:
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


class LazyRecord:
    """A `Record` whose parts are read when looked at."""

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


# Comparing decoded images reads the whole set; a million would take hours.
_MOST_DECODED = 20_000


def without_overlap(retain: PairSource, forget: PairSource) -> tuple[PairSource, list[str]]:
    """`retain` without the pairs whose image is in `forget`, whatever the caption, and their ids.

    Image files and tar entries are compared by size, then by place, then by content, so that only
    files of equal size are read. Images that come decoded are compared by their pixels, RGB or
    tensor values; where that would decode more than 20,000 items a warning says that it was left.

    Raises:
        InputError: nothing would be left of `retain`.
    """
    mine, others = retain.encoded_sizes(), forget.encoded_sizes()
    if mine is not None and others is not None:
        doubles = _same_files(retain, mine, forget, others)
    else:
        doubles = _same_pixels(retain, forget)
    if not doubles:
        return retain, []
    if len(doubles) == len(retain):
        raise InputError(
            f"`retain`: all {len(retain)} pairs show images that are in `forget` too; give pairs "
            f"that the model should keep"
        )
    keep = np.setdiff1d(np.arange(len(retain)), doubles)
    return Subset(retain, keep, name=retain.name), [retain.id(row) for row in doubles]


def _same_files(
    retain: PairSource, retain_sizes: np.ndarray, forget: PairSource, forget_sizes: np.ndarray
) -> list[int]:
    sizes = np.unique(forget_sizes[forget_sizes >= 0])
    candidates = np.flatnonzero(np.isin(retain_sizes, sizes)).tolist()
    if not candidates:
        return []
    shared = np.unique(retain_sizes[candidates])
    known = np.flatnonzero(np.isin(forget_sizes, shared)).tolist()
    places = {forget.encoded_place(row) for row in known}
    contents = {digest for row in known if (digest := _file_digest(forget, row)) is not None}
    return [
        row
        for row in candidates
        if retain.encoded_place(row) in places or _file_digest(retain, row) in contents
    ]


def _file_digest(source: PairSource, row: int) -> bytes | None:
    try:
        return hashlib.blake2b(source.encoded_image(row), digest_size=16).digest()
    except BrokenPair:
        return None


def _same_pixels(retain: PairSource, forget: PairSource) -> list[int]:
    for source in (retain, forget):
        too_many = not source.cheap_pixels and len(source) > _MOST_DECODED
        if too_many or not source.stable:
            reason = "is too large to decode for it" if too_many else "differs at every read"
            warnings.warn(
                f"`retain` is not checked for images that are in `forget` too: `{source.name}` "
                f"{reason}",
                stacklevel=2,
            )
            return []
    known = {_pixel_digest(forget, row) for row in range(len(forget))} - {None}
    return [row for row in range(len(retain)) if _pixel_digest(retain, row) in known]


def _pixel_digest(source: PairSource, row: int) -> bytes | None:
    try:
        image = source[row].image
    except BrokenPair:
        return None
    if isinstance(image, Image.Image):
        values = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    else:
        values = (image.float() if image.is_floating_point() else image).detach().cpu().numpy()
    digest = hashlib.blake2b(f"{values.dtype} {values.shape}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(values).tobytes())
    return digest.digest()
