"""What a model was made to forget before, by salted digests: dropped from later retain sets.

The digests are kept in the record beside a saved model (provenance.py). They name nobody: to look
something up in them takes the picture or the caption itself.
"""

from __future__ import annotations

import hashlib
import secrets
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from fasterase.errors import InputError
from fasterase.evaluation.verdict import EARLIER
from fasterase.pairs.overlap import MOST_READ, image_digest
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.table import PairTable

# Bytes of a digest: no two of a billion are alike.
_SIZE = 10


def remember(pairs: PairTable, *, links: bool = False) -> dict[str, Any]:
    """Return salted digests of the images and of the first captions of pairs, ready for JSON.

    Of `links` alone the pictures are not remembered: they may be kept with other captions.
    """
    salt = secrets.token_hex(16)
    found = {"salt": salt, **_digests(pairs, salt)}
    if links:
        found.pop("images", None)
    return found


def is_same(pairs: PairTable, erased: Mapping[str, Any]) -> bool:
    """Tell whether pairs are those that were erased, wherever they were read from."""
    found = {"salt": erased["salt"], **_digests(pairs, erased["salt"])}
    return {key: found.get(key) for key in erased} == erased


def _digests(pairs: PairTable, salt: str) -> dict[str, list[str]]:
    """Return the distinct digests of first captions and, of a set that is not too large, images."""
    found = {"captions": sorted({each.hex() for each in _salted(_first_captions(pairs)[1], salt)})}
    if len(pairs) <= MOST_READ:
        found["images"] = sorted({each.hex() for each in _images(pairs, salt) if each})
    return found


def content_digest(pairs: PairTable) -> str:
    """Return a digest of the captions of pairs, in any order and wherever they were read from."""
    hashes, _ = pairs.caption_hashes()
    return f"{len(pairs)}-{hashes.astype(np.uint64).sum(dtype=np.uint64):016x}"


def drop_erased(
    retain: PairTable, records: Iterable[Mapping[str, Any]]
) -> tuple[PairTable, dict[str, PairTable]]:
    """Take pairs that were erased before out of a retain set, which would teach them again.

    A pair counts if its picture or its first caption was among the erased; pictures are compared in
    sets of at most 20,000.

    Args:
        retain: the pairs to keep.
        records: of the erasures that led to the model, see `fasterase.provenance.erasures`.

    Returns:
        The remaining pairs, and name -> those of each erasure that were among them.

    Raises:
        InputError: nothing would be left of `retain`.
    """
    kept = np.ones(len(retain), bool)
    dropped: dict[str, PairTable] = {}
    for number, record in enumerate(records, start=1):
        erased = record.get("erased")
        if not erased or not len(retain):
            continue
        here = np.flatnonzero(kept & _among(retain, erased))
        if len(here):
            what = record.get("concept") or f"erasure {number}"
            name = f"{EARLIER}: {what}"
            while name in dropped:
                name += f" ({number})"
            dropped[name] = retain.select(here, name=name)
            kept[here] = False
    if len(retain) and not kept.any():
        raise InputError(
            f"`retain`: all {len(retain):,} pairs were erased from this model before; give pairs "
            f"that the model should keep"
        )
    if dropped:
        counts = ", ".join(f"{len(pairs)} {name!r}" for name, pairs in dropped.items())
        warnings.warn(
            f"retain pairs that were erased from this model before are left out of retain, since "
            f"they would teach it again, and judged: {counts}",
            stacklevel=3,
        )
    return retain.where(kept) if dropped else retain, dropped


def _among(pairs: PairTable, erased: Mapping[str, Any]) -> np.ndarray:
    """[n] bool, whether a pair's picture or first caption was erased."""
    salt = erased["salt"]
    captions = {bytes.fromhex(each) for each in erased["captions"]}
    found = np.zeros(len(pairs), bool)
    rows, hashes = _first_captions(pairs)
    found[rows] = [each in captions for each in _salted(hashes, salt)]
    if "images" in erased and len(pairs) <= MOST_READ:
        images = {bytes.fromhex(each) for each in erased["images"]}
        found |= [each in images for each in _images(pairs, salt)]
    return found


def _first_captions(pairs: PairTable) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows with a caption, and the hash of the first of each."""
    hashes, rows = pairs.caption_hashes()
    rows, first = np.unique(rows, return_index=True)
    return rows, hashes[first]


def _images(pairs: PairTable, salt: str) -> Iterator[bytes | None]:
    for row in range(len(pairs)):
        try:
            yield _digest(image_digest(pairs, row), salt)
        except BrokenPair:
            yield None


def _salted(hashes: np.ndarray, salt: str) -> Iterator[bytes]:
    return (_digest(each.tobytes(), salt) for each in hashes)


def _digest(value: bytes, salt: str) -> bytes:
    return hashlib.blake2b(value, key=salt.encode(), digest_size=_SIZE).digest()
