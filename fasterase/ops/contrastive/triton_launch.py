"""Launches of Triton kernels through the handles of compiled ones.

`JITFunction` examines every argument of every launch, which takes the host 20 to 40 us; a step on
1,024 pairs would wait for the host. Here the first launch of a kind leaves a handle for the others.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from filelock import FileLock
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

# Stated, since Triton 3.10 changes the default: a multiply-add rounds once.
FIXED_OPTIONS = {"enable_fp_fusion": True}
# Seconds that a process waits for another to compile a kernel, which takes some ten.
COMPILE_SECONDS = 120.0

# By kernel, variant and constants, a compiled kernel and the constants that it takes as arguments.
Handles = dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]]


class Launcher(NamedTuple):
    """Launches on the current stream of the current device."""

    handles: Handles
    stream: int | None  # None: through `JITFunction`
    signature: tuple[Any, ...] = ()

    @classmethod
    def of(cls, device: torch.device, *signature: Any) -> Launcher:
        """A launcher for calls of one signature, which settles whatever kernels specialise on.

        That is: the device, the dtype of every tensor, whether its address is a multiple of 16
        bytes, and all integers, but for what a kernel lists in `do_not_specialize`.
        """
        handles = _handles_of(device, *signature)
        hooks = triton.knobs.runtime.launch_enter_hook
        if not handles or getattr(hooks, "calls", hooks):  # a profiler's, which may change kernels
            return cls(handles, None, signature)
        stream = driver.active.get_current_stream(driver.active.get_current_device())
        return cls(handles, stream, signature)

    def __call__(
        self, kernel: Any, grid: tuple[int, int], *args: Any, variant: int = 0, **constants: Any
    ) -> None:
        """`kernel[grid](*args, **constants)`.

        Args:
            args: the kernel's first parameters.
            variant: tells launches apart whose kernel and constants are the same, but whose tensors
                may differ in dtype or alignment.
            constants: the others, and options of its compilation.
        """
        key = id(kernel), variant, *constants.values()
        found = self.handles.get(key)
        if found is not None and self.stream is not None and not kernel.pre_run_hooks:
            # As JITFunction.run does.
            handle, last = found
            handle.run(
                *grid, 1, self.stream, handle.function, handle.packed_metadata, None, None, None,
                *args, *last,
            )  # fmt: skip
            return
        compiles = found is None and isinstance(kernel, triton.JITFunction)
        what = getattr(kernel, "__name__", ""), self.signature, key[1:]
        with _first_of_ranks(*what) if compiles else contextlib.nullcontext():
            made = _compile_and_launch(kernel, (*grid, 1), args, constants)
        # The interpreter has no handle; another version of Triton may have another kind.
        if all(hasattr(made, name) for name in ("run", "function", "packed_metadata")):
            last = tuple(constants[name] for name in kernel.arg_names[len(args) :])
            self.handles[key] = made, last


@functools.lru_cache(maxsize=256)
def _handles_of(*signature: Any) -> Handles:
    return {}


@contextlib.contextmanager
def _first_of_ranks(*what: Any) -> Iterator[None]:
    """Let one process compile a kernel, so that the others find it in Triton's cache."""
    name = hashlib.sha256(repr(what).encode()).hexdigest()[:16]
    try:
        folder = Path(triton.knobs.cache.dir)
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"fasterase-{name}.lock", timeout=COMPILE_SECONDS)
        lock.acquire()
    except (OSError, AttributeError):  # no locks there, or a holder that hangs: compile it here too
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _compile_and_launch(
    kernel: Any, grid: tuple[int, int, int], args: tuple[Any, ...], constants: dict[str, Any]
) -> Any:
    """Launch; with fewer stages of the pipeline where their shared memory exceeds the device's."""
    options = constants | FIXED_OPTIONS
    while True:
        try:
            return kernel[grid](*args, **options)
        except OutOfResources as error:
            stages = options.get("num_stages", 1)
            if stages == 1:
                raise
            options["num_stages"] = stages - 1
            warnings.warn(
                f"{kernel.__name__} needs more of this GPU than it has ({error}), and runs slower "
                f"with {stages - 1} stages.",
                stacklevel=2,
            )
