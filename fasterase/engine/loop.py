"""The training loop: batches in, weights changed in place, a record of every step out."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fasterase.config import UnlearnConfig
from fasterase.engine.checkpoint import Checkpoint, CheckpointFolder
from fasterase.engine.grad_cache import TowerPass, backward, buffers_in_train_mode, put_back
from fasterase.engine.guard import NonFiniteGuard, non_finite_term
from fasterase.engine.history import HistoryFile, StepRecord
from fasterase.engine.interrupt import StopRequests
from fasterase.engine.optim import build_optimizer, lr_at
from fasterase.engine.precision import autocast, grad_scaler
from fasterase.errors import PreemptedError
from fasterase.models.dual_encoder import DualEncoder
from fasterase.objective import EraseLoss, erase_loss
from fasterase.pairs.batches import StepBatch
from fasterase.pairs.skips import SkipLedger
from fasterase.reference.live import Reference

log = logging.getLogger(__name__)

# Seconds between checkpoints where `save_every` is None.
SAVE_SECONDS = 600.0
# Stream of random numbers beside those of the sampler and the augmentation.
_DROPOUT = 6
# CLIP's own ceiling of the scale (Radford et al., 2021, section 2.5).
MAX_SCALE = 100.0


@dataclass(frozen=True)
class Trained:
    """What a run trains: parameters by name, and which towers they touch."""

    parameters: list[tuple[str, nn.Parameter]]
    image: bool
    text: bool

    @classmethod
    def of(cls, tower: DualEncoder, settings: UnlearnConfig) -> Trained:
        parameters = tower.trainable(settings.tune)
        chosen = {id(parameter) for _, parameter in parameters}

        def touches(side: str) -> bool:
            return any(id(parameter) in chosen for _, parameter in tower.trainable(side))

        image, text = touches("image"), touches("text")
        if settings.train_logit_scale:
            parameters = [*parameters, ("logit_scale", tower.logit_scale)]
        return cls(parameters, image, text)


class Trainer:
    """State of one run over the tower's weights.

    Args:
        tower: the model, prepared (device, dtype, requires_grad).
        trained: what is trained.
        reference: the original's features, None where no loss uses them.
        settings: the run's config.
        precision: compute dtype, resolved.
        floor: cosine floor of the forgetting loss, None for none.
        total_steps: steps of the whole run.
    """

    def __init__(
        self,
        tower: DualEncoder,
        trained: Trained,
        reference: Reference | None,
        *,
        settings: UnlearnConfig,
        precision: str,
        floor: float | None,
        total_steps: int,
    ) -> None:
        device = tower.device
        self.tower = tower
        self.trained = trained
        self.reference = reference
        self.settings = settings
        self.floor = floor
        self.total_steps = total_steps
        self.step = 0
        self.forgotten = False
        self._unscaled = False
        self.max_scale = max(MAX_SCALE, float(tower.scale().detach()))
        self.towers = TowerPass(
            tower,
            lambda: autocast(precision, device),
            trained.image,
            trained.text,
            settings.micro_batch_size,
        )
        self.optimizer = build_optimizer(
            trained.parameters,
            name=settings.optimizer,
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
        self.scaler = grad_scaler(precision, device)
        self.guard = NonFiniteGuard(precision)

    def run(
        self,
        batches: Iterator[StepBatch],
        *,
        ledger: SkipLedger,
        checkpoints: CheckpointFolder | None,
        history_path: Path | None,
        callback: Callable[[StepRecord], object] | None,
        forgotten: Callable[[], bool] | None,
        steps_per_epoch: int,
    ) -> list[StepRecord]:
        """Take the remaining steps; returns the records of all steps, earlier ones included.

        Args:
            batches: of the steps from `self.step` on.
            ledger: counts unreadable pairs.
            checkpoints: where to save, or None.
            history_path: the history file, or None.
            callback: called after each step with its record; True ends the run.
            forgotten: checked once an epoch; True ends the run. None for no check.
            steps_per_epoch: steps of one pass over the forget set.

        Raises:
            NonFiniteError: several steps in a row were not finite.
            PreemptedError: SIGTERM arrived; a checkpoint was written.
        """
        history_file = HistoryFile(history_path, keep_steps=self.step) if history_path else None
        history = list(history_file.kept) if history_file else []
        last_save = time.monotonic()
        progress = tqdm(
            total=self.total_steps,
            initial=self.step,
            desc="erasing",
            unit="step",
            disable=not self.settings.progress,
        )
        try:
            with StopRequests() as stop, progress:
                for batch in batches:
                    ledger.add(batch.ids, batch.skipped)
                    ledger.warn()
                    record = self._take(batch)
                    history.append(record)
                    if history_file:
                        history_file.append(record)
                    _show(progress, record, pairs=len(batch.ids))
                    done = callback is not None and callback(record) is True
                    if forgotten is not None and self.step % steps_per_epoch == 0:
                        self.forgotten = self._is_forgotten(forgotten)
                    done = done or self.forgotten
                    end = done or stop.signal is not None
                    if checkpoints and self._is_due(last_save, end=end):
                        checkpoints.save(self.checkpoint())
                        last_save = time.monotonic()
                    if end:
                        break
                if stop.signal is not None:
                    self._stopped(stop.signal, checkpoints)
        finally:
            if history_file:
                history_file.close()
        return history

    def _is_forgotten(self, forgotten: Callable[[], bool]) -> bool:
        module = self.tower.module
        module.eval()
        try:
            return forgotten()
        finally:
            module.train(self.settings.train_mode)

    def _is_due(self, last_save: float, *, end: bool) -> bool:
        if end or self.step == self.total_steps:
            return True
        if self.settings.save_every is None:
            return time.monotonic() - last_save > SAVE_SECONDS
        return self.step % self.settings.save_every == 0

    def _stopped(self, number: signal.Signals, checkpoints: CheckpointFolder | None) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        saved = (
            f"A checkpoint is in {checkpoints.folder}: run it again to go on."
            if checkpoints
            else "Nothing was saved: give an output_dir, and running it again goes on from there."
        )
        raise PreemptedError(f"stopped by {number.name} after step {self.step}. {saved}")

    def _take(self, batch: StepBatch) -> StepRecord:
        started = time.perf_counter()
        settings = self.settings
        # A step's randomness depends on its number only, so that a resumed run repeats it.
        stream = np.random.SeedSequence([settings.seed, _DROPOUT, batch.step])
        torch.manual_seed(int(stream.generate_state(1, np.uint64)[0]))
        lr = lr_at(
            batch.step,
            lr=settings.lr,
            warmup_steps=settings.warmup_steps,
            total_steps=self.total_steps,
            schedule=settings.schedule,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        buffers = buffers_in_train_mode(self.tower.module)
        loss, grad_norm = self._gradients(batch)
        self.step = batch.step + 1
        term = non_finite_term(loss, grad_norm)
        if term is None:
            self.scaler.step(self.optimizer)
        else:
            # BatchNorm statistics have seen the step all the same, and would keep its NaN.
            put_back(buffers)
        self.guard.count(term, step=self.step, ids=batch.ids)
        if self.scaler.is_enabled() and self._unscaled:
            self.scaler.update()
        return StepRecord(
            step=self.step,
            **{name: float(value) for name, value in loss._asdict().items()},
            lr=lr,
            grad_norm=grad_norm,
            applied=term is None,
            seconds=time.perf_counter() - started,
        )

    def _gradients(self, batch: StepBatch) -> tuple[EraseLoss, float]:
        """Loss of the batch, and the gradient norm left (clipped) in the parameters' `.grad`."""
        settings = self.settings
        device = self.tower.device
        ref_image = ref_text = ref_scale = None
        if self.reference is not None:
            ref_image, ref_text = self.reference.features(batch)
            ref_scale = self.reference.scale
        labels = batch.labels.to(device)

        def loss_of(image: Tensor, text: Tensor) -> EraseLoss:
            return erase_loss(
                image,
                text,
                self._scale(),
                ref_image,
                ref_text,
                ref_scale,
                n_forget=batch.n_forget,
                forget_weight=settings.forget_weight,
                retain_weight=settings.retain_weight,
                consistency_weight=settings.consistency_weight,
                forget_loss=settings.forget_loss,
                floor=self.floor,
                anchor_weight=settings.anchor_weight,
                labels=labels,
                negatives=settings.negatives,
                backend=settings.backend,
            )

        self.optimizer.zero_grad(set_to_none=True)
        loss = backward(
            self.towers, batch.pixels.to(device), batch.tokens.to(device), loss_of, self.scaler
        )
        loss = EraseLoss(*(term.detach() for term in loss))
        parameters = [parameter for _, parameter in self.trained.parameters]
        self._unscaled = any(parameter.grad is not None for parameter in parameters)
        if not self._unscaled:
            return loss, 0.0
        self.scaler.unscale_(self.optimizer)
        limit = float("inf") if settings.max_grad_norm is None else settings.max_grad_norm
        return loss, float(torch.nn.utils.clip_grad_norm_(parameters, limit))

    def _scale(self) -> Tensor:
        scale = self.tower.scale()
        if not self.settings.train_logit_scale:
            return scale.detach()
        # Clamped here, not in the weights: a write after the step is lost where the optimiser keeps
        # master weights of its own.
        return scale.clamp(max=self.max_scale)

    @property
    def last_step(self) -> int:
        """Where the run ends: at once where it had ended by forgetting."""
        return self.step if self.forgotten else self.total_steps

    def checkpoint(self) -> Checkpoint:
        """State after the steps taken so far."""
        return Checkpoint(
            step=self.step,
            tensors={name: tensor.detach().contiguous() for name, tensor in self._moved()},
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            non_finite=self.guard.in_a_row,
            forgotten=self.forgotten,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from `checkpoint`."""
        with torch.no_grad():
            for name, tensor in self._moved():
                tensor.copy_(checkpoint.tensors[name])
        self.optimizer.load_state_dict(checkpoint.optimizer)
        self.scaler.load_state_dict(checkpoint.scaler)
        self.guard.in_a_row = checkpoint.non_finite
        self.step = checkpoint.step
        self.forgotten = checkpoint.forgotten
        log.info("Going on from the checkpoint after step %d.", self.step)

    def _moved(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors that training changes: trained parameters, and buffers in train mode."""
        yield from self.trained.parameters
        if self.settings.train_mode:
            for name, buffer in self.tower.module.named_buffers():
                yield f"buffer:{name}", buffer


def _show(progress: tqdm, record: StepRecord, *, pairs: int) -> None:
    progress.set_postfix(
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
    progress.update()
