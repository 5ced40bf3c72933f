"""What was erased, when, from what and with what: a record beside a saved model, and its audit."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fasterase.erased import content_digest, is_same
from fasterase.errors import InputError
from fasterase.files import to_json, write_text
from fasterase.pairs.table import PairTable
from fasterase.report.evaluation import Evaluation

FILE = "provenance.json"
FORMAT = 1
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
    file = Path(model).expanduser() / FILE
    if not file.is_file():
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
    chain: list[Mapping[str, Any]] = []
    current: Mapping[str, Any] | None = record
    while current is not None:
        chain.insert(0, current)
        current = current["parent"].get("record")
    return chain


def audit(
    evaluation: Evaluation,
    record: Mapping[str, Any],
    *,
    fingerprint: str,
    sets: Mapping[str, PairTable],
) -> Evaluation:
    """Return the evaluation of a model with what its record says, one finding per line.

    Args:
        evaluation: of the model as it is now.
        record: of when it was saved.
        fingerprint: of its weights now.
        sets: the pairs that were measured.
    """
    same = fingerprint == record["fingerprint"]
    lines = [
        f"erased {record['erased_at']}, verdict then: {record['outcome']['verdict'] or 'none'}",
        "weights: as they were saved" if same else "weights: CHANGED since they were saved",
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
    known = record["data"]["retain"]
    is_same_digest = sets["retain"].digest() == known["digest"]
    if not is_same_digest and content_digest(sets["retain"]) != known.get("content"):
        lines.append("retain: other pairs than those that the model was trained to keep")
    return replace(evaluation, audit=lines)


def _is_erased(pairs: PairTable, record: Mapping[str, Any]) -> bool:
    """Tell whether pairs are those that were to be forgotten, wherever they were read from."""
    if pairs.digest() == record["data"]["forget"]["digest"]:
        return True
    erased = record.get("erased")
    return erased is not None and is_same(pairs, erased)


def library_versions() -> dict[str, str]:
    """Return the version of fasterase and of each of `LIBRARIES` that is installed."""
    from fasterase import __version__

    found = {"fasterase": __version__}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
