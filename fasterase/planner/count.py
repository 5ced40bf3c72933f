"""What a step costs: FLOPs and memory of one micro-batch, counted or measured, and memory by part.

The towers run on tensors without storage; a dispatch mode counts FLOPs, by the formulas of
`torch.utils.flop_counter`, and the bytes of all live storages. Decoding of pictures is measured.
"""

from __future__ import annotations

import ctypes
import gc
import io
import math
import re
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from fasterase.engine.model_state import checkpointed_activations
from fasterase.engine.optim import EIGHT_BIT, Trained
from fasterase.errors import InputError
from fasterase.models.dual_encoder import DualEncoder, copy_with
from fasterase.models.forward import SplitTower, TowerForward
from fasterase.models.preprocessing import Tokens
from fasterase.pairs.batches import KEPT_BYTES
from fasterase.pairs.images import decode_image, to_rgb

Parallel = Literal["plain", "zero1", "zero2", "zero3"]

FP32 = 4
# bitsandbytes: one byte per number, and an fp32 scale for each block of 256.
_EIGHT_BIT_BLOCK = 256
# Numbers in the buffer that gradients are averaged through, and that ZeRO-3 gathers ahead:
# DeepSpeed's defaults, and plain data parallelism's own.
_REDUCE_BUCKET, _PREFETCH_BUCKET, _PLAIN_BUCKET = 500_000_000, 50_000_000, 1 << 26
# The backends of the loss but "dense" use no more (Triton's `WORKSPACE_BYTES`, C++'s kept logits).
LOSS_WORKSPACE_BYTES = 256 * 2**20
# Matrices [n, n] in fp32 that autograd holds for "dense", with the KL.
_DENSE_MATRICES = 10
# A measured micro-batch has activations that are large beside what the allocator keeps for itself.
_MEASURED_BYTES = 256e6
_FEWEST_PAIRS, _MOST_PAIRS = 4, 64
# Of the JPEGs that are decoded for the measurement, as photographs of web corpora have it.
PHOTO = (640, 480)
_DECODING_SECONDS = 0.5

_aten = torch.ops.aten
# The registry of torch 2.13 lacks the attention of CPUs, which stands for that of any device here.
_FORMULAS = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        _aten._scaled_dot_product_flash_attention
    ],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
}


class Counter(TorchDispatchMode):
    """Counts what runs while it is active, without the memory of the `known` tensors.

    `flops` count a multiplication and an addition as two; `peak_bytes` is the largest amount of
    memory allocated at a time.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.flops = self.peak_bytes = self._live = 0
        self._storages = {each.untyped_storage()._cdata for each in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return NotImplemented  # two in three calls; it makes nothing
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = _FORMULAS.get(func.overloadpacket)
        if formula is not None:
            self.flops += int(formula(*args, **kwargs, out_val=result))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._storages:
            self._storages.add(key)
            self._live += size
            self.peak_bytes = max(self.peak_bytes, self._live)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._storages.remove(key)
        self._live -= size


class Tracer:
    """Counts what encoding and back-propagating a micro-batch costs, `on_gpu` or on a CPU.

    Args:
        model: on the meta device; `requires_grad` tells what is trained.
        precision: of the towers.
        on_gpu: else on a CPU.
        counted: called after each pass, which takes seconds for large towers.
    """

    def __init__(
        self,
        model: DualEncoder,
        *,
        precision: str,
        on_gpu: bool,
        counted: Callable[[], object] = lambda: None,
    ) -> None:
        self._counted = counted
        self.correction = 1.0  # of activations, where they were measured
        # Tensors without storage on a "CPU": unlike meta tensors, they run under autocast and with
        # fused attention. Small constants of the libraries stay real.
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self._fake:
            self._model = copy_with(model, lambda each: torch.empty_like(each, device="cpu"))
        for part in self._model.module.modules() if on_gpu and precision != "fp32" else ():
            # As autocast does on a GPU, and not on a CPU.
            if isinstance(part, nn.LayerNorm | nn.GroupNorm):
                part.register_forward_pre_hook(lambda _, given: (given[0].float(), *given[1:]))
        self._forward = build_forward(self._model, precision=precision)
        self.backpropagate = cache(self._backpropagate)

    def forward(self, tower: str) -> Counter:
        """Count encoding one pair by the `"image"` or the `"text"` tower."""
        with self._fake, torch.enable_grad():
            pixels, tokens = _empty_pairs(self._model, 1)
            # With a graph even if nothing is trained: without one, attention may take a fused path
            # that the counter cannot see.
            with self._counter() as counter:
                self._forward(*((pixels, None) if tower == "image" else (None, tokens)))
        self._counted()
        return counter

    def frozen_widths(self, tune: str) -> dict[str, int]:
        """Return tower -> how many numbers the blocks that `tune` freezes output for one pair."""
        with self._fake:
            return {each: SplitTower(self._model, each, tune).width for each in ("image", "text")}

    def activation_bytes(self, pairs: int, *, share: int, checkpointing: bool = False) -> int:
        """Return what a micro-batch of `pairs` of a GPU's `share` needs beside the gradients."""
        if pairs == share:
            # The gradients of a step of one micro-batch appear while its activations go.
            parameters = self._model.module.parameters()
            trained = sum(each.numel() for each in parameters if each.requires_grad)
            peak = self.backpropagate(pairs, checkpointing=checkpointing).peak_bytes
            return int(max(0, peak - trained * FP32) * self.correction)
        # Memory is a convex function of the number of pairs: the line between one and the share
        # lies on it or above.
        one, most = (
            self.backpropagate(each, checkpointing=checkpointing, with_gradients=True).peak_bytes
            for each in (1, share)
        )
        return int((one + (most - one) * (pairs - 1) // (share - 1)) * self.correction)

    def _backpropagate(
        self, pairs: int, *, checkpointing: bool = False, with_gradients: bool = False
    ) -> Counter:
        """Count encoding `pairs` pairs with a graph and back-propagating them.

        `with_gradients`: they are there before, and not counted, as for all micro-batches of a step
        but the first.
        """
        checkpointed = checkpointed_activations(self._model) if checkpointing else nullcontext()
        with self._fake, checkpointed:
            for parameter in self._model.module.parameters():
                wanted = with_gradients and parameter.requires_grad
                parameter.grad = torch.empty_like(parameter) if wanted else None
            with self._counter() as counter:
                run_micro_batch(self._model, self._forward, pairs)
        self._counted()
        return counter

    def _counter(self) -> Counter:
        parameters = list(self._model.module.parameters())
        gradients = [each.grad for each in parameters if each.grad is not None]
        return Counter([*parameters, *self._model.module.buffers(), *gradients])


def build_forward(model: DualEncoder, *, precision: str) -> TowerForward:
    """Return both towers as training calls them; `requires_grad` tells what is trained."""
    image, text = (
        any(parameter.requires_grad for _, parameter in model.selected(tower))
        for tower in ("image", "text")
    )
    return TowerForward(model, precision=precision, image_trained=image, text_trained=text)


def run_micro_batch(model: DualEncoder, forward: TowerForward, pairs: int) -> None:
    """Encode and back-propagate empty pairs on the model's device; the loss is not part of it."""
    features = forward(*_empty_pairs(model, pairs))
    outputs = [each for each in features if each is not None and each.requires_grad]
    torch.autograd.backward(outputs, [torch.ones_like(each) for each in outputs])


def _empty_pairs(model: DualEncoder, pairs: int) -> tuple[Tensor, Tokens]:
    tokens = torch.zeros(pairs, model.context_length, dtype=torch.int64, device=model.device)
    return torch.empty(pairs, 3, *model.image_size, device=model.device), Tokens(tokens, None)


@dataclass(frozen=True)
class ParameterCounts:
    """How many numbers a model holds."""

    total: int  # parameters
    buffers: int
    trained: int  # parameters
    eight_bit: int  # trained ones whose states an 8-bit optimiser stores in 8 bits
    largest: int  # trained parameter
    largest_block: int  # or embedding: what ZeRO-3 gathers at a time

    @classmethod
    def of(cls, model: DualEncoder, trained: Trained) -> ParameterCounts:
        sizes = {name: each.numel() for name, each in model.module.named_parameters()}
        trained_sizes = [sizes[name] for name in trained.parameters(model.module)]
        blocks = [*model.image_parts().blocks, *model.text_parts().blocks]
        modules = [each for each in blocks if isinstance(each, nn.Module)]
        return cls(
            total=sum(sizes.values()),
            buffers=sum(each.numel() for each in model.module.buffers()),
            trained=sum(trained_sizes),
            eight_bit=sum(sizes[name] for name in trained.quantisable),
            largest=max(trained_sizes),
            largest_block=max(
                *sizes.values(),
                *(sum(each.numel() for each in block.parameters()) for block in modules),
            ),
        )


@dataclass(frozen=True)
class StepMemory:
    """The memory formula: bytes of each GPU at the peak of a step, by part."""

    counts: ParameterCounts
    gpus: int
    on_gpu: bool  # or on a CPU
    pairs: int  # in a step, over all GPUs
    compared: int  # the most of them that the loss compares with each other
    width: int  # of features
    backend: str  # of the loss
    pixel_bytes: int = 0  # of a pair, as they are loaded

    def parts(self, parallel: Parallel, optimizer: str, activations: int) -> dict[str, int]:
        """Return part -> bytes, for a micro-batch with so many bytes of `activations`.

        DeepSpeed's `coalesce_grad_reduction`, without which several backward passes per step are
        not exact, keeps whole local gradients at every stage; so ZeRO-2 saves nothing over ZeRO-1.
        Both update copies of their share of weights and gradients, ZeRO-3 one of the gradients.
        """
        counts = self.counts
        shares = 1 if parallel == "plain" else self.gpus
        share = -(-counts.trained // shares)
        weights = counts.total + counts.buffers
        if parallel == "zero3":
            gathered = min(counts.total, 2 * counts.largest_block + _PREFETCH_BUCKET)
            weights = -(-counts.total // self.gpus) + counts.buffers + gathered
        if not self.on_gpu:
            weights += counts.trained  # the result keeps the original's, on the CPU
        copies = {"plain": 0, "zero1": 2, "zero2": 2, "zero3": 1}[parallel]
        matrices = _DENSE_MATRICES * self.compared**2 * FP32
        loss = matrices if self.backend == "dense" else min(LOSS_WORKSPACE_BYTES, matrices)
        # What a step holds of its pairs: pixels, and features of both towers, encoded in parts,
        # concatenated, the original's, and gradients. Each of several GPUs computes the loss of the
        # whole batch, from all rows of the last three.
        own = -(-self.pairs // self.gpus)
        feature_rows = 8 * self.pairs if self.gpus == 1 else 6 * self.pairs + 6 * own
        # It comes after the backward pass, in the memory that activations and loss have left.
        pixels = min(KEPT_BYTES, own * self.pixel_bytes) if self.on_gpu else 0
        update = self._update_numbers(parallel, optimizer) * FP32 - activations - loss
        return {
            "weights": weights * FP32,
            "gradients": counts.trained * FP32,
            "optimizer_states": -(-self._state_bytes(optimizer) // shares),
            "partitions": copies * share * FP32,
            "activations": activations,
            "features": feature_rows * self.width * FP32 + pixels,
            "loss": loss,
            "update": max(0, update),
        }

    def _state_bytes(self, optimizer: str) -> int:
        counts = self.counts
        moments = 1 if optimizer == "lion8bit" else 2
        if optimizer not in EIGHT_BIT:
            return moments * counts.trained * FP32
        scales = -(-counts.eight_bit // _EIGHT_BIT_BLOCK) * FP32
        return moments * ((counts.trained - counts.eight_bit) * FP32 + counts.eight_bit + scales)

    def _update_numbers(self, parallel: Parallel, optimizer: str) -> int:
        """Numbers that reducing the gradients or the optimiser's step needs for a moment.

        Torch's Adam needs one copy of all tensors on a GPU, two of the largest on a CPU; 8-bit
        optimisers work in place.
        """
        counts = self.counts
        shares = 1 if parallel == "plain" else self.gpus
        update = 0
        if optimizer not in EIGHT_BIT:
            update = -(-counts.trained // shares) if self.on_gpu else 2 * counts.largest
        bucket = max(_PLAIN_BUCKET, counts.largest) if parallel == "plain" else _REDUCE_BUCKET
        return max(update, min(counts.trained, bucket) if self.gpus > 1 else 0)


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

    `InputError` where there is not enough memory for weights and gradients.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = device == "cuda"
    tracer = Tracer(model, precision=precision, on_gpu=on_gpu)
    pairs = _FEWEST_PAIRS
    counted = tracer.backpropagate(pairs, with_gradients=True)
    if counted.peak_bytes < _MEASURED_BYTES:
        pairs = min(_MOST_PAIRS, math.ceil(pairs * _MEASURED_BYTES / counted.peak_bytes))
        counted = tracer.backpropagate(pairs, with_gradients=True)
    numbers = sum(each.numel() for each in model.module.parameters())
    wanted = 2 * numbers * FP32 + counted.peak_bytes
    free = torch.cuda.mem_get_info()[0] if on_gpu else proc_bytes("meminfo", "MemAvailable")
    if wanted > free:
        raise InputError(
            f"measure: a micro-batch of this model needs {wanted / 1e9:.1f} GB here, and "
            f"{free / 1e9:.1f} GB are free. Plan without measure, or on a larger machine."
        )
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
        new = torch.zeros_like(tensor, device=device)
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
    """Return a size from a file of /proc; `LookupError` if it has no such field."""
    text = (Path("/proc") / file).read_text(encoding="utf-8")
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    if found is None:
        raise LookupError(f"/proc/{file} has no line {field}")
    return int(found[1]) * 1024


def measure_decoding(model: DualEncoder) -> float:
    """Return how many JPEGs a process decodes and prepares for `model` in a second of one core.

    Takes about a second.
    """
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (60, 80, 3), np.uint8))
    smooth = np.asarray(coarse.resize(PHOTO, Image.Resampling.BICUBIC), np.float32)
    grain = random.normal(0, 8, smooth.shape)
    photo = Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=90)
    transform, (height, width) = model.image_transform, model.image_size
    done, started = -1, 0.0
    # The first one is not counted: libraries load what they need. CPU time, since others may be
    # using the machine.
    while done < 1 or time.process_time() - started < _DECODING_SECONDS:
        picture = to_rgb(decode_image(file.getvalue(), id="photo"), id="photo")
        if transform is None:
            np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
        else:
            transform.pixels(picture)
        done += 1
        if not done:
            started = time.process_time()
    return done / (time.process_time() - started)
