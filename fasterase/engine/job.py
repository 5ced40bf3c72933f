"""What a run is to do, opened once: the model, the pairs, the settings; which pairs it may draw."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fasterase.config import UnlearnConfig
from fasterase.engine.history import Callback
from fasterase.engine.pacing import MAX_STEPS
from fasterase.evaluation.verdict import WITHHELD
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
# Of the forget set an automatic run withholds a fifth: on these pairs it shows whether the concept
# is forgotten or only its pictures. Smaller sets are needed whole. Where they
# alone are not forgotten, it trains on them too in the end: what a user gives is to be forgotten.
WITHHELD_FORGET_SHARE, LEAST_FORGET = 0.2, 20


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
    request: str | None = None  # ... and what asked for the run
    concepts: Mapping[str, range] = field(default_factory=dict)  # of several: rows in `forget`
    arguments: Mapping[str, Any] = field(default_factory=dict)  # as the caller gave them

    @property
    def forget(self) -> PairTable:
        return self.sets["forget"]

    @property
    def retain(self) -> PairTable:
        return self.sets["retain"]

    def judging_withheld(self, rows: np.ndarray) -> Job:
        """Return the job with these rows of the forget set, if any, as a further set to forget."""
        if not len(rows):
            return self
        sets = {**self.sets, WITHHELD: self.forget.select(rows, name=WITHHELD)}
        return replace(self, sets=sets, forget_sets=[*self.forget_sets, WITHHELD])

    def withheld_of(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return `rows` of the forget set, withheld from training, for it and for each concept."""
        ranges = self.concepts.items()
        of_concepts = {n: rows[np.isin(rows, those)] - those.start for n, those in ranges}
        return {"forget": rows, **of_concepts} if len(rows) else {}

    @property
    def groups(self) -> list[np.ndarray]:
        """The rows of the forget set by concept."""
        return [np.array(rows, np.int64) for rows in self.concepts.values()] or [
            np.arange(len(self.forget))
        ]

    @cached_property
    def batches(self) -> UnlearnConfig:
        """The settings with the batches of a step, which grow as the root of several concepts.

        With the batch of one for four concepts, pairs outside both sets lose twice as much; with
        four times as many pairs about as little as with twice (docs/results.md). They take no more
        memory: so many pairs as one concept has are encoded at a time.
        """
        config, factor = self.config, math.sqrt(max(1, len(self.concepts)))
        if factor == 1:
            return config
        pairs = config.batch_size + config.forget_batch_size
        return config.replace(
            batch_size=math.ceil(factor * config.batch_size),
            forget_batch_size=math.ceil(factor * config.forget_batch_size),
            micro_batch_size=config.micro_batch_size or -(-pairs // self.ranks.world_size),
        )

    @property
    def judged_towers(self) -> tuple[str, ...]:
        """The towers that are to give nothing away beside the original's other one."""
        return ("text",) if self.config.erases_link else ("image", "text")

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


def choose_withheld(forget: PairTable, seed: int) -> np.ndarray:
    """Return the rows (sorted) of a forget set that an automatic run does not train on.

    They are all the pairs of some first captions, or any pairs where few captions stand for many.
    """
    if len(forget) < LEAST_FORGET:
        return np.empty(0, np.int64)
    most = min(int(WITHHELD_FORGET_SHARE * len(forget)), MAX_WITHHELD)
    hashes, rows = forget.caption_hashes()
    rows, first = np.unique(rows, return_index=True)
    captions, place = np.unique(hashes[first], return_inverse=True)
    numbers = generator(seed, Stream.WITHHELD)
    order = numbers.permutation(len(captions))
    sizes = np.bincount(place)[order]
    whole = np.sort(rows[np.isin(place, order[sizes.cumsum() <= most])])
    if 2 * len(whole) >= most:
        return whole
    return np.sort(numbers.permutation(rows)[:most])


class Draws:
    """Which pairs the steps of a job may draw: the `sampler` has the rows of each of them.

    An automatic run uses a part of the retain set, its `pool`, and leaves out `withheld` rows
    (sorted) of the forget set, at first. Rows of the retain set that are drawn more often than the
    others are `emphasised`.
    """

    def __init__(self, job: Job) -> None:
        config, forget, retain = job.batches, job.forget, job.retain
        self._job = job
        self.pool: RetainPool | None = None
        self.withheld = np.empty(0, np.int64)
        self.emphasised: list[int] = []
        if config.runs_until_forgotten:
            # Nothing of a link shows in another one that the run has not seen.
            if not config.erases_link:
                self.withheld = np.concatenate(
                    [rows[choose_withheld(forget.select(rows), config.seed)] for rows in job.groups]
                )
            self.pool = RetainPool.choose(
                len(retain), batch_size=config.batch_size, seed=config.seed, shards=retain.shards()
            )
        self.sampler = self._make_sampler(without=self.withheld)
        self.total_steps = count_steps(config, self.sampler)

    def _make_sampler(self, *, without: np.ndarray) -> Sampler:
        config, forget, retain = self._job.batches, self._job.forget, self._job.retain
        return Sampler(
            len(forget),
            len(retain),
            forget_batch_size=config.forget_batch_size,
            batch_size=config.batch_size,
            seed=config.seed,
            forget_groups=[np.setdiff1d(rows, without) for rows in self._job.groups],
            retain_rows=None if self.pool is None else self.pool.drawn,
            emphasised=np.array(self.emphasised, np.int64),
            forget_shards=forget.shards(),
            retain_shards=retain.shards(),
        )

    def emphasise(self, rows: np.ndarray) -> None:
        """Draw these rows (sorted) of the pool more often than the others, from step 0 on."""
        self.emphasised = rows.tolist()
        self.sampler = self._make_sampler(without=self.withheld)

    @cached_property
    def whole_sampler(self) -> Sampler:
        """Draws the withheld rows too."""
        return self._make_sampler(without=np.empty(0, np.int64))

    @cached_property
    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows (sorted) of the forget and of the retain set that the steps may draw."""
        forget, retain = drawn_rows(self.sampler, self.total_steps)
        return np.union1d(forget, self.withheld), retain

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
    is_whole_pass = steps >= sampler.steps_per_epoch
    whole = np.concatenate(sampler.forget_groups)
    drawn = whole if is_whole_pass else drawn_rows(sampler, steps)[0]
    return np.setdiff1d(np.arange(sampler.n_forget), drawn)
