"""The public contrastive operators and the choice of their backend."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fasterase.errors import InputError
from fasterase.ops.contrastive import cpu
from fasterase.ops.contrastive.checks import (
    check_groups,
    check_labels,
    check_pairs,
    check_products,
    check_reference,
    check_scale,
    check_weights,
    compute_dtype,
    resolve_products,
    scale_tensor,
)
from fasterase.ops.contrastive.chunked import contrastive_chunked
from fasterase.ops.contrastive.dense import Contrastive, contrastive_dense
from fasterase.ops.contrastive.labels import find_kinds, multiply_gaps
from fasterase.ops.contrastive.operator import (
    Batch,
    Groups,
    Operator,
    Wanted,
    differentiable_once,
    unpack_losses,
)

Backend = Operator | Callable[..., Contrastive]  # (*batch, groups, labels)

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
    image, text and scale, for arbitrary upstream gradients: `backward()` of a gradient raises, and
    `torch.autograd.grad` of one finds no way to the features. NaN features give NaN losses.

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
        products: of `"triton"`, and on a GPU of `"chunked"`; `"cpu"` multiplies in bf16 for "bf16",
            and under "auto" where all features are bf16, if the CPU has AMX; all else is in fp32.
            "fp16" and "bf16" round the features first, current and reference alike, "fp32"
            multiplies them exactly. On a GPU "auto" follows torch: inside
            `torch.autocast("cuda", dtype)` that dtype, else half-precision features as they are, if
            all have one dtype, and fp32 products in TF32 if `torch.set_float32_matmul_precision`
            allows it. The diagonal of S, all sums and the gradients are fp32. Rounding to fp16
            needs no unit rows: a power of two brings the longest row of image, and likewise of
            text, to a length between 1 and 2 first.

    Returns:
        `Contrastive(ce_row, ce_col, kl_row, kl_col)`, each [N], fp32 (fp64 for fp64 features). The
        KLs are None without a reference.

    Raises:
        InputError: an argument has the wrong type, shape, dtype or device, the reference requires
            grad, the backend is unknown or not available here, or products is unknown.
    """
    given = image, text, scale, ref_image, ref_text, ref_scale
    return _compute(_check_call(given, labels, groups, backend, products))


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
    given = image, text, scale, ref_image, ref_text, ref_scale
    call = _check_call(given, labels, groups, backend, products)
    check_weights(weights, image, ref_image is not None)
    weights = weights.to(call.batch.scale.dtype)
    run = load_backend(call.choice.name)
    if call.groups and isinstance(run, Operator):
        return _sum_weighted_losses(call, run, weights)
    stacked = torch.stack([loss for loss in _compute(call) if loss is not None])
    return Weighted((weights * stacked).sum(), unpack_losses(stacked.detach()))


def _sum_weighted_losses(
    call: _Call,
    operator: Operator,
    weights: Tensor,  # [2 or 4, N]
) -> Weighted:
    batch, groups = call.batch, call.groups
    wants = batch.requires_grad()
    is_wanted = True in wants
    options, kinds = call.options_of(operator)
    # The operators have no derivatives in forward mode: the function below says so.
    in_forward_mode = forward_ad._current_level >= 0
    is_plain = not (torch.compiler.is_compiling() or in_forward_mode)
    if is_wanted and is_plain and operator.weighted is not None:
        total, losses = operator.weighted(weights, *batch, groups, *options)
    elif is_wanted or in_forward_mode:
        total, losses = _GradientsInForward.apply(
            *batch, operator, groups, options, kinds, wants, weights
        )
    else:
        losses = operator.forward(*batch, groups, *options)[0]
        if kinds is not None:
            _add_terms(losses, batch, kinds)
        total = (weights * losses).sum()
    return Weighted(total, unpack_losses(losses))


class _GradientsInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, operator, groups, options, kinds, wants, weights = arguments
        batch = Batch(*tensors)
        wanted = Wanted._make((*wants, False))
        losses, *made = operator.take_step(weights, batch, groups, wanted, options)
        if kinds is not None:
            terms = _add_terms(losses, batch, kinds)
            _add_gradients_of_terms(tuple(made), weights, batch, kinds, terms, wanted)
        ctx.save_for_backward(*made)
        ctx.wants = wants
        ctx.dtypes = batch.image.dtype, batch.text.dtype, batch.scale.dtype
        ctx.mark_non_differentiable(losses)
        return (weights * losses).sum(), losses

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        saved = zip(ctx.saved_tensors, ctx.dtypes, ctx.wants, strict=True)
        gradients = (
            (gradient * upstream).to(dtype) if is_wanted else None
            for gradient, dtype, is_wanted in saved
        )
        return (*gradients, *(None,) * 9)


def _add_terms(losses: Tensor, batch: Batch, kinds: Tensor) -> Tensor:
    """Add the terms of repeated labels to the cross-entropies in `losses`; return terms / scale."""
    image, text, scale, *_ = batch
    terms = torch.ops.fasterase.label_terms.default(image, text, kinds, scale.dtype)
    losses[:2].addcmul_(scale, terms)
    return terms


def _add_gradients_of_terms(
    made: tuple[Tensor, Tensor, Tensor],
    upstream: Tensor,  # [2 or 4, N]
    batch: Batch,
    kinds: Tensor,
    terms: Tensor,
    wanted: Wanted,
) -> None:
    image, text, scale, *_ = batch
    d_image, d_text, d_scale = made
    upstream = upstream[:2]
    of_image, of_text = torch.ops.fasterase.label_terms_backward.default(
        upstream * scale, image, text, kinds, wanted.image, wanted.text
    )
    if wanted.image:
        d_image.add_(of_image)
    if wanted.text:
        d_text.add_(of_text)
    if wanted.scale:
        d_scale.add_((upstream * terms).sum())


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
    """The backend that the same call of `contrastive` uses; raises what that would raise."""
    given = image, text, scale, ref_image, ref_text, ref_scale
    call = _check_call(given, labels, groups, backend, products)
    run = load_backend(call.choice.name)
    if call.groups and isinstance(run, Operator):
        call.options_of(run)
    return call.choice


def available_backends() -> tuple[str, ...]:
    """Names that `backend=` accepts here, besides "auto". Builds the C++ kernels if possible."""
    return tuple(name for name in BACKENDS if _explain_missing(name) is None)


def choose_backend(backend: str, pairs: tuple[Tensor, Tensor] | None = None) -> tuple[str, str]:
    """Resolve `backend` to (name, reason); a named one is used or refused, never replaced.

    Without the call's `pairs`, image and text, only the name is checked.
    """
    if backend == "auto":
        return _choose_automatically(pairs)
    reason = _explain_missing(backend)
    if backend not in BACKENDS or reason is not None:
        usable = ", ".join(map(repr, ("auto", *available_backends())))
        if backend not in BACKENDS:
            raise InputError(f"backend must be one of {usable}; got {backend!r}.")
        raise InputError(
            f"backend={backend!r} is not available in this installation: {reason}. "
            f"Use one of {usable}."
        )
    if backend == "cpu" and pairs is not None and pairs[0].device.type != "cpu":
        raise InputError(
            f"backend='cpu' takes CPU tensors; image is on {pairs[0].device}. Use backend='auto'."
        )
    return backend, "named by the caller"


class _Call(NamedTuple):
    """A call whose arguments were checked."""

    batch: Batch
    groups: Groups  # those with rows
    labels: Tensor | None
    choice: BackendChoice

    def options_of(self, operator: Operator) -> tuple[tuple[Any, ...], Tensor | None]:
        """(options of the operator, `Kinds` of labels that it does not take itself)."""
        batch, groups, labels, choice = self
        wants = True in batch.requires_grad()
        options = operator.options(batch, groups, wants, choice.products)
        if operator.takes_labels:
            return (None if labels is None else labels.to(batch.image.device), *options), None
        return options, find_kinds(labels, groups, batch.image.device)


def _check_call(
    given: tuple[Any, ...],  # as in a Batch, but scales may be numbers
    labels: Tensor | None,
    groups: tuple[int, ...] | None,
    backend: str,
    products: str,
) -> _Call:
    """Check all arguments, and choose the backend."""
    image, text, scale, ref_image, ref_text, ref_scale = given
    check_pairs(image, text)
    check_scale(scale, "scale")
    dtype = compute_dtype(image, text)
    features = [image, text]
    missing = [name for name, x in zip(Batch._fields, given, strict=True) if x is None]
    if not missing:
        check_reference(image, ref_image, ref_text)
        check_scale(ref_scale, "ref_scale")
        ref_scale = scale_tensor(ref_scale, image, dtype).detach()
        features += [ref_image, ref_text]
    elif len(missing) < 3:
        raise InputError(
            f"ref_image, ref_text and ref_scale go together; {' and '.join(missing)} missing. "
            f"Pass all three, or none."
        )
    if labels is not None:
        check_labels(labels, image.shape[0])
    sizes = check_groups(groups, image.shape[0])
    scale = scale_tensor(scale, image, dtype)
    check_products(products)
    name, reason = choose_backend(backend, (image, text))
    choice = BackendChoice(name, reason, resolve_products(products, name, features))
    batch = Batch(image, text, scale, ref_image, ref_text, ref_scale)
    return _Call(batch, sizes, labels, choice)


def _compute(call: _Call) -> Contrastive:
    batch, groups, labels, choice = call
    if not groups:
        return batch.empty_losses()
    backend = load_backend(choice.name)
    if not isinstance(backend, Operator):
        return backend(*batch, groups, labels)
    options, kinds = call.options_of(backend)
    losses = unpack_losses(backend.differentiable(*batch, groups, *options))
    if kinds is None:
        return losses
    terms = multiply_gaps(batch.image, batch.text, kinds, batch.scale.dtype)
    ce_row, ce_col = torch.stack(losses[:2]).addcmul(batch.scale, terms).unbind()
    return losses._replace(ce_row=ce_row, ce_col=ce_col)


def load_backend(name: str) -> Backend:
    """The function of a backend that `choose_backend` returned."""
    backend = BACKENDS[name]
    if backend is not None:
        return backend
    # On first use: Triton is not installed everywhere, and the import takes 0.3 s.
    from fasterase.ops.contrastive.triton import contrastive_triton

    return contrastive_triton


def _choose_automatically(pairs: tuple[Tensor, Tensor] | None) -> tuple[str, str]:
    if pairs is not None and pairs[0].is_cuda and compute_dtype(*pairs) != torch.float64:
        reason = _explain_missing("triton")
        if reason is None:
            return "triton", "auto: fused Triton kernels for tensors on a GPU"
        _warn_of_fallback(reason, "Losses, and the precision of the products, are the same")
        return "chunked", f"auto: torch tiles, because {reason}"
    if pairs is not None and pairs[0].device.type == "cpu":
        reason = _explain_missing("cpu")
        if reason is None:
            return "cpu", "auto: C++ tiles for tensors on the CPU"
        _warn_of_fallback(reason, "`fasterase compile` tries again")
        return "chunked", f"auto: torch tiles, because the C++ kernels are missing: {reason}"
    return "chunked", "auto: O(N D) memory on any device and dtype"


@functools.cache
def _warn_of_fallback(reason: str, note: str) -> None:
    warnings.warn(
        f"The contrastive loss runs on torch tiles (backend='chunked'), which is slower: {reason}. "
        f"{note}.",
        stacklevel=4,
    )


def _explain_missing(backend: str) -> str | None:
    """Why a backend cannot run here; None if it can."""
    if backend == "cpu":
        return cpu.load_kernels()
    if backend != "triton":
        return None
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


# A constant to torch.compile, as `cpu.load_kernels` is: torch 2.11 cannot trace find_spec.
_explain_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]
