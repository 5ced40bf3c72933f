"""Tables one after another, as one: the pairs of several concepts to forget."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
from torch import Tensor

from fasterase.pairs.items import Record
from fasterase.pairs.table import PairTable


class JoinedTable(PairTable):
    """The rows of `tables` in order; every pair keeps the id it has there."""

    def __init__(self, name: str, tables: Sequence[PairTable]) -> None:
        self.name = name
        self._tables = list(tables)
        self._starts = [0, *accumulate(map(len, tables))]
        self._count = self._starts[-1]
        self.stable = all(table.stable for table in tables)
        self.in_memory = all(table.in_memory for table in tables)
        classes = dict.fromkeys(name for table in tables for name in table.classes or ())
        self.classes = list(classes) or None

    def _find(self, index: int) -> tuple[PairTable, int]:
        row = self._row(index)
        number = bisect_right(self._starts, row) - 1
        return self._tables[number], row - self._starts[number]

    def _record(self, index: int) -> Record:
        table, row = self._find(index)
        return table[row]

    def id(self, index: int) -> str:
        table, row = self._find(index)
        return table.id(row)

    def texts(self, index: int) -> list[str] | Tensor:
        table, row = self._find(index)
        return table.texts(row)

    def meta(self, index: int) -> dict[str, Any]:
        table, row = self._find(index)
        return table.meta(row)

    @cached_property
    def _digest(self) -> str:
        digests = "".join(table.digest() for table in self._tables)
        return hashlib.blake2b(digests.encode(), digest_size=16).hexdigest()

    def shards(self) -> np.ndarray | None:
        found, before = [], 0
        for table in self._tables:
            shards = table.shards()
            if shards is None:
                return None
            found.append(shards + before)
            before += int(shards.max()) + 1
        return np.concatenate(found)[self._rows]

    def encoded_sizes(self) -> np.ndarray | None:
        found = [table.encoded_sizes() for table in self._tables]
        sizes = [each for each in found if each is not None]
        return np.concatenate(sizes)[self._rows] if len(sizes) == len(found) else None

    def encoded_image(self, index: int) -> bytes:
        table, row = self._find(index)
        return table.encoded_image(row)

    def encoded_location(self, index: int) -> str:
        table, row = self._find(index)
        return table.encoded_location(row)
