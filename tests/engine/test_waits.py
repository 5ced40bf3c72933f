"""A training step reads from the device once, when all of its work is queued."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fasterase import transfers
from fasterase.engine.loop import Trainer
from fasterase.models.preprocessing import Tokens
from fasterase.pairs.batches import StepBatch
from fasterase.parallel import engine as local
from tests.marks import SHORT_RUN
from tests.tiny_model import TinyModel, batch, erase, micro_batches, watch

pytestmark = SHORT_RUN
ROOT = Path(__file__).parents[2]

# Operators whose result, or its shape, the host has to wait for.
READS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero"}


class Reads(TorchDispatchMode):
    """Lists what is read from a device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.is_off = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in READS and not self.is_off:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "settings",
    [{}, {"micro_batch_size": 5}, {"tune": "last:1"}, {"train_mode": True, "max_grad_norm": 1.0}],
)
def test_one_read_a_step(settings, monkeypatch):
    model, reads = TinyModel(), Reads()
    take, update, read = Trainer.train_step, torch.optim.AdamW.step, local.read_numbers
    in_steps: list[list[str]] = []

    def train_step(trainer, *args, **options):
        reads.names = []
        with reads:
            record = take(trainer, *args, **options)
        in_steps.append(reads.names)
        return record

    def adam(optimizer, *args):  # counts its steps on the CPU, whatever the device
        reads.is_off = True
        update(optimizer, *args)
        reads.is_off = False

    def read_numbers(numbers):
        assert any(each.grad is not None for each in model.module.parameters()), "too early"
        reads.names.append("numbers")
        return read(numbers)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    monkeypatch.setattr(torch.optim.AdamW, "step", adam)
    monkeypatch.setattr(local, "read_numbers", read_numbers)
    erase(model, **settings)
    _, *later = in_steps  # the first one also compares with what is kept of the original
    assert later == [["numbers"]] * 2


def test_numbers_of_both_precisions_are_read_exactly():
    values = [torch.tensor(0.1), torch.tensor(0.1, dtype=torch.float64)]
    assert transfers.read_numbers(values) == [values[0].item(), 0.1]


def test_pixels_are_copied_once_and_through_pinned_memory(monkeypatch):
    """On a GPU; here tensors say that they are there, and note how they came."""
    came: list[tuple[bool, bool]] = []
    to = torch.Tensor.to

    class Pinned(torch.Tensor):
        pass

    def upload(tensor, device, **options):
        came.append((isinstance(tensor, Pinned), options.get("non_blocking", False)))
        return to(tensor, "meta")

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.as_subclass(Pinned))
    monkeypatch.setattr(Pinned, "to", upload, raising=False)
    pixels, tokens = batch(12)
    step = StepBatch(0, micro_batches(pixels, tokens, 5, n_forget=4))
    step.move_pixels(torch.device("cuda"))
    assert came == [(True, True)] * 3
    assert {part.pixels.device.type for part in step.micro_batches} == {"meta"}
    monkeypatch.setattr("fasterase.pairs.batches.KEPT_BYTES", 100)
    step = StepBatch(0, micro_batches(pixels, tokens, 5, n_forget=4))
    step.move_pixels(torch.device("cuda"))
    assert {part.pixels.device.type for part in step.micro_batches} == {"cpu"}
    assert Tokens(tokens.ids, tokens.ids).to("cuda").mask.is_meta
    assert len(came) == 5


def test_a_loss_that_is_not_finite_says_nothing_of_the_scale_of_fp16(monkeypatch):
    """Gradients that overflow halve it; these are NaN only so that the step is left out."""
    scales, take = [], Trainer.train_step

    def train_step(trainer, *args, **options):
        record = take(trainer, *args, **options)
        scales.append((record.applied, trainer.engine._scaler.get_scale()))
        return record

    monkeypatch.setattr(Trainer, "train_step", train_step)
    model = TinyModel()
    broken = iter([False, True, False])
    watch(model, "text", lambda _, x: x * torch.nan if x.requires_grad and next(broken) else None)
    erase(model, precision="fp16")
    (_, first), second, _ = scales
    assert second == (False, first)


_WITHOUT_A_LAUNCHER = """
import itertools, sys
import torch
from tests.tiny_model import TinyModel, erase
from fasterase.engine import loop

steps, plain, seen = itertools.count(1), loop.backpropagate, []
take = loop.Trainer.train_step

def backpropagate(engine, parts, loss_of, **options):
    broken = next(steps) in (1, 3)
    given = lambda image, *rest: loss_of(image * torch.nan if broken else image, *rest)
    return plain(engine, parts, given, **options)

def train_step(trainer, *args, **options):
    record = take(trainer, *args, **options)
    seen.append(torch.cat([each.flatten() for each in trainer.engine.weights().values()]))
    return record

loop.backpropagate, loop.Trainer.train_step = backpropagate, train_step
result = erase(TinyModel(), max_steps=5, deepspeed=sys.argv[1])
assert [record.applied for record in result.history] == [False, True, False, True, True]
assert [torch.equal(a, b) for a, b in itertools.pairwise(seen)] == [False, True, False, False]
assert seen[-1].isfinite().all()
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_deepspeed_leaves_out_a_step_whose_loss_is_not_finite(stage):
    """In a process without a launcher, too."""
    pytest.importorskip("deepspeed")
    command = [sys.executable, "-W", "ignore", "-c", _WITHOUT_A_LAUNCHER, stage]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
