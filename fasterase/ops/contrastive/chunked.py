"""The contrastive operator over tiles of plain torch: no N x N matrix alive, on any device.

README.md has the maths; the names here are those used there.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fasterase.ops.contrastive.dense import Contrastive
from fasterase.ops.contrastive.tiles import Logits, Shift, Sums, stable_sums, walk


def contrastive_chunked(
    image: Tensor,  # [N, D]
    text: Tensor,  # [N, D]
    scale: Tensor,  # [] in the dtype of the computation
    ref_image: Tensor | None,  # [N, D0]
    ref_text: Tensor | None,  # [N, D0]
    ref_scale: Tensor | None,  # []
    groups: tuple[int, ...],  # none empty
) -> Contrastive:
    """Same numbers as `contrastive_dense`; differentiable once, deterministic.

    Memory O(N D) for the gradients and a few tiles. FLOPs, forward and backward: 12 n^2 D a group
    with the KL, 8 n^2 D without.
    """
    return Contrastive(*_Chunked.apply(image, text, scale, ref_image, ref_text, ref_scale, groups))


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


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        ref_image: Tensor | None,
        ref_text: Tensor | None,
        ref_scale: Tensor | None,
        groups: tuple[int, ...],
    ) -> tuple[Tensor | None, ...]:
        features = (image, text, scale, ref_image, ref_text, ref_scale)
        losses = scale.new_empty(2 if ref_image is None else 4, len(image))
        softmaxes = scale.new_empty(len(losses) // 2, 3, 2, len(image))
        shared: list[list[bool]] = []
        with torch.autocast(image.device.type, enabled=False):
            for rows in _rows(groups):
                logits, ref = _group(features, rows)
                shift, ref_shift, sums = stable_sums(logits, ref)
                losses[:, rows], found = _losses(logits, ref, shift, ref_shift, sums)
                for kept, softmax in zip(softmaxes[..., rows], found, strict=True):
                    kept.copy_(torch.stack((softmax.shift.by, softmax.sums, softmax.off)))
                shared.append([softmax.shift.shared for softmax in found])
        ctx.groups, ctx.shared = groups, shared
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*features, softmaxes)
        return (*losses, None, None)[:4]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        *features, softmaxes = ctx.saved_tensors
        image, text, scale = features[:3]
        wants_image, wants_text, wants_scale = ctx.needs_input_grad[:3]
        weights, unit = _weights(upstream, scale, len(image))
        # dscale follows from either feature gradient; one is made for it where none is wanted.
        d_image = _zeros(image, scale) if wants_image or not wants_text else None
        d_text = _zeros(text, scale) if wants_text else None
        with torch.autocast(image.device.type, enabled=False):
            for rows, shared in zip(_rows(ctx.groups), ctx.shared, strict=True):
                ce, kl = weights[:, :, rows]
                ce_used, kl_used = weights[:, :, rows].ne(0).flatten(1).any(1).tolist()
                if not (ce_used or kl_used):
                    continue
                logits, ref = _group(features, rows, reference=kl_used)
                _add_gradients(
                    None if d_image is None else d_image[rows],
                    None if d_text is None else d_text[rows],
                    logits,
                    ref,
                    [
                        _Softmax(Shift(by, is_shared), sums, off)
                        for (by, sums, off), is_shared in zip(
                            softmaxes[..., rows], shared, strict=True
                        )
                    ],
                    ce,
                    kl,
                )
            d_scale = None
            if wants_scale:
                side, d_side = (text, d_text) if d_image is None else (image, d_image)
                assert d_side is not None
                d_scale = (side.to(scale.dtype) * d_side).sum() * unit
        for gradient in (d_image, d_text):
            if gradient is not None:
                gradient.mul_(scale * unit)
        return (
            d_image.to(image.dtype) if wants_image and d_image is not None else None,
            d_text.to(text.dtype) if d_text is not None else None,
            d_scale,
            *(None,) * 4,
        )


def _rows(groups: tuple[int, ...]) -> list[slice]:
    ends = accumulate(groups)
    return [slice(end - n, end) for end, n in zip(ends, groups, strict=True)]


def _group(features: Any, rows: slice, *, reference: bool = True) -> tuple[Logits, Logits | None]:
    image, text, scale, ref_image, ref_text, ref_scale = features
    logits = Logits(image[rows], text[rows], scale)
    if ref_image is None or not reference:
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


def _weights(upstream: tuple[Tensor | None, ...], like: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Upstream gradients [2 (ce, kl), 2 (row, col), N] over their largest magnitude, and that.

    Weights of about 1 keep a 1/N out of factors that may be 1e-34 already (sums up to exp(78)).
    """
    rows = [like.new_zeros(n) if gradient is None else gradient for gradient in upstream]
    weights = torch.stack(rows).view(2, 2, n)
    unit = weights.abs().amax()
    return weights / torch.where(unit == 0, torch.ones_like(unit), unit), unit


def _zeros(features: Tensor, scale: Tensor) -> Tensor:
    return torch.zeros_like(features, dtype=scale.dtype)


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
