"""Measure a provider: interleaved times, peak extra memory, errors against fp64."""

from __future__ import annotations

import functools
import gc
import os
import random
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.loss.case import Case, Inputs, exact_losses, in_fp64, make_inputs, tiled_losses
from benchmarks.loss.providers import PROVIDERS, Loss, Provider, UnavailableError
from benchmarks.processes import MeasurementError, call_in_process, describe_error
from fasterase.planner.count import PeakMemory, proc_bytes

# Written before every timed call on a GPU, so that each starts with a cold L2 (50 MB on an H100).
_FLUSH_BYTES = 256 * 2**20
# Pairs of the warm-up before a memory measurement, which loads libraries and starts threads.
_WARM_UP_PAIRS = 64
_MEMORY_LIMIT_SECONDS = 600
# Up to so many pairs the truth comes from whole matrices in fp64, beyond from tiles of them.
_DENSE_PAIRS = 8192

Repetition = Callable[[], float]


def repetition(loss: Loss, inputs: Inputs, mode: str, device: str) -> Repetition:
    """Return a function that runs `mode` once and returns the milliseconds it took.

    "backward" builds a new graph before its clock starts; "forward" frees it after its clock
    stops.
    """

    def run() -> float:
        for leaf in inputs.leaves:
            leaf.grad = None
        if mode == "backward":
            value = loss(inputs)
            return clock(value.backward, device)
        if mode == "full":
            return clock(lambda: loss(inputs).backward(), device)
        with torch.set_grad_enabled(mode == "forward"):
            return clock(lambda: loss(inputs), device)

    return run


def clock(call: Callable[[], object], device: str) -> float:
    """Time one call in milliseconds; on a GPU by events on its stream, from a cold L2."""
    if device == "cpu":
        start = time.perf_counter()
        result = call()
        elapsed = time.perf_counter() - start
        del result
        return elapsed * 1e3
    torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device).zero_()
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    call()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after)


def time_interleaved(
    repetitions: dict[str, Repetition],
    *,
    seconds: float,
    min_samples: int,
    max_samples: int,
    compiled: frozenset[str] = frozenset(),
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Call all repetitions in turn, and return (samples in ms, reasons of failures) by name.

    Every round over the names has another random order: a drift of the machine affects all alike,
    and none always follows the same other. After a product of large matrices, which leaves the
    caches cold, a step of 64 pairs takes twice the time. A name drops out when its calls have taken
    `seconds` and it has `min_samples`. The first call warms up and is not counted, unless it alone
    takes `seconds`, which makes a warm-up negligible, and compiles nothing.
    """
    samples: dict[str, list[float]] = {name: [] for name in repetitions}
    spent = dict.fromkeys(repetitions, 0.0)
    failures: dict[str, str] = {}
    active = list(repetitions)
    order = random.Random(0)
    turn = 0
    gc.disable()
    try:
        while active:
            for name in order.sample(active, len(active)):
                began = time.perf_counter()
                try:
                    elapsed = repetitions[name]()
                except Exception as error:
                    failures[name] = describe_error(error)
                    continue
                took = time.perf_counter() - began
                if turn > 0 or (took > seconds and name not in compiled):
                    samples[name].append(elapsed)
                    spent[name] += took
            active = [
                name
                for name in active
                if name not in failures
                and len(samples[name]) < max_samples
                and (len(samples[name]) < min_samples or spent[name] < seconds)
            ]
            gc.collect()
            turn += 1
    finally:
        gc.enable()
    return {name: found for name, found in samples.items() if name not in failures}, failures


def gemm_repetition(size: int, dtype: torch.dtype, device: str) -> Repetition:
    """Time a square product of random numbers: the best that the device's matrix units do."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: clock(lambda: torch.mm(a, b, out=out), device)


def peak_extra_bytes(provider: Provider, case: Case, mode: str) -> int:
    """Measure the peak memory of one call above its inputs, gradients included.

    On a GPU this is what torch's allocator counts; on a CPU it is resident memory, measured in a
    separate process.
    """
    if case.device == "cuda":
        return _measured_peak(provider.name, case, mode)
    try:
        return call_in_process(
            _measured_peak,
            *(provider.name, case, mode),
            seconds=_MEMORY_LIMIT_SECONDS,
            preload=["open_clip.loss"],
        )
    except MeasurementError as error:
        raise UnavailableError(str(error)) from None


def _measured_peak(name: str, case: Case, mode: str) -> int:
    provider = PROVIDERS[name]
    small = Case(**{**vars(case), "num_pairs": min(case.num_pairs, _WARM_UP_PAIRS)})
    warm = case if provider.compiles else small
    repetition(provider.build(warm), make_inputs(warm), mode, case.device)()
    run = repetition(provider.build(case), make_inputs(case), mode, case.device)
    peak = PeakMemory(case.device)
    run()
    return peak.bytes()


def available_bytes(device: str) -> int:
    """Return the memory that a provider could still allocate."""
    if device == "cuda":
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + kept
    try:
        return proc_bytes("meminfo", "MemAvailable")
    except LookupError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Truth(NamedTuple):
    """An exact loss in fp64, and its gradients."""

    loss: Tensor
    reference_entropy: Tensor  # constant
    gradients: tuple[Tensor, ...]  # of the leaves


# Each provider of a case compares with the same one, which takes longer than all of them.
@functools.lru_cache(maxsize=1)
def fp64_truth(case: Case, objective: str) -> Truth:
    """Compute a loss of the case's inputs in fp64."""
    exact = in_fp64(make_inputs(case))
    losses = tiled_losses(exact) if case.num_pairs > _DENSE_PAIRS else exact_losses(exact)
    loss: Tensor = getattr(losses, objective)
    gradients = torch.autograd.grad(loss, exact.leaves)
    return Truth(loss.detach(), losses.reference_entropy.detach(), gradients)


def errors_against_fp64(provider: Provider, case: Case) -> dict[str, float]:
    """Return the relative error of the loss and of each gradient.

    A relative error is the largest deviation divided by the largest true value. The truth is
    computed in fp64 from the same numbers that the provider gets.
    """
    if case.num_pairs > _DENSE_PAIRS and provider.objective == "siglip":
        raise UnavailableError("its exact loss takes whole matrices in fp64, which do not fit")
    loss, inputs = provider.build(case), make_inputs(case)
    truth = fp64_truth(case, provider.objective)
    true_loss = truth.loss + provider.omits_reference_entropy * truth.reference_entropy
    value = loss(inputs)
    value.backward()
    errors = {"loss_error": _relative(value.detach(), true_loss)}
    names = ("image_grad_error", "text_grad_error", "scale_grad_error")
    for name, leaf, gradient in zip(names, inputs.leaves, truth.gradients, strict=True):
        if name != "scale_grad_error" or provider.has_scale_gradient:
            assert leaf.grad is not None
            errors[name] = _relative(leaf.grad, gradient)
    return errors


def _relative(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth).abs().max() / truth.abs().max()).item()
