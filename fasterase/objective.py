"""The erasure objective: CLIPErase's three losses, a floor and an anchor, on [N] vectors.

Weights, signs and sets live here; the similarity matrices are the business of `ops.contrastive`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from fasterase.errors import InputError
from fasterase.ops.contrastive import Contrastive, contrastive, weighted_contrastive
from fasterase.ops.contrastive.api import choose_backend
from fasterase.ops.contrastive.checks import (
    check_labels,
    check_pairs,
    check_reference,
    check_scale,
    compute_dtype,
    scale_tensor,
)

FORGET_LOSSES = ("similarity", "contrastive")
NEGATIVES = ("own", "joint")


class EraseLoss(NamedTuple):
    """The weighted total and its terms, 0-d tensors.

    Each is differentiable; with `grad_in_forward=True` only the total, and the terms are constants.
    """

    total: Tensor
    forget: Tensor
    retain: Tensor
    consistency: Tensor
    anchor: Tensor


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
    grad_in_forward: bool = False,
) -> EraseLoss:
    """CLIPErase (Yang et al., ACL 2025): `3 L_F + 1 L_R + 3 L_C`, by default as in the paper.

    With F the first `n_forget` rows, R the others, and `ce`, `kl` from `fasterase.contrastive`:

        forget      = (image * text).sum(1)[F].mean()               L_F; above `floor` if given
        retain      = ((ce_row + ce_col) / 2)[R].mean()             L_R, CLIP's InfoNCE
        consistency = (kl_row + kl_col)[R].mean()                   L_C, KL(original || current)
        anchor      = (|image - ref_image|^2 + |text - ref_text|^2)[R].mean()     not in the paper
        total       = forget_weight * forget + retain_weight * retain
                      + consistency_weight * consistency + anchor_weight * anchor

    An empty set contributes 0. A similarity matrix that no weight uses is not computed, and its
    terms are reported as 0; likewise the KL and the anchor at weight 0.

    Args:
        image, text: L2-normalised features, row i of both being pair i, forget pairs first. They
            are used as given: of rows that are not normalised, "cos" is their dot product.
        scale: exp(logit_scale), a 0-d tensor or a float.
        ref_image, ref_text, ref_scale: the frozen original's, constants; may be None where the
            weights of consistency and anchor are 0. The anchor needs D0 == D.
        n_forget: how many rows are forget pairs, 0 to N.
        forget_loss: "similarity", or "contrastive": minus the symmetric InfoNCE of the forget rows.
            With one caption for the whole forget set that needs `negatives="joint"` to act.
        floor: with "similarity", the cosine below which a forget pair is left alone:
            mean of `max(cos - floor, 0)`.
        labels: integers; pairs with the same label are each other's positives.
        negatives: "own": forget and retain are two similarity matrices. "joint": one over all rows,
            each loss the mean over its own rows.
        backend: as in `fasterase.contrastive`.
        grad_in_forward: make the gradients of the similarity matrices at once, for these weights,
            and keep them, [N, D] in the returned dtype, in the place of what a backward pass would
            need: no reference, no logits. The backward pass only multiplies them by the upstream
            gradient. The FLOPs are those of both passes. `backend="dense"` stays plain autograd.

    Returns:
        `EraseLoss(total, forget, retain, consistency, anchor)`, fp32 (fp64 for fp64 features),
        differentiable in image, text and scale; with `grad_in_forward` only the total, once.

    Raises:
        InputError: any argument that is not as described.
    """
    weights = {
        "forget_weight": forget_weight,
        "retain_weight": retain_weight,
        "consistency_weight": consistency_weight,
        "anchor_weight": anchor_weight,
    }
    _check_batch(image, text, scale, labels, n_forget)
    _check_options(weights, forget_loss, floor, negatives, backend, grad_in_forward)
    _check_originals(image, ref_image, ref_text, ref_scale, consistency_weight, anchor_weight)
    dtype = compute_dtype(image, text)
    scale = scale_tensor(scale, image, dtype)
    everything = slice(0, len(image))
    forget_rows, retain_rows = slice(0, n_forget), slice(n_forget, len(image))
    n_retain = len(image) - n_forget
    uses_forget = forget_loss == "contrastive" and forget_weight != 0
    uses_retain = retain_weight != 0 or consistency_weight != 0
    # 0 with a gradient of 0, so that a loss without rows does not break the caller's backward pass.
    nothing = image[:0].to(dtype).sum() + text[:0].to(dtype).sum() + scale.expand(0).sum()

    def mean(samples: Tensor) -> Tensor:
        return samples.mean() if len(samples) else nothing

    matrix_totals: list[Tensor] = []  # with grad_in_forward

    def matrix(rows: slice) -> Contrastive:
        has_retain = rows.stop > n_forget
        has_kl = consistency_weight != 0 and has_retain
        options: dict[str, Any] = {
            "ref_image": ref_image[rows] if has_kl and ref_image is not None else None,
            "ref_text": ref_text[rows] if has_kl and ref_text is not None else None,
            "ref_scale": ref_scale if has_kl else None,
            "labels": None if labels is None else labels[rows],
            "backend": backend,
        }
        if not grad_in_forward:
            return contrastive(image[rows], text[rows], scale, **options)
        shares = scale.new_zeros(4 if has_kl else 2, len(image))
        if uses_forget:
            shares[:2, forget_rows] = -forget_weight / (2 * max(n_forget, 1))
        shares[:2, retain_rows] = retain_weight / (2 * max(n_retain, 1))
        shares[2:, retain_rows] = consistency_weight / max(n_retain, 1)
        found = weighted_contrastive(image[rows], text[rows], scale, shares[:, rows], **options)
        matrix_totals.append(found.total)
        return found.losses

    forget_matrix = retain_matrix = None
    if negatives == "joint" and (uses_forget or uses_retain):
        joint = matrix(everything)
        forget_matrix, retain_matrix = _take(joint, forget_rows), _take(joint, retain_rows)
    elif negatives == "own":
        forget_matrix = matrix(forget_rows) if uses_forget else None
        retain_matrix = matrix(retain_rows) if uses_retain else None

    forget = retain = consistency = anchor = nothing
    if forget_loss == "similarity":
        cosine = (image[forget_rows].to(dtype) * text[forget_rows].to(dtype)).sum(1)
        forget = mean(cosine if floor is None else (cosine - floor).clamp_min(0))
    elif forget_matrix is not None:
        forget = -mean((forget_matrix.ce_row + forget_matrix.ce_col) / 2)
    if retain_matrix is not None:
        retain = mean((retain_matrix.ce_row + retain_matrix.ce_col) / 2)
        if retain_matrix.kl_row is not None and retain_matrix.kl_col is not None:
            consistency = mean(retain_matrix.kl_row + retain_matrix.kl_col)
    if anchor_weight and ref_image is not None and ref_text is not None:
        moved_image = image[retain_rows].to(dtype) - ref_image[retain_rows].to(dtype)
        moved_text = text[retain_rows].to(dtype) - ref_text[retain_rows].to(dtype)
        anchor = mean(moved_image.square().sum(1) + moved_text.square().sum(1))
    total = (
        nothing
        + forget_weight * forget
        + retain_weight * retain
        + consistency_weight * consistency
        + anchor_weight * anchor
    )
    terms = (forget, retain, consistency, anchor)
    if not grad_in_forward:
        return EraseLoss(total, *terms)
    for matrix_total in matrix_totals:
        # The terms have counted its value already: this adds 0 (where it is infinite too, which
        # has no gradient worth having), and its gradient.
        total = total + (matrix_total - matrix_total.detach()).nan_to_num(nan=0.0)
    return EraseLoss(total, *(term.detach() for term in terms))


def _take(losses: Contrastive, rows: slice) -> Contrastive:
    kl_row, kl_col = (None if kl is None else kl[rows] for kl in (losses.kl_row, losses.kl_col))
    return Contrastive(losses.ce_row[rows], losses.ce_col[rows], kl_row, kl_col)


def _check_batch(image: Any, text: Any, scale: Any, labels: Any, n_forget: Any) -> None:
    check_pairs(image, text)
    check_scale(scale, "scale")
    if labels is not None:
        check_labels(labels, len(image))
    if isinstance(n_forget, bool) or not isinstance(n_forget, int):
        raise InputError(
            f"n_forget must be an integer, the number of forget rows; "
            f"got {type(n_forget).__name__} {n_forget!r}."
        )
    if not 0 <= n_forget <= len(image):
        raise InputError(
            f"n_forget must be between 0 and the {len(image)} rows of image, forget pairs first; "
            f"got {n_forget}."
        )


def _check_options(
    weights: dict[str, Any],
    forget_loss: Any,
    floor: Any,
    negatives: Any,
    backend: Any,
    grad_in_forward: Any,
) -> None:
    for name, weight in weights.items():
        if not _is_number(weight) or weight < 0:
            raise InputError(f"{name} must be a number of at least 0; got {weight!r}.")
    for name, value, known in (
        ("forget_loss", forget_loss, FORGET_LOSSES),
        ("negatives", negatives, NEGATIVES),
    ):
        if value not in known:
            raise InputError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}.")
    if floor is not None:
        if not _is_number(floor):
            raise InputError(
                f"floor must be None or a number, a cosine; got {floor!r}. "
                f"Only fasterase.unlearn finds one by itself (floor='auto')."
            )
        if forget_loss != "similarity":
            raise InputError(
                f"floor is a cosine and goes with forget_loss='similarity'; "
                f"got floor={floor} with forget_loss={forget_loss!r}. Pass floor=None."
            )
    choose_backend(backend)
    if not isinstance(grad_in_forward, bool):
        raise InputError(f"grad_in_forward must be True or False; got {grad_in_forward!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_originals(
    image: Tensor,
    ref_image: Any,
    ref_text: Any,
    ref_scale: Any,
    consistency_weight: float,
    anchor_weight: float,
) -> None:
    features, scale = {"ref_image": ref_image, "ref_text": ref_text}, {"ref_scale": ref_scale}
    for weight_name, weight, needed in (
        ("consistency_weight", consistency_weight, features | scale),
        ("anchor_weight", anchor_weight, features),
    ):
        missing = [name for name, value in needed.items() if value is None]
        if weight and missing:
            raise InputError(
                f"{' and '.join(missing)} missing, but {weight_name}={weight} compares with the "
                f"original model. Pass {'it' if len(missing) == 1 else 'them'} or {weight_name}=0."
            )
    if (ref_image is None) != (ref_text is None):
        raise InputError("ref_image and ref_text go together; pass both, or None for both.")
    if ref_image is not None:
        check_reference(image, ref_image, ref_text)
        if anchor_weight and ref_image.shape != image.shape:
            raise InputError(
                f"anchor_weight={anchor_weight} needs original features as wide as the current "
                f"ones; got {ref_image.shape[1]} and {image.shape[1]}. Pass anchor_weight=0."
            )
    if ref_scale is not None:
        check_scale(ref_scale, "ref_scale")
