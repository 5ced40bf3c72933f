"""From what a caller gives to tables by name: sets to forget, to keep and to measure."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from fasterase.errors import InputError
from fasterase.evaluation.verdict import EARLIER, WITHHELD
from fasterase.numerals import counted
from fasterase.pairs.items import IMAGE_KEYS
from fasterase.pairs.open import open_pairs
from fasterase.pairs.overlap import remove_overlap
from fasterase.pairs.table import JoinedTable, PairTable
from fasterase.provenance import drop_erased


class OpenedSets(NamedTuple):
    """The pairs of a call."""

    tables: dict[str, PairTable]  # by name, with "forget" and "retain"
    to_forget: list[str]  # names of the further ones to forget
    concepts: dict[str, range]  # of several: rows in the forget set of each, which is a set too


def open_sets(
    forget: Any,
    retain: Any,
    holdout: Any,
    sets: Mapping[str, Any] | None,
    forget_sets: Mapping[str, Any] | None,
    keys: dict[str, Any],
) -> OpenedSets:
    """Open all sets; `keys` are the image key and the text key of each.

    Raises:
        InputError: a source or a name cannot be used.
    """
    concepts = forget if _names_concepts(forget, keys["image_key"]) else {}
    given = {"retain": retain} if concepts else {"forget": forget, "retain": retain}
    if holdout is not None:
        given["holdout"] = holdout
    arguments = {"forget": concepts, "forget_sets": forget_sets, "sets": sets}
    for argument, named in arguments.items():
        if not isinstance(named, Mapping | None):
            raise InputError(f"{argument} must map names to pairs, found {type(named).__name__}.")
        for name, source in (named or {}).items():
            _check_name(argument, name, taken=given)
            # `find` has warned already where it found nothing to judge by.
            if not (isinstance(source, PairTable) and source.found and not len(source)):
                given[name] = source
    opened = {
        name: open_pairs(source, name=name, may_be_empty=name == "retain", **keys)
        for name, source in given.items()
    }
    rows, start = {}, 0
    for name in [name for name in concepts if name in opened]:
        rows[name] = range(start, start := start + len(opened[name]))
    if concepts:
        opened["forget"] = joined = JoinedTable("forget", [opened[name] for name in rows])
        # Views, so that every pair is encoded once.
        opened |= {name: joined.select(here, name=name) for name, here in rows.items()}
    further = [name for name in (*concepts, *(forget_sets or {})) if name in opened]
    return OpenedSets(opened, further, rows)


def _check_name(argument: str, name: Any, *, taken: Collection[str]) -> None:
    if not isinstance(name, str) or not name.strip() or len(name.splitlines()) > 1:
        raise InputError(f"{argument}: {name!r} is not a name.")
    what = {
        **dict.fromkeys(taken, "also a set of another argument"),
        **dict.fromkeys(("forget", "retain", "holdout"), "an argument of its own"),
        WITHHELD: "the name of the pairs to forget that an automatic run does not train on",
    }.get(name)
    if name.startswith(EARLIER):
        what = "how sets are named that an earlier run erased"
    if what is not None:
        raise InputError(f"{argument}: {name!r} is {what}. Choose another name.")


def _names_concepts(forget: Any, image_key: str | None) -> bool:
    """Tell a mapping of concepts from one batch of pairs, and from a DatasetDict."""
    if not isinstance(forget, Mapping) or type(forget).__name__ == "DatasetDict":
        return False
    return not any(key == image_key or key in IMAGE_KEYS for key in forget)


def clean_retain(
    sets: OpenedSets,
    erased: Sequence[Mapping[str, Any]],
    *,
    links: bool = False,
    may_vanish: bool = False,
) -> list[str]:
    """Take out of retain, in place, what is to be forgotten, and return the ids of these pairs.

    That is every pair with a picture of the forget set; of `links` alone, if it has one of the
    captions too. What was `erased` before is taken out as well, and becomes further sets.

    Raises:
        InputError: nothing would be left of it. With `may_vanish` only if all of it was erased
            before; where all pictures are in the forget set, they stay in retain.
    """
    opened = sets.tables
    removed: list[str] = []
    try:
        opened["retain"], removed = remove_overlap(opened["retain"], opened["forget"], links=links)
    except InputError:
        if not may_vanish:
            raise
    if removed:
        shown = ", ".join(removed[:5]) + (", ..." if len(removed) > 5 else "")
        warnings.warn(
            f"{counted(len(removed), 'retain pair is', 'retain pairs are')} also in the forget set "
            f"and left out of retain, since they are to be forgotten: {shown}"
            + ("" if links else ". With erase='link' those with other captions stay."),
            stacklevel=3,
        )
    opened["retain"], earlier = drop_erased(opened["retain"], erased)
    opened |= earlier
    sets.to_forget.extend(earlier)
    return removed
