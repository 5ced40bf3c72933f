"""The public contrastive operator: check, choose a backend, call it."""

from __future__ import annotations

from torch import Tensor

from fasterase.errors import InputError
from fasterase.ops.contrastive import checks
from fasterase.ops.contrastive.backends import BACKENDS, BackendChoice, choose
from fasterase.ops.contrastive.dense import Contrastive
from fasterase.ops.contrastive.positives import label_terms


def contrastive(
    image: Tensor,  # [N, D]
    text: Tensor,  # [N, D]
    scale: Tensor | float,
    *,
    ref_image: Tensor | None = None,  # [N, D0]
    ref_text: Tensor | None = None,  # [N, D0]
    ref_scale: Tensor | float | None = None,
    labels: Tensor | None = None,  # [N]
    groups: tuple[int, ...] | None = None,
    backend: str = "auto",
) -> Contrastive:
    """Per-sample InfoNCE and KL to a frozen original, image -> text (row), text -> image (col).

    Equal to, a group, with `S = scale * image @ text.T` and `S0` from the reference:

        ce_row = S.logsumexp(1) - S.diagonal()
        ce_col = S.logsumexp(0) - S.diagonal()
        kl_row = (S0.softmax(1) * (S0.log_softmax(1) - S.log_softmax(1))).sum(1)
        kl_col = (S0.softmax(0) * (S0.log_softmax(0) - S.log_softmax(0))).sum(0)

    Peak memory O(N D) (`"dense"`: O(n^2)). Differentiable once (`"dense"`: any number of times) in
    image, text and scale, for arbitrary upstream gradients. NaN features give NaN losses.

    Args:
        image, text: features, row i of both being pair i; fp16, bf16, fp32 or fp64. Meant to have
            unit rows; others are computed as they are.
        scale: exp(logit_scale), a 0-d tensor or a float.
        ref_image, ref_text, ref_scale: the original's, constants, all three or none; D0 may differ.
        labels: pairs of one group with the same label are each other's positives:
            `ce_row_i = lse_i - mean over {j: label_j = label_i} of S_ij`, likewise columns.
        groups: row counts, zeros allowed, that split the batch into independent square problems.
        backend: "auto" or one of `available_backends()`; a named one never falls back.

    Returns:
        `Contrastive(ce_row, ce_col, kl_row, kl_col)`, each [N], fp32 (fp64 for fp64 features); the
        KLs None without a reference.

    Raises:
        InputError: an argument of the wrong type, shape, dtype or device, a reference that requires
            grad, or a backend that is unknown or not available here.
    """
    sizes = _check(image, text, scale, ref_image, ref_text, ref_scale, labels, groups)
    run = BACKENDS[choose(backend, (image, text)).name]
    dtype = checks.compute_dtype(image, text)
    scale = checks.scale_tensor(scale, image, dtype)
    if ref_scale is not None:
        ref_scale = checks.scale_tensor(ref_scale, image, dtype).detach()
    if not sizes:
        empty = scale * (image.to(dtype) + text.to(dtype)).sum(1)
        kl = None if ref_image is None else empty
        return Contrastive(empty, empty, kl, kl)
    result = run(image, text, scale, ref_image, ref_text, ref_scale, sizes)
    if labels is None:
        return result
    row, col = label_terms(image, text, scale, labels.to(image.device), sizes)
    return result._replace(ce_row=result.ce_row + row, ce_col=result.ce_col + col)


def explain_backend(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    *,
    ref_image: Tensor | None = None,
    ref_text: Tensor | None = None,
    ref_scale: Tensor | float | None = None,
    labels: Tensor | None = None,
    groups: tuple[int, ...] | None = None,
    backend: str = "auto",
) -> BackendChoice:
    """Which backend the same call of `contrastive` would take, and why: `.name`, `.reason`.

    Raises:
        InputError: where `contrastive` would.
    """
    _check(image, text, scale, ref_image, ref_text, ref_scale, labels, groups)
    return choose(backend, (image, text))


def _check(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    ref_image: Tensor | None,
    ref_text: Tensor | None,
    ref_scale: Tensor | float | None,
    labels: Tensor | None,
    groups: tuple[int, ...] | None,
) -> tuple[int, ...]:
    checks.check_pairs(image, text)
    checks.check_scale(scale, "scale")
    reference = {"ref_image": ref_image, "ref_text": ref_text, "ref_scale": ref_scale}
    missing = [name for name, value in reference.items() if value is None]
    if 0 < len(missing) < 3:
        raise InputError(
            f"ref_image, ref_text and ref_scale go together; {' and '.join(missing)} missing. "
            f"Pass all three, or none."
        )
    if not missing:
        checks.check_reference(image, ref_image, ref_text)
        checks.check_scale(ref_scale, "ref_scale")
    if labels is not None:
        checks.check_labels(labels, len(image))
    return checks.check_groups(groups, len(image))
