"""FLOPs and live memory of encoding and back-propagating one micro-batch, without computing it.

The training code itself runs on tensors without storage (`architecture.py`), and a dispatch mode
counts the FLOPs of all operators, by torch's formulas, and the bytes of all storages alive.

Of a long row of equal blocks only `KEPT` run. The record of one in the middle stands for the
others: each adds the same to the memory in the forward pass and gives it back in the backward one.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from fasterase.engine.activation_checkpointing import checkpointed_activations
from fasterase.engine.grad_cache import backpropagate
from fasterase.engine.loss import FeatureGradients
from fasterase.models.dual_encoder import DualEncoder
from fasterase.models.forward import TowerForward
from fasterase.models.preprocessing import Tokens
from fasterase.objective import EraseLoss
from fasterase.pairs.batches import MicroBatch
from fasterase.parallel.local import LocalEngine
from fasterase.planner.architecture import copy_to_fake_device, fake_device

# Blocks that run of a row of equal ones: the first, two in the middle and the last. The third
# stands for those left out; both its neighbours are blocks like itself.
KEPT, REPEATED = 4, 2


@dataclass(frozen=True)
class Costs:
    """What a piece of the computation costs.

    Attributes:
        flops: floating-point operations; a multiplication and an addition count as two.
        peak_bytes: the largest amount of memory allocated at a time, beyond what was there before.
    """

    flops: int
    peak_bytes: int


class Tracer:
    """Counts what encoding and back-propagating a micro-batch costs.

    Args:
        model: on the meta device; `requires_grad` tells what is trained.
        precision: compute dtype of the towers, resolved.
        on_gpu: count what a GPU allocates.
        activation_checkpointing: of the blocks of both towers.
    """

    def __init__(
        self,
        model: DualEncoder,
        *,
        precision: str,
        on_gpu: bool,
        activation_checkpointing: bool = False,
    ) -> None:
        self._counter = _Counter()
        with fake_device() as self._fake:
            self._model = copy_to_fake_device(model)
            for number, row in enumerate(_shorten_rows(self._model.module)):
                _mark_blocks(row, self._counter, number)
        self._checkpointing = activation_checkpointing
        module = self._model.module
        if on_gpu and precision != "fp32":
            _normalise_in_fp32(module)
        self._trained = [each for each in module.parameters() if each.requires_grad]
        self._engine = build_engine(self._model, precision=precision)

    def forward(self, tower: str) -> Costs:
        """Count encoding one pair by the `"image"` or the `"text"` tower."""
        with self._fake, torch.enable_grad():
            part = _micro_batch(self._model, 1)
            given = (part.pixels, None) if tower == "image" else (None, part.tokens)
            # With a graph even if nothing is trained: without one, attention may take a fused path
            # that the counter cannot see.
            with self._counter.counting(self._known()):
                self._engine(*given)
        return self._counter.costs()

    def backpropagate(self, pairs: int, *, with_gradients: bool) -> Costs:
        """Count encoding `pairs` pairs with a graph and back-propagating them.

        Args:
            pairs: in the micro-batch.
            with_gradients: whether gradients are there before, and not counted: so it is for all
                micro-batches of a step but the first.
        """
        with self._fake:
            for parameter in self._trained:
                parameter.grad = torch.empty_like(parameter) if with_gradients else None
            with self._checkpointed(), self._counter.counting(self._known()):
                run_micro_batch(self._model, self._engine, pairs)
        for parameter in self._trained:
            parameter.grad = None
        return self._counter.costs()

    def _checkpointed(self) -> AbstractContextManager[None]:
        return checkpointed_activations(self._model) if self._checkpointing else nullcontext()

    def _known(self) -> list[Tensor]:
        module = self._model.module
        known: list[Tensor] = [*module.parameters(), *module.buffers()]
        return known + [each.grad for each in self._trained if each.grad is not None]


def build_engine(model: DualEncoder, *, precision: str) -> LocalEngine:
    """Return what encodes and back-propagates; `requires_grad` tells what is trained."""
    trained = {
        tower: any(parameter.requires_grad for _, parameter in model.selected(tower))
        for tower in ("image", "text")
    }
    forward = TowerForward(
        model, precision=precision, image_trained=trained["image"], text_trained=trained["text"]
    )
    parameters = {
        name: each for name, each in model.module.named_parameters() if each.requires_grad
    }
    # No step is taken.
    optimizer = torch.optim.SGD(parameters.values(), lr=0.0)
    return LocalEngine(forward, parameters, optimizer, precision=precision, moves_buffers=False)


def run_micro_batch(model: DualEncoder, engine: LocalEngine, pairs: int) -> None:
    """Encode and back-propagate a micro-batch of empty pairs, on the model's device.

    What the loss itself needs is not part of it: its gradients are ones.
    """

    def stand_in_loss(image: Tensor, text: Tensor, scale: Tensor) -> FeatureGradients:
        zero = torch.zeros(())
        return FeatureGradients(
            EraseLoss(zero, zero, zero, zero, zero),
            *(
                torch.ones_like(each) if each.requires_grad else None
                for each in (image, text, scale)
            ),
        )

    backpropagate(
        engine,
        [_micro_batch(model, pairs)],
        stand_in_loss,
        device=model.device,
        seed_of=lambda _: 0,
    )


@dataclass
class _Segment:
    """What happens between two marks, `repeats` times in a row.

    Attributes:
        row: the row of blocks that it is part of; None outside of rows.
        net_bytes: allocations less frees.
        high_bytes: the largest value of `net_bytes` so far.
    """

    row: int | None
    repeats: int
    flops: int = 0
    net_bytes: int = 0
    high_bytes: int = 0


class _Counter(TorchDispatchMode):
    """Counts FLOPs and live bytes of what runs while it is active, in segments."""

    def __init__(self) -> None:
        super().__init__()
        self._reset([])

    def _reset(self, known: Sequence[Tensor]) -> None:
        self._segments = [_Segment(None, 1)]
        self._place: tuple[int, int] | None = None
        self._alive = {tensor.untyped_storage()._cdata: (0, self._segments[0]) for tensor in known}

    def counting(self, known: Sequence[Tensor]) -> _Counter:
        """Start anew; the storages of `known` tensors were there before."""
        self._reset(known)
        return self

    def mark(self, place: tuple[int, int] | None, repeats: int) -> None:
        """Begin a segment, unless `place` (row and block) is where it is already."""
        if place != self._place:
            self._place = place
            self._segments.append(_Segment(None if place is None else place[0], repeats))

    def costs(self) -> Costs:
        flops = live = peak = 0
        for segment in self._segments:
            # Of equal repetitions, the first or the last reaches the highest point.
            last = (segment.repeats - 1) * max(segment.net_bytes, 0)
            peak = max(peak, live + last + segment.high_bytes)
            live += segment.repeats * segment.net_bytes
            flops += segment.repeats * segment.flops
        return Costs(flops, peak)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        segment = self._segments[-1]
        formula = _FORMULAS.get(func.overloadpacket)
        if formula is not None:
            segment.flops += int(formula(*args, **kwargs, out_val=result))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._alive:
            size = storage.nbytes()
            segment = self._segments[-1]
            self._alive[key] = (size, segment)
            segment.net_bytes += size
            segment.high_bytes = max(segment.high_bytes, segment.net_bytes)
            weakref.finalize(storage, self._remove, key, self._alive)

    def _remove(self, key: int, alive: dict[int, tuple[int, _Segment]]) -> None:
        size, made = alive.pop(key)
        if alive is not self._alive:
            return  # It outlived its own trace.
        here = self._segments[-1]
        if made.row is None or made.row != here.row:
            # What all repetitions made (autocast's copies of their weights) goes at once.
            size = size * made.repeats // here.repeats
        here.net_bytes -= size


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


# The registry of torch 2.13 lacks the attention of CPUs, which stands for that of any device here.
_FORMULAS = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def _shorten_rows(module: nn.Module) -> list[tuple[list[nn.Module], int]]:
    """Leave `KEPT` blocks in each row of equal blocks; return them, and how many one stands for."""
    rows = []
    for part in list(module.children()):
        if not isinstance(part, nn.ModuleList | nn.Sequential):
            rows += _shorten_rows(part)
            continue
        kept: list[nn.Module] = []
        for run in _equal_runs(list(part)):
            if len(run) > KEPT:
                rows.append((run[:KEPT], len(run) - KEPT + 1))
            else:
                rows += [row for block in run for row in _shorten_rows(block)]
            kept += run[:KEPT]
        if len(kept) < len(part):
            part._modules = {str(i): block for i, block in enumerate(kept)}
    return rows


def _equal_runs(blocks: list[nn.Module]) -> list[list[nn.Module]]:
    runs: list[list[nn.Module]] = []
    last: object = None
    for block in blocks:
        kind = _describe(block)
        if kind == last:
            runs[-1].append(block)
        else:
            runs.append([block])
        last = kind
    return runs


def _describe(block: nn.Module) -> object:
    """What must be equal for two blocks to cost the same."""
    return (
        [(name, type(part)) for name, part in block.named_modules()],
        [(name, each.shape, each.requires_grad) for name, each in block.named_parameters()],
        [(name, each.shape) for name, each in block.named_buffers()],
    )


def _mark_blocks(row: tuple[list[nn.Module], int], counter: _Counter, number: int) -> None:
    """Begin a segment wherever a forward or backward pass enters a block or leaves the row."""
    blocks, repeats = row
    for index, block in enumerate(blocks):
        place = (number, index)
        times = repeats if index == REPEATED else 1

        def enter(
            _: nn.Module, inputs: Any, place: tuple[int, int] = place, times: int = times
        ) -> None:
            counter.mark(place, times)
            first = next((each for each in inputs if isinstance(each, Tensor)), None)
            if place[1] == 0 and first is not None and first.requires_grad:
                first.register_hook(lambda _: counter.mark(None, 1))

        def leave(
            _: nn.Module, __: Any, output: Any, place: tuple[int, int] = place, times: int = times
        ) -> None:
            first = next(each for each in tree_iter(output) if isinstance(each, Tensor))
            if first.requires_grad:
                first.register_hook(lambda _: counter.mark(place, times))
            if place[1] == KEPT - 1:
                counter.mark(None, 1)

        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave)


def _normalise_in_fp32(module: nn.Module) -> None:
    """Make normalisation layers take fp32, as autocast does on a GPU and not on a CPU."""
    for part in module.modules():
        if isinstance(part, nn.LayerNorm | nn.GroupNorm):
            part.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))


def _micro_batch(model: DualEncoder, pairs: int) -> MicroBatch:
    return MicroBatch(
        rows=np.zeros(pairs, np.int64),
        ids=[""] * pairs,
        pixels=torch.empty(pairs, 3, *model.image_size),
        skipped=[],
        step=0,
        offset=0,
        n_forget=0,
        tokens=Tokens(torch.zeros(pairs, model.context_length, dtype=torch.int64), None),
        keys=[str(pair) for pair in range(pairs)],  # no caption repeats
    )
