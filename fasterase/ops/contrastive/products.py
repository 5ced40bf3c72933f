"""The precision of the matrix products: as the caller asks, or by torch's conventions.

Only `triton` has a choice; the other backends multiply in the dtype of the computation. Features
of half precision are multiplied as they are: the sum of their exact products is taken in fp32.
Others may be rounded to fp16 or bf16 first, all or none: the KL of two equal models stays 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fasterase.errors import InputError

PRODUCTS = ("auto", "fp32", "fp16", "bf16")

HALF_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def check_products(products: Any) -> None:
    """Refuse what is not in `PRODUCTS`."""
    if products not in PRODUCTS:
        raise InputError(
            f"products must be one of {', '.join(map(repr, PRODUCTS))}; got {products!r}."
        )


def resolve_products(products: str, backend: str, features: Sequence[Tensor]) -> str:
    """Return how a call multiplies: "fp16", "bf16", "tf32", "fp32" or "fp64".

    `features` are image, text and, if there is a reference, its two.
    """
    if any(each.dtype == torch.float64 for each in features[:2]):
        return "fp64"
    if backend != "triton":
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
    matmul = torch.backends.cuda.matmul
    try:
        before = torch.get_float32_matmul_precision()
        restore = partial(torch.set_float32_matmul_precision, before)
        torch.set_float32_matmul_precision("highest")
    except RuntimeError:  # set through `fp32_precision`, which must not be mixed with these
        restore = partial(setattr, matmul, "fp32_precision", "tf32")
        matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        restore()
