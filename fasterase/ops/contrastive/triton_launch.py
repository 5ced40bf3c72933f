"""Launches of Triton kernels through the handles of compiled ones.

`JITFunction` examines every argument of every launch, which takes the host 20 to 40 us; a step on
1,024 pairs would wait for the host. Here the first launch of a kind leaves a handle to the others.
"""

from __future__ import annotations

import warnings
from typing import Any

import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.errors import OutOfResources

# Stated, since Triton 3.10 changes the default: a multiply-add rounds once.
FIXED_OPTIONS = {"enable_fp_fusion": True}

_handles: dict[tuple[Any, ...], tuple[CompiledKernel, tuple[Any, ...]]] = {}


def launch(kernel: Any, grid: tuple[int, int], *args: Any, **constants: Any) -> None:
    """`kernel[grid](*args, **constants)`, on the current stream of the current device.

    Args:
        args: tensors on that device, the first at least; integers; floats.
        constants: the kernel's last parameters, and options of its compilation.
    """
    # All that may change the code: constants, dtypes, and whether pointers and integers are
    # multiples of 16, 1, or wider than 32 bits. Handles belong to a device.
    key: list[Any] = [kernel, args[0].get_device(), *constants.values()]
    values: list[Any] = []
    for x in args:
        if isinstance(x, Tensor):
            key.append(x.dtype)
            x = x.data_ptr()
            key.append(x & 15 == 0)
        elif isinstance(x, int):
            key.append(1 if x == 1 else (x & 15 == 0, x >> 31))
        values.append(x)
    handle, last = _handles.get(tuple(key), (None, ()))
    if handle is not None and not _has_hooks(kernel):
        handle[(*grid, 1)](*values, *last)
        return
    handle = _compile_and_launch(kernel, (*grid, 1), args, constants)
    if isinstance(handle, CompiledKernel):  # an interpreter's has none
        last = tuple(constants[name] for name in kernel.arg_names[len(args) :])
        _handles[tuple(key)] = handle, last


def _has_hooks(kernel: Any) -> bool:
    """Whether something, such as a profiler, follows launches or changes how kernels compile."""
    hooks = triton.knobs.runtime.launch_enter_hook
    return bool(kernel.pre_run_hooks or getattr(hooks, "calls", hooks))


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
