"""What a run is to do, opened once: the model, the pairs, the settings; which pairs it may draw."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from fasterase.config import UnlearnConfig
from fasterase.engine.history import Callback
from fasterase.engine.pacing import MAX_STEPS
from fasterase.models.dual_encoder import DualEncoder
from fasterase.models.forward import resolve_precision
from fasterase.pairs.sampler import Sampler, drawn_rows, shuffle_rows
from fasterase.pairs.skips import SkipLedger
from fasterase.pairs.table import PairTable
from fasterase.parallel.ranks import ALONE, Ranks
from fasterase.seeds import Stream, generator

# Retain batches' worth of pairs that an automatic run encodes first and then cycles.
POOL_BATCHES = 100
WITHHELD_SHARE, MAX_WITHHELD = 0.05, 1000
# Smaller pools are needed whole for training.
LEAST_POOL = 100


@dataclass
class RunClock:
    """Counts the seconds of a run from now on."""

    earlier: float = 0.0  # seconds up to the checkpoint that this run resumes from
    _started: float = field(default_factory=time.perf_counter)

    def seconds(self) -> float:
        """Return the seconds so far, those before interruptions included."""
        return self.earlier + time.perf_counter() - self._started


@dataclass(frozen=True)
class Job:
    """One erasure. Every rank has an equal one."""

    model: DualEncoder  # on its device, in fp32 and eval mode while the run has it
    sets: Mapping[str, PairTable]  # "forget", "retain" and those that are only measured
    forget_sets: Collection[str]  # names of the measured ones that are to be forgotten too
    config: UnlearnConfig
    ledger: SkipLedger  # counts unreadable pairs
    clock: RunClock
    output: Path | None = None  # folder for checkpoints, history and features
    callback: Callback | None = None  # called after each step; True ends the run
    ranks: Ranks = ALONE  # who takes part
    concept: str | None = None  # what the caller calls the forget set

    @property
    def forget(self) -> PairTable:
        return self.sets["forget"]

    @property
    def retain(self) -> PairTable:
        return self.sets["retain"]

    @cached_property
    def precision(self) -> str:
        """The towers' compute dtype."""
        return resolve_precision(self.config.precision, self.model.device)


@dataclass(frozen=True)
class RetainPool:
    """The part of the retain set that an automatic run uses, as sorted rows."""

    drawn: np.ndarray  # by training
    withheld: np.ndarray  # from training; damage is measured on them

    @classmethod
    def choose(
        cls, count: int, *, batch_size: int, seed: int, shards: np.ndarray | None = None
    ) -> RetainPool:
        """Choose at most `POOL_BATCHES` batches of `count` pairs; of few `shards` if given."""
        numbers = generator(seed, Stream.RETAIN_POOL)
        order = shuffle_rows(numbers, count, shards)[: POOL_BATCHES * batch_size]
        size = len(order)
        withheld = min(int(WITHHELD_SHARE * size), MAX_WITHHELD) if size >= LEAST_POOL else 0
        return cls(drawn=np.sort(order[withheld:]), withheld=np.sort(order[:withheld]))


class Draws:
    """Which pairs the steps of a job may draw: the `sampler` has the rows of each of them.

    An automatic run uses a part of the retain set, its `pool`.
    """

    def __init__(self, job: Job) -> None:
        config, forget, retain = job.config, job.forget, job.retain
        self.pool: RetainPool | None = None
        if config.runs_until_forgotten:
            self.pool = RetainPool.choose(
                len(retain), batch_size=config.batch_size, seed=config.seed, shards=retain.shards()
            )
        self.sampler = Sampler(
            len(forget),
            len(retain),
            forget_batch_size=config.forget_batch_size,
            batch_size=config.batch_size,
            seed=config.seed,
            retain_rows=None if self.pool is None else self.pool.drawn,
            forget_shards=forget.shards(),
            retain_shards=retain.shards(),
        )
        self.total_steps = count_steps(config, self.sampler)

    @cached_property
    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows (sorted) of the forget and of the retain set that the steps draw."""
        return drawn_rows(self.sampler, self.total_steps)

    @cached_property
    def undrawn_forget(self) -> np.ndarray:
        """Rows (sorted) of the forget set that an automatic run's usual budget does not draw."""
        return undrawn_rows(self.sampler, min(self.total_steps, MAX_STEPS))


def count_steps(config: UnlearnConfig, sampler: Sampler) -> int:
    """Return the largest number of steps of the run."""
    if config.max_steps is not None:
        return config.max_steps
    if config.epochs == "auto":
        return max(MAX_STEPS, sampler.steps_per_epoch)
    return config.epochs * sampler.steps_per_epoch


def undrawn_rows(sampler: Sampler, steps: int) -> np.ndarray:
    """Return the forget rows (sorted) that the first `steps` steps do not draw."""
    if steps >= sampler.steps_per_epoch:
        return np.empty(0, np.int64)
    return np.setdiff1d(np.arange(sampler.n_forget), drawn_rows(sampler, steps)[0])
