"""What was erased, when, from what and with what: a record beside a saved model, and its audit.

The record also holds salted digests of the erased pairs, by which they are dropped from later
retain sets. They name nobody: to look something up in them takes the picture or the caption itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from fasterase.errors import InputError
from fasterase.evaluation.verdict import EARLIER
from fasterase.files import to_json, write_text
from fasterase.pairs.overlap import MOST_READ, image_digest
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.table import PairTable
from fasterase.report.evaluation import Evaluation

FILE = "provenance.json"
FORMAT = 1
# Bytes of a digest: no two of a billion are alike.
_DIGEST_BYTES = 10
LIBRARIES = ("torch", "open_clip_torch", "transformers", "peft", "numpy")


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write `FILE`."""
    write_text(folder / FILE, to_json(record, indent=1) + "\n")


def read_record(model: object) -> dict[str, Any] | None:
    """Return the record beside a saved model; None if `model` is no folder with one.

    Raises:
        InputError: the file is damaged.
    """
    if not isinstance(model, str | os.PathLike):
        return None
    folder = re.sub("^(local-dir:|hf:)", "", os.fspath(model))
    file = Path(os.path.expanduser(folder)) / FILE
    if not os.path.isfile(file):
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        for key in ("fingerprint", "outcome", "data", "parent", "erased_at"):
            record[key]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file} is no record of an erasure ({error!r}). Restore it, or remove it to evaluate "
            "without an audit."
        ) from error
    return record


def erasures(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the records of all erasures that led to a model, the first one first."""
    parent = record["parent"].get("record")
    return [*(erasures(parent) if parent is not None else ()), record]


def audit(
    evaluation: Evaluation,
    record: Mapping[str, Any],
    *,
    fingerprint: str,
    sets: Mapping[str, PairTable],
) -> Evaluation:
    """Return the evaluation of a model with what its record says, one finding per line.

    `fingerprint` is of its weights now, and `sets` are the pairs that were measured.
    """
    is_unchanged = fingerprint == record["fingerprint"]
    lines = [
        f"erased {record['erased_at']}, verdict then: {record['outcome']['verdict'] or 'none'}",
        "weights: as they were saved" if is_unchanged else "weights: CHANGED since they were saved",
    ]
    verdicts = evaluation.set_verdicts.get("model", {})
    for number, step in enumerate(erasures(record), start=1):
        found = next((name for name, pairs in sets.items() if _is_erased(pairs, step)), None)
        what = f"erasure {number} of {step['erased_at']}"
        if found is None:
            lines.append(f"{what}: its pairs are NOT among the sets measured here")
        else:
            now = verdicts.get(found, "not judged")
            lines.append(f"{what}: its pairs are measured here as {found!r}; now {now}")
    retain, known = sets["retain"], record["data"]["retain"]
    if retain.digest() != known["digest"] and content_digest(retain) != known.get("content"):
        lines.append("retain: other pairs than those that the model was trained to keep")
    return replace(evaluation, audit=lines)


def _is_erased(pairs: PairTable, record: Mapping[str, Any]) -> bool:
    """Tell whether pairs are those that were to be forgotten, wherever they were read from."""
    erased = record.get("erased")
    is_same_source = pairs.digest() == record["data"]["forget"]["digest"]
    return is_same_source or (erased is not None and is_same(pairs, erased))


def library_versions() -> dict[str, str]:
    """Return the version of fasterase and of each of `LIBRARIES` that is installed."""
    from fasterase import __version__

    found = {"fasterase": __version__}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def remember(pairs: PairTable, *, links: bool = False) -> dict[str, Any]:
    """Return salted digests of the images and of the first captions of pairs, ready for JSON.

    Of `links` alone the pictures are not remembered: they may be kept with other captions.
    """
    return _digest_pairs(pairs, secrets.token_hex(16), images=not links)


def is_same(pairs: PairTable, erased: Mapping[str, Any]) -> bool:
    """Tell whether pairs are those that were erased, wherever they were read from."""
    return _digest_pairs(pairs, erased["salt"], images="images" in erased) == erased


def _digest_pairs(pairs: PairTable, salt: str, *, images: bool) -> dict[str, Any]:
    """Return the distinct digests of first captions and, of a set that is not too large, images."""
    found: dict[str, Any] = {
        "salt": salt,
        "captions": sorted(set(_digest_captions(pairs, salt)[1])),
    }
    if images and len(pairs) <= MOST_READ:
        found["images"] = sorted(set(filter(None, _digest_images(pairs, salt))))
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

    Returns:
        The remaining pairs, and name -> those of each erasure in `records` that were among them.

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
    captions, images = set(erased["captions"]), set(erased.get("images", ()))
    found = np.zeros(len(pairs), bool)
    rows, digests = _digest_captions(pairs, erased["salt"])
    found[rows] = [each in captions for each in digests]
    if images and len(pairs) <= MOST_READ:
        found |= [each in images for each in _digest_images(pairs, erased["salt"])]
    return found


def _digest_captions(pairs: PairTable, salt: str) -> tuple[np.ndarray, list[str]]:
    """Return the rows with a caption, and the digest of the first of each."""
    hashes, rows = pairs.caption_hashes()
    rows, first = np.unique(rows, return_index=True)
    return rows, [_digest(each.tobytes(), salt) for each in hashes[first]]


def _digest_images(pairs: PairTable, salt: str) -> Iterator[str | None]:
    for row in range(len(pairs)):
        try:
            yield _digest(image_digest(pairs, row), salt)
        except BrokenPair:
            yield None


def _digest(value: bytes, salt: str) -> str:
    return hashlib.blake2b(value, key=salt.encode(), digest_size=_DIGEST_BYTES).hexdigest()
