"""The training loop: batches in, weights changed in place, one record per step out."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fasterase.engine.checkpoint import Checkpoint, CheckpointFolder
from fasterase.engine.decoys import Decoys
from fasterase.engine.grad_cache import backpropagate, buffers_in_train_mode, restore_buffers
from fasterase.engine.history import HistoryFile, StepRecord
from fasterase.engine.job import Job
from fasterase.engine.loss import FeatureGradients, OfOriginal, StepLoss
from fasterase.engine.pacing import Pacing
from fasterase.engine.stops import NonFiniteGuard, how_to_continue, non_finite_term, stop_error
from fasterase.objective import EraseLoss
from fasterase.original.features import CachedOriginal, Original
from fasterase.pairs.batches import StepBatch
from fasterase.parallel.engine import Engine
from fasterase.progress import SHORT_SECONDS, Progress, WaitingShare, say
from fasterase.seeds import Stream, torch_seed
from fasterase.signals import Stopped, current_stop

# Seconds between checkpoints if `save_every` is None.
SAVE_SECONDS = 600.0
# Seconds that a check of the verdict is given to finish after a signal; it cannot be saved midway.
CHECK_PATIENCE_SECONDS = 5.0


class Trainer:
    """Takes steps, and holds all state that they change.

    Args:
        job: the run.
        engine: the towers and their optimiser.
        loss_of: the objective over the pairs of all ranks.
        original: the original's features; None if no loss uses them.
        unchanged: the towers whose features before the first step are the original's.
        decoys: made-up facts to hold in each step, beside the pairs of the batch.
        emphasised: retain rows that are drawn more often, for checkpoints.
    """

    def __init__(
        self,
        job: Job,
        engine: Engine,
        loss_of: StepLoss,
        original: Original | None,
        unchanged: Collection[str] = (),
        decoys: Decoys | None = None,
        emphasised: Sequence[int] = (),
    ) -> None:
        self.step = 0  # how many were taken
        self._job = job
        self._engine = engine
        self._loss_of = loss_of
        self._original = original
        self._unchanged = unchanged
        self._decoys = decoys
        self._emphasised = emphasised
        self._guard = NonFiniteGuard(job.precision)

    def train_step(
        self, batch: StepBatch, lr: float, *, passes: int, weights: Mapping[str, float]
    ) -> StepRecord:
        """Take one step: encode, loss, gradients, clip, update; a non-finite step is left out.

        `batch` is this rank's part of it; for `passes` see `backpropagate`. `weights` are those of
        several concepts in the forget loss.

        Raises:
            NonFiniteError: several steps in a row were not finite.
            InputError: the first step does not begin at the original's features.
        """
        started = time.perf_counter()
        engine, most = self._engine, self._job.config.max_grad_norm
        batch.move_pixels(engine.device)
        buffers = buffers_in_train_mode(engine.module)
        features: list[Tensor] = []
        with engine.one_reduction():
            loss = self._backpropagate(batch, passes, features, weights)
            if self._decoys is not None and self._decoys.weight:
                moved = self._decoys.hold(engine, self._job.ranks, batch.step)
                total = loss.total + self._decoys.weight * moved
                loss = loss._replace(total=total)
        if batch.step == 0 and isinstance(self._original, CachedOriginal):
            with self._job.ranks.raising_together():
                self._original.check_start(
                    batch, features, towers=self._unchanged, precision=self._job.precision
                )
        self.step = batch.step + 1
        most = float("inf") if most is None else most
        values, grad_norm, applied = engine.step(lr, max_grad_norm=most, loss=loss)
        terms = dict(zip(EraseLoss._fields, values, strict=True))
        term = non_finite_term(terms)
        if not applied:
            grad_norm, term = (0.0, term) if term else (grad_norm, "gradient")
            # BatchNorm statistics saw the step too, and would keep its NaN.
            restore_buffers(buffers)
        self._guard.record(term, step=self.step, ids=batch.ids)
        (seconds,) = self._job.ranks.all_max(time.perf_counter() - started)
        return StepRecord(
            step=self.step,
            **terms,
            lr=lr,
            grad_norm=grad_norm,
            applied=applied,
            seconds=seconds,
        )

    def _concepts(
        self, batch: StepBatch, weights: Mapping[str, float]
    ) -> tuple[Tensor, list[float]] | None:
        """Return the number of each pair's concept, and the concepts' weights; None of one."""
        concepts = self._job.concepts
        if not concepts:
            return None
        stops = [rows.stop for rows in concepts.values()]
        numbers = np.zeros(len(batch.ids), np.int64)
        numbers[: batch.n_forget] = np.searchsorted(stops, batch.forget_rows, side="right")
        return torch.from_numpy(numbers), [weights.get(name, 1.0) for name in concepts]

    def _backpropagate(
        self,
        batch: StepBatch,
        passes: int,
        features: list[Tensor],
        weights: Mapping[str, float],
    ) -> EraseLoss:
        """Add the gradients of a step's loss; of the first one, put its features in a list."""
        engine, seed = self._engine, self._job.config.seed
        of_original, concepts = self._original_features(batch), self._concepts(batch, weights)

        def loss_of(image: Tensor, text: Tensor, scale: Tensor) -> FeatureGradients:
            if batch.step == 0:
                features[:] = image.detach(), text.detach()
            return self._loss_of(
                image,
                text,
                scale,
                original=of_original,
                n_forget=batch.n_forget,
                labels=batch.labels,
                upstream=engine.upstream(),
                concepts=concepts,
            )

        return backpropagate(
            engine,
            batch.micro_batches,
            loss_of,
            device=engine.device,
            seed_of=lambda part: torch_seed(seed, Stream.DROPOUT, part.step, part.offset),
            passes=passes if engine.in_lockstep else None,
        )

    def _original_features(self, batch: StepBatch) -> OfOriginal:
        if self._original is None:
            return None, None, None
        return (*self._original.features(batch), self._original.scale)

    def checkpoint(self, pacing: Pacing) -> Checkpoint:
        """Return the state after the steps taken so far, with that of the pacing."""
        return Checkpoint(
            step=self.step,
            training=self._engine.state(),
            non_finite=self._guard.in_a_row,
            pacing=pacing.state(),
            best=pacing.tensors(),
            seconds=self._job.clock.seconds(),
            emphasised=self._emphasised,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from `checkpoint`."""
        self._engine.restore(checkpoint.training)
        self._guard.in_a_row = checkpoint.non_finite
        self.step = checkpoint.step


def run_steps(
    job: Job,
    trainer: Trainer,
    batches: Iterator[StepBatch],
    pacing: Pacing,
    checkpoints: CheckpointFolder | None,
) -> list[StepRecord]:
    """Take the remaining steps; return the records of all steps, earlier ones included.

    Every rank takes every step; history and progress are the first one's. The `batches` begin after
    `trainer.step`; the last step is saved in any case.

    Raises:
        NonFiniteError: several steps in a row were not finite.
        PreemptedError: SIGTERM arrived; with `checkpoints`, one was written, unless a check of the
            verdict was cut short.
        KeyboardInterrupt: Ctrl-C; likewise, after the current step.
    """
    ranks, config = job.ranks, job.config
    file, history = _open_history(job, trainer.step)
    total, taken = pacing.total_steps, trainer.step
    bar = Progress("training", total=total, initial=taken, unit="step")
    waiting = WaitingShare()
    last_save, number = time.monotonic(), 0
    stop = current_stop()
    with stop.patience(), bar:
        for batch, passes, pairs, waited in _agreed(job, batches):
            if batch is None:
                number = passes
                break
            record = trainer.train_step(
                batch, pacing.lr(batch.step), passes=passes, weights=pacing.weights
            )
            with stop.patience(CHECK_PATIENCE_SECONDS):
                record.update(pacing.after_step(record))
            history.append(record)
            is_due = time.monotonic() - last_save > SAVE_SECONDS
            if config.save_every is not None:
                is_due = trainer.step % config.save_every == 0
            with ranks.raising_together():
                if file:
                    file.append(record)
                waiting.note(waited, record.seconds)
                speed = pairs / max(record.seconds + waited, 1e-9)
                bar.update(1, _facts(record, pacing.residue, speed, waiting))
                done = job.callback is not None and job.callback(record) is True
            found = ranks.all_max(stop.number, done, is_due)
            number = int(found[0])
            ends = bool(number or found[1] or pacing.is_done)
            if checkpoints and not number and (ends or trainer.step == total or found[2]):
                last_save = _save(checkpoints, trainer, pacing)
            if ends:
                break
        if number:
            stop.answer()
            # Before the first step, there is nothing that a new run would not find again.
            if checkpoints and trainer.step:
                _save(checkpoints, trainer, pacing)
            said = f" after step {trainer.step}. {how_to_continue(job.output)}"
            raise stop_error(number, said)
    return history


def _open_history(job: Job, step: int) -> tuple[HistoryFile | None, list[StepRecord]]:
    """Open the file of the first rank; return it, and the records of the first `step` steps."""
    file: HistoryFile | None = None
    with job.ranks.raising_together():
        if job.output and job.ranks.is_first:
            file = HistoryFile(job.output / "history.jsonl", keep_steps=step)
    return file, job.ranks.broadcast(list(file.earlier) if file else [])


def _agreed(
    job: Job, batches: Iterator[StepBatch]
) -> Iterator[tuple[StepBatch | None, int, int, float]]:
    """Yield each batch, the most micro-batches of a rank, the pairs of all ranks, and the seconds
    that the slowest waited for them.

    A batch that cannot be loaded on one rank is an error on all. After a signal to one of them,
    which also ends the waiting for a batch, it is None, and the second value the signal.
    """
    stop = current_stop()
    while True:
        batch: StepBatch | None = None
        error: Exception | None = None
        asked = time.perf_counter()
        try:
            with stop.patience(0):
                batch = next(batches, None)
            if batch is not None:
                job.ledger.add(batch.ids, batch.skipped)
        except Stopped:
            stop.answer()
        except Exception as raised:
            error = raised
        counts = [0, 0, 0]
        if batch is not None:
            counts = [len(batch.micro_batches), len(batch.skipped), len(batch.ids)]
        waited = time.perf_counter() - asked
        state = error is not None, stop.number, batch is None, *counts, waited
        everyone = job.ranks.gather_objects(state)
        has_failed, numbers, ended, passes, skips, pairs, waits = zip(*everyone, strict=True)
        if any(has_failed):
            job.ranks.raise_together(error)
        if any(numbers) and any(ended):
            yield None, max(numbers), 0, 0.0
        if any(ended):
            return
        if any(skips):
            job.ledger.exchange(job.ranks)
            job.ledger.warn()
        yield batch, max(passes), sum(pairs), max(waits)


def _save(checkpoints: CheckpointFolder, trainer: Trainer, pacing: Pacing) -> float:
    """Save a checkpoint, and return when that was done."""
    began = time.monotonic()
    checkpoints.save(trainer.checkpoint(pacing))
    say(f"checkpoint of step {trainer.step:,} written", since=began, least=SHORT_SECONDS)
    return time.monotonic()


def _facts(
    record: StepRecord, residue: float | None, pairs_per_second: float, waiting: WaitingShare
) -> dict[str, str]:
    """Return what is told of a step; `residue` is that of the last check."""
    return {
        "loss": f"{record.total:.3f}",
        **({} if residue is None else {"residue": f"{residue:.2f}"}),
        "lr": f"{record.lr:.1e}",
        "pairs/s": f"{pairs_per_second:,.0f}",
        "waiting for data": str(waiting),
    }
