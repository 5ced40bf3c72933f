"""Compile the Triton kernels ahead of all else, and measure the time of each in a step.

    python -m benchmarks.systems.gpu_kernels warm
    python -m benchmarks.systems.gpu_kernels kernels

"warm" makes a call of each kind in 16 processes at a time, which fills Triton's cache on disk.
"kernels" profiles steps of weighted losses: of every kernel, cuBLAS's included, its share of the
GPU's time, and beside them the time that the host takes to launch a step. It writes each step to
benchmarks/results/gpu_checks.csv as soon as it is profiled, and leaves out those that this version
has profiled on this GPU; --fresh profiles them again. Without a GPU, under TRITON_INTERPRET=1,
sizes are small and the rows are torch's operators on the CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.command import exit_with, mode_parser
from benchmarks.loss.case import Case, make_inputs
from benchmarks.processes import call_all, describe_error
from benchmarks.result_files import forget_rows, measure_once
from benchmarks.systems.gpu_checks import Call, calls
from fasterase.ops.contrastive import weighted_contrastive

PROCESSES = 16
_STEPS = 20


def warm_calls(device: str) -> Iterator[Call]:
    """Yield calls that need every kernel which later stages use."""
    if device == "cpu":
        yield next(calls(30, 20, has_bf16=False))
        return
    for num_pairs, width in ((5000, 512), (130, 80)):
        yield from calls(num_pairs, width, has_bf16=True)
    # All sizes and the usual widths share the kernels of one.
    kinds = [(torch.bfloat16, "auto"), (torch.float32, "fp16")]
    for (dtype, products), kl, weighted in product(kinds, (False, True), (False, True)):
        yield Call("", 4096, 768, dtype, products, kl, (4096,), False, weighted)


def compile_call(call: Call, device: str) -> str:
    """Make a call, and return what came of it."""
    try:
        call.run(device)
    except Exception as error:
        return describe_error(error)
    return "compiled"


def make_step(case: Case) -> Callable[[], tuple[Tensor, ...]]:
    """Return a function that computes weighted losses and their gradients, as training does."""
    inputs = make_inputs(case)
    shape = (4 if case.kl else 2, case.num_pairs)
    weights = torch.full(shape, 1 / case.num_pairs, device=case.device)

    def step() -> tuple[Tensor, ...]:
        found = weighted_contrastive(*inputs.leaves, weights, **inputs.reference, backend="triton")
        return torch.autograd.grad(found.total, inputs.leaves)

    return step


def profile_step(case: Case, steps: int) -> list[dict[str, Any]]:
    """Return a row for each kernel of a step, the largest first, and one for the host."""
    step, on_gpu = make_step(case), case.device == "cuda"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    for _ in range(3 if on_gpu else 1):
        step()
    wait()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    host = (time.perf_counter() - started) / steps
    wait()
    kind = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kind.CUDA if on_gpu else kind.CPU]) as profile:
        for _ in range(steps):
            step()
        wait()
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    spent = {each.key: (getattr(each, name), each.count) for each in profile.key_averages()}
    total = sum(micros for micros, _ in spent.values())
    rows = [
        {"kernel": key, "us": micros / steps, "launches": count / steps, "share": micros / total}
        for key, (micros, count) in sorted(spent.items(), key=lambda each: -each[1][0])
        if micros
    ]
    rows.append({"kernel": "host, to launch a step", "us": host * 1e6})
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = mode_parser(
        __doc__, "benchmarks.systems.gpu_kernels", ("warm", "kernels"), "gpu_checks.csv"
    )
    args = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    if args.mode == "warm":
        jobs = list(warm_calls(device))
        found = call_all(compile_call, jobs, device, processes=min(PROCESSES, len(jobs)))
        wrong = {said for said in found.values() if said != "compiled"}
        print("\n".join(sorted(wrong)) or f"{len(found)} calls compiled")
        return int(bool(wrong))
    if args.fresh:
        forget_rows(args.output, args.mode)
    sizes = (1024, 4096, 8192, 32768) if on_gpu else (24,)
    for n, width, kl in product(sizes, (512, 768, 1280) if on_gpu else (16,), (False, True)):
        case = Case(n, width, "bfloat16" if on_gpu else "float16", kl=kl, device=device)
        thing = {"check": args.mode, "n": n, "width": width, "kl": kl, "dtype": case.dtype}
        profile = partial(profile_step, case, _STEPS if on_gpu else 1)
        host = float(measure_once(args.output, thing, device, profile)[-1]["us"])
        print(f"N={n} D={width} {'KL' if kl else 'InfoNCE'}: {host:.0f} us of the host", flush=True)
    return 0


if __name__ == "__main__":
    exit_with(main)
