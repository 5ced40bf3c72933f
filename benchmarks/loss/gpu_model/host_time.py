"""How long the host takes for a step of the Triton backend, on a machine without a GPU.

    python -m benchmarks.loss.gpu_model.host_time

A step with known weights (`weighted_contrastive`) runs on CPU tensors under a driver that launches
nothing: Python, allocations and small torch operators take what they take before a GPU. Triton's
launcher in C, the CUDA driver, cuBLAS and autograd come on top. The time does not depend on N as
long as G fits one strip. Beside it, a step in plain torch: autograd over `dense.py`, with 8 rows,
whose arithmetic takes no time. The command writes `benchmarks/results/host_time.csv`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.command import exit_with, new_parser
from benchmarks.loss.gpu_model.compiled_kernels import on_gpu
from benchmarks.result_files import RESULTS, write_csv
from fasterase.ops.contrastive import triton as triton_backend
from fasterase.ops.contrastive import triton_launch
from fasterase.ops.contrastive.dense import contrastive_dense
from fasterase.ops.contrastive.operator import Batch, Wanted

REPEATS = 2000


@contextlib.contextmanager
def fake_driver(launched: list[str] | None = None) -> Iterator[None]:
    """Plan for an H100 and launch nothing; append the names of the kernels to `launched`."""

    def compile_nothing(kernel: Any, grid: Any, args: Any, constants: Any) -> Any:
        def run(*arguments: Any) -> None:
            if launched is not None:
                launched.append(kernel.__name__)

        run()
        return SimpleNamespace(run=run, function=0, packed_metadata=())

    driver = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 0)
    triton_launch._handles_of.cache_clear()
    try:
        with (
            on_gpu("sm_90"),
            mock.patch.object(triton_launch, "_compile_and_launch", new=compile_nothing),
            mock.patch.object(triton_launch, "driver", new=SimpleNamespace(active=driver)),
        ):
            yield
    finally:
        triton_launch._handles_of.cache_clear()


def make_batch(n: int, width: int, has_ref: bool, dtype: torch.dtype, device: str = "cpu") -> Batch:
    """Features of zeros."""
    side = torch.zeros(n, width, dtype=dtype, device=device)
    scale = torch.ones((), device=device)
    return Batch(side, side, scale, *((side, side, scale) if has_ref else (None,) * 3))


def triton_step(has_ref: bool, device: str = "cpu") -> Callable[[], Any]:
    """A step of the Triton backend on 64 pairs, to be called under `fake_driver`."""
    batch = make_batch(64, 64, has_ref, torch.bfloat16, device)
    weights = torch.ones(2 * batch.matrices, 64, device=device)
    wanted = Wanted(image=True, text=True, scale=True, rounded=False)
    return lambda: triton_backend.step(weights, batch, (64,), wanted, "bf16")


def dense_step(has_ref: bool) -> Callable[[], Any]:
    """Losses of `contrastive_dense`, and autograd."""
    batch = make_batch(8, 8, has_ref, torch.float32)
    batch = batch._replace(image=batch.image.clone().requires_grad_())
    batch = batch._replace(text=batch.text.clone().requires_grad_())
    weights = torch.ones(2 * batch.matrices, 8)

    def step() -> None:
        losses = [x for x in contrastive_dense(*batch, (8,)) if x is not None]
        (weights * torch.stack(losses)).sum().backward()

    return step


def milliseconds(step: Callable[[], Any], repeats: int) -> dict[str, float]:
    """The median and the 10th percentile of the thread's CPU time."""
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        step()
        times.append(time.thread_time() - start)
    median, low = np.quantile(times[repeats // 10 :], (0.5, 0.1)) * 1e3
    return {"ms": float(median), "ms_p10": float(low)}


def rows(repeats: int) -> Iterator[dict[str, Any]]:
    """Yield a row per loss and way to compute it."""
    torch.set_num_threads(1)
    for has_ref, loss in ((False, "InfoNCE"), (True, "InfoNCE + KL")):
        launched: list[str] = []
        with fake_driver(launched):
            triton_step(has_ref)()
        with fake_driver():
            found = milliseconds(triton_step(has_ref), repeats)
        yield {"step": "triton", "loss": loss, "launches": len(launched), **found}
        found = milliseconds(dense_step(has_ref), repeats // 10)
        yield {"step": "dense", "loss": loss, "launches": "", **found}


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / "host_time.csv")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    args = parser.parse_args(argv)
    found = list(rows(args.repeats))
    for row in found:
        print("{step:7} {loss:14} {launches:>3} launches {ms:.3f} ms".format(**row))
    write_csv(args.output, found, decimals=4)


if __name__ == "__main__":
    exit_with(main)
