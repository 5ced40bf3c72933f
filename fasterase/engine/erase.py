"""One erasure on an opened model and opened pairs, from the original's features to the verdict."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fasterase.config import UnlearnConfig, format_yaml
from fasterase.encode import PairEncoder, PairFeatures
from fasterase.engine.checkpoint import CheckpointFolder
from fasterase.engine.feature_loss import MAX_SCALE, FeatureLoss
from fasterase.engine.history import StepRecord
from fasterase.engine.loop import Trainer, run_steps
from fasterase.engine.model_state import Borrowed, training
from fasterase.engine.optim import (
    EIGHT_BIT,
    Trained,
    build_optimizer,
    lr_schedule,
    require_bitsandbytes,
)
from fasterase.engine.trackers import require_tracker
from fasterase.errors import InputError, ResumeError
from fasterase.evaluation.evaluation import Evaluation
from fasterase.evaluation.evaluator import Evaluator, Measurement
from fasterase.evaluation.verdict import FORGOTTEN_EXCESS, mean_excess
from fasterase.files import write_text
from fasterase.models.dual_encoder import DualEncoder
from fasterase.models.forward import TowerForward, resolve_precision
from fasterase.ops.contrastive.api import choose_backend
from fasterase.pairs.batches import step_batches
from fasterase.pairs.sampler import Sampler, drawn_rows
from fasterase.pairs.skips import SkipLedger
from fasterase.pairs.source import PairSource
from fasterase.reference.cache import FeatureCache
from fasterase.reference.live import LiveReference, Reference
from fasterase.reference.original import (
    CachedReference,
    OriginalFeatures,
    cache_folder,
    floor_rows,
    unmatched_cosine,
)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run.

    Attributes:
        history: one record per step.
        floor: the cosine that forgetting is judged against.
        excess: mean of `max(cos - floor, 0)` over the forget set.
        evaluation: the erased model beside the original; None without an evaluator.
    """

    history: list[StepRecord]
    floor: float
    excess: float
    evaluation: Evaluation | None

    @property
    def forgotten(self) -> bool:
        return self.excess < FORGOTTEN_EXCESS


def erase(
    model: DualEncoder,
    sets: Mapping[str, PairSource],
    *,
    config: UnlearnConfig,
    evaluator: Evaluator | None,
    ledger: SkipLedger,
    state: Borrowed,
    output_dir: Path | None,
    callback: Callable[[StepRecord], object] | None,
) -> Outcome:
    """Train the (borrowed) model in place, and measure it before and after.

    Args:
        model: the model, on its device, in fp32 and eval mode.
        sets: `"forget"`, `"retain"` and sets that are only measured.
        config: the run's settings.
        evaluator: measures `sets`; None to measure nothing but forgetting.
        ledger: counts unreadable pairs.
        state: rounds the weights as they will be returned.
        output_dir: folder for checkpoints, history and features; None keeps nothing.
        callback: see `run_steps`.

    Raises:
        InputError, ResumeError, NonFiniteError, PreemptedError: see `fasterase.unlearn`.
    """
    forget, retain = sets["forget"], sets["retain"]
    precision = resolve_precision(config.precision, model.device)
    trained = Trained.choose(model, config.tune, logit_scale=config.train_logit_scale)
    sampler = Sampler(
        len(forget),
        len(retain),
        forget_batch_size=config.forget_batch_size,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    total_steps = config.max_steps or config.epochs * sampler.steps_per_epoch
    fingerprint = model.fingerprint()
    checkpoints = saved = None
    if output_dir is not None:
        identity = {
            **config.to_dict(),
            "model weights": fingerprint,
            "forget pairs": _identify(forget),
            "retain pairs": _identify(retain),
        }
        checkpoints = CheckpointFolder(output_dir / "checkpoints", identity)
        # Before anything is encoded: a checkpoint of another run is refused at once.
        saved = checkpoints.load(config.resume, device=model.device)
        write_text(output_dir / "config.yaml", format_yaml(config.to_dict()))

    encoder = PairEncoder(
        model,
        precision=precision,
        ledger=ledger,
        num_workers=config.num_workers,
        progress=config.progress,
    )

    def forget_features(*, leave: bool) -> PairFeatures:
        return encoder.pairs(
            forget,
            np.arange(len(forget)),
            captions="all",
            description="is it forgotten?",
            leave=leave,
        )

    with cache_folder(config.reference_cache, output_dir) as folder:
        key = hashlib.sha256(f"{fingerprint} {precision}".encode()).hexdigest()
        cache = FeatureCache(folder, key, model.embed_dim)
        original = _encode_original(
            encoder, cache, sets, sampler, evaluator, config=config, total_steps=total_steps
        )
        floor = config.floor if isinstance(config.floor, float) else original.unmatched_cosine
        trainer = _build_trainer(
            model,
            trained,
            original.reference,
            config=config,
            precision=precision,
            floor=floor,
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
            encoder.prepare,
            first_step=trainer.step,
            last_step=trainer.step if trainer.forgotten else total_steps,
            micro_batch_size=config.micro_batch_size,
            augment_forget=config.forget_augment,
            num_workers=config.num_workers,
        )

        def is_forgotten() -> bool:
            return mean_excess(forget_features(leave=False), floor) < FORGOTTEN_EXCESS

        parameters = trained.parameters(model.module).values()
        with (
            torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []),
            training(model.module, parameters, train_mode=config.train_mode),
        ):
            history = run_steps(
                trainer,
                batches,
                total_steps=total_steps,
                steps_per_epoch=sampler.steps_per_epoch,
                ledger=ledger,
                checkpoints=checkpoints,
                save_every=config.save_every,
                history_path=output_dir / "history.jsonl" if output_dir else None,
                callback=callback,
                is_forgotten=is_forgotten if config.stop_when_forgotten else None,
                progress=config.progress,
            )

    state.round_to_own_dtype()
    forget_after = forget_features(leave=True)
    evaluation = None
    if evaluator is not None:
        features = {"forget": forget_after.at(evaluator.rows("forget"))}
        for name in sets.keys() - {"forget"}:
            features[name] = encoder.pairs(
                sets[name], evaluator.rows(name), description=f"erased model ({name})"
            )
        measured = evaluator.measure(encoder, features)
        evaluation = evaluator.compare(measured, original=original.measured)
    return Outcome(history, floor, mean_excess(forget_after, floor), evaluation)


class _Original(NamedTuple):
    """The original model's measurements and features that a run uses.

    Attributes:
        unmatched_cosine: mean cosine of unrelated pairs, the automatic floor.
        measured: its scores, None without an evaluator.
        reference: its features for each step, None if no loss uses them.
    """

    unmatched_cosine: float
    measured: Measurement | None
    reference: Reference | None


def _encode_original(
    encoder: PairEncoder,
    cache: FeatureCache,
    sets: Mapping[str, PairSource],
    sampler: Sampler,
    evaluator: Evaluator | None,
    *,
    config: UnlearnConfig,
    total_steps: int,
) -> _Original:
    """Encode, once, every pair that the floor, the evaluation or the reference needs."""
    forget, retain = sets["forget"], sets["retain"]
    uses_reference = bool(config.consistency_weight or config.anchor_weight)
    uses_cache = uses_reference and forget.stable and retain.stable
    with_forget = uses_cache and config.negatives == "joint"
    # A retain set of millions is not encoded for a run that draws a fraction of it.
    drawn = drawn_rows(sampler, total_steps) if uses_cache else None
    referenced = {
        "forget": drawn[0] if drawn and with_forget else None,
        "retain": drawn[1] if drawn else None,
    }
    sampled = {
        name: floor_rows(len(sets[name]), rows, seed=config.seed)
        for name, rows in referenced.items()
    }
    measured_rows = {name: evaluator.rows(name) for name in sets} if evaluator else {}
    original = OriginalFeatures(encoder, cache)
    for name, source in sets.items():
        wanted = [rows.get(name) for rows in (referenced, sampled, measured_rows)]
        given = [rows for rows in wanted if rows is not None]
        if given:
            original.encode(source, np.unique(np.concatenate(given)))

    unmatched = unmatched_cosine(
        original.pairs(forget, sampled["forget"]), original.pairs(retain, sampled["retain"])
    )
    measured = None
    if evaluator is not None:
        features = {name: original.pairs(sets[name], rows) for name, rows in measured_rows.items()}
        measured = evaluator.measure(encoder, features)
    reference: Reference | None = None
    if uses_cache:
        scale = encoder.model.scale().detach().clone()
        reference = CachedReference(cache, forget, retain, scale=scale, with_forget=with_forget)
    elif uses_reference:
        reference = LiveReference(encoder.model, precision=encoder.precision)
        warnings.warn(
            "`forget` or `retain` returns a different item on a second read (random "
            "augmentation?), so the original model runs beside the trained one in every step. "
            "This is slower and needs a second copy of the weights. Pass images without random "
            "augmentation to have its features cached.",
            stacklevel=4,
        )
    return _Original(unmatched, measured, reference)


def _build_trainer(
    model: DualEncoder,
    trained: Trained,
    reference: Reference | None,
    *,
    config: UnlearnConfig,
    precision: str,
    floor: float,
    total_steps: int,
) -> Trainer:
    applies_floor = config.floor is not None and config.forget_loss == "similarity"
    feature_loss = FeatureLoss(
        image_trained=trained.image,
        text_trained=trained.text,
        scale_trained=trained.scale,
        max_scale=max(MAX_SCALE, float(model.scale().detach())),
        forget_weight=config.forget_weight,
        retain_weight=config.retain_weight,
        consistency_weight=config.consistency_weight,
        anchor_weight=config.anchor_weight,
        forget_loss=config.forget_loss,
        floor=floor if applies_floor else None,
        negatives=config.negatives,
        backend=config.backend,
    )
    optimizer = build_optimizer(
        model.module,
        trained,
        name=config.optimizer,
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
    )
    return Trainer(
        TowerForward(
            model, precision=precision, image_trained=trained.image, text_trained=trained.text
        ),
        trained,
        optimizer,
        feature_loss,
        reference,
        lr_at=lr_schedule(
            lr=config.lr,
            warmup_steps=config.warmup_steps,
            total_steps=total_steps,
            schedule=config.schedule,
        ),
        precision=precision,
        max_grad_norm=config.max_grad_norm,
        train_mode=config.train_mode,
        seed=config.seed,
    )


def check_environment(config: UnlearnConfig) -> None:
    """Refuse options that this machine cannot honour, before anything is touched.

    Raises:
        InputError: `deepspeed` is set, or a launcher started more than one process, each of which
            would train on its own; `backend` is not available; `resume="must"` without an
            `output_dir`.
        MissingExtraError: an 8-bit optimiser without bitsandbytes; `report_to` without its tracker.
    """
    choose_backend(config.backend)
    if config.optimizer in EIGHT_BIT:
        require_bitsandbytes(config.optimizer)
    require_tracker(config.report_to)
    if config.resume == "must" and config.output_dir is None:
        raise ResumeError(
            "resume='must' without output_dir: a run resumes from the checkpoints in its "
            "output_dir. Give the output_dir of the interrupted run, or resume='auto'."
        )
    if config.deepspeed is not None:
        raise InputError(
            "deepspeed is set, but this version trains in one process. Leave it None; "
            "micro_batch_size bounds memory at any batch_size."
        )
    world_size = int(os.environ.get("WORLD_SIZE") or 1)
    if world_size > 1:
        raise InputError(
            f"WORLD_SIZE={world_size}: this version trains in one process. "
            "Start it without torchrun or the deepspeed launcher."
        )


def _identify(source: PairSource) -> str:
    """Return a string that identifies the set.

    It is the set's manifest, or only its size if it changes on every read.
    """
    return source.manifest() if source.stable else f"{len(source)} pairs, changing"
