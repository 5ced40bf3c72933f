"""Pairs that cannot be read: skipped, counted, named, and an error once there are too many."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from fasterase.errors import FaseraseError, InputError
from fasterase.numerals import counted
from fasterase.parallel.ranks import Ranks

_NAMED = 10
# A share of fewer pairs would stop a large run because of an unlucky first batch.
_LEAST_COUNTED = 1000


class BrokenPair(FaseraseError):  # noqa: N818 (the name says what it is)
    """One pair whose image or caption cannot be used; loaders leave it out."""

    def __init__(self, id: str, reason: str) -> None:
        super().__init__(id, reason)
        self.id, self.reason = self.args

    def __str__(self) -> str:
        return f"{self.id}: {self.reason}"


class Skip(NamedTuple):
    """A pair that was left out, and why."""

    id: str
    reason: str


class SkipLedger:
    """Counts the skipped pairs among the distinct ones that this rank has read.

    Args:
        total: pairs in all sets together.
        max_skipped: accepted share of the distinct pairs seen so far, or of `min(total, 1000)` if
            these are fewer. A single one is accepted at any share above 0.
    """

    def __init__(self, total: int, *, max_skipped: float = 0.01) -> None:
        self.max_skipped = max_skipped
        self._least = min(total, _LEAST_COUNTED)
        # Hashes of ids: 8 bytes each, where a set of the strings takes 120. The distinct ones are
        # known; others wait until they are as many.
        self._known = np.empty(0, np.int64)
        self._waiting: list[np.ndarray] = []
        self._skips: dict[str, Skip] = {}
        self._elsewhere: dict[str, Skip] = {}  # what other ranks skipped
        self._warned: set[str] = set()

    @property
    def skips(self) -> list[Skip]:
        """Every skipped pair once, in the order met; those of other ranks at the last exchange."""
        return list((self._skips | self._elsewhere).values())

    def add(self, seen: Iterable[str], skipped: Iterable[Skip]) -> None:
        """Count the pairs that were read (`seen`, ids) and those that were left out; raise
        `InputError`, which names them, if more than `max_skipped` are broken."""
        skipped = list(skipped)
        ids = [*seen, *(skip.id for skip in skipped)]
        self._waiting.append(np.fromiter(map(hash, ids), np.int64, len(ids)))
        for skip in skipped:
            self._skips.setdefault(skip.id, skip)
        if self._is_too_many() or sum(map(len, self._waiting)) > len(self._known):
            self._known = np.unique(np.concatenate([self._known, *self._waiting]))
            self._waiting = []
        if self._is_too_many():
            raise InputError(
                f"{len(self._skips)} of {len(self._known)} pairs cannot be used, more than the "
                f"{self.max_skipped:.1%} that `max_skipped` allows of "
                f"{max(len(self._known), self._least)}: {_named(list(self._skips.values()))}. "
                "Repair or remove them, or raise `max_skipped`."
            )

    def _is_too_many(self) -> bool:
        """Tell whether more are skipped than the pairs known so far allow."""
        accepted = self.max_skipped * max(len(self._known), self._least)
        return len(self._skips) > (max(1, accepted) if accepted else 0)

    def exchange(self, ranks: Ranks) -> None:
        """Learn what the other ranks have skipped, so that one of them can name it all."""
        for skips in ranks.gather_objects(list(self._skips.values())):
            self._elsewhere |= {skip.id: skip for skip in skips if skip.id not in self._skips}

    def warn(self) -> None:
        """Name the pairs skipped since the last call in one warning; silent if there are none."""
        fresh = [skip for skip in self.skips if skip.id not in self._warned]
        self._warned.update(skip.id for skip in fresh)
        if fresh:
            broken = counted(len(fresh), "broken pair is", "broken pairs are")
            warnings.warn(f"{broken} skipped: {_named(fresh)}", stacklevel=2)


def _named(skips: list[Skip]) -> str:
    shown = "; ".join(f"{skip.id} ({skip.reason})" for skip in skips[:_NAMED])
    return shown + (f"; and {len(skips) - _NAMED} more" if len(skips) > _NAMED else "")
