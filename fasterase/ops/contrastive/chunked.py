"""The contrastive operator over tiles of plain torch: no N x N matrix in memory, on any device.

README.md derives the formulas; names here follow it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from fasterase.ops.contrastive.operator import Batch, Gradients, Groups, Wanted, register

# exp(66) times 2^20 columns, also times the KL's (s0 - s), still fits fp32.
HEADROOM = 66.0
# A smaller sum may have lost terms to underflow: fp32 is normal down to 2^-126.
UNDERFLOW = 2.0**-80
# fp32 tiles of 1 MB stay in a CPU's L2; of 5 on 28 ms (N=2048, D=256, one core), 256x512 to
# 1024x1024 differ by 3 %. An accelerator wants fewer launches: 64 MB.
_TILE_CPU, _TILE_ACCELERATOR = 512, 4096

# (for the row direction, for the column direction); one object if they are equal
TilePair = tuple[Tensor, Tensor]


class Logits(NamedTuple):
    """S = scale * image @ text.T of one group, made by tiles, in the dtype of scale."""

    image: Tensor  # [n, D]
    text: Tensor  # [n, D]
    scale: Tensor  # []

    def scale_rows(self, rows: slice) -> Tensor:
        """The left factor of `multiply`, made once per row of tiles."""
        return self.image[rows].to(self.scale.dtype) * self.scale

    def multiply(self, scaled_rows: Tensor, cols: slice) -> Tensor:
        """The tile of S for these rows and columns."""
        return scaled_rows @ self.text[cols].to(self.scale.dtype).T

    def diagonal(self) -> Tensor:
        dtype = self.scale.dtype
        return self.scale * (self.image.to(dtype) * self.text.to(dtype)).sum(1)

    def has_finite_features(self) -> bool:
        return bool(self.image.isfinite().all() & self.text.isfinite().all())


class Shift(NamedTuple):
    """The numbers subtracted from the logits before exp."""

    values: Tensor  # [2, n] for the rows, for the columns
    is_shared: bool  # one number everywhere, so one exp serves both directions

    @classmethod
    def from_bound(cls, logits: Logits) -> Shift:
        """max(0, B - 66) with B >= |S|. B leaves out NaN rows: they must not reach others."""
        bound = logits.scale.abs()
        for side in (logits.image, logits.text):
            norms = torch.linalg.vector_norm(side.to(bound.dtype), dim=1)
            bound = bound * norms.nan_to_num(nan=0.0, posinf=0.0).amax()
        return cls((bound - HEADROOM).clamp_min(0).expand(2, len(logits.image)), is_shared=True)

    @classmethod
    def from_peaks(cls, logits: Logits) -> Shift:
        """The largest logit of each row and column beside the diagonal: exp is then at most 1."""
        peaks = logits.scale.new_full((2, len(logits.image)), -torch.inf)
        for rows, cols, s, _ in _iterate_tiles(logits, None):
            _fill_diagonal(s, rows, cols, -torch.inf)
            peaks[0, rows] = torch.maximum(peaks[0, rows], s.amax(1))
            peaks[1, cols] = torch.maximum(peaks[1, cols], s.amax(0))
        return cls(peaks, is_shared=False)

    def exp(self, s: Tensor, rows: slice, cols: slice) -> TilePair:
        """exp(s - shift) without the diagonal; s stays as it is."""
        row = _fill_diagonal((s - self.values[0, rows, None]).exp_(), rows, cols, 0.0)
        if self.is_shared:
            return row, row
        return row, _fill_diagonal((s - self.values[1, cols]).exp_(), rows, cols, 0.0)

    def weighted_exp(self, s: Tensor, factors: Tensor, rows: slice, cols: slice) -> Tensor:
        """exp(s - shift) times a factor per row, plus the same times a factor per column."""
        row, col = self.exp(s, rows, cols)
        row_factor, col_factor = factors[0, rows, None], factors[1, cols]
        if self.is_shared:
            return row.mul_(row_factor + col_factor)
        return row.mul_(row_factor).addcmul_(col, col_factor)


class Sums(NamedTuple):
    """Row and column sums of a group beside its diagonal; ref and cross are 0 without reference."""

    student: Tensor  # [2, n] of e = exp(S - shift)
    ref: Tensor  # [2, n] of e0 = exp(S0 - ref_shift)
    cross: Tensor  # [2, n] of e0 * (S0 - S)


class Softmax(NamedTuple):
    """The softmax over one group's S, in O(n); rows and columns are the first axis."""

    shift: Shift
    sums: Tensor  # [2, n] of exp(s - shift) beside the diagonal
    miss_probability: Tensor  # [2, n] the probability beside the diagonal

    def factors(self, weight: Tensor) -> Tensor:
        """[2, n] factors that turn exp(s - shift) into weight * p.

        They use the sums and not exp(shift - lse): a row of p then adds up to the miss probability
        to the last bit. An lse near 100, rounded, would tilt the whole row by 4e-6, and features
        that share a direction would feel it 100-fold.
        """
        return weight * (self.miss_probability / self.sums)


def _forward(batch: Batch, groups: Groups) -> tuple[Tensor, Tensor, Tensor]:
    losses = batch.scale.new_empty(2 * batch.matrices, len(batch.image))
    statistics = batch.scale.new_empty(batch.matrices, 3, 2, len(batch.image))
    shared: list[list[bool]] = []
    with torch.autocast(batch.image.device.type, enabled=False):
        for rows in _slice_groups(groups):
            logits, ref = _select_logits(batch, rows)
            losses[:, rows], softmaxes = _compute_losses(logits, ref, *_stable_sums(logits, ref))
            for saved, softmax in zip(statistics[..., rows], softmaxes, strict=True):
                shift, sums, miss_probability = softmax
                saved.copy_(torch.stack((shift.values, sums, miss_probability)))
            shared.append([softmax.shift.is_shared for softmax in softmaxes])
    return losses, statistics, torch.tensor(shared)


def _slice_groups(groups: Groups) -> list[slice]:
    ends = accumulate(groups)
    return [slice(end - n, end) for end, n in zip(ends, groups, strict=True)]


def _select_logits(
    batch: Batch, rows: slice, *, reference: bool = True
) -> tuple[Logits, Logits | None]:
    logits = Logits(batch.image[rows], batch.text[rows], batch.scale)
    ref_image, ref_text, ref_scale = batch[3:]
    if not reference or ref_image is None or ref_text is None or ref_scale is None:
        return logits, None
    return logits, Logits(ref_image[rows], ref_text[rows], ref_scale)


def _stable_sums(logits: Logits, ref: Logits | None) -> tuple[Shift, Shift | None, Sums]:
    """The sums with the fixed shift or, where they under- or overflow, with the true maxima."""
    shift = Shift.from_bound(logits)
    ref_shift = None if ref is None else Shift.from_bound(ref)
    sums = _sum_tiles(logits, ref, shift, ref_shift)
    if len(logits.image) < 2 or _are_sound(sums, ref):
        return shift, ref_shift, sums
    if _has_lost_terms(logits, sums.student):
        shift = Shift.from_peaks(logits)
    if ref is not None and _has_lost_terms(ref, sums.ref, sums.cross):
        ref_shift = Shift.from_peaks(ref)
    return shift, ref_shift, _sum_tiles(logits, ref, shift, ref_shift)


def _are_sound(sums: Sums, ref: Logits | None) -> bool:
    """The guard of every call; it costs one host sync."""
    positive = sums.student if ref is None else torch.stack((sums.student, sums.ref))
    in_range = (positive >= UNDERFLOW).all() & (positive < torch.inf).all()
    return bool(in_range & sums.cross.isfinite().all())


def _has_lost_terms(logits: Logits, positive: Tensor, *others: Tensor) -> bool:
    if bool((positive < UNDERFLOW).any()):
        return True
    overflow = not all(bool(x.isfinite().all()) for x in (positive, *others))
    return overflow and logits.has_finite_features()


def _sum_tiles(logits: Logits, ref: Logits | None, shift: Shift, ref_shift: Shift | None) -> Sums:
    n = len(logits.image)
    sums = Sums(*(logits.scale.new_zeros(2, n) for _ in range(3)))
    for rows, cols, s, s0 in _iterate_tiles(logits, ref):
        _add_tile(sums.student, shift.exp(s, rows, cols), rows, cols)
        if s0 is not None and ref_shift is not None:
            e0 = ref_shift.exp(s0, rows, cols)
            gap = s0.sub_(s)
            row = e0[0] * gap
            cross = (row, row if ref_shift.is_shared else e0[1] * gap)
            _add_tile(sums.ref, e0, rows, cols)
            _add_tile(sums.cross, cross, rows, cols)
    return sums


def _iterate_tiles(
    logits: Logits, ref: Logits | None
) -> Iterator[tuple[slice, slice, Tensor, Tensor | None]]:
    """(rows, cols, tile of S, tile of S0 or None) in a fixed order; none for a single pair."""
    n = len(logits.image)
    spans = _split_evenly(n, logits.image.device) if n > 1 else []
    for rows in spans:
        scaled = logits.scale_rows(rows)
        ref_scaled = None if ref is None else ref.scale_rows(rows)
        for cols in spans:
            s0 = None if ref is None or ref_scaled is None else ref.multiply(ref_scaled, cols)
            yield rows, cols, logits.multiply(scaled, cols), s0


def _split_evenly(n: int, device: torch.device) -> list[slice]:
    """The rows, and likewise the columns, of a group of n in nearly equal parts."""
    tile = _TILE_CPU if device.type == "cpu" else _TILE_ACCELERATOR
    step = math.ceil(n / math.ceil(n / tile))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _fill_diagonal(tile: Tensor, rows: slice, cols: slice, value: float) -> Tensor:
    """Put `value` on the group's diagonal where it crosses this tile."""
    return tile.fill_diagonal_(value) if rows == cols else tile


def _add_tile(sums: Tensor, tile: TilePair, rows: slice, cols: slice) -> None:
    sums[0, rows] += tile[0].sum(1)
    sums[1, cols] += tile[1].sum(0)


def _compute_losses(
    logits: Logits, ref: Logits | None, shift: Shift, ref_shift: Shift | None, sums: Sums
) -> tuple[Tensor, list[Softmax]]:
    """One group's losses, [2 or 4, n], and its one or two softmaxes."""
    diagonal = logits.diagonal()
    ce, softmax = _compute_cross_entropies(shift, sums.student, diagonal)
    if ref is None or ref_shift is None:
        return ce, [softmax]
    ref_diagonal = ref.diagonal()
    ref_ce, ref_softmax = _compute_cross_entropies(ref_shift, sums.ref, ref_diagonal)
    # Every logit is measured from its own diagonal (lse - diagonal is ce), so a matched pair's KL
    # consists of small numbers, not of differences of large ones. A lone pair has no sums:
    # 0 / tiny.
    tiny = torch.finfo(diagonal.dtype).tiny
    gap = sums.cross / sums.ref.clamp_min(tiny) - (ref_diagonal - diagonal)
    kl = ref_softmax.miss_probability * gap + ce - ref_ce
    return torch.cat((ce, kl)), [softmax, ref_softmax]


def _compute_cross_entropies(
    shift: Shift, sums: Tensor, diagonal: Tensor
) -> tuple[Tensor, Softmax]:
    """(cross-entropies [2, n], softmax) from the off-diagonal sums and the diagonal [n]."""
    gap = sums.log() + shift.values - diagonal
    ce = torch.logaddexp(gap, torch.zeros_like(gap))
    return ce, Softmax(shift, sums, gap.sigmoid())


def _backward(
    upstream: Tensor,
    batch: Batch,
    saved: tuple[Tensor, ...],
    groups: Groups,
    wanted: Wanted,
) -> Gradients:
    statistics, all_shared = saved
    image, text, scale = batch[:3]
    weights, largest = _normalise_upstream(upstream)
    # dscale follows from either feature gradient; make one for it where neither is wanted.
    makes_image = wanted.image or not wanted.text
    d_image = scale.new_zeros(image.shape) if makes_image else None
    d_text = scale.new_zeros(text.shape) if wanted.text else None
    with torch.autocast(image.device.type, enabled=False):
        for rows, shared in zip(_slice_groups(groups), all_shared.tolist(), strict=True):
            ce, kl = weights[:, :, rows]
            ce_used, kl_used = weights[:, :, rows].ne(0).flatten(1).any(1).tolist()
            if not (ce_used or kl_used):
                continue
            logits, ref = _select_logits(batch, rows, reference=kl_used)
            softmaxes = [
                Softmax(Shift(values, is_shared), sums, miss_probability)
                for (values, sums, miss_probability), is_shared in zip(
                    statistics[..., rows], shared, strict=True
                )
            ]
            of_image, of_text = (None if x is None else x[rows] for x in (d_image, d_text))
            _add_gradients(of_image, of_text, logits, ref, softmaxes, ce, kl)
        d_scale = None
        if wanted.scale:
            side, d_side = (text, d_text) if d_image is None else (image, d_image)
            assert d_side is not None
            d_scale = (side.to(scale.dtype) * d_side).sum() * largest
    for gradient in (d_image, d_text):
        if gradient is not None:
            gradient.mul_(scale * largest)
    if wanted.rounded:
        d_image = None if d_image is None else d_image.to(image.dtype)
        d_text = None if d_text is None else d_text.to(text.dtype)
    return d_image if wanted.image else None, d_text, d_scale


def _normalise_upstream(upstream: Tensor) -> tuple[Tensor, Tensor]:
    """(upstream / its largest finite magnitude, [2 (ce, kl), 2 (row, col), N]; that magnitude).

    Weights of about 1 keep a 1/N out of factors that may be 1e-34 already (sums up to exp(78)).
    """
    largest = upstream.abs().masked_fill(~upstream.isfinite(), 0.0).amax()
    weights = upstream / torch.where(largest == 0, torch.ones_like(largest), largest)
    if len(weights) == 2:
        weights = torch.cat((weights, torch.zeros_like(weights)))
    return weights.reshape(2, 2, -1), largest


def _add_gradients(
    d_image: Tensor | None,  # [n, D]
    d_text: Tensor | None,  # [n, D]
    logits: Logits,
    ref: Logits | None,
    softmaxes: list[Softmax],  # of logits, and of ref where there is one
    ce: Tensor,  # [2, n] weights
    kl: Tensor,  # [2, n] weights
) -> None:
    """Add G @ text and G.T @ image, G the gradient of the weighted losses with respect to S."""
    dtype = logits.scale.dtype
    student, teacher = softmaxes[0], softmaxes[-1]
    factors = student.factors(ce + kl)
    diagonal = -(ce + kl) * student.miss_probability
    if ref is not None:
        ref_factors = teacher.factors(kl)
        diagonal += kl * teacher.miss_probability
    for rows, cols, s, s0 in _iterate_tiles(logits, ref):
        g = student.shift.weighted_exp(s, factors, rows, cols)
        if s0 is not None:
            g -= teacher.shift.weighted_exp(s0, ref_factors, rows, cols)
        if d_image is not None:
            d_image[rows].addmm_(g, logits.text[cols].to(dtype))
        if d_text is not None:
            d_text[cols].addmm_(g.T, logits.image[rows].to(dtype))
    g_diagonal = diagonal.sum(0).unsqueeze(1)
    if d_image is not None:
        d_image.addcmul_(g_diagonal, logits.text.to(dtype))
    if d_text is not None:
        d_text.addcmul_(g_diagonal, logits.image.to(dtype))


# Memory O(N D) for the gradients and a few tiles. FLOPs, forward and backward: per group 12 n^2 D
# with the KL, 8 n^2 D without. Besides the statistics, each group and matrix saves whether its
# shift is one number, on the CPU, where the backward pass asks.
contrastive_chunked = register(
    "contrastive_chunked",
    {
        "shared": lambda batch, groups: batch.scale.new_empty(
            len(groups), batch.matrices, dtype=torch.bool, device="cpu"
        )
    },
    key="CompositeExplicitAutograd",
    forward=_forward,
    backward=_backward,
)
