"""Who computes what in a launch: the tables that the Triton kernels read, made once a shape."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator
from itertools import accumulate
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fasterase.errors import InputError
from fasterase.kernels.contrastive_tiles import SLOTS

# Rows that one program of the reductions takes.
SPAN = 128
# Strips walked together, so that the tiles of one moment share rows and columns in L2.
_BAND = 8


_Tables = TypeVar("_Tables")


def _is_capturing() -> bool:
    """Whether launches are recorded into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _cached(make: Callable[..., _Tables]) -> Callable[..., _Tables]:
    """Keeps the tables of the last 64 shapes, and for good those that CUDA graphs will read."""
    recent = functools.lru_cache(maxsize=64)(make)
    captured = functools.cache(recent)

    @functools.wraps(make)
    def tables(*shape: Hashable) -> _Tables:
        return (captured if _is_capturing() else recent)(*shape)

    return tables


class Sweep(NamedTuple):
    """Tables of a forward call, int32 on its device; fields as in contrastive_tiles."""

    starts: Tensor  # [num_groups + 1]
    items: Tensor  # [num_items, ITEM_FIELDS]
    spans: Tensor  # [num_spans, SPAN_FIELDS]


class Segment(NamedTuple):
    """Some rows of one group's G, and where they lie in the workspace."""

    start: int  # the group's first row
    n: int  # rows of the group
    first: int  # the segment's first row in the group
    rows: int
    offset: int  # elements
    stride: int  # elements from row to row
    last_tile: int  # tiles of the launch up to and with this segment
    group: int

    @property
    def batch_rows(self) -> slice:
        return slice(self.start + self.first, self.start + self.first + self.rows)

    @property
    def batch_cols(self) -> slice:
        return slice(self.start, self.start + self.n)


@_cached
def sweep_tables(
    groups: tuple[int, ...], block_m: int, block_n: int, device: torch.device
) -> Sweep:
    """One rectangle of tiles an item, at most SLOTS x SLOTS a group."""
    starts = [0, *accumulate(groups)]
    items: list[tuple[int, ...]] = []
    spans: list[tuple[int, ...]] = []
    for group, (start, n) in enumerate(zip(starts, groups, strict=False)):
        strips, chunks = _parts(n, block_m), _parts(n, block_n)
        for band in range(0, len(strips), _BAND):
            for chunk, cols in enumerate(chunks):
                for strip, rows in enumerate(strips[band : band + _BAND], start=band):
                    items.append((start, n, *rows, strip, *cols, chunk, group))
        for first in range(0, n, SPAN):
            rows_here = min(SPAN, n - first)
            spans.append((start + first, rows_here, len(strips), len(chunks), group, int(n > 1)))
    return Sweep(*(_table(rows, torch.int32, device) for rows in (starts, items, spans)))


def _parts(n: int, block: int) -> list[tuple[int, int]]:
    """The blocks of n rows in at most SLOTS runs (first, end)."""
    blocks = -(-n // block)
    step = -(-blocks // int(SLOTS))
    return [(first, min(first + step, blocks)) for first in range(0, blocks, step)]


@_cached
def strip_tables(
    groups: tuple[int, ...], elements: int, block_m: int, block_n: int, device: torch.device
) -> tuple[tuple[tuple[Segment, ...], Tensor], ...]:
    """Launches whose strips of G fit in `elements` together, each with its table (int64).

    A strip has at least one row block, however small `elements` is.
    """
    return tuple(
        (tuple(segments), _table(segments, torch.int64, device))
        for segments in _launches(groups, elements, block_m, block_n)
    )


def _launches(
    groups: tuple[int, ...], elements: int, block_m: int, block_n: int
) -> Iterator[list[Segment]]:
    launch: list[Segment] = []
    used = tiles = start = 0
    for group, n in enumerate(groups):
        stride = -(-n // 64) * 64  # whole cache lines, as tensor-core GEMMs like them
        first = 0
        while first < n:
            free = (elements - used) // stride
            rows = min(n - first, free if free >= n - first else free // block_m * block_m)
            if rows < 1:
                if launch:
                    yield launch
                    launch, used, tiles = [], 0, 0
                    continue
                rows = min(n - first, block_m)
            tiles += -(-rows // block_m) * -(-n // block_n)
            launch.append(Segment(start, n, first, rows, used, stride, tiles, group))
            used += rows * stride
            first += rows
        start += n
    if launch:
        yield launch


def _table(rows: object, dtype: torch.dtype, device: torch.device) -> Tensor:
    if _is_capturing():
        raise InputError(
            "groups and the shape of image are new to this process, and a CUDA graph that is being "
            "captured cannot copy tables to the GPU. Run the same step once before the capture."
        )
    return torch.tensor(rows, dtype=dtype).to(device)
