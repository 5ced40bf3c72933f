"""Which implementation of the contrastive operator a call takes, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from fasterase.errors import InputError
from fasterase.ops.contrastive.chunked import contrastive_chunked
from fasterase.ops.contrastive.dense import Contrastive, contrastive_dense

Backend = Callable[
    [Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, tuple[int, ...]],
    Contrastive,
]

BACKENDS: dict[str, Backend] = {
    "dense": contrastive_dense,
    "chunked": contrastive_chunked,
}

# Names of the interface; those without an entry above are not built into this installation.
NAMES = ("dense", "chunked", "cpu", "triton")


class BackendChoice(NamedTuple):
    """The backend a call takes, and the reason in words."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def available_backends() -> tuple[str, ...]:
    """Names that `backend=` accepts here, beside "auto"."""
    return tuple(name for name in NAMES if name in BACKENDS)


def choose(backend: str) -> BackendChoice:
    """Resolve `backend`; a named one is taken or refused, never replaced by another.

    Raises:
        InputError: the name is unknown, or known but not available here.
    """
    if backend == "auto":
        return BackendChoice("chunked", "auto: O(N D) memory on any device and dtype")
    if backend in BACKENDS:
        return BackendChoice(backend, "named by the caller")
    usable = ", ".join(repr(name) for name in ("auto", *available_backends()))
    if backend in NAMES:
        raise InputError(
            f"backend={backend!r} is not available in this installation. Use one of {usable}."
        )
    raise InputError(f"backend must be one of {usable}; got {backend!r}.")
