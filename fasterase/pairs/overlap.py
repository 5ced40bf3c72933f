"""Retain pairs that also stand in the forget set: kept, they would undo the erasure."""

from __future__ import annotations

import hashlib
import warnings

import numpy as np
from PIL import Image

from fasterase.errors import InputError
from fasterase.pairs.pair_source import PairSource, Subset
from fasterase.pairs.skips import BrokenPair

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
