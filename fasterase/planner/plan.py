"""`fasterase.plan`: what an erasure of a model costs, and how to run it, before paying for it."""

from __future__ import annotations

import bisect
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from typing_extensions import Unpack

from fasterase.config import UnlearnConfig
from fasterase.engine.job import POOL_BATCHES, count_steps
from fasterase.engine.optim import EIGHT_BIT, Trained
from fasterase.engine.prefix_cache import VIEWS, check_prefix_cache, row_bytes, training_bytes
from fasterase.errors import InputError
from fasterase.models.dual_encoder import DualEncoder
from fasterase.models.load import load_architecture
from fasterase.models.lora import parse_rank
from fasterase.option_values import parse_count
from fasterase.overrides import Overrides
from fasterase.pairs.processes import MOST_PROCESSES, count_workers
from fasterase.pairs.sampler import Sampler
from fasterase.planner.count import (
    FP32,
    PHOTO,
    Parallel,
    ParameterCounts,
    StepMemory,
    Tracer,
    measure_decoding,
    measure_micro_batch,
)
from fasterase.planner.table import explain, plan_table, write_command
from fasterase.progress import Progress

# Dense peak of an H100 SXM in TFLOP/s (NVIDIA's data sheet), and the share of it that training a
# large ViT reaches.
_TFLOPS = {"fp32": 67.0, "bf16": 989.0, "fp16": 989.0}
EFFICIENCY = 0.4
# Share of a GPU's memory that is planned with: the rest is for the CUDA context, cuBLAS and NCCL
# (about 2 GB) and for gaps between blocks of torch's allocator.
USABLE = 0.92
# What ZeRO-3 costs beside the others, which gather weights once per step, not in every pass.
_ZERO3_PENALTY = 1.2
# Smaller micro-batches leave a GPU idle.
_LEAST_MICRO_BATCH = 8
# A peak up to this share of a GPU's memory leaves room for larger batches and longer captions.
_COMFORTABLE = 0.8
# Cards that are easy to rent or buy, and their memory in GB.
_CARDS = (
    *(("RTX 4060", 8), ("RTX 4070", 12), ("T4", 16), ("L4, A10G or RTX 4090", 24)),
    *(("A100 40 GB", 40), ("L40S", 48), ("A100 or H100", 80), ("H200", 141), ("B200", 180)),
)


@dataclass(frozen=True)
class Setup:
    """One way to run a job, and what it costs on each GPU."""

    parallel: Parallel  # "plain": data parallelism, or one process
    optimizer: str
    activation_checkpointing: bool
    name: str  # the way to run in words
    micro_batch_size: int  # the largest that fits, at most a GPU's share of the batch; 0: none
    in_one: bool  # the whole share fits and is encoded once; else twice (GradCache)
    bytes_per_gpu: dict[str, int]  # part -> bytes at the peak of a step with it (or with one pair)
    flops_per_pair: int  # of training, re-encoding and checkpointing included

    @property
    def peak_bytes(self) -> int:
        return sum(self.bytes_per_gpu.values())

    @property
    def cost(self) -> float:
        """Relative time of a pair; infinite if nothing fits."""
        if self.micro_batch_size == 0:
            return math.inf
        idle = 1.0 if self.in_one else max(1.0, _LEAST_MICRO_BATCH / self.micro_batch_size)
        return self.flops_per_pair * idle * (_ZERO3_PENALTY if self.parallel == "zero3" else 1.0)


def _largest(bytes_of: Callable[[int], int], limit: float, most: int) -> int:
    """Return the largest number of pairs up to `most` that needs at most `limit` bytes, or 0."""
    if bytes_of(most) <= limit:
        return most
    fitting = bisect.bisect_right(range(1, most), limit, key=bytes_of)
    return fitting - fitting % 8 if fitting > 64 else fitting


def choose_setup(setups: Sequence[Setup], gpus: int, gpu_memory: float) -> Setup:
    """Return the fastest; of those that are as fast, the simplest that leaves room, if one does.

    `InputError` where not one pair fits, whatever the setup.
    """
    least = min(each.cost for each in setups)
    if least == math.inf:
        smallest = min(setups, key=lambda each: each.peak_bytes)
        raise InputError(
            f"gpu_memory={gpu_memory:g}: one pair at a time needs "
            f"{smallest.peak_bytes / 1e9 / USABLE:.0f} GB on each of {gpus} GPUs, even with "
            f"{smallest.name}. Give more gpus or gpu_memory, train less (tune='last:N'), or take a "
            "smaller batch_size."
        )
    fastest = [each for each in setups if each.cost <= 1.01 * least]
    roomy = [each for each in fastest if each.peak_bytes <= _COMFORTABLE * gpu_memory * 1e9]
    return (roomy or fastest)[0]


@dataclass(frozen=True)
class Feeding:
    """How a GPU gets its pairs."""

    images_per_second: float  # that a process decodes
    pairs_per_second: float  # that a GPU trains on; NaN if that is not known
    asked: int  # processes per GPU that load, as the settings have it; 0: the training one
    is_measured: bool  # on this machine, or told

    @property
    def needed(self) -> int:
        """Processes with which loading keeps up."""
        if math.isnan(self.pairs_per_second):
            return 1
        return max(1, math.ceil(self.pairs_per_second / self.images_per_second))

    @property
    def workers(self) -> int:
        """Processes per GPU to load with: those asked for, or as many as are needed and of use."""
        return self.asked or min(self.needed, MOST_PROCESSES)

    def hours(self, pairs: int, gpu_hours: float, gpus: int, *, workers: int) -> float:
        """Return the wall clock of a job of so many pairs and GPU-hours.

        Workers load while the GPU computes; without one (0), the two take turns.
        """
        loading = pairs / (self.images_per_second * max(1, workers) * gpus) / 3600
        return max(loading, gpu_hours / gpus) if workers else loading + gpu_hours / gpus

    def describe(self) -> str:
        """Say which of the two binds, and what to do about it."""
        measured = "measured on a core here" if self.is_measured else "as given"
        size = f"{PHOTO[0]} x {PHOTO[1]} JPEGs, " if self.is_measured else ""
        rate = f"{self.images_per_second:,.0f} images/s per worker ({size}{measured})"
        if math.isnan(self.pairs_per_second):
            return f"Loading: {rate}."
        train = f"a GPU trains on {self.pairs_per_second:,.0f} pairs/s"
        if self.workers >= self.needed:
            enough = f"--num_workers {self.needed} is enough."
            return f"Compute binds: {train}, and loading gives {rate}. {enough}"
        missing = 1 - self.workers * self.images_per_second / self.pairs_per_second
        if self.needed <= MOST_PROCESSES:
            advice = f"Give --num_workers {self.needed}, and as many cores"
        else:
            advice = f"{self.needed} on as many cores would keep up, or smaller pictures"
        return (
            f"Loading binds: {rate}, and {train}, which waits {missing:.0%} of the time with "
            f"{self.workers}. {advice}."
        )


class Plan:
    """What erasing costs. `str(plan)` is a table.

    Attributes:
        setup: the recommended way to run; `setups`: all that were compared, the simplest first.
        bytes_per_gpu: part -> bytes on each GPU at the peak of a step; they add up to the peak.
        micro_batch_size: the largest that fits, at most a GPU's share of the batch.
        flops_per_pair: of training on one pair, re-encoding included.
        forward_flops: tower -> FLOPs of encoding one image or text.
        gpu_hours_per_epoch: of training on `pairs` once; NaN on a CPU without `measure`.
        disk_bytes: of the original's features of `pairs` pairs, images and captions.
        steps: of the run that the command starts, at most.
        run_gpu_hours: of these, encoding the original's features included.
        retain_pairs: how many different ones the run reads.
        run_disk_bytes: of their features.
        prefix_bytes: of the outputs of frozen blocks, which `prefix_cache` stores; else 0.
        find_gpu_hours: of `fasterase.find`, which encodes all pairs once, into `disk_bytes`.
        run_pairs: pairs that it reads, one as often as it is drawn.
        feeding: how a GPU gets its pairs: what a process decodes, and how many are needed.
        smallest_gpu: the smallest common GPU that the run fits on, in a sentence; empty for a CPU.
        command: words in capitals stand for paths and names to fill in.
        reason: why this one.
    """

    def __init__(
        self,
        model: DualEncoder,  # on the meta device
        given: str,  # what the command calls it
        pairs: int,
        config: UnlearnConfig,
        *,
        forget: int,
        gpus: int,
        gpu_memory: float,
        tflops: float | None,
        efficiency: float,
        measure: bool,
        find: bool = False,
        images_per_second: float | None = None,
    ) -> None:
        self.finds = find
        self.model, self.config, self.pairs, self.forget = model.name, config, pairs, forget
        self.gpus, self.gpu_memory = gpus, gpu_memory
        on_gpu = not (config.device or "cuda").startswith("cpu")
        auto = "bf16" if on_gpu else "fp32"
        self.precision = auto if config.precision == "auto" else config.precision
        step_pairs, compared = self._count_draws()
        self._trained = Trained.choose(model, config.tune, logit_scale=config.train_logit_scale)
        names = set(self._trained.parameters(model.module))
        for name, parameter in model.module.named_parameters():
            parameter.requires_grad_(name in names)
        counts = ParameterCounts.of(model, self._trained)
        self.parameters, self.trained_parameters = counts.total, counts.trained
        self._memory = StepMemory(
            counts,
            gpus,
            on_gpu,
            step_pairs,
            compared,
            model.embed_dim,
            config.backend,
            pixel_bytes=3 * math.prod(model.image_size),  # uint8
        )
        with Progress(f"plan of {model.name}", unit="step", shown=config.progress) as bar:
            tracer = Tracer(model, precision=self.precision, on_gpu=on_gpu, counted=bar.update)
            self.forward_flops = {each: tracer.forward(each).flops for each in ("image", "text")}
            self.prefix_bytes = self._count_prefix_bytes(tracer)
            self.measured = None
            if measure:
                self.measured = measure_micro_batch(model, precision=self.precision)
                tracer.correction = self.measured.correction
            decoded = images_per_second or measure_decoding(model)
            self.setups = self._compare_setups(model, tracer)
            self.setup = setup = choose_setup(self.setups, gpus, gpu_memory)
            self.smallest_gpu = self._find_smallest_gpu(tracer) if on_gpu else ""
        self.bytes_per_gpu, self.micro_batch_size = setup.bytes_per_gpu, setup.micro_batch_size
        self.flops_per_pair = setup.flops_per_pair

        if tflops is None:
            tflops = _TFLOPS[self.precision] if on_gpu else math.nan
        if self.measured is not None and not on_gpu:
            tflops, efficiency = self.measured.tflops, 1.0
        self.tflops, self.efficiency = tflops, efficiency
        row = 8 + model.embed_dim * (2 if on_gpu and self.precision != "fp32" else FP32)
        self.run_disk_bytes, self.disk_bytes = 2 * self.retain_pairs * row, 2 * pairs * row
        self.run_pairs = self.steps * step_pairs + self.retain_pairs
        speed = tflops * 1e12 * efficiency / self.flops_per_pair
        asked = count_workers(config.num_workers)
        self.feeding = Feeding(decoded, speed, asked, is_measured=images_per_second is None)
        self.command = write_command(
            given, config, setup, gpus, config.num_workers or self.feeding.workers
        )
        self.reason = explain(setup, self.setups, gpus, self.share)

    @property
    def run_gpu_hours(self) -> float:
        training = self.steps * self._memory.pairs * self.flops_per_pair
        return self._hours_of(training + self.retain_pairs * sum(self.forward_flops.values()))

    @property
    def find_gpu_hours(self) -> float:
        return self._hours_of(self.pairs * sum(self.forward_flops.values()))

    @property
    def gpu_hours_per_epoch(self) -> float:
        return self._hours_of(self.pairs * self.flops_per_pair)

    def _hours_of(self, flops: int) -> float:
        return flops / (self.tflops * 1e12 * self.efficiency * 3600)

    def _count_draws(self) -> tuple[int, int]:
        """Count a GPU's share of a step, the steps and what they read.

        Return a step's pairs, and the most of them that the loss compares with each other.
        """
        config = self.config
        sampler = Sampler(
            self.forget,
            min(self.pairs, POOL_BATCHES * config.batch_size),
            forget_batch_size=config.forget_batch_size,
            batch_size=config.batch_size,
            seed=config.seed,
        )
        self.share, self.steps = sampler.max_pairs_per_rank(self.gpus), count_steps(config, sampler)
        # An automatic run reads its pool, any other what its steps draw.
        batches = POOL_BATCHES if config.runs_until_forgotten else self.steps
        self.retain_pairs = min(self.pairs, batches * config.batch_size)
        step_pairs, n_retain = sampler.max_pairs_per_rank(), min(config.batch_size, self.pairs)
        own = max(n_retain, step_pairs - n_retain)
        return step_pairs, own if config.negatives == "own" else step_pairs

    def _count_prefix_bytes(self, tracer: Tracer) -> int:
        if self.config.prefix_cache is None:
            return 0
        check_prefix_cache(self.config, self.gpus)
        widths = tracer.frozen_widths(self.config.tune)
        return training_bytes(
            {tower: row_bytes(width, self.precision) for tower, width in widths.items()},
            forget=self.forget,
            retain=self.retain_pairs,
            views=VIEWS if self.config.forget_augment else 0,
        )

    def _compare_setups(self, model: DualEncoder, tracer: Tracer) -> list[Setup]:
        config = self.config
        parallels: tuple[Parallel, ...] = ("plain", "zero1", "zero2", "zero3")
        optimizers = [config.optimizer]
        if self._memory.on_gpu and config.optimizer not in EIGHT_BIT:
            optimizers.append("paged_adamw8bit")
        checkpointings = [config.activation_checkpointing]
        towers = (model.image_parts(), model.text_parts())
        if not config.activation_checkpointing and all(parts.blocks for parts in towers):
            checkpointings.append(True)
        return [
            self._fit(tracer, parallel, optimizer, checkpointing)
            for checkpointing in checkpointings
            for optimizer in optimizers
            for parallel in (parallels if self.gpus > 1 else parallels[:1])
        ]

    def _fit(
        self, tracer: Tracer, parallel: Parallel, optimizer: str, checkpointing: bool
    ) -> Setup:
        """Return a way to run, with the largest micro-batch that fits."""
        share = self.share

        def parts(pairs: int) -> dict[str, int]:
            activations = tracer.activation_bytes(pairs, share=share, checkpointing=checkpointing)
            return self._memory.parts(parallel, optimizer, activations)

        most = min(share, self.config.micro_batch_size or share)
        limit = USABLE * self.gpu_memory * 1e9
        fitting = _largest(lambda pairs: sum(parts(pairs).values()), limit, most)
        flops = tracer.backpropagate(share, checkpointing=checkpointing).flops // share
        if fitting < share:
            # GradCache: both towers without a graph, then the trained ones with one.
            trained = {"image": self._trained.image, "text": self._trained.text}
            flops += sum(self.forward_flops[tower] for tower in trained if trained[tower])
        alone = "plain data parallelism" if self.gpus > 1 else "one process"
        words = [alone if parallel == "plain" else f"ZeRO-{parallel[-1]}"]
        words += ["8-bit states"] * (optimizer in EIGHT_BIT) + ["checkpointing"] * checkpointing
        return Setup(
            parallel=parallel,
            optimizer=optimizer,
            activation_checkpointing=checkpointing,
            name=", ".join(words),
            micro_batch_size=fitting,
            in_one=fitting == share,
            bytes_per_gpu=parts(max(fitting, 1)),
            flops_per_pair=flops,
        )

    def _find_smallest_gpu(self, tracer: Tracer) -> str:
        """Name the smallest of `_CARDS` on which one of the ways to run fits, and that way.

        Where no card takes a GPU's share in one micro-batch, as many pairs as keep it busy will do.
        """
        found = [(each.peak_bytes, each.name) for each in self.setups if each.in_one]
        if not any(peak <= USABLE * _CARDS[0][1] * 1e9 for peak, _ in found):
            pairs = min(_LEAST_MICRO_BATCH, self.share, self.config.micro_batch_size or self.share)
            leanest = self.setups[-1].activation_checkpointing
            counted = tracer.backpropagate(pairs, checkpointing=leanest, with_gradients=True)
            activations = int(counted.peak_bytes * tracer.correction)
            for each in self.setups:
                if each.activation_checkpointing == leanest:
                    parts = self._memory.parts(each.parallel, each.optimizer, activations)
                    found.append((sum(parts.values()), f"{each.name}, micro_batch_size={pairs}"))
        for card, memory in _CARDS:
            for peak, name in found:
                if peak <= USABLE * memory * 1e9:
                    return (
                        f"The smallest common GPU that it fits on is {card} ({memory} GB), with "
                        f"{name}: {peak / 1e9:.1f} GB."
                    )
        return f"It fits on none of the common GPUs, of which {_CARDS[-1][0]} is the largest."

    def __str__(self) -> str:
        return plan_table(self)


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
    find: bool = False,
    images_per_second: float | None = None,
    config: UnlearnConfig | None = None,
    **overrides: Unpack[Overrides],
) -> Plan:
    """Estimate memory, time and disk of an erasure from the model's architecture alone.

    No weights are read, but for a checkpoint file: the towers run on tensors without storage, and
    FLOPs and live bytes are counted.

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
        find: let the table also tell what `fasterase.find` costs.
        images_per_second: pictures that one process decodes in a second; None: measured here, in a
            second, on photographs of 640 x 480.
        config: settings as for `unlearn`. `micro_batch_size` bounds the micro-batch.
        overrides: fields of `UnlearnConfig`. `device="cpu"` plans for a CPU.

    Raises:
        InputError: the architecture is unknown, a number is out of range, or `prefix_cache` is not
            for this run.
    """
    config = (config or UnlearnConfig()).replace(**overrides)
    pairs, gpus = parse_count("pairs", pairs, least=1), parse_count("gpus", gpus, least=1)
    forget = max(1, pairs // 100) if forget is None else parse_count("forget", forget, least=1)
    numbers = {"gpu_memory": gpu_memory, "efficiency": efficiency, "tflops": tflops}
    for name, value in {**numbers, "images_per_second": images_per_second}.items():
        if value is not None and not value > 0:
            raise InputError(f"{name}={value!r} must be above 0.")
    if parse_rank(config.tune) is not None:
        raise InputError(
            f"tune={config.tune!r}: adapters are not planned. Plan tune='all', which needs "
            "more: adapters spare the gradients and the states of the weights themselves."
        )
    return Plan(
        load_architecture(model),
        os.fspath(model) if isinstance(model, str | os.PathLike) else "MODEL",
        pairs,
        config,
        forget=forget,
        gpus=gpus,
        gpu_memory=gpu_memory,
        tflops=tflops,
        efficiency=efficiency,
        measure=measure,
        find=find,
        images_per_second=images_per_second,
    )
