"""Square problems cut into tiles: the logits of a group, their shift, and the sums both ways."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# exp(66) times 2^20 columns, also times the KL's (s0 - s), still fits fp32.
_HEADROOM = 66.0
# A smaller sum may have lost terms to underflow: fp32 is normal down to 2^-126.
_UNDERFLOW = 2.0**-80
# fp32 tiles of 1 MB stay in a CPU's L2; of 5 on 28 ms (N=2048, D=256, one core), 256x512 to
# 1024x1024 differ by 3 %. An accelerator wants fewer launches: 64 MB.
_TILE_CPU, _TILE_ACCELERATOR = 512, 4096

Pair = tuple[
    Tensor, Tensor
]  # (for the row direction, for the column direction), one object if equal


def spans(n: int, device: torch.device) -> list[slice]:
    """The rows, and likewise the columns, of a group of n in nearly equal tiles."""
    tile = _TILE_CPU if device.type == "cpu" else _TILE_ACCELERATOR
    step = math.ceil(n / math.ceil(n / tile)) if n else 1
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


class Logits(NamedTuple):
    """S = scale * image @ text.T of one group, a tile at a time, in the dtype of scale."""

    image: Tensor  # [n, D]
    text: Tensor  # [n, D]
    scale: Tensor  # []

    def left(self, rows: slice) -> Tensor:
        """What `tile` takes for these rows: made once a row of tiles."""
        return self.image[rows].to(self.scale.dtype) * self.scale

    def tile(self, left: Tensor, cols: slice) -> Tensor:
        return left @ self.text[cols].to(self.scale.dtype).T

    def diagonal(self) -> Tensor:
        dtype = self.scale.dtype
        return self.scale * (self.image.to(dtype) * self.text.to(dtype)).sum(1)

    def finite(self) -> bool:
        return bool(self.image.isfinite().all() & self.text.isfinite().all())


class Shift(NamedTuple):
    """Subtracted from the logits before exp."""

    by: Tensor  # [2, n] for the rows, for the columns
    shared: bool  # one number everywhere, so that one exp serves both directions

    @classmethod
    def fixed(cls, logits: Logits) -> Shift:
        """max(0, B - 66) with B >= |S|. NaN rows are left out of B: they must not reach others."""
        bound = logits.scale.abs()
        for side in (logits.image, logits.text):
            norms = torch.linalg.vector_norm(side.to(bound.dtype), dim=1)
            bound = bound * norms.nan_to_num(nan=0.0, posinf=0.0).amax()
        return cls((bound - _HEADROOM).clamp_min(0).expand(2, len(logits.image)), shared=True)

    @classmethod
    def peaks(cls, logits: Logits) -> Shift:
        """The largest logit of each row and column beside the diagonal: exp is then at most 1."""
        n = len(logits.image)
        by = logits.scale.new_full((2, n), -torch.inf)
        tiles = spans(n, logits.image.device)
        for rows in tiles:
            left = logits.left(rows)
            for cols in tiles:
                s = drop_diagonal(logits.tile(left, cols), rows, cols, -torch.inf)
                by[0, rows] = torch.maximum(by[0, rows], s.amax(1))
                by[1, cols] = torch.maximum(by[1, cols], s.amax(0))
        return cls(by, shared=False)

    def exp(self, s: Tensor, rows: slice, cols: slice) -> Pair:
        """exp(s - shift) without the diagonal; s is left as it is."""
        row = drop_diagonal((s - self.by[0, rows, None]).exp_(), rows, cols, 0.0)
        if self.shared:
            return row, row
        return row, drop_diagonal((s - self.by[1, cols]).exp_(), rows, cols, 0.0)

    def weighted_exp(self, s: Tensor, factors: Tensor, rows: slice, cols: slice) -> Tensor:
        """exp(s - shift) times a factor a row, plus the same times a factor a column."""
        row, col = self.exp(s, rows, cols)
        by_row, by_col = factors[0, rows, None], factors[1, cols]
        if self.shared:
            return row.mul_(by_row + by_col)
        return row.mul_(by_row).addcmul_(col, by_col)


class Sums(NamedTuple):
    """Row and column sums of a group beside its diagonal; ref and cross are 0 without reference."""

    student: Tensor  # [2, n] of e = exp(S - shift)
    ref: Tensor  # [2, n] of e0 = exp(S0 - ref_shift)
    cross: Tensor  # [2, n] of e0 * (S0 - S)


def drop_diagonal(tile: Tensor, rows: slice, cols: slice, value: float) -> Tensor:
    """Put `value` on the group's diagonal where it crosses this tile."""
    return tile.fill_diagonal_(value) if rows == cols else tile


def stable_sums(logits: Logits, ref: Logits | None) -> tuple[Shift, Shift | None, Sums]:
    """The sums under the fixed shift, or, where they under- or overflow, under the true maxima."""
    shift = Shift.fixed(logits)
    ref_shift = None if ref is None else Shift.fixed(ref)
    sums = _sums(logits, ref, shift, ref_shift)
    if len(logits.image) < 2 or not _suspicious(sums, ref):
        return shift, ref_shift, sums
    if _lost(logits, sums.student):
        shift = Shift.peaks(logits)
    if ref is not None and _lost(ref, sums.ref, sums.cross):
        ref_shift = Shift.peaks(ref)
    return shift, ref_shift, _sums(logits, ref, shift, ref_shift)


def _suspicious(sums: Sums, ref: Logits | None) -> bool:
    """The guard of every call: one host sync, also where all is well."""
    positive = sums.student if ref is None else torch.stack((sums.student, sums.ref))
    sound = (positive >= _UNDERFLOW).all() & (positive < torch.inf).all()
    return not bool(sound & sums.cross.isfinite().all())


def _lost(logits: Logits, positive: Tensor, *others: Tensor) -> bool:
    if bool((positive < _UNDERFLOW).any()):
        return True
    overflow = not all(bool(x.isfinite().all()) for x in (positive, *others))
    return overflow and logits.finite()


def _sums(logits: Logits, ref: Logits | None, shift: Shift, ref_shift: Shift | None) -> Sums:
    n = len(logits.image)
    sums = Sums(*(logits.scale.new_zeros(2, n) for _ in range(3)))
    for rows, cols, s, s0 in walk(logits, ref):
        _add(sums.student, shift.exp(s, rows, cols), rows, cols)
        if s0 is not None and ref_shift is not None:
            e0 = ref_shift.exp(s0, rows, cols)
            gap = s0.sub_(s)
            row = e0[0] * gap
            cross = (row, row if ref_shift.shared else e0[1] * gap)
            _add(sums.ref, e0, rows, cols)
            _add(sums.cross, cross, rows, cols)
    return sums


def walk(
    logits: Logits, ref: Logits | None
) -> Iterator[tuple[slice, slice, Tensor, Tensor | None]]:
    """(rows, cols, tile of S, tile of S0 or None) in a fixed order; none for a single pair."""
    n = len(logits.image)
    tiles = spans(n, logits.image.device) if n > 1 else []
    for rows in tiles:
        left = logits.left(rows)
        ref_left = None if ref is None else ref.left(rows)
        for cols in tiles:
            s0 = None if ref is None or ref_left is None else ref.tile(ref_left, cols)
            yield rows, cols, logits.tile(left, cols), s0


def _add(sums: Tensor, tile: Pair, rows: slice, cols: slice) -> None:
    sums[0, rows] += tile[0].sum(1)
    sums[1, cols] += tile[1].sum(0)
