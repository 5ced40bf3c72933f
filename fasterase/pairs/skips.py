"""Pairs that cannot be read: skipped, counted, named, and an error once there are too many."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from fasterase.errors import FaseraseError, InputError
from fasterase.parallel.ranks import Ranks

_NAMED = 10
# A share of fewer pairs would stop a large run because of an unlucky first batch.
_LEAST_COUNTED = 1000


class BrokenPair(FaseraseError):  # noqa: N818 (the name says what it is)
    """One pair whose image or caption cannot be used; loaders leave it out."""

    def __init__(self, id: str, reason: str) -> None:
        super().__init__(id, reason)
        self.id = id
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.id}: {self.reason}"


class Skip(NamedTuple):
    """A pair that was left out, and why."""

    id: str
    reason: str


class _DistinctIds:
    """Counts distinct ids in 8 bytes each: a set of the strings takes 120.

    Their hashes are kept in sorted runs, each at least twice as long as the next.
    """

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def __len__(self) -> int:
        return sum(map(len, self._runs))

    def add(self, ids: list[str]) -> None:
        fresh = np.unique(np.fromiter(map(hash, ids), np.int64, len(ids)))
        for run in self._runs:
            at = np.minimum(np.searchsorted(run, fresh), len(run) - 1)
            fresh = fresh[run[at] != fresh]
        if len(fresh) == 0:
            return
        while self._runs and len(self._runs[-1]) < 2 * len(fresh):
            fresh = np.sort(np.concatenate([self._runs.pop(), fresh]))
        self._runs.append(fresh)


class SkipLedger:
    """Counts skipped pairs over distinct ids, those that this rank has read.

    Args:
        total: pairs in all sets together.
        max_skipped: accepted share of skipped pairs, 0 to 1. It is taken of the distinct pairs seen
            so far, but of at least `min(total, 1000)`.
    """

    def __init__(self, total: int, *, max_skipped: float = 0.01) -> None:
        self.max_skipped = max_skipped
        self._least = min(total, _LEAST_COUNTED)
        self._seen = _DistinctIds()
        self._skips: dict[str, Skip] = {}
        self._elsewhere: dict[str, Skip] = {}  # what other ranks skipped
        self._warned: set[str] = set()

    @property
    def skips(self) -> list[Skip]:
        """Every skipped pair once, in the order met; those of other ranks at the last exchange."""
        return list((self._skips | self._elsewhere).values())

    def add(self, seen: Iterable[str], skipped: Iterable[Skip]) -> None:
        """Count the pairs that were read (`seen`, ids) and those that were left out.

        Raises:
            InputError: more than `max_skipped` of the pairs are broken; names them.
        """
        skipped = list(skipped)
        self._seen.add([*seen, *(skip.id for skip in skipped)])
        for skip in skipped:
            self._skips.setdefault(skip.id, skip)
        counted = max(len(self._seen), self._least)
        if len(self._skips) > self.max_skipped * counted:
            raise InputError(
                f"{len(self._skips)} of {len(self._seen)} pairs cannot be used, more than the "
                f"{self.max_skipped:.1%} that `max_skipped` allows of {counted}: "
                f"{self._named(list(self._skips.values()))}. Repair or remove them, or raise "
                "`max_skipped`."
            )

    def exchange(self, ranks: Ranks) -> None:
        """Learn what the other ranks have skipped, so that one of them can name it all."""
        for skips in ranks.gather_objects(list(self._skips.values())):
            self._elsewhere |= {skip.id: skip for skip in skips if skip.id not in self._skips}

    def warn(self) -> None:
        """Name the pairs skipped since the last call in one warning; silent if there are none."""
        fresh = [skip for skip in self.skips if skip.id not in self._warned]
        self._warned.update(skip.id for skip in fresh)
        if fresh:
            warnings.warn(
                f"{len(fresh)} broken pairs are skipped: {self._named(fresh)}", stacklevel=2
            )

    @staticmethod
    def _named(skips: list[Skip]) -> str:
        shown = "; ".join(f"{skip.id} ({skip.reason})" for skip in skips[:_NAMED])
        return shown + (f"; and {len(skips) - _NAMED} more" if len(skips) > _NAMED else "")
