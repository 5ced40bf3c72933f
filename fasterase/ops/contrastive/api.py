"""The public contrastive operator: check, choose a backend, call it."""

from __future__ import annotations

from torch import Tensor

from fasterase.ops.contrastive.backends import BackendChoice, choose, load
from fasterase.ops.contrastive.checks import check_call
from fasterase.ops.contrastive.dense import Contrastive
from fasterase.ops.contrastive.operator import Batch
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
    sizes = check_call(image, text, scale, ref_image, ref_text, ref_scale, labels, groups)
    run = load(choose(backend, (image, text)).name)
    batch = Batch.of(image, text, scale, ref_image, ref_text, ref_scale)
    result = run(*batch, sizes) if sizes else batch.no_losses()
    if labels is None or not sizes:
        return result
    row, col = label_terms(image, text, batch.scale, labels.to(image.device), sizes)
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
    check_call(image, text, scale, ref_image, ref_text, ref_scale, labels, groups)
    return choose(backend, (image, text))
