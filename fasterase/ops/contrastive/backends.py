"""Which implementation of the contrastive operator a call takes, and why."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from fasterase.errors import InputError
from fasterase.ops.contrastive import build
from fasterase.ops.contrastive.checks import compute_dtype
from fasterase.ops.contrastive.chunked import contrastive_chunked
from fasterase.ops.contrastive.cpu import contrastive_cpu
from fasterase.ops.contrastive.dense import Contrastive, contrastive_dense

Backend = Callable[
    [Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, tuple[int, ...]],
    Contrastive,
]


BACKENDS: dict[str, Backend | None] = {
    "dense": contrastive_dense,
    "chunked": contrastive_chunked,
    "cpu": contrastive_cpu,
    "triton": None,
}

NAMES = tuple(BACKENDS)


def load(name: str) -> Backend:
    """The backend of that name.

    Triton's is imported when first used: it is not installed everywhere, and takes 0.3 s.
    """
    backend = BACKENDS[name]
    if backend is not None:
        return backend
    from fasterase.ops.contrastive.triton import contrastive_triton

    return contrastive_triton


class BackendChoice(NamedTuple):
    """The backend a call takes, and the reason in words."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def available_backends() -> tuple[str, ...]:
    """Names that `backend=` accepts here, beside "auto". Builds the C++ kernels where it can."""
    return tuple(name for name in NAMES if _missing(name) is None)


def choose(backend: str, pairs: tuple[Tensor, Tensor] | None = None) -> BackendChoice:
    """Resolve `backend`; a named one is taken or refused, never replaced by another.

    `pairs`, image and text, are what the call is about; without them the name is only checked.

    Raises:
        InputError: the name is unknown, not available here, or not for image's device.
    """
    if backend == "auto":
        return _automatic(pairs)
    if backend not in NAMES:
        usable = ", ".join(repr(name) for name in ("auto", *available_backends()))
        raise InputError(f"backend must be one of {usable}; got {backend!r}.")
    reason = _missing(backend)
    if reason is not None:
        usable = ", ".join(repr(name) for name in ("auto", *available_backends()))
        raise InputError(
            f"backend={backend!r} is not available in this installation: {reason}. "
            f"Use one of {usable}."
        )
    if backend == "cpu" and pairs is not None and pairs[0].device.type != "cpu":
        raise InputError(
            f"backend='cpu' takes CPU tensors; image is on {pairs[0].device}. Use backend='auto'."
        )
    return BackendChoice(backend, "named by the caller")


def _automatic(pairs: tuple[Tensor, Tensor] | None) -> BackendChoice:
    if pairs is not None and pairs[0].is_cuda and compute_dtype(*pairs) != torch.float64:
        reason = _missing("triton")
        if reason is None:
            return BackendChoice("triton", "auto: fused Triton kernels for tensors on a GPU")
        return BackendChoice("chunked", f"auto: torch tiles, for {reason}")
    if pairs is not None and pairs[0].device.type == "cpu":
        reason = build.problem()
        if reason is None:
            return BackendChoice("cpu", "auto: C++ tiles for tensors on the CPU")
        _warn_of_fallback(reason)
        return BackendChoice(
            "chunked", f"auto: torch tiles, for the C++ ones are missing: {reason}"
        )
    return BackendChoice("chunked", "auto: O(N D) memory on any device and dtype")


@functools.cache
def _warn_of_fallback(reason: str) -> None:
    warnings.warn(
        f"The contrastive loss runs on torch tiles (backend='chunked'), which is slower: {reason}. "
        f"`fasterase compile` tries again.",
        stacklevel=4,
    )


def _missing(backend: str) -> str | None:
    """Why a backend of the interface cannot run here; None where it can."""
    if backend == "cpu":
        return build.problem()
    return _triton_missing() if backend == "triton" else None


def _triton_missing() -> str | None:
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


# As of `build.problem`: a constant to torch.compile, which in torch 2.11 cannot trace find_spec.
_triton_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]
