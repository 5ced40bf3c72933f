"""The implementations that the benchmark compares: fasterase's backends and public peers.

Each provider is one scalar function of `Inputs`, called as its own documentation says. A peer that
is not installed, or does not support the device or size, raises `UnavailableError` with the reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.loss.case import SIGLIP_BIAS, Case, Inputs
from benchmarks.processes import MeasurementError

Loss = Callable[[Inputs], Tensor]


class UnavailableError(MeasurementError):
    """A provider cannot take a case; the message gives the reason."""


@dataclass(frozen=True)
class Provider:
    """One implementation; `build(case)` returns its loss."""

    name: str
    build: Callable[[Case], Loss]
    package: str = "fasterase"
    # Number of [N, N] matrices alive at its peak, without and with the KL, taken from the
    # benchmark's own memory rows; 0 if memory does not grow with N^2.
    dense_matrices: tuple[int, int] = (0, 0)
    # It may keep logits for the backward pass, which the FLOPs of `case.flops` compute twice.
    keeps_logits: bool = False
    objective: str = "clip"  # the field of `Losses` that it computes
    omits_reference_entropy: bool = False  # its KL is a cross-entropy
    has_scale_gradient: bool = True
    makes_gradients_early: bool = False  # in its forward pass, so only both together compare
    compiles: bool = False

    @property
    def version(self) -> str:
        try:
            return f"{self.package} {metadata.version(self.package)}"
        except metadata.PackageNotFoundError:
            return self.package

    def dense_bytes(self, case: Case) -> int:
        return self.dense_matrices[case.kl] * case.matrix_bytes


def _fasterase(backend: str, case: Case, products: str = "auto") -> Loss:
    """The weighted total, as a step of `unlearn` computes it: gradients come with the loss."""
    from fasterase.errors import InputError
    from fasterase.ops.contrastive import explain_backend, weighted_contrastive

    try:
        sample = torch.ones(1, 1, device=case.device, dtype=case.torch_dtype)
        choice = explain_backend(sample, sample, 1.0, backend=backend, products=products)
    except InputError as error:
        raise UnavailableError(str(error)) from error
    if products not in ("auto", choice.products):
        raise UnavailableError(f"this CPU has no AMX: it would multiply in {choice.products}")

    dtype = torch.float64 if case.dtype == "float64" else torch.float32
    shape = 4 if case.kl else 2, case.num_pairs
    weights = torch.full(shape, 0.5 / case.num_pairs, dtype=dtype, device=case.device)

    def loss(inputs: Inputs) -> Tensor:
        call = {**inputs._asdict(), "weights": weights, "backend": backend, "products": products}
        return weighted_contrastive(**call).total

    return loss


def _torch_dense(case: Case) -> Loss:
    """The best that a few lines of torch do: one product per matrix, softmax both ways from it."""

    def loss(inputs: Inputs) -> Tensor:
        image, text, scale, ref_image, ref_text, ref_scale, labels = inputs
        # Rounded to the features' dtype by the product, as torch does under autocast.
        logits = ((scale * image) @ text.T).float()
        row, col = logits.log_softmax(1), logits.log_softmax(0)
        if labels is None:
            total = -(row.diagonal() + col.diagonal()).mean() / 2
        else:
            # The mean over a pair's positives: a product with the mean of their features.
            count = labels.bincount(minlength=case.num_labels)[labels, None].to(image.dtype)
            mean = image.new_zeros(case.num_labels, case.width).index_add(0, labels, text / count)
            positive = (scale * image * mean[labels]).sum(1).float().mean()
            lse = (logits.diagonal() - (row.diagonal() + col.diagonal()) / 2).mean()
            total = lse - positive  # columns have the same mean
        if ref_image is not None and ref_text is not None and ref_scale is not None:
            with torch.no_grad():
                ref = ((ref_scale * ref_image) @ ref_text.T).float()
            for now, before in ((row, ref.log_softmax(1)), (col, ref.log_softmax(0))):
                total = total + (before.exp() * (before - now)).sum() / (2 * case.num_pairs)
        return total

    return loss


def _open_clip(case: Case) -> Loss:
    _refuse(case, "open_clip")
    from open_clip.loss import ClipLoss, DistillClipLoss

    if not case.kl:
        plain = ClipLoss()
        return lambda inputs: plain(*inputs[:3])
    distill = DistillClipLoss()
    return lambda inputs: sum(distill(*inputs[:6]))


def _open_clip_compiled(case: Case) -> Loss:
    return torch.compile(_open_clip(case))


def _torch_linear_cross_entropy(case: Case) -> Loss:
    _refuse(case, "torch's linear_cross_entropy", kl=True)
    try:
        from torch.nn import LinearCrossEntropyOptions
        from torch.nn.functional import linear_cross_entropy
    except ImportError as error:
        raise UnavailableError(
            f"torch {torch.__version__} has no linear_cross_entropy with options ({error})"
        ) from error
    run = partial(linear_cross_entropy, options=LinearCrossEntropyOptions())
    target = torch.arange(case.num_pairs, device=case.device)

    def loss(inputs: Inputs) -> Tensor:
        scale = inputs.scale.to(inputs.image.dtype)
        row = run(scale * inputs.image, inputs.text, target)
        return (row + run(scale * inputs.text, inputs.image, target)) / 2

    return loss


def _liger(case: Case) -> Loss:
    """Build the chunked distillation loss in torch, or without the KL the Triton cross-entropy."""
    _refuse(case, "Liger-Kernel")
    target = torch.arange(case.num_pairs, device=case.device)
    if not case.kl:
        _refuse(case, "Liger-Kernel's fused linear cross-entropy (without a teacher)", cpu=True)
        fused = _imported("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()

        def infonce(inputs: Inputs) -> Tensor:
            scale = inputs.scale.to(inputs.image.dtype)
            row = fused(inputs.text, scale * inputs.image, target)
            return (row + fused(inputs.image, scale * inputs.text, target)) / 2

        return infonce
    # beta 0 is KL(teacher || student).
    distill = _imported("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss(
        weight_hard_loss=1.0, weight_soft_loss=1.0, beta=0.0
    )

    def with_kl(inputs: Inputs) -> Tensor:
        image, text, scale, ref_image, ref_text, ref_scale, _ = inputs
        assert ref_image is not None
        assert ref_text is not None
        assert ref_scale is not None
        scale, ref_scale = scale.to(image.dtype), ref_scale.to(image.dtype)
        row = distill(scale * image, text, ref_scale * ref_image, ref_text, target)
        return (row + distill(scale * text, image, ref_scale * ref_text, ref_image, target)) / 2

    return with_kl


def _memeff(case: Case) -> Loss:
    _refuse(case, "memeff", kl=True, cpu=True)
    # stable=True, its default, would give gradients times sqrt(N / scale).
    loss = _imported("memeff").MemoryEfficientCLIPLoss(
        temperature=1.0 / case.scale, normalized_inputs=True, stable=False
    )
    return lambda inputs: loss(inputs.image, inputs.text)


def _siglip(case: Case) -> Loss:
    _refuse(case, "siglip-kernel", kl=True, cpu=True)
    run = _imported("siglip_kernel").fused_siglip_loss
    bias = torch.tensor(SIGLIP_BIAS, device=case.device)
    return lambda inputs: run(inputs.image, inputs.text, inputs.scale.log(), bias)


def _inf_cl(case: Case) -> Loss:
    _refuse(case, "inf-cl", kl=True, cpu=True)
    if case.width % 256:
        raise UnavailableError(f"inf-cl needs a multiple of its head width, 256; D is {case.width}")
    run = _imported("inf_cl").cal_flash_loss

    def loss(inputs: Inputs) -> Tensor:
        row = run(inputs.image, inputs.text, scale=inputs.scale)
        return (row.mean() + run(inputs.text, inputs.image, scale=inputs.scale).mean()) / 2

    return loss


def _refuse(case: Case, name: str, *, kl: bool = False, cpu: bool = False) -> None:
    """Refuse a case with labels, and with what else an implementation cannot take."""
    if kl and case.kl:
        raise UnavailableError(f"{name} has no KL to a teacher")
    if case.labels:
        raise UnavailableError(f"{name} knows no pairs that are each other's positives")
    if cpu and case.device != "cuda":
        raise UnavailableError(f"{name} is Triton kernels, which need a CUDA GPU")


def _imported(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnavailableError(f"{module} cannot be imported ({error})") from error


_OPEN_CLIP = Provider(
    "open_clip",
    _open_clip,
    package="open_clip_torch",
    dense_matrices=(6, 12),
    keeps_logits=True,
    omits_reference_entropy=True,
)
_ALL = (
    Provider("fasterase-triton", partial(_fasterase, "triton"), makes_gradients_early=True),
    Provider(
        "fasterase-cpu", partial(_fasterase, "cpu"), keeps_logits=True, makes_gradients_early=True
    ),
    Provider(
        "fasterase-cpu-bf16",
        partial(_fasterase, "cpu", products="bf16"),
        keeps_logits=True,
        makes_gradients_early=True,
    ),
    Provider("fasterase-chunked", partial(_fasterase, "chunked"), makes_gradients_early=True),
    Provider(
        "fasterase-dense", partial(_fasterase, "dense"), dense_matrices=(7, 20), keeps_logits=True
    ),
    Provider(
        "torch-dense", _torch_dense, package="torch", dense_matrices=(5, 10), keeps_logits=True
    ),
    _OPEN_CLIP,
    replace(
        _OPEN_CLIP,
        name="open_clip-compiled",
        build=_open_clip_compiled,
        dense_matrices=(3, 9),
        compiles=True,
    ),
    Provider("torch-linear-ce", _torch_linear_cross_entropy, package="torch"),
    Provider("liger", _liger, package="liger-kernel", compiles=True),
    Provider("memeff", _memeff, package="memeff", has_scale_gradient=False),
    Provider("siglip-kernel", _siglip, package="siglip-kernel", objective="siglip"),
    Provider("inf-cl", _inf_cl, package="inf-cl"),
)
PROVIDERS = {provider.name: provider for provider in _ALL}
