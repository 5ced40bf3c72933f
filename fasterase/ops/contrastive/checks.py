"""What the contrastive operator and the objectives above it accept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasterase.errors import InputError


def check_pairs(image: Any, text: Any, names: tuple[str, str] = ("image", "text")) -> None:
    """Both are [N, D] floating-point tensors, of one shape and on one device."""
    for name, value in zip(names, (image, text), strict=True):
        if not isinstance(value, Tensor):
            raise InputError(
                f"{name} must be a torch.Tensor of features, shape (N, D); "
                f"got {type(value).__name__}."
            )
        if value.dim() != 2:
            raise InputError(
                f"{name} must have shape (N, D), one row a pair; got {tuple(value.shape)}."
            )
        _check_dtype(value, name)
    if image.shape != text.shape:
        raise InputError(
            f"{names[0]} and {names[1]} must have the same shape, row i of both being pair i; "
            f"got {tuple(image.shape)} and {tuple(text.shape)}."
        )
    if image.device != text.device:
        found = f"got {image.device} and {text.device}."
        raise InputError(f"{names[0]} and {names[1]} must be on one device; {found}")


def _check_dtype(value: Tensor, name: str) -> None:
    if value.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise InputError(
            f"{name} must be float16, bfloat16, float32 or float64; got {value.dtype}. "
            f"Convert with {name}.float()."
        )


def check_reference(image: Tensor, ref_image: Any, ref_text: Any) -> None:
    """The original's features fit the batch and are constants."""
    check_pairs(ref_image, ref_text, ("ref_image", "ref_text"))
    if len(ref_image) != len(image):
        raise InputError(
            f"ref_image and ref_text must have one row a pair, {len(image)} as image has; "
            f"got {len(ref_image)}."
        )
    if ref_image.device != image.device:
        raise InputError(
            f"ref_image and ref_text must be on image's device {image.device}; "
            f"got {ref_image.device}."
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
        if value.dim() != 0 or not value.is_floating_point():
            raise InputError(
                f"{name} must be a 0-d floating-point tensor or a float, exp(logit_scale); "
                f"got shape {tuple(value.shape)}, {value.dtype}."
            )
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(
            f"{name} must be a 0-d tensor or a float, exp(logit_scale); got {type(value).__name__}."
        )
    elif not 0 < value <= torch.finfo(torch.float32).max:
        raise InputError(
            f"{name} must be a positive number, exp(logit_scale), that fits fp32; got {value}."
        )


def check_labels(labels: Any, rows: int) -> None:
    """[N] integers."""
    if not isinstance(labels, Tensor):
        raise InputError(
            f"labels must be a tensor of {rows} integers, one a pair; got {type(labels).__name__}."
        )
    if labels.dtype is torch.bool or labels.is_floating_point() or labels.is_complex():
        raise InputError(f"labels must be integers; got {labels.dtype}. Use labels.long().")
    if labels.shape != (rows,):
        raise InputError(
            f"labels must have shape ({rows},), one integer a pair; got {tuple(labels.shape)}."
        )


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
    shape = (len(names), len(image))
    of = f"shape {shape}, of {', '.join(names)}"
    if not isinstance(weights, Tensor):
        raise InputError(f"weights must be a tensor of {of}; got {type(weights).__name__}.")
    if weights.shape != shape:
        raise InputError(f"weights must have {of}; got {tuple(weights.shape)}.")
    _check_dtype(weights, "weights")
    if weights.device != image.device:
        raise InputError(f"weights must be on image's device {image.device}; got {weights.device}.")
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
