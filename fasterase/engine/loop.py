"""The training loop: batches in, weights changed in place, one record per step out."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fasterase.engine.checkpoint import Checkpoint, CheckpointFolder
from fasterase.engine.decoys import Decoys
from fasterase.engine.grad_cache import backpropagate, buffers_in_train_mode, restore_buffers
from fasterase.engine.history import HistoryFile, StepRecord
from fasterase.engine.job import Job
from fasterase.engine.loss import FeatureGradients, StepLoss
from fasterase.engine.pacing import Pacing
from fasterase.errors import NonFiniteError
from fasterase.objective import EraseLoss
from fasterase.original.features import CachedOriginal
from fasterase.pairs.batches import StepBatch
from fasterase.parallel.engine import Engine
from fasterase.progress import SHORT_SECONDS, Progress, WaitingShare, say
from fasterase.seeds import Stream, torch_seed
from fasterase.signals import Stopped, current_stop, how_to_continue, stop_error

log = logging.getLogger(__name__)

# Seconds between checkpoints if `save_every` is None.
SAVE_SECONDS = 600.0
# Seconds that a check of the verdict is given to finish after a signal; it cannot be saved midway.
CHECK_PATIENCE_SECONDS = 5.0
# In fp16 the loss scale finds its level by overflowing (it halves at each overflow, from 2^16), so
# that many steps may fail before such a run counts as broken.
LIMITS = {"fp32": 3, "bf16": 3, "fp16": 20}


@dataclass
class Trainer:
    """Takes steps, and holds all state that they change."""

    job: Job
    engine: Engine  # the towers and their optimiser
    loss: StepLoss
    # Towers that give the original's features before the first step.
    unchanged: Collection[str] = ()
    decoys: Decoys | None = None  # made-up facts to hold in each step, beside the batch
    emphasised: Sequence[int] = ()  # retain rows that are drawn more often, for checkpoints
    step: int = 0  # how many were taken

    def __post_init__(self) -> None:
        self._guard = NonFiniteGuard(self.job.precision)

    def train_step(
        self, batch: StepBatch, lr: float, *, passes: int, weights: Mapping[str, float]
    ) -> StepRecord:
        """Take one step: encode, loss, gradients, clip, update; a non-finite step is left out.

        `batch` is this rank's part; for `passes` see `backpropagate`, for `weights` `StepPairs`.

        Raises:
            NonFiniteError: several steps in a row were not finite.
            InputError: the first step does not begin at the original's features.
        """
        started = time.perf_counter()
        engine, job = self.engine, self.job
        batch.move_pixels(engine.device)
        buffers = buffers_in_train_mode(engine.module)
        pairs = self.loss.pairs(batch, weights)
        features: list[Tensor] = []

        def loss_of(image: Tensor, text: Tensor, scale: Tensor) -> FeatureGradients:
            if batch.step == 0:
                features[:] = image.detach(), text.detach()
            return self.loss(image, text, scale, pairs, engine.upstream())

        with engine.one_reduction():
            loss = backpropagate(
                engine,
                batch.micro_batches,
                loss_of,
                seed_of=lambda part: torch_seed(
                    job.config.seed, Stream.DROPOUT, part.step, part.offset
                ),
                passes=passes if engine.in_lockstep else None,
            )
            if self.decoys is not None and self.decoys.weight:
                moved = self.decoys.hold(engine, job.ranks, batch.step)
                loss = loss._replace(total=loss.total + self.decoys.weight * moved)
        if batch.step == 0 and isinstance(self.loss.original, CachedOriginal):
            with job.ranks.raising_together():
                self.loss.original.check_start(
                    batch, features, towers=self.unchanged, precision=job.precision
                )
        self.step = batch.step + 1
        most = job.config.max_grad_norm
        values, grad_norm, applied = engine.step(
            lr, max_grad_norm=math.inf if most is None else most, loss=loss
        )
        terms = dict(zip(EraseLoss._fields, values, strict=True))
        term = non_finite_term(terms)
        if not applied:
            grad_norm, term = (0.0, term) if term else (grad_norm, "gradient")
            # BatchNorm statistics saw the step too, and would keep its NaN.
            restore_buffers(buffers)
        self._guard.record(term, step=self.step, ids=batch.ids)
        (seconds,) = job.ranks.all_max(time.perf_counter() - started)
        return StepRecord(
            step=self.step,
            **terms,
            lr=lr,
            grad_norm=grad_norm,
            applied=applied,
            seconds=seconds,
        )

    def checkpoint(self, pacing: Pacing) -> Checkpoint:
        """Return the state after the steps taken so far, with that of the pacing."""
        return Checkpoint(
            step=self.step,
            training=self.engine.state(),
            non_finite=self._guard.in_a_row,
            pacing=pacing.state(),
            best=pacing.tensors(),
            seconds=self.job.clock.seconds(),
            emphasised=self.emphasised,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from `checkpoint`."""
        self.engine.restore(checkpoint.training)
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
    waiting, stop = WaitingShare(), current_stop()
    last_save, number = time.monotonic(), 0
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
                residue = pacing.residue  # that of the last check
                facts = {
                    "loss": f"{record.total:.3f}",
                    **({} if residue is None else {"residue": f"{residue:.2f}"}),
                    "lr": f"{record.lr:.1e}",
                    "pairs/s": f"{pairs / max(record.seconds + waited, 1e-9):,.0f}",
                    "waiting for data": str(waiting),
                }
                bar.update(1, facts)
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


class NonFiniteGuard:
    """Counts consecutive steps that could not be applied; too many depends on `precision`."""

    def __init__(self, precision: str) -> None:
        self.limit = LIMITS[precision]
        self.in_a_row = 0  # a resumed run sets it

    def record(self, term: str | None, *, step: int, ids: Sequence[str]) -> None:
        """Record a step: `term` is its first non-finite term, None if all were finite.

        Raises:
            NonFiniteError: too many steps in a row were not; names term, step and pair ids.
        """
        if term is None:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        log.warning("Step %d: %s is not finite; the step is not applied.", step, term)
        if self.in_a_row >= self.limit:
            shown = ", ".join(ids[:8]) + (f", ... ({len(ids)} in all)" if len(ids) > 8 else "")
            raise NonFiniteError(
                f"{term} is not finite at step {step}, for {self.in_a_row} steps in a row. The "
                f"model holds the weights of the last good step. Pairs of this step: {shown}. "
                "Try a lower lr, max_grad_norm=1.0 or precision='fp32', and look at these pairs.",
                term=term,
                step=step,
                pair_ids=ids,
            )


def non_finite_term(terms: Mapping[str, float]) -> str | None:
    """Return the first term of an `EraseLoss` that is NaN or infinite, the total last."""
    names = (*EraseLoss._fields[1:], "total")
    return next((name for name in names if not math.isfinite(terms[name])), None)
