"""The story of an erasure: from the original's features, through the steps, to the verdict."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fasterase.config import format_yaml
from fasterase.encode import PairEncoder
from fasterase.engine.baseline import Checks, measure_original, measured_rows
from fasterase.engine.build_engine import build_engine, shards, working_model
from fasterase.engine.checkpoint import Checkpoint, CheckpointFolder
from fasterase.engine.clock import RunClock
from fasterase.engine.conditions import check_same, check_steps_left, check_train_mode, identify
from fasterase.engine.history import StepRecord
from fasterase.engine.job import Draws, Job
from fasterase.engine.loop import Trainer, run_steps
from fasterase.engine.loss import StepLoss, loss_products
from fasterase.engine.model_state import Borrowed, training
from fasterase.engine.optim import Trained, lr_schedule
from fasterase.engine.pacing import (
    SETTLED_LOSS,
    AutomaticPacing,
    Check,
    FixedPacing,
    LinePacing,
    Pacing,
)
from fasterase.engine.prefix_cache import PrefixCache, open_prefix_cache
from fasterase.engine.rates import LineFollower, Rate
from fasterase.engine.words import ForgottenWords, forget_words
from fasterase.errors import InputError, NonFiniteError, PreemptedError
from fasterase.evaluation.evaluator import Evaluator, sampled_rows
from fasterase.evaluation.verdict import JUDGED_PAIRS, Judge, Trace, decide, summarise
from fasterase.files import write_text
from fasterase.models.lora import LoraAdapter, adapting, parse_rank
from fasterase.original.features import FeatureCache, cache_folder
from fasterase.pairs.batches import StepBatch, step_batches
from fasterase.pairs.processes import count_workers
from fasterase.pairs.skips import SkipLedger
from fasterase.parallel.engine import Engine
from fasterase.report.evaluation import Evaluation, compare
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


class Run:
    """Trains a job's (borrowed) model in place, and measures it before and after.

    Every rank makes the same run, and gets the same outcome.

    Args:
        job: what to do.
        ledger: counts unreadable pairs.
        clock: gets the seconds of the run that this one resumes.
        borrowed: rounds the weights as they will be returned.

    Raises:
        InputError: an argument cannot be used; every method may raise it, before any step.
    """

    def __init__(
        self, job: Job, *, ledger: SkipLedger, clock: RunClock, borrowed: Borrowed
    ) -> None:
        config, model = job.config, job.model
        self.job = job
        self._ledger, self._clock, self._borrowed = ledger, clock, borrowed
        self._trained = Trained.choose(model, config.tune, logit_scale=config.train_logit_scale)
        self._lora_rank = parse_rank(config.tune)
        if self._lora_rank is not None and shards(config):
            raise InputError(
                f"tune={config.tune!r} with deepspeed: sharded weights cannot be adapted. Leave "
                "out deepspeed (of adapters, gradients and optimizer states are small), or choose "
                "another tune."
            )
        self._draws = Draws(job)
        self._tell(
            f"training draws at most "
            f"{self._draws.sampler.retain_pairs_drawn(self._draws.total_steps):,} of "
            f"{len(job.retain):,} retain pairs"
        )
        # Before anything wraps the model: sharded weights would look the same for any model.
        self._fingerprint = model.fingerprint()
        self._identity = {
            "model weights": self._fingerprint,
            "forget pairs": identify(job.forget),
            "retain pairs": identify(job.retain),
        }
        check_same(self._identity, job.ranks)
        check_train_mode(model, config, job.ranks)
        self._num_workers = count_workers(config.num_workers, job.ranks)
        self._encoder = PairEncoder(
            model,
            precision=job.precision,
            ledger=ledger,
            num_workers=self._num_workers,
            progress=config.progress,
            ranks=job.ranks,
        )
        self._checkpoints: CheckpointFolder | None = None
        self._saved: Checkpoint | None = None
        self._prefixes: PrefixCache | None = None
        self._adapter: LoraAdapter | None = None

    def erase(self) -> Outcome:
        """Make the run.

        Raises:
            InputError, ResumeError, NonFiniteError, PreemptedError: see `fasterase.unlearn`.
        """
        job = self.job
        self.open_checkpoint()
        self.choose_judge()
        with (
            cache_folder(job.config.reference_cache, job.output, job.ranks) as folder,
            ExitStack() as stack,
        ):
            cache = self.open_caches(folder, stack)
            self._baseline = measure_original(
                job,
                self._draws,
                self._encoder,
                cache,
                judge=self._judge,
                evaluator=self._evaluator,
            )
            # Adapters become part of the weights when training ends, before these are measured.
            with self.adapted():
                history, limit = self.train()
            self._borrowed.round_to_own_dtype()
            return self.measure_erased(history, limit)

    def open_checkpoint(self) -> None:
        """Find where an interrupted run is to continue; one of another run is refused at once."""
        job, config = self.job, self.job.config
        if job.output is None:
            return
        identity = {
            **config.to_dict(),
            # The pool of retain pairs depends on it.
            "whether the run ends by itself": config.runs_until_forgotten,
            **self._identity,
        }
        self._checkpoints = CheckpointFolder(job.output / "checkpoints", identity, job.ranks)
        self._saved = self._checkpoints.load(config.resume)
        taken = self._saved.step if self._saved else 0
        check_steps_left(config, self._draws.total_steps, taken=taken)
        settings, file = format_yaml(config.to_dict()), job.output / "config.yaml"
        job.ranks.on_first(lambda: write_text(file, settings))

    def choose_judge(self) -> None:
        """Choose the pairs that tell whether the concept is forgotten, and what else is measured.

        Raises:
            InputError: an automatic run would have nothing to tell by.
        """
        job, config = self.job, self.job.config
        preferred = {"forget": self._draws.undrawn_forget}
        self._evaluator = None
        if config.evaluation is not None:
            self._evaluator = Evaluator(
                dict(job.sets),
                forget_sets=job.forget_sets,
                preferred=preferred,
                seed=config.seed,
                quick=config.evaluation == "quick",
            )
            self._judge = self._evaluator.judge
        else:
            rows = sampled_rows(
                len(job.forget), JUDGED_PAIRS, seed=config.seed, preferred=preferred["forget"]
            )
            names = ("forget", *job.forget_sets)
            self._judge = Judge(job.sets, names, seed=config.seed, rows={"forget": rows})
        if not self._judge.rows and (self._draws.pool is not None or config.stop_when_forgotten):
            raise InputError(
                "retain: every caption is also a caption of the forget set, so there is nothing to "
                "tell by when the concept is forgotten. Give numbers for lr and epochs (or "
                "max_steps) and no stop_when_forgotten, or retain pairs with other captions."
            )

    def open_caches(self, folder: Path, stack: ExitStack) -> FeatureCache:
        """Open what keeps the original's features, and the outputs of frozen blocks if asked."""
        job, config, model = self.job, self.job.config, self.job.model
        encoding = f"{self._fingerprint} {job.precision}"
        if config.prefix_cache is not None and job.precision == "bf16":
            encoding += f" {config.tune}"  # rounded halfway
        key = hashlib.sha256(encoding.encode()).hexdigest()
        is_half = model.device.type == "cuda" and loss_products(job.precision) == "fp16"
        if config.prefix_cache is not None:
            pool = self._draws.pool
            drawn = self._draws.rows[1] if pool is None else pool.drawn
            measured = [
                *self._judge.rows.items(),
                *measured_rows(self._evaluator, job.sets).items(),
            ]
            if pool is not None:
                measured.insert(0, ("retain", pool.withheld))
            self._prefixes = open_prefix_cache(
                folder / key[:16],
                model,
                job.sets,
                drawn,
                measured,
                config,
                job.precision,
                job.ranks,
            )
            stack.callback(self._prefixes.flush)
            self._encoder.prefixes = self._prefixes
        return FeatureCache(folder, key, model.embed_dim, is_half=is_half, ranks=job.ranks)

    @contextmanager
    def adapted(self) -> Iterator[None]:
        """Train adapters in place of the weights inside the block, with `tune="lora:N"`."""
        if self._lora_rank is None:
            yield
            return
        model, config = self.job.model, self.job.config
        blocks = [*model.image_parts().blocks, *model.text_parts().blocks]
        seed = torch_seed(config.seed, Stream.LORA)
        with adapting(
            model.module, blocks, rank=self._lora_rank, seed=seed, scale=model.logit_scale
        ) as self._adapter:
            # Of a model with adapters, these are all that is free.
            self._trained = Trained.choose(model, "all", logit_scale=config.train_logit_scale)
            yield

    def train(self) -> tuple[list[StepRecord], str | None]:
        """Take the steps: the weights change in place.

        Returns:
            The records of all steps, and what kept an automatic run from forgetting.
        """
        job, config, model = self.job, self.job.config, self.job.model
        self._checks = Checks(job, self._encoder, self._judge, self._baseline)
        words = self.forget_words()
        has_words = words is not None and self._draws.pool is not None
        start = self._checks() if has_words else None
        device = model.device  # an engine may move the model away while it trains a copy
        working = working_model(model, config)
        parameters = self._trained.parameters(working.module).values()
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            training(working.module, parameters, train_mode=config.train_mode),
        ):
            engine = build_engine(
                working,
                model,
                self._trained,
                config=config,
                precision=job.precision,
                ranks=job.ranks,
            )
            original = engine.weights() if self._draws.pool is not None else {}
            if words is not None:
                words.put_back(original)
            trainer = self._build_trainer(engine, device)
            pacing = self._build_pacing(engine, original, start)
            self._resume(trainer, pacing)
            with self._encoder.through(engine), _exporting(engine):
                history = run_steps(
                    trainer,
                    self._batches(trainer, pacing),
                    pacing,
                    clock=self._clock,
                    ledger=self._ledger,
                    checkpoints=self._checkpoints,
                    save_every=config.save_every,
                    history_path=job.output / "history.jsonl" if job.output else None,
                    callback=job.callback,
                    progress=config.progress,
                )
        return history, pacing.limit

    def forget_words(self) -> ForgottenWords | None:
        """Overwrite the vectors of tokens that only forget captions use."""
        job, config = self.job, self.job.config
        # A checkpoint has its own vectors.
        begins = self._saved is None and not self._baseline.is_never_known
        if not (begins and config.forget_words and config.forget_weight):
            return None
        words = forget_words(
            self._encoder,
            job.forget,
            job.retain,
            drawn=self._draws.rows[1],
            trained=self._trained,
            seed=config.seed,
        )
        if words is not None:
            self._tell(f"{len(words.tokens)} tokens of the forget set alone lost their meaning")
        return words

    def measure_erased(self, history: list[StepRecord], limit: str | None) -> Outcome:
        """Judge and measure the erased model beside the original."""
        baseline, evaluator, sets = self._baseline, self._evaluator, self.job.sets
        rows = self._judge.rows | measured_rows(evaluator, sets)
        features = {
            name: self._encoder.pairs(sets[name], these, description=f"erased model ({name})")
            for name, these in rows.items()
        }
        traces = summarise(self._judge.judge(features))
        evaluation = None
        if evaluator is not None:
            found = evaluator.measure(self._encoder, features, original=baseline.measured)
            evaluation = compare(evaluator, found, original=baseline.measured)
        return Outcome(
            history,
            baseline.floor,
            decide(traces, baseline.traces),
            traces,
            baseline.traces,
            evaluation,
            limit=limit,
            adapter=self._adapter,
        )

    def _build_trainer(self, engine: Engine, device: torch.device) -> Trainer:
        job, baseline = self.job, self._baseline
        return Trainer(
            engine,
            StepLoss.of_job(job, self._trained, floor=baseline.floor),
            baseline.reference,
            device=device,
            precision=job.precision,
            max_grad_norm=job.config.max_grad_norm,
            seed=job.config.seed,
            ranks=job.ranks,
            prefixes=self._prefixes,
        )

    def _build_pacing(
        self, engine: Engine, original: dict[str, Tensor], start: Check | None
    ) -> Pacing:
        config, checks = self.job.config, self._checks
        total_steps = self._draws.total_steps
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
        check_steps = self._draws.sampler.steps_per_epoch
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

    def _resume(self, trainer: Trainer, pacing: Pacing) -> None:
        """Continue from the checkpoint, or clear the folder of those of an earlier run."""
        if self._saved is not None:
            self._clock.earlier = self._saved.seconds
            trainer.restore(self._saved)
            pacing.restore(self._saved.pacing, self._saved.best)
            self._tell(f"resuming after step {self._saved.step}")
        elif self._checkpoints is not None:
            self._checkpoints.clear()

    def _batches(self, trainer: Trainer, pacing: Pacing) -> Iterator[StepBatch]:
        job, config = self.job, self.job.config
        never_known = self._draws.pool is not None and self._baseline.is_never_known
        return step_batches(
            job.forget,
            job.retain,
            self._draws.sampler,
            self._encoder.prepare,
            first_step=trainer.step,
            last_step=trainer.step if pacing.is_done or never_known else pacing.total_steps,
            micro_batch_size=config.micro_batch_size,
            augment_forget=config.forget_augment,
            keeper=self._prefixes,
            num_workers=self._num_workers,
            ranks=job.ranks,
        )

    def _tell(self, message: str) -> None:
        if self.job.config.progress and self.job.ranks.is_first:
            tqdm.write(f"fasterase: {message}")


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
