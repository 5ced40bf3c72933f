"""Keep a forget and a retain set from sharing images."""

from __future__ import annotations

import hashlib
import warnings

import numpy as np
from PIL import Image

from fasterase.errors import InputError
from fasterase.pairs.images import to_rgb
from fasterase.pairs.read_tars import TarTable
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.table import PairTable

# Comparing decoded images, or the contents of files, reads them; a million would take hours.
_MOST_READ = 20_000


def remove_overlap(retain: PairTable, forget: PairTable) -> tuple[PairTable, list[str]]:
    """Remove from `retain` the pairs with an image of `forget`, whatever their captions.

    Two sets of the same shards are compared by row, and no image is read. Other image files and tar
    entries are compared by size, then by location, then by content, so only files of equal size in
    different places are read; of more than 20,000 of equal size only those with an equal caption
    are compared, and a warning says so. Decoded images are compared by their pixels (RGB or tensor
    values); if that means decoding more than 20,000 items, a warning says that they were not.

    Returns:
        The remaining pairs, and the ids of those removed.

    Raises:
        InputError: nothing would be left of `retain`.
    """
    duplicates = _find_duplicates(retain, forget) if len(retain) else []
    if not duplicates:
        return retain, []
    if len(duplicates) == len(retain):
        raise InputError(
            f"`retain`: all {len(retain)} pairs show images that are in `forget` too; give pairs "
            f"that the model should keep"
        )
    keep = np.ones(len(retain), bool)
    keep[duplicates] = False
    return retain.where(keep), [retain.id(row) for row in duplicates]


def _find_duplicates(retain: PairTable, forget: PairTable) -> list[int]:
    if _share_index(retain, forget):
        return _find_same_rows(retain, forget)
    mine, others = retain.encoded_sizes(), forget.encoded_sizes()
    if mine is not None and others is not None:
        return _find_same_files(retain, mine, forget, others)
    return _find_same_pixels(retain, forget)


def _share_index(retain: PairTable, forget: PairTable) -> bool:
    """Tell whether both sets are rows of one index, so that equal rows mean equal images."""
    one, other = retain.base, forget.base
    if not isinstance(one, TarTable) or not isinstance(other, TarTable):
        return False
    shards = one.images.shards
    same = shards == other.images.shards and one.images.entries == other.images.entries
    return same and len(set(shards)) == len(shards)


def _find_same_rows(retain: PairTable, forget: PairTable) -> list[int]:
    """Return the rows of `retain` that are rows of `forget` too."""
    known = np.zeros(len(forget.base), bool)
    known[slice(None) if forget.indices is None else forget.indices] = True
    shared = known if retain.indices is None else known[retain.indices]
    return np.flatnonzero(shared).tolist()


def _find_same_files(
    retain: PairTable, retain_sizes: np.ndarray, forget: PairTable, forget_sizes: np.ndarray
) -> list[int]:
    """Return the rows of `retain` whose image file is also in `forget`."""
    sizes = np.unique(forget_sizes[forget_sizes >= 0])
    candidates = np.flatnonzero(np.isin(retain_sizes, sizes))
    known = np.flatnonzero(np.isin(forget_sizes, np.unique(retain_sizes[candidates])))
    if len(candidates) > _MOST_READ:
        count = len(candidates)
        candidates, known = _with_same_captions(retain, candidates, forget, known)
        warnings.warn(
            f"`retain`: {count} images have the size in bytes of an image in `forget`; only the "
            f"{len(candidates)} of them with an equal caption too are compared with it",
            stacklevel=2,
        )
    locations = {forget.encoded_location(row) for row in known.tolist()}
    same = [row for row in candidates.tolist() if retain.encoded_location(row) in locations]
    # Only what may be a copy in another place has to be read.
    others = np.setdiff1d(candidates, same)
    known = known[np.isin(forget_sizes[known], retain_sizes[others])]
    contents = {_digest_file(forget, row) for row in known.tolist()} - {None}
    copies = [row for row in others.tolist() if _digest_file(retain, row) in contents]
    return sorted(same + copies)


def _with_same_captions(
    retain: PairTable, candidates: np.ndarray, forget: PairTable, known: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return those rows of both that have a caption in common with a row of the other."""
    hashes, rows = _of_rows(retain.caption_hashes(), candidates)
    known_hashes, known_rows = _of_rows(forget.caption_hashes(), known)
    shared = np.intersect1d(hashes, known_hashes)
    return (
        np.unique(rows[np.isin(hashes, shared)]),
        np.unique(known_rows[np.isin(known_hashes, shared)]),
    )


def _of_rows(
    captions: tuple[np.ndarray, np.ndarray], rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    here = np.isin(captions[1], rows)
    return captions[0][here], captions[1][here]


def _digest_file(source: PairTable, row: int) -> bytes | None:
    try:
        return hashlib.blake2b(source.encoded_image(row), digest_size=16).digest()
    except BrokenPair:
        return None


def _find_same_pixels(retain: PairTable, forget: PairTable) -> list[int]:
    """Return the rows of `retain` whose decoded image is also in `forget`."""
    for source in (retain, forget):
        too_many = not source.in_memory and len(source) > _MOST_READ
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


def _digest_pixels(source: PairTable, row: int) -> bytes | None:
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
