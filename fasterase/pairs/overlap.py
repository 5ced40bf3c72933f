"""Keep a forget and a retain set from sharing images."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Hashable, Iterator

import numpy as np
from PIL import Image

from fasterase.errors import InputError
from fasterase.pairs.images import to_rgb
from fasterase.pairs.read_tars import TarImages
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.table import PairTable

# Comparing decoded images, or the contents of files, reads them; a million would take hours.
MOST_READ = 20_000


def remove_overlap(
    retain: PairTable, forget: PairTable, *, links: bool = False
) -> tuple[PairTable, list[str]]:
    """Remove from `retain` the pairs with an image of `forget`, whatever their captions.

    With `links` only those that have a caption of `forget` too.

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
    if not len(retain):
        return retain, []
    shared = np.zeros(len(retain), bool)
    shared[_find_same(retain, forget)] = True
    if links and shared.any():
        rows = np.flatnonzero(shared)
        hashes, places = retain.select(rows).caption_hashes()
        told = np.isin(hashes, forget.caption_hashes()[0])
        shared[np.setdiff1d(rows, rows[places[told]])] = False
    if not shared.any():
        return retain, []
    if shared.all():
        raise InputError(
            f"`retain`: all {len(retain)} pairs show images that are in `forget` too; give pairs "
            f"that the model should keep"
        )
    return retain.where(~shared), [retain.id(row) for row in np.flatnonzero(shared).tolist()]


def _find_same(retain: PairTable, forget: PairTable) -> np.ndarray:
    """Return the rows of `retain` with an image of `forget`."""
    if _share_index(retain, forget):
        rows, known = (each.base_rows(np.arange(len(each))) for each in (retain, forget))
        return np.flatnonzero(np.isin(rows, known))
    sizes, known_sizes = retain.encoded_sizes(), forget.encoded_sizes()
    if sizes is None or known_sizes is None:
        return _find_same_pixels(retain, forget)
    return _find_same_files(retain, sizes, forget, known_sizes)


def _share_index(retain: PairTable, forget: PairTable) -> bool:
    """Tell whether both sets are rows of one index, so that equal rows mean equal images."""
    one, other = retain.images, forget.images
    if not isinstance(one, TarImages) or not isinstance(other, TarImages):
        return False
    shards, others = ([shard[:4] for shard in each.shards] for each in (one, other))
    is_distinct = len(set(shards)) == len(shards)
    return is_distinct and shards == others and one.entries == other.entries


def _find_same_files(
    retain: PairTable, sizes: np.ndarray, forget: PairTable, known_sizes: np.ndarray
) -> np.ndarray:
    candidates = np.flatnonzero(np.isin(sizes, known_sizes[known_sizes >= 0]))
    known = np.flatnonzero(np.isin(known_sizes, sizes[candidates]))
    if len(candidates) > MOST_READ:
        count = len(candidates)
        hashes, rows = retain.select(candidates).caption_hashes()
        known_hashes, known_rows = forget.select(known).caption_hashes()
        candidates = candidates[np.unique(rows[np.isin(hashes, known_hashes)])]
        known = known[np.unique(known_rows[np.isin(known_hashes, hashes)])]
        warnings.warn(
            f"`retain`: {count} images have the size in bytes of an image in `forget`; only the "
            f"{len(candidates)} of them with an equal caption too are compared with it",
            stacklevel=2,
        )
    same = _with_same(lambda s, row: s.encoded_location(row), retain, candidates, forget, known)
    # Only what may be a copy in another place has to be read.
    others = np.setdiff1d(candidates, same)
    known = known[np.isin(known_sizes[known], sizes[others])]
    return np.union1d(same, _with_same(_digest_bytes, retain, others, forget, known))


def _with_same(
    key: Callable[[PairTable, int], Hashable],
    retain: PairTable,
    candidates: np.ndarray,
    forget: PairTable,
    known: np.ndarray,
) -> np.ndarray:
    """Return those `candidates` whose key a `known` row has; a broken pair has none."""

    def keys(source: PairTable, rows: np.ndarray) -> Iterator[Hashable]:
        for row in rows.tolist():
            try:
                yield key(source, row)
            except BrokenPair:
                yield None

    wanted = set(keys(forget, known)) - {None}
    return candidates[[each in wanted for each in keys(retain, candidates)]]


def _find_same_pixels(retain: PairTable, forget: PairTable) -> np.ndarray:
    for source in (retain, forget):
        too_many = not source.in_memory and len(source) > MOST_READ
        if too_many or not source.stable:
            reason = "is too large to decode for that" if too_many else "differs on every read"
            warnings.warn(
                f"`retain` is not checked for images that are in `forget` too: `{source.name}` "
                f"{reason}",
                stacklevel=2,
            )
            return np.empty(0, np.int64)
    rows, known = np.arange(len(retain)), np.arange(len(forget))
    return _with_same(_digest_pixels, retain, rows, forget, known)


def image_digest(source: PairTable, row: int) -> bytes:
    """Return a digest of a pair's image: of its file, wherever that is, or of its pixels.

    Raises:
        BrokenPair: it cannot be read.
    """
    of_pixels = source.encoded_sizes() is None
    return (_digest_pixels if of_pixels else _digest_bytes)(source, row)


def _digest_bytes(source: PairTable, row: int) -> bytes:
    return hashlib.blake2b(source.encoded_image(row), digest_size=16).digest()


def _digest_pixels(source: PairTable, row: int) -> bytes:
    image = source[row].image
    if isinstance(image, Image.Image):
        image = np.asarray(to_rgb(image, id=source.id(row))).transpose(2, 0, 1)
    else:
        image = (image.float() if image.is_floating_point() else image).detach().cpu().numpy()
    kind = f"{image.dtype} {image.shape}".encode()
    return hashlib.blake2b(kind + image.tobytes(), digest_size=16).digest()
