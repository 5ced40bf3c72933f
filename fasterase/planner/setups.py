"""The ways to run an erasure, and what each needs of every GPU."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from fasterase.config import UnlearnConfig
from fasterase.engine.job import POOL_BATCHES, count_steps
from fasterase.engine.optim import EIGHT_BIT, Trained
from fasterase.engine.prefix_cache import VIEWS, check_prefix_cache, row_bytes, training_bytes
from fasterase.errors import InputError
from fasterase.models.dual_encoder import DualEncoder
from fasterase.models.lora import parse_rank
from fasterase.pairs.sampler import Sampler
from fasterase.planner.architecture import frozen_widths
from fasterase.planner.count import Parallel, ParameterCounts, StepMemory, Tracer

# Share of a GPU's memory that is planned with: the rest is for the CUDA context, cuBLAS and NCCL
# (about 2 GB) and for gaps between blocks of torch's allocator.
USABLE = 0.92
# What ZeRO-3 costs beside the others, which gather weights once per step, not in every pass.
_ZERO3_PENALTY = 1.2
# Smaller micro-batches leave a GPU idle.
_LEAST_MICRO_BATCH = 8
# A peak up to this share of a GPU's memory leaves room for larger batches and longer captions.
_COMFORTABLE = 0.8


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


class PlannedJob:
    """An erasure of a model on the meta device: what all ways to run it have in common."""

    def __init__(
        self, model: DualEncoder, config: UnlearnConfig, pairs: int, forget: int, gpus: int
    ) -> None:
        if parse_rank(config.tune) is not None:
            raise InputError(
                f"tune={config.tune!r}: adapters are not planned. Plan tune='all', which needs "
                "more: adapters spare the gradients and the states of the weights themselves."
            )
        self.model, self._config, self._gpus, self._forget = model, config, gpus, forget
        self.on_gpu = not (config.device or "cuda").startswith("cpu")
        auto = "bf16" if self.on_gpu else "fp32"
        self.precision = auto if config.precision == "auto" else config.precision
        self._trained = Trained.choose(model, config.tune, logit_scale=config.train_logit_scale)
        names = set(self._trained.parameters(model.module))
        for name, parameter in model.module.named_parameters():
            parameter.requires_grad_(name in names)
        sampler = Sampler(
            forget,
            min(pairs, POOL_BATCHES * config.batch_size),
            forget_batch_size=config.forget_batch_size,
            batch_size=config.batch_size,
            seed=config.seed,
        )
        self.share = sampler.max_pairs_per_rank(gpus)
        self.steps = count_steps(config, sampler)
        # An automatic run reads its pool, any other what its steps draw.
        batches = POOL_BATCHES if config.runs_until_forgotten else self.steps
        self.retain_pairs = min(pairs, batches * config.batch_size)
        self.counts = ParameterCounts.of(model, self._trained)
        step_pairs, n_retain = sampler.max_pairs_per_rank(), min(config.batch_size, pairs)
        compared = max(n_retain, step_pairs - n_retain)
        self._memory = StepMemory(
            counts=self.counts,
            gpus=gpus,
            on_gpu=self.on_gpu,
            pairs=step_pairs,
            compared=compared if config.negatives == "own" else step_pairs,
            width=model.embed_dim,
            backend=config.backend,
        )
        self._tracer = cache(
            lambda checkpointing: Tracer(
                model,
                precision=self.precision,
                on_gpu=self.on_gpu,
                activation_checkpointing=checkpointing,
            )
        )
        tracer = self._tracer(False)
        self.forward_flops = {tower: tracer.forward(tower).flops for tower in ("image", "text")}

    def flops(self, setup: Setup) -> int:
        """Return those of the run: of its steps, and of encoding the original's features."""
        steps = self.steps * self._memory.pairs * setup.flops_per_pair
        return steps + self.retain_pairs * sum(self.forward_flops.values())

    def prefix_bytes(self) -> int:
        """Return the bytes on disk of the outputs of frozen blocks that `prefix_cache` stores."""
        if self._config.prefix_cache is None:
            return 0
        check_prefix_cache(self._config, self._gpus)
        widths = frozen_widths(self.model, self._config.tune)
        return training_bytes(
            {tower: row_bytes(width, self.precision) for tower, width in widths.items()},
            forget=self._forget,
            retain=self.retain_pairs,
            views=VIEWS if self._config.forget_augment else 0,
        )

    def setups(self, gpu_memory: float, correction: float) -> list[Setup]:
        """Return the ways to run, the simplest first.

        Args:
            gpu_memory: GB of each GPU.
            correction: by what counted activations are multiplied.
        """
        config = self._config
        parallels: tuple[Parallel, ...] = ("plain", "zero1", "zero2", "zero3")
        optimizers = [config.optimizer]
        if self.on_gpu and config.optimizer not in EIGHT_BIT:
            optimizers.append("paged_adamw8bit")
        checkpointings = [config.activation_checkpointing]
        towers = (self.model.image_parts(), self.model.text_parts())
        if not config.activation_checkpointing and all(parts.blocks for parts in towers):
            checkpointings.append(True)
        return [
            self._setup(parallel, optimizer, checkpointing, USABLE * gpu_memory * 1e9, correction)
            for checkpointing in checkpointings
            for optimizer in optimizers
            for parallel in (parallels if self._gpus > 1 else parallels[:1])
        ]

    def _setup(
        self,
        parallel: Parallel,
        optimizer: str,
        checkpointing: bool,
        usable: float,
        correction: float,
    ) -> Setup:
        """Return a way to run, with the largest micro-batch that `usable` bytes hold."""
        tracer, share = self._tracer(checkpointing), self.share

        def parts(pairs: int) -> dict[str, int]:
            activations = int(tracer.activation_bytes(pairs, share=share) * correction)
            return self._memory.parts(parallel, optimizer, activations)

        most = min(share, self._config.micro_batch_size or share)
        fitting = _largest(lambda pairs: sum(parts(pairs).values()), usable, most)
        flops = tracer.backpropagate(share, with_gradients=False).flops // share
        if fitting < share:
            # GradCache: both towers without a graph, then the trained ones with one.
            trained = {"image": self._trained.image, "text": self._trained.text}
            flops += sum(self.forward_flops[tower] for tower in trained if trained[tower])
        alone = "plain data parallelism" if self._gpus > 1 else "one process"
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


def _largest(bytes_of: Callable[[int], int], limit: float, most: int) -> int:
    """Return the largest number of pairs up to `most` that needs at most `limit` bytes, or 0.

    Above 64 it is a multiple of 8, unless it is `most`.
    """
    if bytes_of(most) <= limit:
        return most
    fitting = bisect.bisect_right(range(1, most), limit, key=bytes_of)
    return fitting - fitting % 8 if fitting > 64 else fitting


def choose_setup(setups: list[Setup], gpus: int, gpu_memory: float) -> Setup:
    """Return the fastest; of those that are as fast, the simplest that leaves room, if one does.

    Raises:
        InputError: not one pair fits, whatever the setup.
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
