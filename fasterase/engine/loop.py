"""The training loop: batches in, weights changed in place, one record per step out."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fasterase.engine.checkpoint import Checkpoint, CheckpointFolder
from fasterase.engine.clock import RunClock
from fasterase.engine.grad_cache import backpropagate, buffers_in_train_mode, restore_buffers
from fasterase.engine.history import HistoryFile, StepRecord
from fasterase.engine.loss import StepLoss
from fasterase.engine.pacing import Pacing
from fasterase.engine.stops import (
    NonFiniteGuard,
    StopRequests,
    how_to_continue,
    non_finite_term,
)
from fasterase.errors import PreemptedError
from fasterase.original.features import Original
from fasterase.pairs.batches import MicroBatch, StepBatch
from fasterase.pairs.skips import SkipLedger
from fasterase.parallel.engine import Engine
from fasterase.parallel.ranks import Ranks
from fasterase.progress import WaitingShare, progress_bar
from fasterase.seeds import Stream, torch_seed

# Seconds between checkpoints if `save_every` is None.
SAVE_SECONDS = 600.0


class Trainer:
    """Takes steps, and holds all state that they change.

    Args:
        engine: the towers and their optimiser.
        loss_of: the objective over the pairs of all ranks.
        reference: the original's features; None if no loss uses them.
        device: where the towers run.
        precision: compute dtype of the towers, resolved.
        max_grad_norm: limit of the global gradient norm; None does not clip.
        seed: seed for Dropout.
        ranks: who takes part.

    Attributes:
        step: steps taken so far.
        engine: as given.
        ranks: as given.
    """

    def __init__(
        self,
        engine: Engine,
        loss_of: StepLoss,
        reference: Original | None,
        *,
        device: torch.device,
        precision: str,
        max_grad_norm: float | None,
        seed: int,
        ranks: Ranks,
    ) -> None:
        self.step = 0
        self.engine = engine
        self.ranks = ranks
        self._loss_of = loss_of
        self._reference = reference
        self._device = device
        self._max_grad_norm = float("inf") if max_grad_norm is None else max_grad_norm
        self._seed = seed
        self._guard = NonFiniteGuard(precision)

    def train_step(self, batch: StepBatch, lr: float, *, passes: int) -> StepRecord:
        """Take one step: encode, loss, gradients, clip, update; a non-finite step is left out.

        Args:
            batch: this rank's part of the step.
            lr: the learning rate.
            passes: see `backpropagate`.

        Raises:
            NonFiniteError: several steps in a row were not finite.
        """
        started = time.perf_counter()
        buffers = buffers_in_train_mode(self.engine.module)
        with self.engine.one_reduction():
            loss = backpropagate(
                self.engine,
                batch.micro_batches,
                partial(
                    self._loss_of,
                    reference=self._reference_features(batch),
                    n_forget=batch.n_forget,
                    labels=batch.labels,
                    upstream=self.engine.upstream(),
                ),
                device=self._device,
                seed_of=self._dropout_seed,
                passes=passes if self.engine.in_lockstep else None,
            )
        self.step = batch.step + 1
        grad_norm, applied = 0.0, False
        term = non_finite_term(loss)
        if term is None:
            grad_norm, applied = self.engine.step(lr, max_grad_norm=self._max_grad_norm)
            term = None if applied else "gradient"
        if not applied:
            # BatchNorm statistics saw the step too, and would keep its NaN.
            restore_buffers(buffers)
        self._guard.record(term, step=self.step, ids=batch.ids)
        (seconds,) = self.ranks.largest(time.perf_counter() - started)
        return StepRecord(
            step=self.step,
            **{name: float(value) for name, value in loss._asdict().items()},
            lr=lr,
            grad_norm=grad_norm,
            applied=applied,
            seconds=seconds,
        )

    def _reference_features(
        self, batch: StepBatch
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if self._reference is None:
            return None, None, None
        return (*self._reference.features(batch), self._reference.scale)

    def _dropout_seed(self, part: MicroBatch) -> int:
        return torch_seed(self._seed, Stream.DROPOUT, part.step, part.offset)

    def checkpoint(self, pacing: Pacing, *, seconds: float) -> Checkpoint:
        """Return the state after the steps taken so far, with that of the pacing."""
        return Checkpoint(
            step=self.step,
            training=self.engine.state(),
            non_finite=self._guard.in_a_row,
            pacing=pacing.state(),
            best=pacing.tensors(),
            seconds=seconds,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from `checkpoint`."""
        self.engine.restore(checkpoint.training)
        self._guard.in_a_row = checkpoint.non_finite
        self.step = checkpoint.step


def run_steps(
    trainer: Trainer,
    batches: Iterator[StepBatch],
    pacing: Pacing,
    *,
    clock: RunClock,
    ledger: SkipLedger,
    checkpoints: CheckpointFolder | None,
    save_every: int | None,
    history_path: Path | None,
    callback: Callable[[StepRecord], object] | None,
    progress: bool,
) -> list[StepRecord]:
    """Take the remaining steps; return the records of all steps, earlier ones included.

    Args:
        trainer: takes the steps.
        batches: the batches after `trainer.step`.
        pacing: gives each step its learning rate, and ends the run.
        clock: the run's, for checkpoints.
        ledger: counts unreadable pairs.
        checkpoints: where to save, or None.
        save_every: steps between checkpoints; None: every ten minutes. The last step is saved too.
        history_path: the history file, or None.
        callback: called after each step with its record; True ends the run.
        progress: whether to show a progress bar.

    Every rank takes every step; history and progress are the first one's.

    Raises:
        NonFiniteError: several steps in a row were not finite.
        PreemptedError: SIGTERM arrived; with `checkpoints`, one was written.
        KeyboardInterrupt: Ctrl-C; likewise, after the current step.
    """
    ranks = trainer.ranks
    history_file: HistoryFile | None = None
    with ranks.together():
        if history_path and ranks.is_first:
            history_file = HistoryFile(history_path, keep_steps=trainer.step)
    history = ranks.tell(list(history_file.kept) if history_file else [])
    last_save = time.monotonic()

    def is_save_due() -> bool:
        if save_every is None:
            return time.monotonic() - last_save > SAVE_SECONDS
        return trainer.step % save_every == 0

    waiting = WaitingShare()

    def note(record: StepRecord, pairs: int, waited: float) -> bool:
        """Write and show a step on the first rank, and ask every callback whether to stop."""
        if history_file:
            history_file.append(record)
        waiting.note(waited, record.seconds)
        _show(bar, record, pairs=pairs, waited=waited, waiting=waiting)
        return callback is not None and callback(record) is True

    bar = progress_bar(
        "erasing", total=pacing.total_steps, initial=trainer.step, unit="step", shown=progress
    )
    number = 0  # of the signal that ends the run
    try:
        with StopRequests() as stop, bar:
            for batch, passes, pairs, waited in _agreed(batches, ledger, ranks):
                record = trainer.train_step(batch, pacing.lr(batch.step), passes=passes)
                history.append(record)
                with ranks.together():
                    done = note(record, pairs, waited)
                found = ranks.largest(stop.number, done, is_save_due())
                number, ends, due = int(found[0]), bool(found[1]), bool(found[2])
                pacing.after_step(record)
                ends = ends or pacing.is_done or number > 0
                if checkpoints and (ends or trainer.step == pacing.total_steps or due):
                    checkpoints.save(trainer.checkpoint(pacing, seconds=clock.seconds()))
                    last_save = time.monotonic()
                if ends:
                    break
            if number:
                _raise_stopped(signal.Signals(number), trainer.step, checkpoints)
    finally:
        if history_file:
            history_file.close()
    return history


def _agreed(
    batches: Iterator[StepBatch], ledger: SkipLedger, ranks: Ranks
) -> Iterator[tuple[StepBatch, int, int, float]]:
    """Yield each batch, the most micro-batches of a rank, the pairs of all ranks, and the seconds
    that the slowest waited for them.

    A batch that cannot be loaded on one rank is an error on all.
    """
    while True:
        batch: StepBatch | None = None
        error: Exception | None = None
        asked = time.perf_counter()
        try:
            batch = next(batches, None)
            if batch is not None:
                ledger.add(batch.ids, batch.skipped)
        except Exception as raised:
            error = raised
        passes = 0 if batch is None else len(batch.micro_batches)
        skipped = 0 if batch is None else len(batch.skipped)
        pairs = 0 if batch is None else len(batch.ids)
        waited_us = int(1e6 * (time.perf_counter() - asked))
        everyone = ranks.gather_numbers(error is not None, passes, skipped, pairs, waited_us)
        if any(failed for failed, *_ in everyone):
            ranks.agree_on_error(error)
        if batch is None:
            return
        if any(skips for _, _, skips, *_ in everyone):
            ledger.exchange(ranks)
            ledger.warn()
        most_passes, waited_us = (max(each[i] for each in everyone) for i in (1, 4))
        yield batch, most_passes, sum(each[3] for each in everyone), waited_us / 1e6


def _raise_stopped(number: signal.Signals, step: int, checkpoints: CheckpointFolder | None) -> None:
    saved = how_to_continue(checkpoints.folder if checkpoints else None)
    if number == signal.SIGINT:
        raise KeyboardInterrupt(f"stopped by Ctrl-C after step {step}. {saved}")
    raise PreemptedError(f"stopped by {number.name} after step {step}. {saved}")


def _show(
    bar: tqdm, record: StepRecord, *, pairs: int, waited: float, waiting: WaitingShare
) -> None:
    bar.set_postfix(
        {
            "loss": f"{record.total:.3f}",
            "forget": f"{record.forget:.3f}",
            "retain": f"{record.retain:.3f}",
            "kl": f"{record.consistency:.4f}",
            "anchor": f"{record.anchor:.4f}",
            "pairs/s": f"{pairs / max(record.seconds + waited, 1e-9):.0f}",
            "waiting for data": str(waiting),
        },
        refresh=False,
    )
    bar.update()
