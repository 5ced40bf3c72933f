"""`fasterase.plan`: what an erasure of a model costs, and how to run it, before paying for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from fasterase.config import UnlearnConfig
from fasterase.engine.job import POOL_BATCHES, count_steps
from fasterase.engine.optim import EIGHT_BIT, Trained
from fasterase.engine.prefix_cache import VIEWS, check_prefix_cache, row_bytes, training_bytes
from fasterase.errors import InputError
from fasterase.models.dual_encoder import DualEncoder
from fasterase.models.lora import parse_rank
from fasterase.pairs.sampler import Sampler
from fasterase.planner.architecture import build_architecture, frozen_widths
from fasterase.planner.command import explain, name_for_command, write_command
from fasterase.planner.measure import Measured, measure_micro_batch
from fasterase.planner.memory import (
    FP32,
    Parallel,
    ParameterCounts,
    feature_bytes,
    lasting_bytes,
    loss_bytes,
    update_bytes,
)
from fasterase.planner.table import format_plan
from fasterase.planner.trace import Costs, Tracer

# Share of a GPU's memory that is planned with: the rest is for the CUDA context, cuBLAS and NCCL
# (about 2 GB) and for gaps between blocks of torch's allocator.
USABLE = 0.92
# Dense peak of an H100 SXM in TFLOP/s (NVIDIA's data sheet), and the share of it that training a
# large ViT reaches.
_TFLOPS = {"fp32": 67.0, "bf16": 989.0, "fp16": 989.0}
EFFICIENCY = 0.4
# What ZeRO-3 costs beside the others, which gather weights once per step, not in every pass.
_ZERO3_PENALTY = 1.2
# Smaller micro-batches leave a GPU idle.
_LEAST_MICRO_BATCH = 8
# A peak up to this share of a GPU's memory leaves room for larger batches and longer captions.
_COMFORTABLE = 0.8


@dataclass(frozen=True)
class Setup:
    """One way to run a job, and what it costs on each GPU.

    Attributes:
        parallel: `"plain"` (data parallelism, or one process), `"zero1"`, `"zero2"`, `"zero3"`.
        optimizer: see `UnlearnConfig`.
        activation_checkpointing: whether blocks are run again in the backward pass.
        micro_batch_size: the largest that fits, at most a GPU's share of the batch; 0 if none does.
        in_one: whether the whole share fits. Then it is encoded once; else twice (GradCache).
        bytes_per_gpu: part -> bytes at the peak of a step, for this micro-batch (or for one pair).
        flops_per_pair: of training, re-encoding and checkpointing included.
    """

    parallel: Parallel
    optimizer: str
    activation_checkpointing: bool
    micro_batch_size: int
    in_one: bool
    bytes_per_gpu: dict[str, int]
    flops_per_pair: int

    @property
    def peak_bytes(self) -> int:
        return sum(self.bytes_per_gpu.values())

    @property
    def cost(self) -> float:
        """Relative time of a pair; infinite if nothing fits."""
        if self.micro_batch_size == 0:
            return float("inf")
        idle = 1.0 if self.in_one else max(1.0, _LEAST_MICRO_BATCH / self.micro_batch_size)
        return self.flops_per_pair * idle * (_ZERO3_PENALTY if self.parallel == "zero3" else 1.0)

    def describe(self, gpus: int) -> str:
        """Return the way to run in words."""
        names = {
            "plain": "plain data parallelism" if gpus > 1 else "one process",
            "zero1": "ZeRO-1",
            "zero2": "ZeRO-2",
            "zero3": "ZeRO-3",
        }
        words = [names[self.parallel]]
        if self.optimizer in EIGHT_BIT:
            words.append("8-bit states")
        if self.activation_checkpointing:
            words.append("checkpointing")
        return ", ".join(words)


@dataclass(frozen=True)
class Run:
    """The run that the command starts.

    Attributes:
        steps: at most.
        retain_pairs: how many different retain pairs are read.
        gpu_hours: of all GPUs together, at most; encoding the original's features included.
        disk_bytes: of the original's features of those pairs.
        prefix_bytes: of the outputs of frozen blocks, which `prefix_cache` keeps; else 0.
    """

    steps: int
    retain_pairs: int
    gpu_hours: float
    disk_bytes: int
    prefix_bytes: int


@dataclass(frozen=True)
class Plan:
    """What erasing costs. `str(plan)` is a table.

    Attributes:
        model: name of the architecture.
        pairs, forget: sizes of the retain and the forget set.
        gpus, gpu_memory: how many, and GB (10^9 bytes) of each.
        config: the settings that were planned with.
        precision: compute dtype of the towers.
        parameters: of the model.
        trained_parameters: those that `config.tune` trains.
        forward_flops: tower -> FLOPs of encoding one image or text.
        setup: the recommended way to run.
        setups: all ways that were compared, the simplest first.
        run: the run of the command.
        gpu_hours_per_epoch: of training on `pairs` pairs once; NaN on a CPU without `measure`.
        disk_bytes: of the original's features of `pairs` pairs, images and captions.
        tflops, efficiency: peak of a GPU, and the share of it that is assumed to be reached.
        measured: a micro-batch measured on this machine; None without `measure`.
        command: the recommended command; words in capitals stand for paths and names to fill in.
        reason: why this one.
    """

    model: str
    pairs: int
    forget: int
    gpus: int
    gpu_memory: float
    config: UnlearnConfig
    precision: str
    parameters: int
    trained_parameters: int
    forward_flops: dict[str, int]
    setup: Setup
    setups: tuple[Setup, ...]
    run: Run
    gpu_hours_per_epoch: float
    disk_bytes: int
    tflops: float
    efficiency: float
    measured: Measured | None
    command: str
    reason: str

    @property
    def bytes_per_gpu(self) -> dict[str, int]:
        """Part -> bytes on each GPU at the peak of a step; they add up to the peak."""
        return self.setup.bytes_per_gpu

    @property
    def micro_batch_size(self) -> int:
        """The largest micro-batch that fits, at most a GPU's share of the batch."""
        return self.setup.micro_batch_size

    @property
    def flops_per_pair(self) -> int:
        """FLOPs of training on one pair, re-encoding included."""
        return self.setup.flops_per_pair

    def __str__(self) -> str:
        return format_plan(self)


def plan(
    model: nn.Module | DualEncoder | str | os.PathLike[str] | Any,
    pairs: int,
    *,
    forget: int | None = None,
    gpus: int = 1,
    gpu_memory: float = 80,
    tflops: float | None = None,
    efficiency: float = EFFICIENCY,
    measure: bool = False,
    config: UnlearnConfig | None = None,
    **overrides: Any,
) -> Plan:
    """Estimate memory, time and disk of an erasure from the model's architecture alone.

    No weights are read. The training code runs on tensors without storage, and FLOPs and live bytes
    are counted (`fasterase/planner/trace.py`).

    Args:
        model: in any form that `unlearn` takes, an open_clip name without a tag, or a transformers
            configuration. Only configurations on a hub need the network.
        pairs: size of the retain set.
        forget: size of the forget set; None: a hundredth of `pairs`.
        gpus: how many GPUs.
        gpu_memory: of each, in GB (10^9 bytes).
        tflops: dense peak of a GPU in TFLOP/s; None: an H100's in this precision.
        efficiency: share of `tflops` that training reaches.
        measure: run a micro-batch with random weights on this machine, and correct the memory of
            activations by what it needs.
        config: settings as for `unlearn`. `micro_batch_size` bounds the micro-batch.
        overrides: fields of `UnlearnConfig`. `device="cpu"` plans for a CPU.

    Raises:
        InputError: the architecture is unknown, a number is out of range, or `prefix_cache` is not
            for this run.
    """
    config = (config or UnlearnConfig()).replace(**overrides)
    forget = max(1, pairs // 100) if forget is None else forget
    for name, value in (
        ("pairs", pairs), ("forget", forget), ("gpus", gpus), ("gpu_memory", gpu_memory),
        ("efficiency", efficiency), ("tflops", 1 if tflops is None else tflops),
    ):  # fmt: skip
        if not value > 0:
            raise InputError(f"{name}={value!r} must be above 0.")
    encoder = build_architecture(model)
    on_gpu = not (config.device or "cuda").startswith("cpu")
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if on_gpu else "fp32"
    if parse_rank(config.tune) is not None:
        raise InputError(
            f"tune={config.tune!r}: adapters are not planned. Plan tune='all', which needs more: "
            "adapters spare the gradients and the states of the weights themselves."
        )
    prefix_rows = {}
    if config.prefix_cache is not None:
        check_prefix_cache(config, gpus)
        prefix_rows = {
            tower: row_bytes(width, precision)
            for tower, width in frozen_widths(encoder, config.tune).items()
        }
    trained = Trained.choose(encoder, config.tune, logit_scale=config.train_logit_scale)
    names = set(trained.parameters(encoder.module))
    for name, parameter in encoder.module.named_parameters():
        parameter.requires_grad_(name in names)
    planner = _Planner(encoder, config, forget, pairs, gpus, gpu_memory, precision, on_gpu)
    measured = None
    if measure:
        measured = measure_micro_batch(encoder, precision=precision)
        planner.correction = measured.correction
    setups = planner.setups()
    setup = _choose(setups, gpu_memory)
    if setup is None:
        smallest = min(setups, key=lambda each: each.peak_bytes)
        raise InputError(
            f"gpu_memory={gpu_memory:g}: one pair at a time needs "
            f"{smallest.peak_bytes / 1e9 / USABLE:.0f} GB on each of {gpus} GPUs, even with "
            f"{smallest.describe(gpus)}. Give more gpus or gpu_memory, train less (tune='last:N'), "
            "or take a smaller batch_size."
        )
    if tflops is None:
        tflops = _TFLOPS[precision] if on_gpu else float("nan")
    if measured is not None and not on_gpu:
        tflops, efficiency = measured.tflops, 1.0
    per_hour = tflops * 1e12 * efficiency * 3600
    feature_row = 8 + encoder.embed_dim * (2 if on_gpu and precision != "fp32" else 4)
    steps, read = planner.steps(), planner.retain_pairs_read()
    views = VIEWS if config.forget_augment else 0
    prefix_bytes = (
        training_bytes(prefix_rows, forget=forget, retain=read, views=views) if prefix_rows else 0
    )
    trained_pairs = steps * planner.step_pairs
    run_flops = trained_pairs * setup.flops_per_pair + read * planner.forward_flops
    return Plan(
        model=encoder.name,
        pairs=pairs,
        forget=forget,
        gpus=gpus,
        gpu_memory=gpu_memory,
        config=config,
        precision=precision,
        parameters=planner.counts.total,
        trained_parameters=planner.counts.trained,
        forward_flops=planner.tower_flops,
        setup=setup,
        setups=tuple(setups),
        run=Run(steps, read, run_flops / per_hour, 2 * read * feature_row, prefix_bytes),
        gpu_hours_per_epoch=pairs * setup.flops_per_pair / per_hour,
        disk_bytes=2 * pairs * feature_row,
        tflops=tflops,
        efficiency=efficiency,
        measured=measured,
        command=write_command(name_for_command(model), config, setup, gpus),
        reason=explain(setup, setups, gpus, planner.share),
    )


class _Planner:
    """Compares the ways to run one job."""

    def __init__(
        self,
        model: DualEncoder,
        config: UnlearnConfig,
        forget: int,
        retain: int,
        gpus: int,
        gpu_memory: float,
        precision: str,
        on_gpu: bool,
    ) -> None:
        self._config = config
        self._retain = retain
        self._gpus = gpus
        self._on_gpu = on_gpu
        self._usable = USABLE * gpu_memory * 1e9
        self._width = model.embed_dim
        blocks = [*model.image_parts().blocks, *model.text_parts().blocks]
        self.counts = ParameterCounts.of(
            model.module, [each for each in blocks if isinstance(each, nn.Module)]
        )
        self._sampler = Sampler(
            forget,
            min(retain, POOL_BATCHES * config.batch_size),
            forget_batch_size=config.forget_batch_size,
            batch_size=config.batch_size,
            seed=config.seed,
        )
        self.step_pairs = self._sampler.max_pairs_per_rank()
        self.share = self._sampler.max_pairs_per_rank(gpus)
        can_checkpoint = bool(model.image_parts().blocks and model.text_parts().blocks)
        self._checkpointings = [True] if config.activation_checkpointing else [False]
        if can_checkpoint and not config.activation_checkpointing:
            self._checkpointings.append(True)
        self.correction = 1.0

        @cache
        def tracer(checkpointing: bool) -> Tracer:
            return Tracer(
                model,
                precision=precision,
                on_gpu=on_gpu,
                activation_checkpointing=checkpointing,
            )

        @cache
        def costs(checkpointing: bool, pairs: int, with_gradients: bool) -> Costs:
            return tracer(checkpointing).backpropagate(pairs, with_gradients=with_gradients)

        self._costs = costs
        self.tower_flops = {
            tower: tracer(False).forward(tower).flops for tower in ("image", "text")
        }
        self._trained_towers = [
            tower
            for tower in self.tower_flops
            if any(parameter.requires_grad for _, parameter in model.selected(tower))
        ]

    @property
    def forward_flops(self) -> int:
        return sum(self.tower_flops.values())

    def steps(self) -> int:
        """Return the largest number of steps of the run."""
        return count_steps(self._config, self._sampler)

    def retain_pairs_read(self) -> int:
        """Return how many retain pairs the run reads: its pool, or what its steps draw."""
        most = POOL_BATCHES if self._config.runs_until_forgotten else self.steps()
        return min(self._retain, most * self._config.batch_size)

    def setups(self) -> list[Setup]:
        """Return the ways to run, the simplest first."""
        parallels: list[Parallel] = ["plain"]
        if self._gpus > 1:
            parallels += ["zero1", "zero2", "zero3"]
        optimizers = [self._config.optimizer]
        if self._on_gpu and self._config.optimizer not in EIGHT_BIT:
            optimizers.append("paged_adamw8bit")
        return [
            self._setup(parallel, optimizer, checkpointing)
            for checkpointing in self._checkpointings
            for optimizer in optimizers
            for parallel in parallels
        ]

    def _setup(self, parallel: Parallel, optimizer: str, checkpointing: bool) -> Setup:
        most = min(self.share, self._config.micro_batch_size or self.share)

        def bytes_of(pairs: int) -> dict[str, int]:
            return self._bytes(parallel, optimizer, checkpointing, pairs)

        fitting = _largest(lambda pairs: sum(bytes_of(pairs).values()), self._usable, most)
        in_one = fitting == self.share
        # Proportional to the number of pairs, of which a share is traced for its memory too.
        flops = self._costs(checkpointing, self.share, False).flops // self.share
        if not in_one:
            # GradCache: both towers without a graph, then the trained ones with one.
            flops += sum(self.tower_flops[tower] for tower in self._trained_towers)
        return Setup(
            parallel, optimizer, checkpointing, fitting, in_one, bytes_of(max(fitting, 1)), flops
        )

    def _bytes(
        self, parallel: Parallel, optimizer: str, checkpointing: bool, pairs: int
    ) -> dict[str, int]:
        """Return part -> bytes at the peak of a step with micro-batches of `pairs` pairs."""
        parts = lasting_bytes(self.counts, parallel=parallel, optimizer=optimizer, gpus=self._gpus)
        if not self._on_gpu:
            # The result keeps the original's, on the CPU.
            parts["weights"] += self.counts.trained * FP32
        activations = self._activation_bytes(checkpointing, pairs)
        parts["activations"] = int(activations * self.correction)
        parts["features"] = feature_bytes(self.step_pairs, self._width, gpus=self._gpus)
        n_retain = min(self._config.batch_size, self._retain)
        n_forget = self.step_pairs - n_retain
        parts["loss"] = loss_bytes(
            (n_retain, n_forget) if self._config.negatives == "own" else (self.step_pairs,),
            backend=self._config.backend,
        )
        update = update_bytes(
            self.counts,
            parallel=parallel,
            optimizer=optimizer,
            gpus=self._gpus,
            on_gpu=self._on_gpu,
        )
        # It comes after the backward pass, in the memory that activations and loss have left.
        parts["update"] = max(0, update - parts["activations"] - parts["loss"])
        return parts

    def _activation_bytes(self, checkpointing: bool, pairs: int) -> int:
        if pairs == self.share:
            # The gradients of a step of one micro-batch appear while its activations go.
            peak = self._costs(checkpointing, pairs, False).peak_bytes
            return max(0, peak - self.counts.trained * FP32)
        # Memory is a convex function of the number of pairs, so that lines between powers of two,
        # which all setups share, lie on it or above.
        low = 1 << (pairs.bit_length() - 1)
        bytes_low = self._costs(checkpointing, low, True).peak_bytes
        if pairs == low:
            return bytes_low
        bytes_high = self._costs(checkpointing, 2 * low, True).peak_bytes
        return bytes_low + (bytes_high - bytes_low) * (pairs - low) // low


def _choose(setups: list[Setup], gpu_memory: float) -> Setup | None:
    """Return the fastest; of those that are as fast, the simplest that leaves room, if one does."""
    least = min(each.cost for each in setups)
    if least == float("inf"):
        return None
    fastest = [each for each in setups if each.cost <= 1.01 * least]
    roomy = [each for each in fastest if each.peak_bytes <= _COMFORTABLE * gpu_memory * 1e9]
    return (roomy or fastest)[0]


def _largest(bytes_of: Callable[[int], int], limit: float, most: int) -> int:
    """Return the largest number of pairs up to `most` that needs at most `limit` bytes, or 0.

    Above 64 it is a multiple of 8, unless it is `most`.
    """
    if bytes_of(most) <= limit:
        return most
    if most == 1 or bytes_of(1) > limit:
        return 0
    # First between powers of two, at which memory is counted, then between two of them.
    low, high = 0, (most - 1).bit_length()
    while high - low > 1:
        middle = (low + high) // 2
        if bytes_of(1 << middle) <= limit:
            low = middle
        else:
            high = middle
    low, high = 1 << low, min(1 << high, most)
    while high - low > 1:
        middle = (low + high) // 2
        if bytes_of(middle) <= limit:
            low = middle
        else:
            high = middle
    return low - low % 8 if low > 64 else low
