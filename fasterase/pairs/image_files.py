"""Pairs whose images are files of their own."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path

import numpy as np

from fasterase.pairs.packed import PackedCaptions, PackedStrings
from fasterase.pairs.pair_source import EncodedSource
from fasterase.pairs.records import read_image_file


class ImageFiles(EncodedSource):
    """Image files under `root`; the ids are their paths, relative to it or absolute."""

    def __init__(
        self,
        name: str,
        *,
        root: Path,
        ids: PackedStrings,
        captions: PackedCaptions,
        metas: PackedStrings | None = None,
        classes: list[str] | None = None,
    ) -> None:
        super().__init__(name, ids=ids, captions=captions, metas=metas, classes=classes)
        self.root = os.path.abspath(root)

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.id(index))

    @cached_property
    def _sizes(self) -> np.ndarray:
        return np.fromiter((_file_size(self.path(i)) for i in range(len(self))), dtype=np.int64)

    def encoded_sizes(self) -> np.ndarray:
        return self._sizes

    def encoded_image(self, index: int) -> bytes:
        return read_image_file(self.path(index), id=self.id(index))

    def encoded_place(self, index: int) -> str:
        return os.path.realpath(self.path(index))


def _file_size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return -1
