"""Keep a forget and a retain set from sharing images."""

from __future__ import annotations

import hashlib
import warnings

import numpy as np
from PIL import Image
from torch import Tensor

from fasterase.errors import InputError
from fasterase.pairs.pictures import to_rgb
from fasterase.pairs.prepare import caption_key, hash_captions
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.source import PairSource, Subset
from fasterase.pairs.tars import TarFiles, TarPairs

# Comparing decoded images, or the contents of files, reads them; a million would take hours.
_MOST_READ = 20_000


def remove_overlap(retain: PairSource, forget: PairSource) -> tuple[PairSource, list[str]]:
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
    return Subset(retain, np.flatnonzero(keep), name=retain.name), [
        retain.id(row) for row in duplicates
    ]


def caption_hashes(source: PairSource) -> tuple[np.ndarray, np.ndarray]:
    """Return the hash (see `hash_captions`) and the row of each caption, both [m] int64.

    Rows are in order; pairs without a readable caption have none.
    """
    if isinstance(source, TarPairs):
        return source.index.caption_hashes()
    if not isinstance(source, Subset):
        texts = ([each] if isinstance(each, Tensor) else each for each in source.every_text())
        keys = [list(map(caption_key, each)) for each in texts]
        rows = np.repeat(np.arange(len(keys)), [len(each) for each in keys])
        return hash_captions([key for each in keys for key in each]), rows
    hashes, rows = caption_hashes(source.base)
    first = np.searchsorted(rows, source.indices)
    counts = np.searchsorted(rows, source.indices, side="right") - first
    before = np.cumsum(counts) - counts
    at = np.arange(counts.sum()) + np.repeat(first - before, counts)
    return hashes[at], np.repeat(np.arange(len(source)), counts)


def _find_duplicates(retain: PairSource, forget: PairSource) -> list[int]:
    if _share_index(retain, forget):
        return _find_same_rows(retain, forget)
    mine, others = retain.encoded_sizes(), forget.encoded_sizes()
    if mine is not None and others is not None:
        return _find_same_files(retain, mine, forget, others)
    return _find_same_pixels(retain, forget)


def _base(source: PairSource) -> PairSource:
    return source.base if isinstance(source, Subset) else source


def _share_index(retain: PairSource, forget: PairSource) -> bool:
    """Tell whether both sets are rows of one index, so that equal rows mean equal images."""
    one, other = _base(retain), _base(forget)
    if not isinstance(one, TarFiles) or not isinstance(other, TarFiles):
        return False
    shards = one.index.shards
    same = shards == other.index.shards and one.index.entries == other.index.entries
    return same and len(set(shards)) == len(shards)


def _find_same_rows(retain: PairSource, forget: PairSource) -> list[int]:
    """Return the rows of `retain` that are rows of `forget` too."""
    known = np.zeros(len(_base(forget)), bool)
    known[forget.indices if isinstance(forget, Subset) else slice(None)] = True
    shared = known[retain.indices] if isinstance(retain, Subset) else known
    return np.flatnonzero(shared).tolist()


def _find_same_files(
    retain: PairSource, retain_sizes: np.ndarray, forget: PairSource, forget_sizes: np.ndarray
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
    retain: PairSource, candidates: np.ndarray, forget: PairSource, known: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return those rows of both that have a caption in common with a row of the other."""
    hashes, rows = _of_rows(caption_hashes(retain), candidates)
    known_hashes, known_rows = _of_rows(caption_hashes(forget), known)
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


def _digest_file(source: PairSource, row: int) -> bytes | None:
    try:
        return hashlib.blake2b(source.encoded_image(row), digest_size=16).digest()
    except BrokenPair:
        return None


def _find_same_pixels(retain: PairSource, forget: PairSource) -> list[int]:
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
