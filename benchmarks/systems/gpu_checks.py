"""Calls of the Triton backend: small ones for compute-sanitizer, many times over, and replayed.

    python -m benchmarks.systems.gpu_checks small
    python -m benchmarks.systems.gpu_checks repeats
    python -m benchmarks.systems.gpu_checks graphs

"small" makes one call of each kind; `make gpu STAGE=memcheck` and `STAGE=racecheck` run it under
compute-sanitizer. "repeats" makes each call many times, between allocations that move its memory,
and compares the bits. It writes a digest of each call's results, and ends with code 1 if two
repeats differ. "graphs" captures a step of weighted losses as a CUDA graph, replays it on other
features, and compares bits and time with the step itself. Both write each row to
benchmarks/results/gpu_checks.csv as soon as it is measured, and leave out what this version has
measured on this GPU, unless bits differed; --fresh measures it again. On CPU tensors, under
TRITON_INTERPRET=1, sizes are smaller and nothing is captured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.command import exit_with, mode_parser
from benchmarks.loss.case import Case, make_inputs
from benchmarks.loss.measure import clock
from benchmarks.result_files import forget_rows, measure_once
from fasterase.ops.contrastive import contrastive, weighted_contrastive


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


def digest(tensors: list[Tensor]) -> str:
    """Return a short SHA-256 of the bits of some tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def repeat(call: Call, device: str, times: int) -> list[dict[str, Any]]:
    """Make one call `times` times; return a row: were the bits equal, and their digest."""
    digests = set()
    held: list[Tensor] = []
    for number in range(times):
        digests.add(digest(call.run(device)))
        # Moves what the next call allocates, and leaves NaN in it.
        held.append(torch.full((1000 * (number + 1),), torch.nan, device=device))
        held = held[-3:]
    return [{"equal": len(digests) == 1, "digest": " ".join(sorted(digests))}]


def replay(case: Case) -> list[dict[str, Any]]:
    """Capture a step with some features, replay it with others; return a row: bits and times."""
    device = case.device
    first, second = (make_inputs(case, seed) for seed in (0, 1))
    shape = (4 if case.kl else 2, case.num_pairs)
    weights = torch.full(shape, 1 / case.num_pairs, device=device)

    def step() -> list[Tensor]:
        found = weighted_contrastive(*first.leaves, weights, **first.reference, backend="triton")
        return [found.total.detach(), *torch.autograd.grad(found.total, first.leaves)]

    captured, run_again = capture(step, device)
    with torch.no_grad():
        for ours, other in zip(first.leaves, second.leaves, strict=True):
            ours.copy_(other)
    replayed = run_again()
    replayed = [each.clone() for each in (captured if replayed is None else replayed)]
    equal = all(map(torch.equal, replayed, step()))
    times = {
        name: float(np.median([clock(call, device) for _ in range(20 if device == "cuda" else 1)]))
        for name, call in (("eager_ms", step), ("replay_ms", run_again))
    }
    return [{"equal": equal, **times}]


def capture(
    step: Callable[[], list[Tensor]], device: str
) -> tuple[list[Tensor], Callable[[], list[Tensor] | None]]:
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


def measurements(
    mode: str, device: str, times: int | None
) -> Iterator[tuple[dict[str, Any], Callable[[], list[dict[str, Any]]]]]:
    """Yield what is measured, and the function that measures it."""
    on_gpu = device == "cuda"
    if mode == "graphs":
        dtype = "bfloat16" if on_gpu else "float16"
        for n, kl in product((1024, 4096, 16384) if on_gpu else (24,), (False, True)):
            case = Case(n, 768 if on_gpu else 16, dtype, kl=kl, device=device)
            name = f"weighted, {dtype}, {'KL' if kl else 'InfoNCE'}"
            thing = {"check": mode, "call": name, "n": n, "width": case.width}
            yield thing, partial(replay, case)
        return
    times = times or (20 if on_gpu else 2)
    for call in calls(5000 if on_gpu else 40, 512 if on_gpu else 20, has_bf16=on_gpu):
        thing = {"check": mode, "call": call.name, "n": call.num_pairs, "width": call.width}
        yield thing | {"times": times}, partial(repeat, call, device, times)


def main(argv: list[str] | None = None) -> int:
    parser = mode_parser(
        __doc__, "benchmarks.systems.gpu_checks", ("small", "repeats", "graphs"), "gpu_checks.csv"
    )
    parser.add_argument("--times", type=int, help="repeats of a call; default: 20, on a CPU 2")
    args = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    if args.mode == "small":
        for call in calls(130 if on_gpu else 30, 80 if on_gpu else 20, has_bf16=on_gpu):
            finite = all(bool(x.isfinite().all()) for x in call.run(device))
            print(f"{call.name}: {'finite' if finite else 'NOT FINITE'}", flush=True)
            if not finite:
                return 1
        return 0
    if args.fresh:
        forget_rows(args.output, args.mode)
    is_good = True
    for thing, measure in measurements(args.mode, device, args.times):
        (row,) = measure_once(args.output, thing, device, measure)
        is_equal = str(row["equal"]) == "True"
        print(f"{row['call']}, N={row['n']}: {'equal' if is_equal else 'DIFFERENT'}", flush=True)
        if row.get("eager_ms"):
            eager, replayed = (float(row[name]) for name in ("eager_ms", "replay_ms"))
            print(f"  {eager:.3f} ms, replayed {replayed:.3f} ms", flush=True)
        is_good &= is_equal
    return int(not is_good)


if __name__ == "__main__":
    exit_with(main)
