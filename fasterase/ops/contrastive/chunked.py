"""The contrastive operator over tiles of plain torch: no N x N matrix in memory, on any device.

README.md derives the formulas; names here follow it. On an accelerator nothing is read back, so the
host does not wait, and features that are multiplied in half precision use its matrix units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from fasterase.ops.contrastive.checks import HALF_DTYPES, refuse_tf32
from fasterase.ops.contrastive.operator import Batch, Gradients, Groups, Wanted, register

# exp(66) times 2^20 columns, also times the KL's (s0 - s), still fits fp32.
HEADROOM = 66.0
# A smaller sum may have lost terms to underflow: fp32 is normal down to 2^-126.
UNDERFLOW = 2.0**-80
# fp32 tiles of 1 MB stay in a CPU's L2; of 5 on 28 ms (N=2048, D=256, one core), 256x512 to
# 1024x1024 differ by 3 %. An accelerator wants fewer launches: 64 MB.
_TILE_CPU, _TILE_ACCELERATOR = 512, 4096
# What G, at most 6, is multiplied by before it is rounded: fp16 is normal down to 6e-5.
_GAIN = {torch.float16: 8192.0, torch.bfloat16: 1.0}

# (for the row direction, for the column direction); one object if they are equal
TilePair = tuple[Tensor, Tensor]


class Rounded(NamedTuple):
    """Features in half precision, stretched by a power of two: the longest row is 1 to 2 long."""

    image: Tensor  # [n, D]
    text: Tensor  # [n, D]
    stretches: Tensor  # [2] of image and text

    @classmethod
    def of(cls, image: Tensor, text: Tensor, dtype: torch.dtype) -> Rounded:
        """Round the features; those that have the dtype stay as they are."""
        sides, stretches = [], []
        for side in (image, text):
            stretch = torch.ones((), device=side.device)
            if side.dtype != dtype:
                _, exponent = torch.frexp(_longest_row(side.float()))
                stretch = torch.ldexp(stretch, (1 - exponent).clamp(-126, 126))
            sides.append((side * stretch).to(dtype))
            stretches.append(stretch)
        return cls(sides[0], sides[1], torch.stack(stretches))


class Logits(NamedTuple):
    """S = scale * image @ text.T of one group, made by tiles, in the dtype of scale."""

    image: Tensor  # [n, D] as given
    text: Tensor  # [n, D]
    scale: Tensor  # []
    rounded: Rounded | None  # what is multiplied, if that is not image and text

    def scale_rows(self, rows: slice) -> Tensor:
        """The left factor of `multiply`, made once per row of tiles."""
        if self.rounded is not None:
            return self.rounded.image[rows]
        return self.image[rows].to(self.scale.dtype) * self.scale

    def multiply(self, scaled_rows: Tensor, cols: slice) -> Tensor:
        """The tile of S for these rows and columns."""
        if self.rounded is not None:
            tile = _multiply_halves(scaled_rows, self.rounded.text[cols].T)
            return tile.mul_(self.scale / self.rounded.stretches.prod())
        return scaled_rows @ self.text[cols].to(self.scale.dtype).T

    def diagonal(self) -> Tensor:
        dtype = self.scale.dtype
        return self.scale * (self.image.to(dtype) * self.text.to(dtype)).sum(1)


class Shift(NamedTuple):
    """The numbers subtracted from the logits before exp."""

    values: Tensor  # [2, n] for the rows, for the columns
    is_shared: bool  # one number everywhere, so one exp serves both directions

    @classmethod
    def from_bound(cls, logits: Logits) -> Shift:
        """max(0, B - 66) with B >= |S|. B leaves out NaN rows: they must not reach others."""
        bound = logits.scale.abs()
        for side in (logits.image, logits.text):
            bound = bound * _longest_row(side.to(bound.dtype))
        return cls((bound - HEADROOM).clamp_min(0).expand(2, len(logits.image)), is_shared=True)

    @classmethod
    def from_peaks(cls, logits: Logits) -> Shift:
        """The largest logits beside the diagonal, once `rise` has seen all tiles: exp is at most 1.

        They stay finite, so that infinite logits do not become NaN.
        """
        lowest = torch.finfo(logits.scale.dtype).min
        return cls(logits.scale.new_full((2, len(logits.image)), lowest), is_shared=False)

    def rise(self, s: Tensor, rows: slice, cols: slice, *sums: Tensor) -> None:
        """Take the largest logits of a tile, and what was summed up so far by the same factor."""
        if self.is_shared:
            return
        if rows == cols:
            s = _fill_diagonal(s.clone(), rows, cols, -torch.inf)
        most = torch.finfo(s.dtype).max
        for values, dim, part in ((self.values[0], 1, rows), (self.values[1], 0, cols)):
            peak = torch.maximum(values[part], s.amax(dim).clamp(-most, most))
            shrink = (values[part] - peak).exp()
            for each in sums:
                each[1 - dim, part] *= shrink
            values[part] = peak

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


def _forward(batch: Batch, groups: Groups, products: str) -> tuple[Tensor, Tensor, Tensor]:
    losses = batch.scale.new_empty(2 * batch.matrices, len(batch.image))
    statistics = batch.scale.new_empty(batch.matrices, 3, 2, len(batch.image))
    shared: list[list[bool]] = []
    with _multiplying(batch, products):
        for rows in _slice_groups(groups):
            logits, ref = _select_logits(batch, rows, products)
            losses[:, rows], softmaxes = _compute_losses(logits, ref, *_stable_sums(logits, ref))
            for saved, softmax in zip(statistics[..., rows], softmaxes, strict=True):
                shift, sums, miss_probability = softmax
                saved.copy_(torch.stack((shift.values, sums, miss_probability)))
            shared.append([softmax.shift.is_shared for softmax in softmaxes])
    return losses, statistics, torch.tensor(shared)


@contextmanager
def _multiplying(batch: Batch, products: str) -> Iterator[None]:
    """Keep torch at the precision of the products, whatever its settings say."""
    with torch.autocast(batch.image.device.type, enabled=False):
        if products == "fp32" and batch.image.is_cuda:
            with refuse_tf32():
                yield
        else:
            yield


def _slice_groups(groups: Groups) -> list[slice]:
    ends = accumulate(groups)
    return [slice(end - n, end) for end, n in zip(ends, groups, strict=True)]


def _select_logits(
    batch: Batch, rows: slice, products: str, *, reference: bool = True
) -> tuple[Logits, Logits | None]:
    dtype = HALF_DTYPES.get(products)

    def select(image: Tensor, text: Tensor, scale: Tensor) -> Logits:
        image, text = image[rows], text[rows]
        rounded = None if dtype is None else Rounded.of(image, text, dtype)
        return Logits(image, text, scale, rounded)

    ref_image, ref_text, ref_scale = batch[3:]
    logits = select(batch.image, batch.text, batch.scale)
    if not reference or ref_image is None or ref_text is None or ref_scale is None:
        return logits, None
    return logits, select(ref_image, ref_text, ref_scale)


def _stable_sums(logits: Logits, ref: Logits | None) -> tuple[Shift, Shift | None, Sums]:
    """The sums with a fixed shift or, where they under- or overflow, with the true maxima.

    To know that, the host would wait for an accelerator; its matrix units leave time for maxima.
    """
    if not logits.image.is_cpu:
        return _sum_tiles(logits, ref, Shift.from_peaks)
    found = _sum_tiles(logits, ref, Shift.from_bound)
    sums = found[2]
    positive = sums.student if ref is None else torch.stack((sums.student, sums.ref))
    in_range = (positive >= UNDERFLOW).all() & (positive < torch.inf).all()
    if len(logits.image) < 2 or in_range & sums.cross.isfinite().all():
        return found
    return _sum_tiles(logits, ref, Shift.from_peaks)


def _sum_tiles(
    logits: Logits, ref: Logits | None, make_shift: Callable[[Logits], Shift]
) -> tuple[Shift, Shift | None, Sums]:
    n = len(logits.image)
    shift, ref_shift = make_shift(logits), None if ref is None else make_shift(ref)
    sums = Sums(*(logits.scale.new_zeros(2, n) for _ in range(3)))
    for rows, cols, s, s0 in _iterate_tiles(logits, ref):
        shift.rise(s, rows, cols, sums.student)
        _add_tile(sums.student, shift.exp(s, rows, cols), rows, cols)
        if s0 is not None and ref_shift is not None:
            ref_shift.rise(s0, rows, cols, sums.ref, sums.cross)
            e0 = ref_shift.exp(s0, rows, cols)
            gap = s0.sub_(s)
            row = e0[0] * gap
            cross = (row, row if ref_shift.is_shared else e0[1] * gap)
            _add_tile(sums.ref, e0, rows, cols)
            _add_tile(sums.cross, cross, rows, cols)
    return shift, ref_shift, sums


def _iterate_tiles(
    logits: Logits, ref: Logits | None
) -> Iterator[tuple[slice, slice, Tensor, Tensor | None]]:
    """(rows, cols, tile of S, tile of S0 or None) in a fixed order; none for a single pair."""
    n = len(logits.image)
    tile = _TILE_CPU if logits.image.is_cpu else _TILE_ACCELERATOR
    step = math.ceil(n / math.ceil(n / tile))  # nearly equal parts
    spans = [slice(start, min(start + step, n)) for start in range(0, n, step)] if n > 1 else []
    for rows in spans:
        scaled = logits.scale_rows(rows)
        ref_scaled = None if ref is None else ref.scale_rows(rows)
        for cols in spans:
            s0 = None if ref is None or ref_scaled is None else ref.multiply(ref_scaled, cols)
            yield rows, cols, logits.multiply(scaled, cols), s0


def _longest_row(rows: Tensor) -> Tensor:
    """[] the largest length of a row, leaving out rows that are not finite."""
    norms = torch.linalg.vector_norm(rows, dim=1)
    return norms.nan_to_num(nan=0.0, posinf=0.0).amax()


def _multiply_halves(left: Tensor, right: Tensor) -> Tensor:
    """The product of two matrices in half precision, in fp32: never rounded in between."""
    if left.is_cpu or torch.version.hip is not None:  # which lack it
        return left.float() @ right.float()
    return torch.mm(left, right, out_dtype=torch.float32)


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
    products: str,
) -> Gradients:
    statistics, all_shared = saved
    image, text, scale = batch[:3]
    weights, largest = _normalise_upstream(upstream)
    # dscale follows from either feature gradient; make one for it where neither is wanted.
    makes_image = wanted.image or not wanted.text
    d_image = scale.new_zeros(image.shape) if makes_image else None
    d_text = scale.new_zeros(text.shape) if wanted.text else None
    with _multiplying(batch, products):
        for rows, shared in zip(_slice_groups(groups), all_shared.tolist(), strict=True):
            ce, kl = weights[:, :, rows]
            ce_used = kl_used = True
            if image.is_cpu:  # elsewhere it would have to be waited for
                ce_used, kl_used = weights[:, :, rows].ne(0).flatten(1).any(1).tolist()
            if not (ce_used or kl_used):
                continue
            logits, ref = _select_logits(batch, rows, products, reference=kl_used)
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
        _add_products(d_image, d_text, g, logits, rows, cols)
    if logits.rounded is not None:
        gain = _GAIN[logits.rounded.image.dtype]
        for gradient, stretch in zip((d_text, d_image), logits.rounded.stretches, strict=True):
            if gradient is not None:
                gradient.div_(stretch * gain)
    g_diagonal = diagonal.sum(0).unsqueeze(1)
    if d_image is not None:
        d_image.addcmul_(g_diagonal, logits.text.to(dtype))
    if d_text is not None:
        d_text.addcmul_(g_diagonal, logits.image.to(dtype))


def _add_products(
    d_image: Tensor | None,
    d_text: Tensor | None,
    g: Tensor,
    logits: Logits,
    rows: slice,
    cols: slice,
) -> None:
    """Add a tile's `g @ text` and `g.T @ image`, as they are rounded; g may be overwritten."""
    if logits.rounded is None:
        if d_image is not None:
            d_image[rows].addmm_(g, logits.text[cols].to(g.dtype))
        if d_text is not None:
            d_text[cols].addmm_(g.T, logits.image[rows].to(g.dtype))
        return
    image, text, _ = logits.rounded
    g = g.mul_(_GAIN[image.dtype]).to(image.dtype)
    if d_image is not None:
        d_image[rows] += _multiply_halves(g, text[cols])
    if d_text is not None:
        d_text[cols] += _multiply_halves(g.T, image[rows])


# Memory O(N D) for the gradients and a few tiles. FLOPs, forward and backward: per group 12 n^2 D
# with the KL, 8 n^2 D without. Besides the statistics, each group and matrix saves whether its
# shift is one number, on the CPU, where the backward pass asks.
contrastive_chunked = register(
    "contrastive_chunked",
    {
        "shared": lambda batch, groups, products: batch.scale.new_empty(
            len(groups), batch.matrices, dtype=torch.bool, device="cpu"
        )
    },
    key="CompositeExplicitAutograd",
    forward=_forward,
    backward=_backward,
    options_schema="str products",
    options=lambda batch, groups, is_differentiable, products: (products,),
)
