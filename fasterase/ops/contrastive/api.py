"""The public contrastive operators and the choice of their backend."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from fasterase.errors import InputError
from fasterase.ops.contrastive import cpu
from fasterase.ops.contrastive.autograd import (
    compute_labelled_losses,
    compute_native_losses,
    sum_weighted_losses,
)
from fasterase.ops.contrastive.checks import check_call, check_weights, compute_dtype
from fasterase.ops.contrastive.chunked import contrastive_chunked
from fasterase.ops.contrastive.dense import Contrastive, contrastive_dense
from fasterase.ops.contrastive.labels import compute_label_terms, find_kinds
from fasterase.ops.contrastive.operator import (
    Batch,
    Groups,
    Operator,
    unpack_losses,
)
from fasterase.ops.contrastive.products import check_products, resolve_products

Backend = Callable[
    [Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Groups],
    Contrastive,
]

BACKENDS: dict[str, Backend | None] = {
    "dense": contrastive_dense,
    "chunked": contrastive_chunked,
    "cpu": cpu.contrastive_cpu,
    "triton": None,  # imported by `load_backend`
}


class BackendChoice(NamedTuple):
    """The backend that a call uses, the reason in words, and how it multiplies features.

    products is "fp16", "bf16", "tf32", "fp32" or "fp64"; sums and gradients are fp32 (fp64) always.
    """

    name: str
    reason: str
    products: str

    def __str__(self) -> str:
        return f"{self.name}, {self.products} products: {self.reason}"


class Weighted(NamedTuple):
    """A differentiable total and the losses that it sums."""

    total: Tensor  # []
    losses: Contrastive  # constants


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
    products: str = "auto",
) -> Contrastive:
    """Per-sample InfoNCE and KL to a frozen original, image -> text (row) and text -> image (col).

    Equal to, per group, with `S = scale * image @ text.T` and `S0` from the reference:

        ce_row = S.logsumexp(1) - S.diagonal()
        ce_col = S.logsumexp(0) - S.diagonal()
        kl_row = (S0.softmax(1) * (S0.log_softmax(1) - S.log_softmax(1))).sum(1)
        kl_col = (S0.softmax(0) * (S0.log_softmax(0) - S.log_softmax(0))).sum(0)

    Peak memory O(N D) (`"dense"`: O(n^2)). Differentiable once (`"dense"`: any number of times) in
    image, text and scale, for arbitrary upstream gradients. NaN features give NaN losses.

    Args:
        image, text: features; row i of both is pair i. fp16, bf16, fp32 or fp64. Rows are used as
            given; they usually have unit length.
        scale: exp(logit_scale), a 0-d tensor or a float.
        ref_image, ref_text, ref_scale: the original's, constants, all three or none; D0 may differ
            from D.
        labels: any integers. Pairs of one group with the same label are each other's positives:
            `ce_row_i = lse_i - mean over {j: label_j = label_i} of S_ij`, likewise columns. On the
            CPU, whatever image's device: labels that are all distinct then cost nothing.
        groups: row counts, zeros allowed, that split the batch into independent square problems.
        backend: "auto" or one of `available_backends()`; a named one never falls back.
        products: how `"triton"` multiplies image by text; the other backends do so in fp32. "fp16"
            and "bf16" round the features first, current and reference alike, "fp32" multiplies them
            exactly. "auto" follows torch: inside `torch.autocast("cuda", dtype)` that dtype, else
            half-precision features as they are, if all have one dtype, and fp32 products in TF32 if
            `torch.set_float32_matmul_precision` allows it. The diagonal of S, all sums and the
            gradients are fp32. Rounding to fp16 needs no unit rows: a power of two brings the
            longest row of image, and likewise of text, to a length between 1 and 2 first.

    Returns:
        `Contrastive(ce_row, ce_col, kl_row, kl_col)`, each [N], fp32 (fp64 for fp64 features). The
        KLs are None without a reference.

    Raises:
        InputError: an argument has the wrong type, shape, dtype or device, the reference requires
            grad, the backend is unknown or not available here, or products is unknown.
    """
    sizes = check_call(image, text, scale, ref_image, ref_text, ref_scale, labels, groups)
    batch = Batch.of(image, text, scale, ref_image, ref_text, ref_scale)
    return _compute(_choose(backend, products, batch), batch, sizes, labels)


def weighted_contrastive(
    image: Tensor,  # [N, D]
    text: Tensor,  # [N, D]
    scale: Tensor | float,
    weights: Tensor,  # [4, N], or [2, N] without a reference
    *,
    ref_image: Tensor | None = None,  # [N, D0]
    ref_text: Tensor | None = None,  # [N, D0]
    ref_scale: Tensor | float | None = None,
    labels: Tensor | None = None,  # [N]
    groups: tuple[int, ...] | None = None,
    backend: str = "auto",
    products: str = "auto",
) -> Weighted:
    """`(weights * losses).sum()` over `contrastive`'s losses, with gradients made in the forward.

    Between the passes only the gradients stay in memory, [N, D] in the dtype of the computation for
    each of image and text that requires one: no features, no reference, no kept logits. The
    backward pass multiplies them by the upstream gradient and rounds them to the features' dtype
    afterwards, so a GradScaler's factor arrives before the rounding. FLOPs are those of
    `contrastive` and its backward pass. If no input requires grad, no gradient is made.

    `backend="dense"` is plain autograd and saves what autograd saves.

    Args:
        weights: constants for ce_row, ce_col and, with a reference, kl_row, kl_col.
        image, text, scale, ref_image, ref_text, ref_scale, labels, groups, backend, products: as in
            `contrastive`.

    Returns:
        `Weighted(total, losses)`: total 0-d, differentiable once in image, text and scale; losses
        as `contrastive` returns them, without gradients. With gradients to make, `"cpu"` leaves
        out the KLs of a group whose KLs all have weight 0: they are 0.

    Raises:
        InputError: `contrastive` would raise it, or weights have the wrong shape, dtype or device,
            or require grad.
    """
    sizes = check_call(image, text, scale, ref_image, ref_text, ref_scale, labels, groups)
    check_weights(weights, image, ref_image is not None)
    batch = Batch.of(image, text, scale, ref_image, ref_text, ref_scale)
    choice = _choose(backend, products, batch)
    weights = weights.to(batch.scale.dtype)
    run = load_backend(choice.name)
    if sizes and isinstance(run, Operator):
        kinds = find_kinds(labels, sizes, image.device)
        return Weighted(*sum_weighted_losses(run, batch, weights, sizes, choice.products, kinds))
    differentiable = _compute(choice, batch, sizes, labels)
    stacked = torch.stack([loss for loss in differentiable if loss is not None])
    return Weighted((weights * stacked).sum(), unpack_losses(stacked.detach()))


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
    products: str = "auto",
) -> BackendChoice:
    """The backend that the same call of `contrastive` uses, and why: `.name`, `.reason`.

    `.products` says how it multiplies the features.

    Raises:
        InputError: `contrastive` would raise it.
    """
    check_call(image, text, scale, ref_image, ref_text, ref_scale, labels, groups)
    batch = Batch.of(image, text, scale, ref_image, ref_text, ref_scale)
    return _choose(backend, products, batch)


def available_backends() -> tuple[str, ...]:
    """Names that `backend=` accepts here, besides "auto". Builds the C++ kernels if possible."""
    return tuple(name for name in BACKENDS if _explain_missing(name) is None)


def choose_backend(backend: str, pairs: tuple[Tensor, Tensor] | None = None) -> tuple[str, str]:
    """Resolve `backend` to (name, reason); a named one is used or refused, never replaced.

    Args:
        backend: "auto" or a name.
        pairs: image and text of the call; without them only the name is checked.

    Raises:
        InputError: the name is unknown, not available here, or not for image's device.
    """
    if backend == "auto":
        return _choose_automatically(pairs)
    if backend not in BACKENDS:
        raise InputError(f"backend must be one of {_list_usable()}; got {backend!r}.")
    reason = _explain_missing(backend)
    if reason is not None:
        raise InputError(
            f"backend={backend!r} is not available in this installation: {reason}. "
            f"Use one of {_list_usable()}."
        )
    if backend == "cpu" and pairs is not None and pairs[0].device.type != "cpu":
        raise InputError(
            f"backend='cpu' takes CPU tensors; image is on {pairs[0].device}. Use backend='auto'."
        )
    return backend, "named by the caller"


def _choose(backend: str, products: str, batch: Batch) -> BackendChoice:
    check_products(products)
    name, reason = choose_backend(backend, (batch.image, batch.text))
    features = (batch.image, batch.text, batch.ref_image, batch.ref_text)
    given = [each for each in features if each is not None]
    return BackendChoice(name, reason, resolve_products(products, name, given))


def _compute(
    choice: BackendChoice, batch: Batch, groups: Groups, labels: Tensor | None
) -> Contrastive:
    if not groups:
        return batch.empty_losses()
    backend = load_backend(choice.name)
    is_eager = not torch.compiler.is_compiling()
    if is_eager and isinstance(backend, Operator) and backend.native is not None:
        return compute_native_losses(backend, batch, groups, choice.products, labels)
    kinds = find_kinds(labels, groups, batch.image.device)
    if not isinstance(backend, Operator):
        losses = backend(*batch, groups)
    elif kinds is None or not is_eager:
        losses = backend(*batch, groups, choice.products)
    else:
        return compute_labelled_losses(backend, batch, groups, choice.products, kinds)
    if kinds is None:
        return losses
    row, col = compute_label_terms(batch.image, batch.text, batch.scale, kinds).unbind()
    return losses._replace(ce_row=losses.ce_row + row, ce_col=losses.ce_col + col)


def load_backend(name: str) -> Backend:
    """The function of a backend that `choose_backend` returned.

    Triton is imported on first use: it is not installed everywhere, and the import takes 0.3 s.
    """
    backend = BACKENDS[name]
    if backend is not None:
        return backend
    from fasterase.ops.contrastive.triton import contrastive_triton

    return contrastive_triton


def _choose_automatically(pairs: tuple[Tensor, Tensor] | None) -> tuple[str, str]:
    if pairs is not None and pairs[0].is_cuda and compute_dtype(*pairs) != torch.float64:
        reason = _explain_missing("triton")
        if reason is None:
            return "triton", "auto: fused Triton kernels for tensors on a GPU"
        return "chunked", f"auto: torch tiles, because {reason}"
    if pairs is not None and pairs[0].device.type == "cpu":
        reason = _explain_missing("cpu")
        if reason is None:
            return "cpu", "auto: C++ tiles for tensors on the CPU"
        _warn_of_fallback(reason)
        return ("chunked", f"auto: torch tiles, because the C++ kernels are missing: {reason}")
    return "chunked", "auto: O(N D) memory on any device and dtype"


@functools.cache
def _warn_of_fallback(reason: str) -> None:
    warnings.warn(
        f"The contrastive loss runs on torch tiles (backend='chunked'), which is slower: {reason}. "
        f"`fasterase compile` tries again.",
        stacklevel=4,
    )


def _list_usable() -> str:
    return ", ".join(repr(name) for name in ("auto", *available_backends()))


def _explain_missing(backend: str) -> str | None:
    """Why a backend cannot run here; None if it can."""
    if backend == "cpu":
        return cpu.load_kernels()
    return _explain_missing_triton() if backend == "triton" else None


def _explain_missing_triton() -> str | None:
    if find_spec("triton") is None:
        return "the package triton is not installed (it comes with torch on Linux)"
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 5):  # tl.range(disable_licm=)
        return f"triton is {triton.__version__}, and the kernels need 3.5 (torch 2.9 brings it)"
    if torch.cuda.is_available():
        if torch.cuda.get_device_properties().major < 8:
            return "the kernels need a GPU of compute capability 8.0 (such as an A100) or newer"
        return None
    from fasterase.ops.contrastive.triton_plan import INTERPRETED

    return None if INTERPRETED else "there is no CUDA device"


# A constant to torch.compile, like `cpu.load_kernels`: torch 2.11 cannot trace find_spec.
_explain_missing_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]
