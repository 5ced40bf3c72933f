"""One real micro-batch on this machine: its peak memory and its speed, beside those counted."""

from __future__ import annotations

import ctypes
import gc
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from fasterase.errors import InputError
from fasterase.models.dual_encoder import DualEncoder
from fasterase.planner.architecture import copy_with
from fasterase.planner.count import FP32, Tracer, build_forward, run_micro_batch

# Activations that are large beside what the allocator and libraries keep for themselves.
_MEASURED_BYTES = 256e6
_FEWEST_PAIRS, _MOST_PAIRS = 4, 64


@dataclass(frozen=True)
class Measured:
    """What encoding and back-propagating one micro-batch took on this machine."""

    device: str  # "cuda" or "cpu"
    pairs: int  # in the micro-batch
    activation_bytes: int  # peak beyond weights and gradients
    counted_bytes: int  # what was counted for it beforehand
    tflops: float  # TFLOP per second

    @property
    def correction(self) -> float:
        """By what the counted memory of activations is multiplied."""
        return self.activation_bytes / self.counted_bytes


def measure_micro_batch(model: DualEncoder, *, precision: str) -> Measured:
    """Run one micro-batch of a model of meta tensors with random weights.

    Raises:
        InputError: there is not enough memory for weights and gradients, or no way to measure it.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tracer = Tracer(model, precision=precision, on_gpu=device == "cuda")
    pairs = _FEWEST_PAIRS
    counted = tracer.backpropagate(pairs, with_gradients=True)
    if counted.peak_bytes < _MEASURED_BYTES:
        pairs = min(_MOST_PAIRS, math.ceil(pairs * _MEASURED_BYTES / counted.peak_bytes))
        counted = tracer.backpropagate(pairs, with_gradients=True)
    numbers = sum(each.numel() for each in model.module.parameters())
    _check_room(2 * numbers * FP32 + counted.peak_bytes, device)
    real = with_random_weights(model, device=device)
    forward = build_forward(real, precision=precision)
    # The first makes gradients, and what libraries make once.
    run_micro_batch(real, forward, 1)
    memory = PeakMemory(device)
    started = time.perf_counter()
    run_micro_batch(real, forward, pairs)
    if device == "cuda":
        torch.cuda.synchronize()
    tflops = counted.flops / (time.perf_counter() - started) / 1e12
    return Measured(device, pairs, memory.bytes(), counted.peak_bytes, tflops)


def with_random_weights(model: DualEncoder, *, device: str) -> DualEncoder:
    """Copy a model of meta tensors with random weights; whole numbers and masks become 0.

    BatchNorm gets the statistics that it begins with: features and gradients stay finite.
    """
    generator = torch.Generator(device).manual_seed(0)

    def fill(tensor: Tensor) -> Tensor:
        new = torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
        return new.normal_(std=0.02, generator=generator) if new.is_floating_point() else new

    real = copy_with(model, fill)
    for part in real.module.modules():
        if isinstance(part, _BatchNorm):
            part.reset_running_stats()
    return real


class PeakMemory:
    """Measures the peak memory of what follows, above what is in use when it is made.

    On a GPU this is what torch's allocator counts. On a CPU it is resident memory, which earlier
    peaks of the process would hide: call it in a process of its own.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        gc.collect()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM = VmRSS
        self._before = proc_bytes("self/status", "VmRSS")

    def bytes(self) -> int:
        """Return the peak so far."""
        if self._device == "cuda":
            return torch.cuda.max_memory_allocated() - self._before
        return proc_bytes("self/status", "VmHWM") - self._before


def proc_bytes(file: str, field: str) -> int:
    """Return a size from a file of /proc.

    Raises:
        LookupError: the file has no such field.
    """
    text = (Path("/proc") / file).read_text(encoding="utf-8")
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    if found is None:
        raise LookupError(f"/proc/{file} has no line {field}")
    return int(found[1]) * 1024


def _check_room(wanted: int, device: str) -> None:
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = proc_bytes("meminfo", "MemAvailable")
    if wanted > free:
        raise InputError(
            f"measure: a micro-batch of this model needs {wanted / 1e9:.1f} GB here, and "
            f"{free / 1e9:.1f} GB are free. Plan without measure, or on a larger machine."
        )
