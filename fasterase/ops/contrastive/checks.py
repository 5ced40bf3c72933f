"""What the operator and the objectives above it accept, and how features are multiplied.

`triton`, and `chunked` on a GPU, have a choice of products, `cpu` with AMX that of fp32 and bf16.
All else multiplies in the dtype of the computation.
Features of half precision are multiplied as they are: the sum of their exact products is taken in
fp32. Others may be rounded to fp16 or bf16 first, all or none: the KL of two equal models stays 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fasterase.errors import InputError
from fasterase.ops.contrastive import cpu

PRODUCTS = ("auto", "fp32", "fp16", "bf16")
HALF_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def check_pairs(image: Any, text: Any, names: tuple[str, str] = ("image", "text")) -> None:
    """Both are [N, D] floating-point tensors, of one shape and on one device."""
    for name, value in zip(names, (image, text), strict=True):
        if not isinstance(value, Tensor) or value.dim() != 2:
            raise InputError(
                f"{name} must be a torch.Tensor of features, shape (N, D), one row a pair; "
                f"got {_describe(value)}."
            )
        _check_dtype(value, name)
    if image.shape != text.shape or image.device != text.device:
        raise InputError(
            f"{names[0]} and {names[1]} must have the same shape, row i of both being pair i, on "
            f"one device; got {_describe(image)} and {_describe(text)}."
        )


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)} on {value.device}"
    return type(value).__name__


def _check_dtype(value: Tensor, name: str) -> None:
    if value.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise InputError(
            f"{name} must be float16, bfloat16, float32 or float64; got {value.dtype}. "
            f"Convert with {name}.float()."
        )


def check_reference(image: Tensor, ref_image: Any, ref_text: Any) -> None:
    """The original's features fit the batch and are constants."""
    check_pairs(ref_image, ref_text, ("ref_image", "ref_text"))
    if len(ref_image) != len(image) or ref_image.device != image.device:
        raise InputError(
            f"ref_image and ref_text must have one row a pair, {len(image)} as image has, on "
            f"image's device {image.device}; got {_describe(ref_image)}."
        )
    for name, value in (("ref_image", ref_image), ("ref_text", ref_text)):
        if value.requires_grad:
            raise InputError(
                f"{name} requires grad, but the original model is frozen. "
                f"Compute it under torch.no_grad() or pass {name}.detach()."
            )


def check_scale(value: Any, name: str) -> None:
    """`exp(logit_scale)`: a 0-d tensor, or a positive finite number."""
    if isinstance(value, Tensor):
        is_known = value.dim() == 0 and value.is_floating_point()
    else:
        is_known = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_known:
        raise InputError(
            f"{name} must be a 0-d floating-point tensor or a float, exp(logit_scale); "
            f"got {_describe(value)}."
        )
    if not isinstance(value, Tensor) and not 0 < value <= torch.finfo(torch.float32).max:
        raise InputError(
            f"{name} must be a positive number, exp(logit_scale), that fits fp32; got {value}."
        )


def check_labels(labels: Any, rows: int) -> None:
    """[N] integers."""
    if not isinstance(labels, Tensor) or labels.shape != (rows,):
        found = _describe(labels)
        raise InputError(f"labels must be a tensor of {rows} integers, one a pair; got {found}.")
    if labels.dtype is torch.bool or labels.is_floating_point() or labels.is_complex():
        raise InputError(f"labels must be integers; got {labels.dtype}. Use labels.long().")


def check_groups(groups: Any, rows: int) -> tuple[int, ...]:
    """The sizes of the groups that have rows; None is one group of all rows."""
    if groups is None:
        return (rows,) if rows else ()
    sizes = tuple(groups) if isinstance(groups, (list, tuple)) else None
    if sizes is None or any(isinstance(n, bool) or not isinstance(n, int) for n in sizes):
        raise InputError(f"groups must be a tuple of row counts; got {groups!r}.")
    if any(n < 0 for n in sizes) or sum(sizes) != rows:
        raise InputError(
            f"groups must be non-negative row counts that sum to the {rows} rows of image; "
            f"got {sizes}, sum {sum(sizes)}."
        )
    return tuple(n for n in sizes if n)


def check_weights(weights: Any, image: Tensor, has_reference: bool) -> None:
    """[4, N] constants, one a loss and pair; [2, N] where there are no KLs."""
    names = ("ce_row", "ce_col", "kl_row", "kl_col")[: 4 if has_reference else 2]
    shape = (len(names), image.shape[0])
    is_tensor = isinstance(weights, Tensor)
    if not is_tensor or weights.shape != shape or weights.device != image.device:
        raise InputError(
            f"weights must be a tensor of shape {shape}, of {', '.join(names)}, on image's device "
            f"{image.device}; got {_describe(weights)}."
        )
    _check_dtype(weights, "weights")
    if weights.requires_grad:
        raise InputError(
            "weights require grad, but are constants here. Pass weights.detach(), or weight the "
            "losses of contrastive()."
        )


def compute_dtype(image: Tensor, text: Tensor) -> torch.dtype:
    """fp64 where a feature is fp64, else fp32, whatever the inputs' own precision."""
    return torch.float64 if torch.float64 in (image.dtype, text.dtype) else torch.float32


def scale_tensor(value: Tensor | float, image: Tensor, dtype: torch.dtype) -> Tensor:
    """0-d, in `dtype`, on image's device; differentiable where `value` is."""
    if isinstance(value, Tensor):
        return value.to(device=image.device, dtype=dtype)
    return image.new_full((), value, dtype=dtype)  # filled there: a copy would wait for the device


def check_products(products: Any) -> None:
    """Refuse what is not in `PRODUCTS`."""
    if products not in PRODUCTS:
        raise InputError(
            f"products must be one of {', '.join(map(repr, PRODUCTS))}; got {products!r}."
        )


def resolve_products(
    products: str,
    backend: str,
    features: Sequence[Tensor],  # image, text and, if there is a reference, its two
) -> str:
    """How a call multiplies `features`: "fp16", "bf16", "tf32", "fp32" or "fp64"."""
    if compute_dtype(features[0], features[1]) == torch.float64:
        return "fp64"
    if backend == "cpu":
        halves = [each for each in features if each.dtype == torch.bfloat16]
        is_bf16 = products == "bf16" or (products == "auto" and len(halves) == len(features))
        return "bf16" if is_bf16 and cpu.multiplies_bf16() else "fp32"
    if backend != "triton" and not (backend == "chunked" and features[0].is_cuda):
        return "tf32" if features[0].is_cuda and allows_tf32() else "fp32"
    if products in HALF_DTYPES:
        return products
    dtypes = [each.dtype for each in features]
    if products == "auto" and torch.is_autocast_enabled("cuda"):
        dtypes = [torch.get_autocast_dtype("cuda")]
    for name, dtype in HALF_DTYPES.items():
        if all(each == dtype for each in dtypes):
            return name
    return "tf32" if products == "auto" and allows_tf32() else "fp32"


def allows_tf32() -> bool:
    """Decide as cuBLAS does. torch 2.9 has settings per backend, which older functions reject."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32


# A constant to torch.compile, which compiles anew when the setting changes.
allows_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextlib.contextmanager
def refuse_tf32() -> Iterator[None]:
    """Keep cuBLAS from taking TF32, whatever torch's settings say."""
    if not allows_tf32():
        yield
        return
    backends: Any = torch.backends
    matmul = backends.cuda.matmul
    on_cpu = getattr(backends.mkldnn, "matmul", None)
    of_cpu = getattr(on_cpu, "fp32_precision", None)
    try:
        before = torch.get_float32_matmul_precision()
        restore = partial(torch.set_float32_matmul_precision, before)
        torch.set_float32_matmul_precision("highest")
    except RuntimeError:  # set through `fp32_precision`, which must not be mixed with these
        is_inherited = backends.fp32_precision == "tf32"
        restore = partial(setattr, matmul, "fp32_precision", "none" if is_inherited else "tf32")
        matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        restore()
        if on_cpu is not None and of_cpu is not None:
            on_cpu.fp32_precision = of_cpu
