"""The contrastive operator over tiles of plain torch: no N x N matrix alive, on any device.

README.md has the maths; the names here are those used there.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from fasterase.ops.contrastive.operator import Batch, Gradients, Groups, Wanted, register
from fasterase.ops.contrastive.tiles import Logits, Shift, Sums, stable_sums, walk


class _Softmax(NamedTuple):
    """What one group's S comes down to, (rows, columns) in the first axis."""

    shift: Shift
    sums: Tensor  # [2, n] of exp(s - shift) beside the diagonal
    off: Tensor  # [2, n] the probability beside the diagonal

    def factors(self, weight: Tensor) -> Tensor:
        """[2, n] that turn exp(s - shift) into weight * p.

        By the sums and not by exp(shift - lse): then a row of p adds up to `off` to the last bit,
        where an lse near 100, rounded, would tilt the whole row by 4e-6, and features that share a
        direction would feel it 100-fold.
        """
        return weight * (self.off / self.sums)


def _rows(groups: Groups) -> list[slice]:
    ends = accumulate(groups)
    return [slice(end - n, end) for end, n in zip(ends, groups, strict=True)]


def _group(batch: Batch, rows: slice, *, reference: bool = True) -> tuple[Logits, Logits | None]:
    logits = Logits(batch.image[rows], batch.text[rows], batch.scale)
    ref_image, ref_text, ref_scale = batch[3:]
    if not reference or ref_image is None or ref_text is None or ref_scale is None:
        return logits, None
    return logits, Logits(ref_image[rows], ref_text[rows], ref_scale)


def _losses(
    logits: Logits, ref: Logits | None, shift: Shift, ref_shift: Shift | None, sums: Sums
) -> tuple[Tensor, list[_Softmax]]:
    """One group's losses, [2 or 4, n], and its one or two softmaxes."""
    own = logits.diagonal()
    ce, softmax = _softmax(shift, sums.student, own)
    if ref is None or ref_shift is None:
        return ce, [softmax]
    ref_own = ref.diagonal()
    ref_ce, ref_softmax = _softmax(ref_shift, sums.ref, ref_own)
    # Every logit is measured from its own diagonal (lse - own is ce), so that a matched pair's KL
    # is made of small numbers, not of differences of large ones. A lone pair has no sums: 0 / tiny.
    gap = sums.cross / sums.ref.clamp_min(torch.finfo(own.dtype).tiny) - (ref_own - own)
    kl = ref_softmax.off * gap + ce - ref_ce
    return torch.cat((ce, kl)), [softmax, ref_softmax]


def _softmax(shift: Shift, sums: Tensor, own: Tensor) -> tuple[Tensor, _Softmax]:
    """(cross-entropies [2, n], softmax) from the off-diagonal sums and the diagonal `own` [n]."""
    gap = sums.log() + shift.by - own
    ce = torch.logaddexp(gap, torch.zeros_like(gap))
    return ce, _Softmax(shift, sums, gap.sigmoid())


def _weights(upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Upstream gradients [2 or 4, N] as [2 (ce, kl), 2 (row, col), N] over their largest finite
    magnitude, and that.

    Weights of about 1 keep a 1/N out of factors that may be 1e-34 already (sums up to exp(78)).
    """
    unit = upstream.abs().masked_fill(~upstream.isfinite(), 0.0).amax()
    weights = upstream / torch.where(unit == 0, torch.ones_like(unit), unit)
    if len(weights) == 2:
        weights = torch.cat((weights, torch.zeros_like(weights)))
    return weights.reshape(2, 2, -1), unit


def _zeros(features: Tensor, scale: Tensor) -> Tensor:
    return scale.new_zeros(features.shape)


def _add_gradients(
    d_image: Tensor | None,  # [n, D]
    d_text: Tensor | None,  # [n, D]
    logits: Logits,
    ref: Logits | None,
    softmaxes: list[_Softmax],  # of logits, and of ref where there is one
    ce: Tensor,  # [2, n] weights
    kl: Tensor,  # [2, n]
) -> None:
    """Add G @ text and G.T @ image, G the gradient of the weighted losses with respect to S."""
    dtype = logits.scale.dtype
    student, teacher = softmaxes[0], softmaxes[-1]
    factors = student.factors(ce + kl)
    diagonal = -(ce + kl) * student.off
    if ref is not None:
        ref_factors = teacher.factors(kl)
        diagonal += kl * teacher.off
    for rows, cols, s, s0 in walk(logits, ref):
        g = student.shift.weighted_exp(s, factors, rows, cols)
        if s0 is not None:
            g -= teacher.shift.weighted_exp(s0, ref_factors, rows, cols)
        if d_image is not None:
            d_image[rows].addmm_(g, logits.text[cols].to(dtype))
        if d_text is not None:
            d_text[cols].addmm_(g.T, logits.image[rows].to(dtype))
    own = diagonal.sum(0).unsqueeze(1)
    if d_image is not None:
        d_image.addcmul_(own, logits.text.to(dtype))
    if d_text is not None:
        d_text.addcmul_(own, logits.image.to(dtype))


def _forward(batch: Batch, groups: Groups) -> tuple[Tensor, Tensor, Tensor]:
    losses = batch.scale.new_empty(2 * batch.matrices, len(batch.image))
    statistics = batch.scale.new_empty(batch.matrices, 3, 2, len(batch.image))
    shared: list[list[bool]] = []
    with torch.autocast(batch.image.device.type, enabled=False):
        for rows in _rows(groups):
            logits, ref = _group(batch, rows)
            shift, ref_shift, sums = stable_sums(logits, ref)
            losses[:, rows], found = _losses(logits, ref, shift, ref_shift, sums)
            for kept, softmax in zip(statistics[..., rows], found, strict=True):
                kept.copy_(torch.stack((softmax.shift.by, softmax.sums, softmax.off)))
            shared.append([softmax.shift.shared for softmax in found])
    return losses, statistics, torch.tensor(shared)


def _backward(
    upstream: Tensor,
    batch: Batch,
    saved: tuple[Tensor, ...],
    groups: Groups,
    wanted: Wanted,
) -> Gradients:
    statistics, all_shared = saved
    image, text, scale = batch[:3]
    weights, unit = _weights(upstream)
    # dscale follows from either feature gradient; one is made for it where none is wanted.
    d_image = _zeros(image, scale) if wanted.image or not wanted.text else None
    d_text = _zeros(text, scale) if wanted.text else None
    with torch.autocast(image.device.type, enabled=False):
        for rows, shared in zip(_rows(groups), all_shared.tolist(), strict=True):
            ce, kl = weights[:, :, rows]
            ce_used, kl_used = weights[:, :, rows].ne(0).flatten(1).any(1).tolist()
            if not (ce_used or kl_used):
                continue
            logits, ref = _group(batch, rows, reference=kl_used)
            _add_gradients(
                None if d_image is None else d_image[rows],
                None if d_text is None else d_text[rows],
                logits,
                ref,
                [
                    _Softmax(Shift(by, is_shared), sums, off)
                    for (by, sums, off), is_shared in zip(
                        statistics[..., rows], shared, strict=True
                    )
                ],
                ce,
                kl,
            )
        d_scale = None
        if wanted.scale:
            side, d_side = (text, d_text) if d_image is None else (image, d_image)
            assert d_side is not None
            d_scale = (side.to(scale.dtype) * d_side).sum() * unit
    for gradient in (d_image, d_text):
        if gradient is not None:
            gradient.mul_(scale * unit)
    if wanted.rounded:
        d_image = None if d_image is None else d_image.to(image.dtype)
        d_text = None if d_text is None else d_text.to(text.dtype)
    return d_image if wanted.image else None, d_text, d_scale


# Memory O(N D) for the gradients and a few tiles. FLOPs, forward and backward: 12 n^2 D a group
# with the KL, 8 n^2 D without. Beside the statistics a group and matrix saves whether its shift is
# one number: on the CPU, where the backward pass asks.
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
