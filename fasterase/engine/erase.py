"""One erasure on an opened model and opened pairs, from the original's features to the verdict."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from fasterase.config import UnlearnConfig, format_yaml
from fasterase.encode import PairEncoder
from fasterase.engine.baseline import (
    Baseline,
    Checks,
    RetainPool,
    measure_original,
    measured_rows,
    undrawn_rows,
)
from fasterase.engine.build_engine import build_engine, shards, working_model
from fasterase.engine.checkpoint import Checkpoint, CheckpointFolder
from fasterase.engine.clock import RunClock
from fasterase.engine.conditions import check_same, check_steps_left, check_train_mode, identify
from fasterase.engine.feature_loss import MAX_SCALE, FeatureLoss, loss_products
from fasterase.engine.global_loss import GlobalLoss
from fasterase.engine.history import StepRecord
from fasterase.engine.loop import Trainer, run_steps
from fasterase.engine.model_state import Borrowed, training
from fasterase.engine.optim import Trained, lr_schedule
from fasterase.engine.pacing import (
    MAX_STEPS,
    SETTLED_LOSS,
    AutomaticPacing,
    Check,
    FixedPacing,
    LinePacing,
    Pacing,
)
from fasterase.engine.prefix_cache import open_prefix_cache
from fasterase.engine.rates import LineFollower, Rate
from fasterase.engine.words import forget_words
from fasterase.errors import InputError, NonFiniteError, PreemptedError
from fasterase.evaluation.evaluation import Evaluation
from fasterase.evaluation.evaluator import Evaluator
from fasterase.evaluation.features import sampled_rows
from fasterase.evaluation.judge import JUDGED_PAIRS, Judge, summarise
from fasterase.evaluation.verdict import Trace, decide
from fasterase.files import write_text
from fasterase.models.dual_encoder import DualEncoder
from fasterase.models.forward import resolve_precision
from fasterase.models.lora import LoraAdapter, adapting, parse_rank
from fasterase.pairs.batches import step_batches
from fasterase.pairs.processes import count_workers
from fasterase.pairs.sampler import Sampler, drawn_rows
from fasterase.pairs.skips import SkipLedger
from fasterase.pairs.table import PairTable
from fasterase.parallel.engine import Engine
from fasterase.parallel.ranks import Ranks
from fasterase.reference.cache import FeatureCache
from fasterase.reference.original import cache_folder
from fasterase.seeds import Stream, torch_seed


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run.

    Attributes:
        history: one record per step.
        floor: the cosine of unrelated pairs under the original.
        verdict: see `fasterase.evaluation.verdict.decide`; None if there was nothing to compare
            with.
        traces: set to forget -> what is left of it.
        original_traces: the same of the original.
        evaluation: the erased model beside the original; None if the config asked for none.
        limit: what kept an automatic run from forgetting: `"damage"`, `"steps"` or None.
        adapter: what `tune="lora:N"` has added to the weights.
    """

    history: list[StepRecord]
    floor: float
    verdict: str | None
    traces: dict[str, Trace]
    original_traces: dict[str, Trace]
    evaluation: Evaluation | None
    limit: str | None
    adapter: LoraAdapter | None = None

    def figures(self) -> dict[str, float]:
        """Return `set/name` -> value of what is left of each set, and of the evaluation."""
        residues = {f"{name}/residue": trace.residue for name, trace in self.traces.items()}
        return residues | ({} if self.evaluation is None else self.evaluation.flat())


def erase(
    model: DualEncoder,
    sets: Mapping[str, PairTable],
    *,
    forget_sets: Collection[str],
    config: UnlearnConfig,
    ledger: SkipLedger,
    clock: RunClock,
    state: Borrowed,
    output_dir: Path | None,
    callback: Callable[[StepRecord], object] | None,
    ranks: Ranks,
) -> Outcome:
    """Train the (borrowed) model in place, and measure it before and after.

    Every rank calls it with the same arguments, and gets the same outcome.

    Args:
        model: the model, on its device, in fp32 and eval mode.
        sets: `"forget"`, `"retain"` and sets that are only measured.
        forget_sets: names of those of them that are to be forgotten too.
        config: the run's settings.
        ledger: counts unreadable pairs.
        clock: gets the seconds of the run that this one resumes.
        state: rounds the weights as they will be returned.
        output_dir: folder for checkpoints, history and features; None keeps nothing.
        callback: see `run_steps`.
        ranks: who takes part.

    Raises:
        InputError, ResumeError, NonFiniteError, PreemptedError: see `fasterase.unlearn`.
    """
    forget, retain = sets["forget"], sets["retain"]
    precision = resolve_precision(config.precision, model.device)
    trained = Trained.choose(model, config.tune, logit_scale=config.train_logit_scale)
    rank = parse_rank(config.tune)
    if rank is not None and shards(config):
        raise InputError(
            f"tune={config.tune!r} with deepspeed: sharded weights cannot be adapted. Leave out "
            "deepspeed (of adapters, gradients and optimizer states are small), or choose another "
            "tune."
        )
    pool = None
    if config.runs_until_forgotten:
        pool = RetainPool.choose(
            len(retain), batch_size=config.batch_size, seed=config.seed, shards=retain.shards()
        )
    sampler = Sampler(
        len(forget),
        len(retain),
        forget_batch_size=config.forget_batch_size,
        batch_size=config.batch_size,
        seed=config.seed,
        retain_rows=None if pool is None else pool.drawn,
        forget_shards=forget.shards(),
        retain_shards=retain.shards(),
    )
    total_steps = count_steps(config, sampler)
    if config.progress and ranks.is_first:
        tqdm.write(
            f"fasterase: training draws at most {sampler.retain_pairs_drawn(total_steps):,} of "
            f"{len(retain):,} retain pairs"
        )
    # Before anything wraps the model: sharded weights would look the same for any model.
    fingerprint = model.fingerprint()
    pairs = {"forget pairs": identify(forget), "retain pairs": identify(retain)}
    check_same({"model weights": fingerprint, **pairs}, ranks)
    check_train_mode(model, config, ranks)
    checkpoints = saved = None
    if output_dir is not None:
        identity = {
            **config.to_dict(),
            # The pool of retain pairs depends on it.
            "whether the run ends by itself": config.runs_until_forgotten,
            "model weights": fingerprint,
            **pairs,
        }
        checkpoints = CheckpointFolder(output_dir / "checkpoints", identity, ranks)
        # Before anything is encoded: a checkpoint of another run is refused at once.
        saved = checkpoints.load(config.resume)
        check_steps_left(config, total_steps, taken=saved.step if saved else 0)
        settings = format_yaml(config.to_dict())
        ranks.on_first(lambda: write_text(output_dir / "config.yaml", settings))

    num_workers = count_workers(config.num_workers, ranks)
    encoder = PairEncoder(
        model,
        precision=precision,
        ledger=ledger,
        num_workers=num_workers,
        progress=config.progress,
        ranks=ranks,
    )
    preferred = {"forget": undrawn_rows(sampler, min(total_steps, MAX_STEPS))}
    evaluator = None
    if config.evaluation is not None:
        evaluator = Evaluator(
            dict(sets),
            forget_sets=forget_sets,
            preferred=preferred,
            seed=config.seed,
            quick=config.evaluation == "quick",
        )
    judge = evaluator.judge if evaluator else _build_judge(sets, forget_sets, preferred, config)
    if not judge.rows and (pool is not None or config.stop_when_forgotten):
        raise InputError(
            "retain: every caption is also a caption of the forget set, so there is nothing to "
            "tell by when the concept is forgotten. Give numbers for lr and epochs (or max_steps) "
            "and no stop_when_forgotten, or retain pairs with other captions."
        )

    adapter = None
    with cache_folder(config.reference_cache, output_dir, ranks) as folder, ExitStack() as stack:
        # Adapters become part of the weights when training ends, before these are measured.
        adapters = stack.enter_context(ExitStack())
        encoding = f"{fingerprint} {precision}"
        if config.prefix_cache is not None and precision == "bf16":
            encoding += f" {config.tune}"  # rounded halfway
        key = hashlib.sha256(encoding.encode()).hexdigest()
        is_half = model.device.type == "cuda" and loss_products(precision) == "fp16"
        cache = FeatureCache(folder, key, model.embed_dim, is_half=is_half, ranks=ranks)
        prefixes = None
        if config.prefix_cache is not None:
            drawn = drawn_rows(sampler, total_steps)[1] if pool is None else pool.drawn
            measured = [*judge.rows.items(), *measured_rows(evaluator, sets).items()]
            if pool is not None:
                measured.insert(0, ("retain", pool.withheld))
            prefixes = open_prefix_cache(
                folder / key[:16], model, sets, drawn, measured, config, precision, ranks
            )
            stack.callback(prefixes.flush)
            encoder.prefixes = prefixes
        baseline = measure_original(
            encoder,
            cache,
            sets,
            config=config,
            sampler=sampler,
            total_steps=total_steps,
            judge=judge,
            evaluator=evaluator,
            pool=pool,
        )
        if rank is not None:
            blocks = [*model.image_parts().blocks, *model.text_parts().blocks]
            seed = torch_seed(config.seed, Stream.LORA)
            adapter = adapters.enter_context(
                adapting(model.module, blocks, rank=rank, seed=seed, scale=model.logit_scale)
            )
            # Of a model with adapters, these are all that is free.
            trained = Trained.choose(model, "all", logit_scale=config.train_logit_scale)
        checks = Checks(encoder, sets, judge, baseline, max_damage=config.max_damage)
        words = None
        begins = saved is None and not baseline.is_never_known  # a checkpoint has its own vectors
        if begins and config.forget_words and config.forget_weight:
            drawn = drawn_rows(sampler, total_steps)[1]
            words = forget_words(
                encoder, forget, retain, drawn=drawn, trained=trained, seed=config.seed
            )
            if words is not None and config.progress and ranks.is_first:
                count = len(words.tokens)
                tqdm.write(f"fasterase: {count} tokens of the forget set alone lost their meaning")
        start = checks() if words is not None and pool is not None else None
        device = model.device  # an engine may move the model away while it trains a copy
        working = working_model(model, config)
        parameters = trained.parameters(working.module).values()
        with (
            torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []),
            training(working.module, parameters, train_mode=config.train_mode),
        ):
            engine = build_engine(
                working, model, trained, config=config, precision=precision, ranks=ranks
            )
            trainer = Trainer(
                engine,
                GlobalLoss(_build_loss(model, trained, baseline, config, precision), ranks),
                baseline.reference,
                device=device,
                precision=precision,
                max_grad_norm=config.max_grad_norm,
                seed=config.seed,
                ranks=ranks,
                prefixes=prefixes,
            )
            original = engine.weights() if pool is not None else {}
            if words is not None:
                words.put_back(original)
            pacing = _build_pacing(
                config, sampler, engine, checks, original, start, total_steps=total_steps
            )
            if saved is not None:
                clock.earlier = saved.seconds
                _resume(saved, trainer, pacing, progress=config.progress)
            elif checkpoints is not None:
                checkpoints.clear()
            never_known = pool is not None and baseline.is_never_known
            batches = step_batches(
                forget,
                retain,
                sampler,
                encoder.prepare,
                first_step=trainer.step,
                last_step=trainer.step if pacing.is_done or never_known else pacing.total_steps,
                micro_batch_size=config.micro_batch_size,
                augment_forget=config.forget_augment,
                keeper=prefixes,
                num_workers=num_workers,
                ranks=ranks,
            )
            with encoder.through(engine), _exporting(engine):
                history = run_steps(
                    trainer,
                    batches,
                    pacing,
                    clock=clock,
                    ledger=ledger,
                    checkpoints=checkpoints,
                    save_every=config.save_every,
                    history_path=output_dir / "history.jsonl" if output_dir else None,
                    callback=callback,
                    progress=config.progress,
                )

        adapters.close()
        state.round_to_own_dtype()
        rows = judge.rows | measured_rows(evaluator, sets)
        features = {
            name: encoder.pairs(sets[name], these, description=f"erased model ({name})")
            for name, these in rows.items()
        }
        traces = summarise(judge.judge(features))
        evaluation = None
        if evaluator is not None:
            found = evaluator.measure(encoder, features, original=baseline.measured)
            evaluation = evaluator.compare(found, original=baseline.measured)
    return Outcome(
        history,
        baseline.floor,
        decide(traces, baseline.traces),
        traces,
        baseline.traces,
        evaluation,
        limit=pacing.limit,
        adapter=adapter,
    )


def count_steps(config: UnlearnConfig, sampler: Sampler) -> int:
    """Return the largest number of steps of the run."""
    if config.max_steps is not None:
        return config.max_steps
    if config.epochs == "auto":
        return max(MAX_STEPS, sampler.steps_per_epoch)
    return config.epochs * sampler.steps_per_epoch


def _build_judge(
    sets: Mapping[str, PairTable],
    forget_sets: Collection[str],
    preferred: Mapping[str, np.ndarray],
    config: UnlearnConfig,
) -> Judge:
    rows = sampled_rows(
        len(sets["forget"]), JUDGED_PAIRS, seed=config.seed, preferred=preferred["forget"]
    )
    return Judge(sets, ("forget", *forget_sets), seed=config.seed, rows={"forget": rows})


def _build_pacing(
    config: UnlearnConfig,
    sampler: Sampler,
    engine: Engine,
    checks: Checks,
    original: dict[str, Tensor],
    start: Check | None,
    *,
    total_steps: int,
) -> Pacing:
    if config.runs_until_forgotten:
        return AutomaticPacing(
            LineFollower() if config.lr == "auto" else Rate(config.lr),
            check=checks,
            weights=engine.weights,
            load=engine.load_weights,
            original=(checks.original(), original),
            start=start,
            settled_loss=SETTLED_LOSS if config.thorough else 1.0,
            max_steps=total_steps,
        )
    is_forgotten = checks.is_forgotten if config.stop_when_forgotten else None
    check_steps = sampler.steps_per_epoch
    if config.lr == "auto":
        return LinePacing(
            total_steps=total_steps, is_forgotten=is_forgotten, check_steps=check_steps
        )
    lr_at = lr_schedule(
        lr=config.lr,
        warmup_steps=config.warmup_steps,
        total_steps=total_steps,
        schedule=config.schedule,
    )
    return FixedPacing(
        lr_at, total_steps=total_steps, is_forgotten=is_forgotten, check_steps=check_steps
    )


def _resume(saved: Checkpoint, trainer: Trainer, pacing: Pacing, *, progress: bool) -> None:
    trainer.restore(saved)
    pacing.restore(saved.pacing, saved.best)
    if progress:
        tqdm.write(f"fasterase: resuming after step {saved.step}")


def _build_loss(
    model: DualEncoder, trained: Trained, baseline: Baseline, config: UnlearnConfig, precision: str
) -> FeatureLoss:
    floor = config.floor if isinstance(config.floor, float) else baseline.floor
    applies_floor = config.floor is not None and config.forget_loss == "similarity"
    return FeatureLoss(
        image_trained=trained.image,
        text_trained=trained.text,
        scale_trained=trained.scale,
        max_scale=max(MAX_SCALE, float(model.scale().detach())),
        measures_distance=config.lr == "auto",
        forget_weight=config.forget_weight,
        retain_weight=config.retain_weight,
        consistency_weight=config.consistency_weight,
        anchor_weight=config.anchor_weight,
        cross_weight=config.used_cross_weight,
        forget_loss=config.forget_loss,
        floor=floor if applies_floor else None,
        negatives=config.negatives,
        backend=config.backend,
        products=loss_products(precision),
    )


@contextmanager
def _exporting(engine: Engine) -> Iterator[None]:
    """Leave the weights on the caller's model after the block, also if it stopped early."""
    try:
        yield
    # What stops all ranks alike; after an error on one of them the others could not take part.
    except (NonFiniteError, PreemptedError, KeyboardInterrupt):
        engine.export()
        raise
    engine.export()
