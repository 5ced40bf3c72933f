"""One erasure on an opened model and opened pairs: reference, steps, checkpoints, verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from fasterase.config import UnlearnConfig, format_yaml
from fasterase.engine.checkpoint import CheckpointFolder
from fasterase.engine.forgotten import FORGOTTEN_EXCESS, forget_excess
from fasterase.engine.history import StepRecord
from fasterase.engine.loop import Trained, Trainer
from fasterase.engine.model_state import Borrowed, training
from fasterase.engine.precision import autocast, resolve_precision
from fasterase.engine.reference_setup import build_reference, cache_folder
from fasterase.files import write_text
from fasterase.models.dual_encoder import DualEncoder
from fasterase.pairs.batches import Sampler, step_batches
from fasterase.pairs.prepare import Preparer
from fasterase.pairs.skips import SkipLedger
from fasterase.pairs.source import PairSource
from fasterase.reference.sweeper import Sweeper


@dataclass(frozen=True)
class Outcome:
    """What a run did.

    Attributes:
        history: a record a step.
        floor: the cosine that forgetting is judged against.
        excess: mean of `max(cos - floor, 0)` over the forget set.
    """

    history: list[StepRecord]
    floor: float
    excess: float

    @property
    def forgotten(self) -> bool:
        return self.excess < FORGOTTEN_EXCESS


def erase(
    tower: DualEncoder,
    forget: PairSource,
    retain: PairSource,
    prepare: Preparer,
    ledger: SkipLedger,
    *,
    state: Borrowed,
    settings: UnlearnConfig,
    output_dir: Path | None,
    callback: Callable[[StepRecord], object] | None,
) -> Outcome:
    """Train the (borrowed) model in place and say whether it has forgotten.

    Raises:
        InputError, ResumeError, NonFiniteError, PreemptedError: see `fasterase.unlearn`.
    """
    device = tower.device
    precision = resolve_precision(settings.precision, device)
    cast = partial(autocast, precision, device)
    trained = Trained.of(tower, settings)
    sampler = Sampler(
        len(forget),
        len(retain),
        forget_batch_size=settings.forget_batch_size,
        batch_size=settings.batch_size,
        seed=settings.seed,
    )
    total_steps = settings.max_steps or settings.epochs * sampler.steps_per_epoch
    fingerprint = tower.fingerprint()
    checkpoints = saved = None
    if output_dir is not None:
        identity = {
            **settings.to_dict(),
            "model weights": fingerprint,
            "forget pairs": _identity(forget),
            "retain pairs": _identity(retain),
        }
        checkpoints = CheckpointFolder(output_dir / "checkpoints", identity)
        # Before the sweep: a checkpoint of another run is refused at once.
        saved = checkpoints.load(settings.resume, device=device)
        write_text(output_dir / "config.yaml", format_yaml(settings.to_dict()))
    sweeper = Sweeper(tower, prepare, ledger, cast, settings.num_workers, settings.progress)
    with cache_folder(settings) as folder:
        reference, unmatched = build_reference(
            sweeper,
            forget,
            retain,
            sampler,
            total_steps=total_steps,
            settings=settings,
            fingerprint=fingerprint,
            precision=precision,
            folder=folder,
        )
        floor = settings.floor if isinstance(settings.floor, float) else unmatched
        excess = partial(
            forget_excess,
            tower,
            forget,
            prepare,
            floor=floor,
            autocast=cast,
            num_workers=settings.num_workers,
            progress=settings.progress,
        )
        no_floor = settings.floor is None or settings.forget_loss != "similarity"
        trainer = Trainer(
            tower,
            trained,
            reference,
            settings=settings,
            precision=precision,
            floor=None if no_floor else floor,
            total_steps=total_steps,
        )
        if saved is not None:
            trainer.restore(saved)
        elif checkpoints is not None:
            checkpoints.clear()
        batches = step_batches(
            forget,
            retain,
            sampler,
            prepare,
            first_step=trainer.step,
            last_step=trainer.last_step,
            augment=settings.forget_augment,
            seed=settings.seed,
            num_workers=settings.num_workers,
        )
        parameters = [parameter for _, parameter in trained.parameters]
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            training(tower.module, parameters, train_mode=settings.train_mode),
        ):
            history = trainer.run(
                batches,
                ledger=ledger,
                checkpoints=checkpoints,
                history_path=output_dir / "history.jsonl" if output_dir else None,
                callback=callback,
                forgotten=(lambda: excess() < FORGOTTEN_EXCESS)
                if settings.stop_when_forgotten
                else None,
                steps_per_epoch=sampler.steps_per_epoch,
            )
    state.round_to_own_dtype()
    return Outcome(history, floor, excess())


def _identity(source: PairSource) -> str:
    """What tells a set from others; of one that differs at every read only the size is lasting."""
    return source.manifest() if source.stable else f"{len(source)} pairs, changing"
