"""Millions of strings in a few buffers.

A list of str costs about 60 bytes a row on top of its text, and reference counting copies its pages
into every forked worker; one buffer and one array of ends cost 8 bytes a row and stay shared.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence

import numpy as np

# File names may carry undecodable bytes as lone surrogates.
_ERRORS = "surrogatepass"


class PackedStrings:
    """An append-only sequence of strings."""

    def __init__(self, strings: Iterable[str] = ()) -> None:
        self._data = bytearray()
        self._ends = array("q", [0])
        for string in strings:
            self.append(string)

    def append(self, string: str) -> None:
        self._data += string.encode("utf-8", _ERRORS)
        self._ends.append(len(self._data))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._data[self._ends[index] : self._ends[index + 1]].decode("utf-8", _ERRORS)

    def digest(self) -> bytes:
        """Hash over all strings and their borders."""
        return hashlib.blake2b(self._data + self._ends.tobytes()).digest()


class PackedCaptions:
    """An append-only sequence of caption lists; an empty list marks a pair without a usable one."""

    def __init__(self, rows: Iterable[Sequence[str]] = ()) -> None:
        self._captions = PackedStrings()
        self._ends = array("q", [0])
        for row in rows:
            self.append(row)

    def append(self, captions: Sequence[str]) -> None:
        """Blank captions are left out."""
        for caption in captions:
            if caption.strip():
                self._captions.append(caption.strip())
        self._ends.append(len(self._captions))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> list[str]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return [self._captions[i] for i in range(self._ends[index], self._ends[index + 1])]

    def counts(self) -> np.ndarray:
        """Captions a row, [n] int64."""
        return np.diff(np.frombuffer(self._ends, dtype=np.int64))

    def digest(self) -> bytes:
        return hashlib.blake2b(self._captions.digest() + self._ends.tobytes()).digest()
