"""The erasure objective: CLIPErase's three losses, a floor and an anchor, on [N] vectors.

This module applies weights, signs and sets; `ops.contrastive` computes the similarity matrices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from fasterase.errors import InputError
from fasterase.ops.contrastive import Contrastive, contrastive, weighted_contrastive
from fasterase.ops.contrastive.api import choose_backend
from fasterase.ops.contrastive.checks import (
    check_labels,
    check_pairs,
    check_products,
    check_reference,
    check_scale,
    compute_dtype,
    scale_tensor,
)

_NOT_NEGATIVE = (
    *("forget_weight", "retain_weight", "consistency_weight", "anchor_weight", "cross_weight"),
    "floor_margin",
)
# Distances of a mean cosine below which their loss is quadratic.
SMOOTH_STRAY = 0.05
# Weight of what links exceed: all that holds other facts holds theirs too.
STRANGERS_WEIGHT = 3.0
FORGET_LOSSES = ("similarity", "contrastive")
NEGATIVES = ("own", "joint")


class EraseLoss(NamedTuple):
    """The weighted total and its terms, 0-d tensors."""

    total: Tensor
    forget: Tensor
    retain: Tensor
    consistency: Tensor
    anchor: Tensor


class Strangers(NamedTuple):
    """What a fact and a picture that are no pair are like, under the original."""

    text: Tensor  # [D] mean features of made-up facts
    image: Tensor  # [D] those of pictures of the same kind
    # How far above the mean cosine with them a pair is that ranks as made-up ones do.
    margins: tuple[float, float] = (0.0, 0.0)


class ForgetGroup(NamedTuple):
    """Some forget rows of a batch, such as those of a concept, and what they are to end at."""

    rows: Tensor | slice = slice(0)  # [m] int64; none, until a step fills them in
    floor: float | None = None
    weight: float = 1.0  # the groups' sum is 1
    floor_margin: float = 0.0
    strangers: Strangers | None = None  # of links, in place of floor and cross terms


class Objective(NamedTuple):
    """Weights and options of `erase_loss`."""

    forget_weight: float = 3.0
    retain_weight: float = 1.0
    consistency_weight: float = 3.0
    forget_loss: str = "similarity"
    floor: float | None = None
    anchor_weight: float = 0.0
    negatives: str = "own"
    backend: str = "auto"
    products: str = "auto"
    cross_weight: float = 0.0
    floor_margin: float = 0.0


def erase_loss(
    image: Tensor,  # [N, D]
    text: Tensor,  # [N, D]
    scale: Tensor | float,
    ref_image: Tensor | None,  # [N, D0]
    ref_text: Tensor | None,  # [N, D0]
    ref_scale: Tensor | float | None,
    *,
    n_forget: int,
    forget_weight: float = 3.0,
    retain_weight: float = 1.0,
    consistency_weight: float = 3.0,
    forget_loss: str = "similarity",
    floor: float | None = None,
    anchor_weight: float = 0.0,
    labels: Tensor | None = None,  # [N]
    negatives: str = "own",
    backend: str = "auto",
    products: str = "auto",
    cross_weight: float = 0.0,
    floor_margin: float = 0.0,
) -> EraseLoss:
    """CLIPErase (Yang et al., ACL 2025): `3 L_F + 1 L_R + 3 L_C`, by default as in the paper.

    With F the first `n_forget` rows, R the others, and `ce`, `kl` from `fasterase.contrastive`:

        forget      = (image * text).sum(1)[F].mean()               L_F; see `floor`
        retain      = ((ce_row + ce_col) / 2)[R].mean()             L_R, CLIP's InfoNCE
        consistency = (kl_row + kl_col)[R].mean()                   L_C, KL(original || current)
        anchor      = (|image - ref_image|^2 + |text - ref_text|^2)[R].mean()     not in the paper
        total       = forget_weight * forget + retain_weight * retain
                      + consistency_weight * consistency + anchor_weight * anchor

    An empty set contributes 0. A similarity matrix that no weight uses is not computed, and its
    terms are reported as 0; the same holds for the KL and the anchor at weight 0.

    With `cross_weight` c > 0 (not in the paper) each tower also forgets against the original's
    other tower, never below the floor, and the mean cosine of each forget row with retain rows
    moves to the floor: a caption that moves towards all other images ends less similar to its own
    than to these.

        forget      = e(image, text) + c (e(image, ref_text) + e(ref_image, text)
                      + d(image, ref_text) + d(text, ref_image)), where
        e(a, b)     = max(cos - floor - floor_margin, 0).mean() + max(floor - cos.mean(), 0)
        cos         = (a * b).sum(1)[F]
        d(a, b)     = huber(a[F] @ b[R].mean(0) - floor).mean(), |x| - 0.025 from |x| = 0.05 on

    Args:
        image, text: L2-normalised features; row i of both is pair i, forget pairs first. They are
            used as given: for rows that are not normalised, "cos" is the dot product.
        scale: exp(logit_scale), a 0-d tensor or a float.
        ref_image, ref_text, ref_scale: the frozen original's, constants; may be None where the
            weights of consistency, anchor and cross are 0. Anchor and cross need D0 == D.
        n_forget: how many rows are forget pairs, 0 to N.
        forget_loss: "similarity", or "contrastive": minus the symmetric InfoNCE of the forget rows.
            If the whole forget set has one caption, it needs `negatives="joint"` to have an effect.
        floor: with "similarity", the cosine below which a forget pair is left alone:
            mean of `max(cos - floor - floor_margin, 0)`.
        labels: any integers; pairs with the same label are each other's positives. Best on the
            CPU, as in `fasterase.contrastive`.
        negatives: "own": forget and retain are two similarity matrices. "joint": one over all rows,
            each loss the mean over its own rows.
        backend, products: as in `fasterase.contrastive`.
        cross_weight: see above; acts with "similarity". Without a floor, e is the mean cosine.
        floor_margin: how far above the floor a pair is left alone already.

    Returns:
        `EraseLoss(total, forget, retain, consistency, anchor)`, fp32 (fp64 for fp64 features),
        each term differentiable in image, text and scale.

    Raises:
        InputError: an argument is not as described.
    """
    objective = Objective(
        forget_weight,
        retain_weight,
        consistency_weight,
        forget_loss,
        floor,
        anchor_weight,
        negatives,
        backend,
        products,
        cross_weight,
        floor_margin,
    )
    given = _Pairs(image, text, scale, ref_image, ref_text, ref_scale, labels, n_forget)
    pairs = _check(given, objective)
    forget, retain, consistency, anchor = _compute_terms(pairs, objective, is_weighted=False)[1]
    total = (
        pairs.zero
        + forget_weight * forget
        + retain_weight * retain
        + consistency_weight * consistency
        + anchor_weight * anchor
    )
    return EraseLoss(total, forget, retain, consistency, anchor)


def weighted_erase_loss(
    image: Tensor,  # [N, D]
    text: Tensor,  # [N, D]
    scale: Tensor | float,
    ref_image: Tensor | None,  # [N, D0]
    ref_text: Tensor | None,  # [N, D0]
    ref_scale: Tensor | float | None,
    objective: Objective,
    *,
    n_forget: int,
    labels: Tensor | None = None,  # [N]
    groups: Sequence[ForgetGroup] = (),
) -> EraseLoss:
    """`erase_loss` for a training step: only the total is differentiable, once.

    The gradients of the similarity matrices are made together with the losses, by
    `weighted_contrastive`; the backward pass multiplies them by the upstream gradient. With
    `groups`, which need the loss "similarity", `forget` is their weighted sum.
    """
    given = _Pairs(image, text, scale, ref_image, ref_text, ref_scale, labels, n_forget, groups)
    pairs = _check(given, objective)
    total, terms = _compute_terms(pairs, objective, is_weighted=True)
    if objective.forget_loss == "similarity":
        total = total + objective.forget_weight * terms[0]
    if objective.anchor_weight:
        total = total + objective.anchor_weight * terms[3]
    return EraseLoss(total, *(term.detach() for term in terms))


class _Pairs(NamedTuple):
    """The batch; once checked, scale is a tensor in the dtype of the computation."""

    image: Tensor  # [N, D]
    text: Tensor  # [N, D]
    scale: Any  # []
    ref_image: Tensor | None  # [N, D0]
    ref_text: Tensor | None  # [N, D0]
    ref_scale: Tensor | float | None
    labels: Tensor | None  # [N]
    n_forget: int
    groups: Sequence[ForgetGroup] = ()
    zero: Any = None  # [] a term without rows, once checked

    def originals(self) -> tuple[Tensor, Tensor]:
        """The original's features, which the checks have found."""
        assert self.ref_image is not None
        assert self.ref_text is not None
        return self.ref_image.to(self.scale.dtype), self.ref_text.to(self.scale.dtype)

    def mean(self, samples: Tensor) -> Tensor:
        return samples.mean() if len(samples) else self.zero


def _compute_terms(
    pairs: _Pairs, objective: Objective, *, is_weighted: bool
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The differentiable weighted total of the similarity matrices, or 0, and the four terms."""
    of_forget, of_retain, total = _compute_matrices(pairs, objective, is_weighted)
    forget = retain = consistency = anchor = pairs.zero
    if objective.forget_loss == "similarity" and pairs.n_forget:
        forget = _compute_forget(pairs, objective)
    elif of_forget is not None:
        forget = pairs.mean(-(of_forget.ce_row + of_forget.ce_col) / 2)
    if of_retain is not None:
        retain = pairs.mean((of_retain.ce_row + of_retain.ce_col) / 2)
        if of_retain.kl_row is not None and of_retain.kl_col is not None:
            consistency = pairs.mean(of_retain.kl_row + of_retain.kl_col)
    if objective.anchor_weight and pairs.n_forget < len(pairs.image):
        features = (pairs.image, pairs.text, *pairs.originals())
        retained = (each[pairs.n_forget :].to(pairs.scale.dtype) for each in features)
        anchor = moved_distance(*retained)
    return total, (forget, retain, consistency, anchor)


def _compute_matrices(
    pairs: _Pairs, objective: Objective, is_weighted: bool
) -> tuple[Contrastive | None, Contrastive | None, Tensor]:
    """Compute the similarity matrices that a weight uses, one or one per set, in one call.

    Return the losses of the forget and of the retain rows, None where there is no matrix, and
    their weighted total, 0 unless `is_weighted`.

    Two in one call have the KL for both sets or for neither. That of the forget rows is not used;
    its cost is a part of one matrix. A step on the CPU leaves it out.
    """
    uses_forget = objective.forget_loss == "contrastive" and objective.forget_weight != 0
    uses_retain = objective.retain_weight != 0 or objective.consistency_weight != 0
    if not (uses_forget or uses_retain):
        return None, None, pairs.zero
    n, n_forget = len(pairs.image), pairs.n_forget
    is_joint = objective.negatives == "joint"
    rows = slice(
        0 if uses_forget or is_joint else n_forget, n if uses_retain or is_joint else n_forget
    )
    is_double = uses_forget and uses_retain and not is_joint
    has_kl = objective.consistency_weight != 0 and rows.stop > n_forget
    call = _select_rows(pairs, rows, has_kl) | {
        "groups": (n_forget, n - n_forget) if is_double else None,
        "backend": objective.backend,
        "products": objective.products,
    }
    total = pairs.zero
    if is_weighted:
        spread = _spread_weights(pairs, objective, uses_forget, has_kl)
        weighted, losses = weighted_contrastive(weights=spread[:, rows], **call)
        total = total + weighted
    else:
        losses = contrastive(**call)
    border = n_forget - rows.start
    forget, retain = (
        Contrastive._make(None if loss is None else loss[part] for loss in losses)
        for part in (slice(0, border), slice(border, None))
    )
    return forget, retain, total


def _select_rows(pairs: _Pairs, rows: slice, has_kl: bool) -> dict[str, Any]:
    """Arguments of `contrastive` for these rows, with the original's features if `has_kl`."""
    reference = ("ref_image", "ref_text", "ref_scale") if has_kl else ()
    names = ("image", "text", "scale", "labels", *reference)
    found = {name: getattr(pairs, name) for name in names}
    for name, value in found.items():  # in a comprehension, torch.compile would fix the row count
        if isinstance(value, Tensor) and value.dim():
            found[name] = value[rows]
    return found


def _spread_weights(pairs: _Pairs, objective: Objective, uses_forget: bool, has_kl: bool) -> Tensor:
    """[4 or 2, N] weights of the per-sample losses in the total."""
    n_forget, n_retain = pairs.n_forget, len(pairs.image) - pairs.n_forget
    spread = pairs.scale.new_zeros(4 if has_kl else 2, len(pairs.image))
    if uses_forget:
        spread[:2, :n_forget] = -objective.forget_weight / (2 * max(n_forget, 1))
    spread[:2, n_forget:] = objective.retain_weight / (2 * max(n_retain, 1))
    spread[2:, n_forget:] = objective.consistency_weight / max(n_retain, 1)
    return spread


def _compute_forget(pairs: _Pairs, objective: Objective) -> Tensor:
    """The loss "similarity": of all forget rows, or the weighted sum of the groups' losses."""
    rows = slice(0, pairs.n_forget)
    whole = ForgetGroup(rows, objective.floor, floor_margin=objective.floor_margin)
    total = pairs.zero
    for group in pairs.groups or (whole,):
        total = total + group.weight * _compute_group(pairs, group, objective.cross_weight)
    return total


def _compute_group(pairs: _Pairs, group: ForgetGroup, cross_weight: float) -> Tensor:
    rows, dtype = group.rows, pairs.scale.dtype
    with torch.autocast(pairs.image.device.type, enabled=False):
        image, text = pairs.image[rows].to(dtype), pairs.text[rows].to(dtype)
        if group.strangers is not None:
            return _exceed_strangers(image, text, group.strangers)
        exceed = partial(_exceed, group, from_below=cross_weight > 0)
        own = exceed(image, text)
        if not cross_weight:
            return own
        ref_image, ref_text = pairs.originals()
        crossed = exceed(image, ref_text[rows]) + exceed(ref_image[rows], text)
        if group.floor is not None and pairs.n_forget < len(pairs.image):
            for features, others in ((image, ref_text), (text, ref_image)):
                crossed = crossed + _stray(features, others[pairs.n_forget :], group.floor)
        return own + cross_weight * crossed


def _stray(features: Tensor, others: Tensor, floor: float) -> Tensor:
    """How far mean cosines of forget rows with the other tower's retain rows are from the floor.

    A matched cosine at the floor is no trace only where unrelated ones have it for their mean, in
    both directions. Smooth at 0: the sign of a rounding error must not decide a gradient.
    """
    distance = features @ others.mean(0) - floor
    return smooth_l1_loss(distance, torch.zeros_like(distance), beta=SMOOTH_STRAY)


def _exceed(group: ForgetGroup, image: Tensor, text: Tensor, *, from_below: bool) -> Tensor:
    """How far cosines are above where they may rest, and if asked their mean below the floor."""
    cosine, floor = (image * text).sum(1), group.floor
    if floor is None:
        return cosine.mean()
    above = (cosine - floor - group.floor_margin).clamp_min(0).mean()
    return above + (floor - cosine.mean()).clamp_min(0) if from_below else above


def _exceed_strangers(image: Tensor, text: Tensor, strangers: Strangers) -> Tensor:
    """How far pairs are above their picture with other facts, and above their fact with others'.

    A clean model's facts are not far below made-up ones, they are among them; in both directions.
    """
    cosine = (image * text).sum(1)
    means = [image @ strangers.text.to(image), text @ strangers.image.to(image)]
    above = [cosine - mean - m for mean, m in zip(means, strangers.margins, strict=True)]
    return STRANGERS_WEIGHT * torch.stack(above).clamp_min(0).mean(1).sum()


def moved_distance(image: Tensor, text: Tensor, ref_image: Tensor, ref_text: Tensor) -> Tensor:
    """Return the mean over [n, D] pairs of `|image - ref_image|^2 + |text - ref_text|^2`."""
    moved = (image - ref_image).square().sum(1) + (text - ref_text).square().sum(1)
    return moved.mean()


def _check(pairs: _Pairs, objective: Objective) -> _Pairs:
    image, text, scale, n_forget = pairs.image, pairs.text, pairs.scale, pairs.n_forget
    check_pairs(image, text)
    check_scale(scale, "scale")
    if pairs.labels is not None:
        check_labels(pairs.labels, len(image))
    is_integer = isinstance(n_forget, int) and not isinstance(n_forget, bool)
    if not is_integer or not 0 <= n_forget <= len(image):
        raise InputError(
            f"n_forget must be an integer between 0 and the {len(image)} rows of image, forget "
            f"pairs first; got {n_forget!r}."
        )
    _check_options(objective)
    _check_originals(pairs, objective)
    scale = scale_tensor(scale, image, compute_dtype(image, text))
    # With gradients of 0, so that a loss without rows does not break the caller's backward pass.
    zero = image[:0].to(scale.dtype).sum() + text[:0].to(scale.dtype).sum() + scale.expand(0).sum()
    return pairs._replace(scale=scale, zero=zero)


def _check_options(objective: Objective) -> None:
    for name in _NOT_NEGATIVE:
        weight = getattr(objective, name)
        if not _is_number(weight) or weight < 0:
            raise InputError(f"{name} must be a number of at least 0; got {weight!r}.")
    for name, known in (("forget_loss", FORGET_LOSSES), ("negatives", NEGATIVES)):
        value = getattr(objective, name)
        if value not in known:
            raise InputError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}.")
    floor = objective.floor
    if floor is not None:
        if not _is_number(floor):
            raise InputError(
                f"floor must be None or a number, a cosine; got {floor!r}. "
                f"Only fasterase.unlearn measures one (floor='auto')."
            )
        if objective.forget_loss != "similarity":
            raise InputError(
                f"floor is a cosine and goes with forget_loss='similarity'; "
                f"got floor={floor} with forget_loss={objective.forget_loss!r}. Pass floor=None."
            )
    choose_backend(objective.backend)
    check_products(objective.products)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_originals(pairs: _Pairs, objective: Objective) -> None:
    features = {"ref_image": pairs.ref_image, "ref_text": pairs.ref_text}
    cross = objective.cross_weight if objective.forget_loss == "similarity" else 0
    needs_width = {"anchor_weight": objective.anchor_weight, "cross_weight": cross}
    for name, weight in {"consistency_weight": objective.consistency_weight, **needs_width}.items():
        needs_scale = name == "consistency_weight"
        needed = features | ({"ref_scale": pairs.ref_scale} if needs_scale else {})
        missing = [each for each, value in needed.items() if value is None]
        if weight and missing:
            raise InputError(
                f"{' and '.join(missing)} missing, but {name}={weight} compares with the "
                f"original model. Pass {'it' if len(missing) == 1 else 'them'} or {name}=0."
            )
    if (pairs.ref_image is None) != (pairs.ref_text is None):
        raise InputError("ref_image and ref_text go together; pass both, or None for both.")
    if pairs.ref_image is not None:
        check_reference(pairs.image, pairs.ref_image, pairs.ref_text)
        for name, weight in needs_width.items():
            if weight and pairs.ref_image.shape != pairs.image.shape:
                raise InputError(
                    f"{name}={weight} needs original features as wide as the current ones; "
                    f"got {pairs.ref_image.shape[1]} and {pairs.image.shape[1]}. Pass {name}=0."
                )
    if pairs.ref_scale is not None:
        check_scale(pairs.ref_scale, "ref_scale")
