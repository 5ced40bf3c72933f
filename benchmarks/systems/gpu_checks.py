"""Calls of the Triton backend on a GPU: compiled ahead, checked for equal bits, timed.

    python -m benchmarks.systems.gpu_checks warm|small|repeats|graphs|kernels

"warm" makes a call of each kind in 16 processes at a time, which fills Triton's cache on disk.
"small" makes one small call of each kind; `make gpu STAGE=memcheck` and `STAGE=racecheck` run it
under compute-sanitizer. "repeats" makes each call many times, between allocations that move its
memory; it writes a digest of the results. "graphs" captures a step of weighted losses as a CUDA
graph, replays it on other features, and compares bits and time with the step itself. Both end with
code 1 where bits differ. "kernels" profiles steps: of every kernel, cuBLAS's included, its share of
the GPU's time, and beside them the time that the host takes to launch a step.

The last three write each row to benchmarks/results/gpu_checks.csv as soon as it is measured, and
leave out what this version has measured on this GPU, unless bits differed; --fresh measures it
again. On CPU tensors, under TRITON_INTERPRET=1, sizes are smaller and nothing is captured.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.command import exit_with, mode_parser
from benchmarks.loss.case import Case, Inputs, make_inputs
from benchmarks.loss.measure import clock
from benchmarks.processes import call_all, describe_error
from benchmarks.result_files import forget_rows, measure_once
from fasterase.ops.contrastive import contrastive, weighted_contrastive

PROCESSES = 16
Measure = Callable[[], list[dict[str, Any]]]


class Call(NamedTuple):
    """One kind of call; `products` as in `contrastive`."""

    name: str
    num_pairs: int
    width: int
    dtype: torch.dtype
    products: str
    kl: bool
    groups: tuple[int, ...]
    labels: bool
    weighted: bool

    def run(self, device: str) -> list[Tensor]:
        """Return losses and gradients, from inputs that are the same every time."""
        generator = torch.Generator().manual_seed(0)

        def rows() -> Tensor:
            features = normalize(torch.randn(self.num_pairs, self.width, generator=generator))
            return features.to(device, self.dtype)

        image, text = rows().requires_grad_(), rows().requires_grad_()
        scale = torch.tensor(30.0, device=device, requires_grad=True)
        options: dict[str, Any] = {"groups": self.groups, "backend": "triton"}
        if self.kl:
            options |= {"ref_image": rows(), "ref_text": rows(), "ref_scale": 100.0}
        if self.labels:
            options["labels"] = (torch.arange(self.num_pairs) % 40).to(device)
        if self.weighted:
            weights = torch.rand(4 if self.kl else 2, self.num_pairs, generator=generator)
            found = weighted_contrastive(
                image, text, scale, weights.to(device), products=self.products, **options
            )
            losses, total = found.losses, found.total
        else:
            losses = contrastive(image, text, scale, products=self.products, **options)
            total = sum((x.sum() for x in losses if x is not None), scale.new_zeros(()))
        gradients = torch.autograd.grad(total, [image, text, scale])
        return [x.detach() for x in (*losses, *gradients) if x is not None]


def calls(num_pairs: int, width: int, *, has_bf16: bool) -> Iterator[Call]:
    """Yield calls of every kind, in two groups, the second four times as large."""
    groups = (num_pairs // 5, num_pairs - num_pairs // 5)
    kinds = [(torch.float32, "fp32"), (torch.float32, "fp16"), (torch.float16, "auto")]
    if has_bf16:
        kinds += [(torch.float32, "bf16"), (torch.bfloat16, "auto")]
    for (dtype, products), kl in product(kinds, (False, True)):
        given = str(dtype).removeprefix("torch.")
        name = f"{given}, {products} products, {'KL' if kl else 'InfoNCE'}"
        yield Call(name, num_pairs, width, dtype, products, kl, groups, False, False)
    yield Call("labels", num_pairs, width, torch.float16, "auto", True, groups, True, False)
    yield Call("weighted", num_pairs, width, torch.float16, "auto", True, groups, False, True)


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


def make_step(case: Case, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """Return what computes the gradients of weighted losses, and their total, as training does."""
    shape = (4 if case.kl else 2, case.num_pairs)
    weights = torch.full(shape, 1 / case.num_pairs, device=case.device)

    def step() -> tuple[Tensor, ...]:
        found = weighted_contrastive(*inputs.leaves, weights, **inputs.reference, backend="triton")
        return *torch.autograd.grad(found.total, inputs.leaves), found.total.detach()

    return step


def repeat(call: Call, device: str, times: int) -> list[dict[str, Any]]:
    """Make one call `times` times; return a row: were the bits equal, and their digest."""
    digests = set()
    held: list[Tensor] = []
    for number in range(times):
        digest = hashlib.sha256()
        for tensor in call.run(device):
            bits = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(bits.numpy().tobytes())
        digests.add(digest.hexdigest()[:16])
        # Moves what the next call allocates, and leaves NaN in it.
        held.append(torch.full((1000 * (number + 1),), torch.nan, device=device))
        held = held[-3:]
    return [{"equal": len(digests) == 1, "digest": " ".join(sorted(digests))}]


def replay(case: Case) -> list[dict[str, Any]]:
    """Capture a step with some features, replay it with others; return a row: bits and times."""
    device = case.device
    first, second = (make_inputs(case, seed) for seed in (0, 1))
    step = make_step(case, first)
    captured, run_again = capture(step, device)
    with torch.no_grad():
        for ours, other in zip(first.leaves, second.leaves, strict=True):
            ours.copy_(other)
    replayed = run_again()
    replayed = tuple(each.clone() for each in (captured if replayed is None else replayed))
    equal = all(map(torch.equal, replayed, step()))
    times = {
        name: float(np.median([clock(call, device) for _ in range(20 if device == "cuda" else 1)]))
        for name, call in (("eager_ms", step), ("replay_ms", run_again))
    }
    return [{"equal": equal, **times}]


def capture(
    step: Callable[[], tuple[Tensor, ...]], device: str
) -> tuple[tuple[Tensor, ...], Callable[[], tuple[Tensor, ...] | None]]:
    """Capture a step; return its outputs, and what replays it into them. A CPU takes the step."""
    if device == "cpu":
        return step(), step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    return outputs, graph.replay


def profile_step(case: Case, steps: int) -> list[dict[str, Any]]:
    """Return a row for each kernel of a step, the largest first, and one for the host."""
    step, on_gpu = make_step(case, make_inputs(case)), case.device == "cuda"
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
    return [*rows, {"kernel": "host, to launch a step", "us": host * 1e6}]


def measurements(
    mode: str, device: str, times: int | None
) -> Iterator[tuple[dict[str, Any], Measure]]:
    """Yield what is measured, and the function that measures it."""
    on_gpu = device == "cuda"
    dtype = "bfloat16" if on_gpu else "float16"
    if mode == "repeats":
        times = times or (20 if on_gpu else 2)
        for call in calls(5000 if on_gpu else 40, 512 if on_gpu else 20, has_bf16=on_gpu):
            thing = {"check": mode, "call": call.name, "n": call.num_pairs, "width": call.width}
            yield thing | {"times": times}, partial(repeat, call, device, times)
    elif mode == "graphs":
        for n, kl in product((1024, 4096, 16384) if on_gpu else (24,), (False, True)):
            case = Case(n, 768 if on_gpu else 16, dtype, kl=kl, device=device)
            name = f"weighted, {dtype}, {'KL' if kl else 'InfoNCE'}"
            thing = {"check": mode, "call": name, "n": n, "width": case.width}
            yield thing, partial(replay, case)
    else:
        sizes = (1024, 4096, 8192, 32768) if on_gpu else (24,)
        for n, width, kl in product(sizes, (512, 768, 1280) if on_gpu else (16,), (False, True)):
            case = Case(n, width, dtype, kl=kl, device=device)
            thing = {"check": mode, "n": n, "width": width, "kl": kl, "dtype": dtype}
            yield thing, partial(profile_step, case, 20 if on_gpu else 1)


def main(argv: list[str] | None = None) -> int:
    modes = ("warm", "small", "repeats", "graphs", "kernels")
    parser = mode_parser(__doc__, "benchmarks.systems.gpu_checks", modes, "gpu_checks.csv")
    parser.add_argument("--times", type=int, help="repeats of a call; default: 20, on a CPU 2")
    args = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    if args.mode == "warm":
        jobs = list(warm_calls(device))
        found = call_all(compile_call, jobs, device, processes=min(PROCESSES, len(jobs)))
        wrong = {said for said in found.values() if said != "compiled"}
        print("\n".join(sorted(wrong)) or f"{len(found)} calls compiled")
        return int(bool(wrong))
    if args.mode == "small":
        for call in calls(130 if on_gpu else 30, 80 if on_gpu else 20, has_bf16=on_gpu):
            is_finite = all(bool(x.isfinite().all()) for x in call.run(device))
            print(f"{call.name}: {'finite' if is_finite else 'NOT FINITE'}", flush=True)
            if not is_finite:
                return 1
        return 0
    if args.fresh:
        forget_rows(args.output, args.mode)
    is_good = True
    for thing, measure in measurements(args.mode, device, args.times):
        *_, row = measure_once(args.output, thing, device, measure)
        names = (*thing, "equal", "eager_ms", "replay_ms", "us")
        print(*(f"{name}={row[name]}" for name in names if name in row), flush=True)
        is_good &= str(row.get("equal", True)) != "False"
    return int(not is_good)


if __name__ == "__main__":
    exit_with(main)
