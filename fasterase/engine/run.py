"""The story of an erasure: from the original's features, through the steps, to the verdict."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from fasterase.config import describe_recipe
from fasterase.encode import PairEncoder
from fasterase.engine.baseline import measure_original, measured_rows
from fasterase.engine.checkpoint import Checkpoint, CheckpointFolder
from fasterase.engine.checks import Checks
from fasterase.engine.conditions import check_same, check_steps_left, check_train_mode
from fasterase.engine.history import StepRecord
from fasterase.engine.job import Draws, Job
from fasterase.engine.loop import Trainer, run_steps
from fasterase.engine.loss import StepLoss, loss_products
from fasterase.engine.model_state import training
from fasterase.engine.optim import Trained, build_engine, shards
from fasterase.engine.outcome import Outcome, describe_known
from fasterase.engine.pacing import (
    LONG_PATIENCE_STEPS,
    PATIENCE_STEPS,
    AutomaticPacing,
    Check,
    Pacing,
)
from fasterase.engine.prefix_cache import open_prefix_cache
from fasterase.engine.rates import LINE_STEPS, LINK_LINE_STEPS, LineFollower, Rate, Schedule
from fasterase.engine.words import ForgottenWords, forget_words, named_words
from fasterase.errors import InputError, NonFiniteError, PreemptedError
from fasterase.evaluation.evaluator import Evaluator, sampled_rows
from fasterase.evaluation.verdict import JUDGED_PAIRS, Judge, decide, decide_each, summarise
from fasterase.files import write_text
from fasterase.models.dual_encoder import separate_copy
from fasterase.models.lora import LoraAdapter, adapting, parse_rank
from fasterase.numerals import counted
from fasterase.original.features import OriginalFeatures, cache_folder, feature_key
from fasterase.pairs.batches import StepBatch, step_batches
from fasterase.pairs.processes import count_workers
from fasterase.parallel.engine import Engine
from fasterase.parallel.zero import complete
from fasterase.progress import say
from fasterase.repeat import describe_run
from fasterase.report.evaluation import compare, describe_hurt
from fasterase.seeds import Stream, torch_seed


class Run:
    """Trains a job's (borrowed) model in place, and measures it before and after.

    Every rank makes the same run, and gets the same outcome. `round_weights` rounds the weights as
    they will be returned. Every method may raise `InputError`, before any step.
    """

    def __init__(self, job: Job, *, round_weights: Callable[[], None]) -> None:
        config, model = job.config, job.model
        self._draws = Draws(job)
        self.job = job = job.judging_withheld(self._draws.withheld)
        self._round_weights = round_weights
        self._trained = Trained.choose(model, config.tune, logit_scale=config.train_logit_scale)
        self._word_table = model.word_table(config.tune)  # before a run freezes anything
        self._lora_rank = parse_rank(config.tune)
        if shards(config):  # told before the original is measured
            complete(config, precision=job.precision, world_size=job.ranks.world_size)
        most = self._draws.sampler.retain_pairs_drawn(self._draws.total_steps)
        say(
            f"erasing from {model.name}: {counted(len(job.forget), 'pair')} to forget, "
            f"{len(job.retain):,} to keep, of which training draws at most {most:,}; recipe: "
            f"{describe_recipe(config)}"
        )
        # Before anything wraps the model: sharded weights would look the same for any model.
        self._fingerprint = model.fingerprint()
        self._identity = {"model weights": self._fingerprint}
        for name in ("forget", "retain"):
            source = job.sets[name]
            changing = f"{counted(len(source), 'pair')}, changing"
            self._identity[f"{name} pairs"] = source.digest() if source.stable else changing
        check_same(self._identity, job.ranks)
        check_train_mode(model, config, job.ranks)
        self._num_workers = count_workers(config.num_workers, job.ranks)
        self._encoder = PairEncoder(
            model,
            precision=job.precision,
            ledger=job.ledger,
            num_workers=self._num_workers,
            progress=config.progress,
            ranks=job.ranks,
        )
        self._checkpoints: CheckpointFolder | None = None
        self._saved: Checkpoint | None = None
        self._adapter: LoraAdapter | None = None

    def erase(self) -> Outcome:
        """Make the run.

        Raises:
            InputError, ResumeError, NonFiniteError, PreemptedError: see `fasterase.unlearn`.
        """
        job = self.job
        self.open_checkpoint()
        self.choose_judge()
        with cache_folder(job.config.reference_cache, job.output, job.ranks) as folder:
            cache = self.open_caches(folder)
            began = time.monotonic()
            self._baseline = measure_original(
                job, self._draws, self._encoder, cache, judge=self._judge, evaluator=self._evaluator
            )
            self.emphasise_neighbours()
            known = describe_known(self._baseline.traces, self._baseline.recall)
            say(f"original measured: {known or 'nothing to compare with'}", since=began)
            # Adapters become part of the weights when training ends, before these are measured.
            with self.adapted():
                history, pacing = self.train()
            self._round_weights()
            return self.measure_erased(history, pacing)

    def open_checkpoint(self) -> None:
        """Find where an interrupted run is to continue; one of another run is refused at once."""
        job, config = self.job, self.job.config
        if job.output is None:
            return
        ends_itself = config.runs_until_forgotten
        identity = {
            **config.to_dict(),
            "whether the run ends by itself": ends_itself,  # the pool of retain pairs depends on it
            "what judges a run that ends by itself": config.evaluation if ends_itself else None,
            "words to forget": _named_words(job),
            **self._identity,
        }
        self._checkpoints = CheckpointFolder(job.output / "checkpoints", identity, job.ranks)
        self._saved = self._checkpoints.load(config.resume)
        taken = self._saved.step if self._saved else 0
        check_steps_left(config, self._draws.total_steps, taken=taken)
        settings, file = describe_run(job.arguments, config), job.output / "config.yaml"
        job.ranks.on_first(lambda: write_text(file, settings))

    def choose_judge(self) -> None:
        """Choose the pairs that tell whether it is forgotten, and what else is measured."""
        job, config, undrawn = self.job, self.job.config, self._draws.undrawn_forget
        self._evaluator = None
        if config.evaluation is not None:
            self._evaluator = Evaluator(
                dict(job.sets),
                forget_sets=job.forget_sets,
                preferred={"forget": undrawn},
                seed=config.seed,
                quick=config.evaluation == "quick",
                towers=job.judged_towers,
            )
            self._judge = self._evaluator.judge
        else:
            rows = sampled_rows(len(job.forget), JUDGED_PAIRS, seed=config.seed, preferred=undrawn)
            names = ("forget", *job.forget_sets)
            self._judge = Judge(
                job.sets, names, seed=config.seed, rows={"forget": rows}, towers=job.judged_towers
            )
        if not self._judge.rows and (self._draws.pool is not None or config.stop_when_forgotten):
            raise InputError(
                "retain: every caption is also a caption of the forget set, so there is nothing to "
                "tell by when the concept is forgotten. Give numbers for lr and epochs (or "
                "max_steps) and no stop_when_forgotten, or retain pairs with other captions."
            )

    def open_caches(self, folder: Path) -> OriginalFeatures:
        """Open what keeps the original's features, and the outputs of frozen blocks if asked."""
        job, config, model = self.job, self.job.config, self.job.model
        is_rounded = config.prefix_cache is not None and job.precision == "bf16"  # halfway
        key = feature_key(self._fingerprint, job.precision, *[config.tune] * is_rounded)
        is_half = model.device.type == "cuda" and loss_products(job.precision) == "fp16"
        if config.prefix_cache is not None:
            pool, drawn = self._draws.pool, self._draws.rows[1]
            measured = [
                *self._judge.rows.items(),
                *measured_rows(self._evaluator, job.sets).items(),
            ]
            if pool is not None:
                drawn, measured = pool.drawn, [("retain", pool.withheld), *measured]
            self._encoder.prefixes = open_prefix_cache(folder / key[:16], job, drawn, measured)
        return OriginalFeatures(self._encoder, folder, key, is_half=is_half)

    def emphasise_neighbours(self) -> None:
        """Draw the retain pairs nearest to the concept more often, in a run that ends by itself."""
        # A link is held beside made-up facts instead.
        if self._draws.pool is None or self.job.config.erases_link:
            return
        if self._saved is not None:
            rows = np.array(self._saved.emphasised, np.int64)
        else:  # the first rank decides for all: others may round differently
            rows = self.job.ranks.on_first(lambda: self._baseline.near_rows)
        self._draws.emphasise(rows)

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

    def train(self) -> tuple[list[StepRecord], Pacing]:
        """Take the steps; return their records and what has paced them."""
        job, config, draws, baseline = self.job, self.job.config, self._draws, self._baseline
        self._words = self.forget_words()
        if self._lora_rank is not None:
            self.keep_words()
        words = self._words
        things = () if self._evaluator is None else self._evaluator.things
        withheld = job.withheld_of(draws.withheld)
        checks = Checks(job, self._encoder, self._judge, baseline, self._trained, withheld, things)
        is_automatic = draws.pool is not None
        begins_here = words is not None and self._saved is None
        start = checks() if begins_here and is_automatic else None
        working = separate_copy(job.model) if shards(config) else job.model
        parameters = self._trained.parameters(working.module).values()
        devices = [working.device] if working.device.type == "cuda" else []
        trainer: Trainer | None = None
        try:
            with (
                torch.random.fork_rng(devices=devices),
                training(working.module, parameters, train_mode=config.train_mode),
            ):
                engine = build_engine(job, self._trained, working)
                begun = engine.weights() if is_automatic else {}
                trainer = self._build_trainer(engine)
                pacing = self._build_pacing(engine, checks, (start, begun))
                self._resume(trainer, pacing)
                with self._encoder.through(engine), _exporting(engine):
                    batches = self._batches(trainer, pacing)
                    began = time.monotonic()
                    history = run_steps(job, trainer, batches, pacing, self._checkpoints)
                    if history:
                        taken = counted(len(history), "step")
                        say(f"trained: {taken}, loss {history[-1].total:.3f}", since=began)
        except InputError:
            if words is not None and (trainer is None or not trainer.step):
                words.give_back(job.model)
            raise
        return history, pacing

    def _build_trainer(self, engine: Engine) -> Trainer:
        baseline, decoys = self._baseline, self._baseline.decoys
        # The towers whose features begin as the original's: not with Dropout, or other words.
        unchanged = ["image"] if self._words and self._words.tokens else ["image", "text"]
        return Trainer(
            self.job,
            engine,
            StepLoss.of_job(
                self.job,
                self._trained,
                floors=baseline.floors,
                strangers=decoys.strangers if decoys else (),
                original=baseline.original,
            ),
            unchanged=[] if self.job.config.train_mode else unchanged,
            decoys=decoys,
            emphasised=self._draws.emphasised,
        )

    def forget_words(self) -> ForgottenWords | None:
        """Overwrite the vectors of words of the concept that nothing else needs."""
        job, config = self.job, self.job.config
        wanted = config.forget_words and config.forget_weight
        if not wanted or self._baseline.is_never_known:
            return None
        words = forget_words(
            self._encoder,
            job.forget,
            job.retain,
            drawn=self._draws.rows[1],
            table=self._word_table,
            seed=config.seed,
            named=_named_words(job),
            named_alone=config.forget_words is not True or config.erases_link,
        )
        if words is not None:
            say(words.describe())
        return words

    def keep_words(self) -> None:
        """Keep the table of words, which adapters leave alone, with the weights of the run.

        A checkpoint decides: further steps may draw captions that change which words are taken.
        """
        words = self._words
        if self._word_table is None:
            return
        name, _ = self._word_table
        taken = words is not None and bool(words.tokens)
        if self._saved is not None and name not in self._saved.training.tensors:
            if words is not None:
                words.give_back(self.job.model)
            self._words = None
        elif self._saved is not None or taken:
            self._trained = replace(self._trained, overwritten=name)

    def measure_erased(self, history: list[StepRecord], pacing: Pacing) -> Outcome:
        """Judge and measure the erased model beside the original."""
        baseline, evaluator, sets = self._baseline, self._evaluator, self.job.sets
        began = time.monotonic()
        rows = self._judge.rows | measured_rows(evaluator, sets)
        features = {
            name: self._encoder.pairs(sets[name], these, description=f"erased model ({name})")
            for name, these in rows.items()
        }
        traces = summarise(self._judge.judge(features, baseline.judged))
        verdict, evaluation, recall, hurt = decide(traces, baseline.traces), None, None, ""
        if evaluator is not None:
            found = evaluator.measure(self._encoder, features, original=baseline.measured)
            evaluation = compare(evaluator, found, original=baseline.measured)
            recall, hurt = found.recall, describe_hurt(evaluation, count=5)
        known = "; ".join(filter(None, [describe_known(traces, recall), hurt.removesuffix(".")]))
        say(f"erased model measured: {verdict or 'no verdict'}; {known}", since=began)
        # Not where the original's weights were the best.
        taken = self._words
        if taken is not None and not taken.are_taken(self.job.model):
            taken = None
        return Outcome(
            history,
            fmean(floor.mean for floor in baseline.floors),
            verdict,
            traces,
            evaluation,
            pacing.limit,
            pacing.withheld_until,
            self._adapter,
            [] if taken is None else taken.words,
            decide_each(traces, baseline.traces),
        )

    def _build_rate(self) -> Rate:
        config, total_steps = self.job.config, self._draws.total_steps
        if config.lr == "auto" and config.runs_until_forgotten:
            is_link = self._baseline.decoys is not None
            return LineFollower(line_steps=LINK_LINE_STEPS if is_link else LINE_STEPS)
        if config.lr == "auto":
            return LineFollower(line_steps=total_steps)
        if config.runs_until_forgotten:
            return Rate(config.lr)
        return Schedule(
            config.lr,
            warmup_steps=config.warmup_steps,
            total_steps=total_steps,
            is_cosine=config.schedule == "cosine",
        )

    def _build_pacing(
        self, engine: Engine, checks: Checks, start: tuple[Check | None, dict[str, Tensor]]
    ) -> Pacing:
        config, words, total_steps = self.job.config, self._words, self._draws.total_steps
        rate = self._build_rate()
        if not config.runs_until_forgotten:
            return Pacing(
                rate,
                total_steps=total_steps,
                is_forgotten=checks.is_forgotten if config.stop_when_forgotten else None,
                check_steps=self._draws.sampler.steps_per_epoch,
            )
        is_link = self._baseline.decoys is not None
        # Nothing pushes a tower beside the original's other one without cross terms.
        patience = PATIENCE_STEPS if config.used_cross_weight else 0
        if config.thorough or is_link:
            patience = LONG_PATIENCE_STEPS
        original = start[1] if words is None else words.put_back(start[1])
        names = self._trained.names
        return AutomaticPacing(
            rate,
            check=checks,
            weights=engine.weights,
            load=engine.load_weights,
            original=(checks.original(), original),
            start=start,
            towers={
                tower: names & {name for name, _ in self.job.model.selected(tower)}
                for tower in ("image", "text")
            },
            patience=patience,
            of_link=is_link,
            max_steps=total_steps,
        )

    def _resume(self, trainer: Trainer, pacing: Pacing) -> None:
        """Continue from the checkpoint, or clear the folder of those of an earlier run."""
        if self._saved is not None:
            self.job.clock.earlier = self._saved.seconds
            trainer.restore(self._saved)
            pacing.restore(self._saved.pacing, self._saved.best)
            say(f"resuming after step {self._saved.step}")
        elif self._checkpoints is not None:
            self._checkpoints.clear()

    def _batches(self, trainer: Trainer, pacing: Pacing) -> Iterator[StepBatch]:
        """Yield the batches of the remaining steps, from some step on with the withheld pairs."""
        job, config, draws = self.job, self.job.config, self._draws
        never_known = draws.pool is not None and self._baseline.is_never_known
        while not (pacing.is_done or never_known or trainer.step == pacing.total_steps):
            until = pacing.withheld_until
            for batch in step_batches(
                job.forget,
                job.retain,
                draws.sampler if until is None else draws.whole_sampler,
                self._encoder.prepare,
                first_step=trainer.step,
                last_step=pacing.total_steps,
                micro_batch_size=job.batches.micro_batch_size,
                augment_forget=config.forget_augment,
                prefixes=self._encoder.prefixes,
                num_workers=self._num_workers,
                ranks=job.ranks,
            ):
                yield batch
                if pacing.withheld_until != until:
                    say(f"step {trainer.step}: the withheld pairs lag behind; training on them too")
                    break


def _named_words(job: Job) -> list[str]:
    """Return the words that the caller names; of a concept, its name or names do so too."""
    wanted = job.config.forget_words
    if wanted is False or (job.config.erases_link and wanted is True):
        return []
    names = job.concepts or [job.concept]
    found = (word for name in names for word in named_words(job.config.forget_words, name))
    return list(dict.fromkeys(found))


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
