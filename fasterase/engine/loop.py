"""The training loop: batches in, weights changed in place, one record per step out."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fasterase.engine.checkpoint import Checkpoint, CheckpointFolder
from fasterase.engine.clock import RunClock
from fasterase.engine.feature_loss import FeatureLoss
from fasterase.engine.grad_cache import backpropagate, buffers_in_train_mode, restore_buffers
from fasterase.engine.history import HistoryFile, StepRecord
from fasterase.engine.optim import Trained, build_grad_scaler
from fasterase.engine.pacing import Pacing
from fasterase.engine.stops import (
    NonFiniteGuard,
    StopRequests,
    how_to_continue,
    non_finite_term,
)
from fasterase.errors import PreemptedError
from fasterase.models.forward import TowerForward
from fasterase.pairs.batches import MicroBatch, StepBatch
from fasterase.pairs.skips import SkipLedger
from fasterase.progress import progress_bar
from fasterase.reference.live import Reference
from fasterase.seeds import Stream, torch_seed

# Seconds between checkpoints if `save_every` is None.
SAVE_SECONDS = 600.0


class Trainer:
    """Takes steps, and holds all state that they change.

    Args:
        forward: the towers, on their device.
        trained: which of their parameters are trained.
        optimizer: optimises those parameters.
        feature_loss: the objective.
        reference: the original's features; None if no loss uses them.
        precision: compute dtype of the towers, resolved.
        max_grad_norm: limit of the global gradient norm; None does not clip.
        train_mode: whether BatchNorm statistics move and Dropout is active.
        seed: seed for Dropout.

    Attributes:
        step: steps taken so far.
    """

    def __init__(
        self,
        forward: TowerForward,
        trained: Trained,
        optimizer: torch.optim.Optimizer,
        feature_loss: FeatureLoss,
        reference: Reference | None,
        *,
        precision: str,
        max_grad_norm: float | None,
        train_mode: bool,
        seed: int,
    ) -> None:
        self.step = 0
        self._forward = forward
        self._parameters = trained.parameters(forward.module)
        self._device = next(iter(self._parameters.values())).device
        self._optimizer = optimizer
        self._feature_loss = feature_loss
        self._reference = reference
        self._max_grad_norm = float("inf") if max_grad_norm is None else max_grad_norm
        self._train_mode = train_mode
        self._seed = seed
        self._scaler = build_grad_scaler(precision, self._device)
        self._guard = NonFiniteGuard(precision)

    def train_step(self, batch: StepBatch, lr: float) -> StepRecord:
        """Take one step: encode, loss, gradients, clip, update; a non-finite step is left out.

        Raises:
            NonFiniteError: several steps in a row were not finite.
        """
        started = time.perf_counter()
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.zero_grad(set_to_none=True)
        buffers = buffers_in_train_mode(self._forward.module)
        loss = backpropagate(
            self._forward,
            batch.micro_batches,
            partial(
                self._feature_loss,
                reference=self._reference_features(batch),
                n_forget=batch.n_forget,
                labels=batch.labels,
                upstream=self._scaler.scale(torch.ones((), device=self._device)),
            ),
            device=self._device,
            seed_of=self._dropout_seed,
        )
        has_gradients = any(each.grad is not None for each in self._parameters.values())
        grad_norm = self._clip_gradients() if has_gradients else 0.0
        self.step = batch.step + 1
        term = non_finite_term(loss, grad_norm)
        if term is None:
            self._scaler.step(self._optimizer)
        else:
            # BatchNorm statistics saw the step too, and would keep its NaN.
            restore_buffers(buffers)
        self._guard.record(term, step=self.step, ids=batch.ids)
        if self._scaler.is_enabled() and has_gradients:
            self._scaler.update()
        return StepRecord(
            step=self.step,
            **{name: float(value) for name, value in loss._asdict().items()},
            lr=lr,
            grad_norm=grad_norm,
            applied=term is None,
            seconds=time.perf_counter() - started,
        )

    def _reference_features(
        self, batch: StepBatch
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if self._reference is None:
            return None, None, None
        return (*self._reference.features(batch), self._reference.scale)

    def _dropout_seed(self, part: MicroBatch) -> int:
        return torch_seed(self._seed, Stream.DROPOUT, part.step, part.offset)

    def _clip_gradients(self) -> float:
        """Remove the loss scaling, clip, and return the norm before clipping."""
        self._scaler.unscale_(self._optimizer)
        parameters = list(self._parameters.values())
        return float(torch.nn.utils.clip_grad_norm_(parameters, self._max_grad_norm))

    def checkpoint(self, pacing: Pacing, *, seconds: float) -> Checkpoint:
        """Return the state after the steps taken so far, with that of the pacing."""
        return Checkpoint(
            step=self.step,
            tensors={name: tensor.detach().contiguous() for name, tensor in self._state()},
            optimizer=self._optimizer.state_dict(),
            scaler=self._scaler.state_dict(),
            non_finite=self._guard.in_a_row,
            pacing=pacing.state(),
            best=pacing.tensors(),
            seconds=seconds,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from `checkpoint`."""
        self.load_weights(checkpoint.tensors)
        self._optimizer.load_state_dict(checkpoint.optimizer)
        self._scaler.load_state_dict(checkpoint.scaler)
        self._guard.in_a_row = checkpoint.non_finite
        self.step = checkpoint.step

    def weights(self) -> dict[str, Tensor]:
        """Return a copy on the CPU of all that training changes in the model."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._state()}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Put back what `weights` returned."""
        with torch.no_grad():
            for name, tensor in self._state():
                tensor.copy_(weights[name])

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors that training changes: trained parameters, and buffers if they move."""
        yield from self._parameters.items()
        if self._train_mode:
            for name, buffer in self._forward.module.named_buffers():
                yield f"buffer:{name}", buffer


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

    Raises:
        NonFiniteError: several steps in a row were not finite.
        PreemptedError: SIGTERM arrived; with `checkpoints`, one was written.
        KeyboardInterrupt: Ctrl-C; likewise, after the current step.
    """
    history_file = HistoryFile(history_path, keep_steps=trainer.step) if history_path else None
    history = list(history_file.kept) if history_file else []
    last_save = time.monotonic()

    def is_save_due() -> bool:
        if save_every is None:
            return time.monotonic() - last_save > SAVE_SECONDS
        return trainer.step % save_every == 0

    bar = progress_bar(
        "erasing", total=pacing.total_steps, initial=trainer.step, unit="step", shown=progress
    )
    try:
        with StopRequests() as stop, bar:
            for batch in batches:
                ledger.add(batch.ids, batch.skipped)
                ledger.warn()
                record = trainer.train_step(batch, pacing.lr(batch.step))
                history.append(record)
                if history_file:
                    history_file.append(record)
                _show(bar, record, pairs=len(batch.ids))
                done = callback is not None and callback(record) is True
                pacing.after_step(record)
                ends = done or pacing.is_done or stop.signal is not None
                if checkpoints and (ends or trainer.step == pacing.total_steps or is_save_due()):
                    checkpoints.save(trainer.checkpoint(pacing, seconds=clock.seconds()))
                    last_save = time.monotonic()
                if ends:
                    break
            if stop.signal is not None:
                _raise_stopped(stop.signal, trainer.step, checkpoints)
    finally:
        if history_file:
            history_file.close()
    return history


def _raise_stopped(number: signal.Signals, step: int, checkpoints: CheckpointFolder | None) -> None:
    saved = how_to_continue(checkpoints.folder if checkpoints else None)
    if number == signal.SIGINT:
        raise KeyboardInterrupt(f"stopped by Ctrl-C after step {step}. {saved}")
    raise PreemptedError(f"stopped by {number.name} after step {step}. {saved}")


def _show(bar: tqdm, record: StepRecord, *, pairs: int) -> None:
    bar.set_postfix(
        {
            "loss": f"{record.total:.3f}",
            "forget": f"{record.forget:.3f}",
            "retain": f"{record.retain:.3f}",
            "kl": f"{record.consistency:.4f}",
            "anchor": f"{record.anchor:.4f}",
            "pairs/s": f"{pairs / max(record.seconds, 1e-9):.0f}",
        },
        refresh=False,
    )
    bar.update()
