"""`fasterase.unlearn` and `fasterase.evaluate`: open models and pairs, run, hand back a result."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import nn
from typing_extensions import Unpack

from fasterase.config import UnlearnConfig
from fasterase.encode import PairEncoder
from fasterase.engine.conditions import (
    check_arguments,
    check_environment,
    check_output_folder,
    check_sets,
    lock_run,
)
from fasterase.engine.history import StepRecord, tracking
from fasterase.engine.job import Job, RunClock
from fasterase.engine.model_state import (
    best_device,
    borrowed,
    placed,
    resolve_device,
    usual_defaults,
)
from fasterase.engine.outcome import advise
from fasterase.engine.run import Run
from fasterase.errors import InputError
from fasterase.evaluation.evaluator import Evaluator, Measurement
from fasterase.evaluation.examiner import Examiner, check_attacks, check_tasks
from fasterase.models.delta import fingerprint_weights, keep_original
from fasterase.models.dual_encoder import DualEncoder, separate_copy
from fasterase.models.forward import without_autocast
from fasterase.models.load import check_model_name, load_compared, load_model
from fasterase.models.preprocessing import remember
from fasterase.numerals import counted
from fasterase.overrides import Overrides
from fasterase.pairs.open import open_pairs
from fasterase.pairs.processes import count_workers
from fasterase.pairs.skips import SkipLedger
from fasterase.parallel.ranks import Ranks, join_ranks, launched_device
from fasterase.progress import say, speaking
from fasterase.provenance import audit, erasures, read_record
from fasterase.report.evaluation import Evaluation, compare
from fasterase.result import UnlearnResult
from fasterase.sets import clean_retain, open_sets
from fasterase.signals import explaining_interrupts, handling_signals, how_to_continue

NO_SETS: Mapping[str, Any] = MappingProxyType({})
WRITING_SECONDS = 10.0  # what is written sooner is not worth a line
Model = nn.Module | str | os.PathLike[str] | DualEncoder


def unlearn(
    model: nn.Module | str | os.PathLike[str],
    forget: Any,
    retain: Any,
    *,
    config: UnlearnConfig | None = None,
    tokenizer: Any = None,
    preprocess: Any = None,
    model_name: str | None = None,
    holdout: Any = None,
    sets: Mapping[str, Any] | None = None,
    forget_sets: Mapping[str, Any] | None = None,
    concept: str | None = None,
    request: str | None = None,
    image_key: str | None = None,
    text_key: str | None = None,
    callback: Callable[[StepRecord], object] | None = None,
    copy: bool = False,
    **overrides: Unpack[Overrides],
) -> UnlearnResult:
    """Make `model` forget the associations of the `forget` pairs and keep the rest (CLIPErase).

    Minimises `forget_weight L_F + retain_weight L_R + consistency_weight L_C + anchor_weight L_A`
    (Yang et al., CLIPErase, ACL 2025, and our floor, cross terms and anchor: see `erase_loss`)
    over both towers, and changes the weights in place. By default the run ends once the concept is
    forgotten (`result.verdict`), within a budget of steps and of damage to everything else; a model
    that does not know the pairs is left as it is. Any verdict but "forgotten" warns.

    In several processes (torchrun, the deepspeed launcher, or a process group that exists already)
    every one makes the same call. They divide each batch among themselves, and all get the same
    result; the first one writes files, warns and shows progress. See docs/processes.md.

    Args:
        model: an open_clip model; a transformers `CLIPModel`, `SiglipModel` or `Siglip2Model`; or a
            string: `"ViT-B-32/laion2b_s34b_b79k"` (open_clip name/tag), `"hf-hub:org/name"`
            (open_clip), `"hf:org/name"` (transformers), a folder that either library or
            `result.save` wrote, or an open_clip checkpoint file. Parameters that do not require a
            gradient are never trained; of a `PeftModel` only the adapters are. For SigLIP the
            softmax objective acts on its similarities; logit_bias is left alone.
        forget: pairs whose association is erased, in any form of docs/inputs.md: a map-style
            dataset, a DataLoader (its dataset is taken), an iterable of `(image, text)` pairs, of
            dicts or of batches; a table, a folder, tars; what `fasterase.split` returned. An image
            that is a float tensor (3, H, W) counts as preprocessed; a text is a str, a list of str
            of which one is drawn each time, or token ids. Of several concepts a mapping, name ->
            pairs: each has a floor, an equal part of every batch, a verdict and a row of its own,
            weighs more the slower it goes, and the run ends when each is forgotten.
        retain: pairs to keep. Pairs that are also in `forget` are left out, with a warning. An
            empty set needs numbers for lr and epochs (or max_steps), and gives no verdict.
        config: settings; `overrides` are fields of it by name.
        tokenizer, preprocess: the model's own, if it does not carry them; a transformers processor
            gives both. They stay with the result: `unlearn(result.model, ...)` finds them.
        model_name: open_clip's name for the architecture of an instance (for its tokenizer and
            `save`) or of a checkpoint file.
        holdout: pairs in neither set, only measured.
        sets: name -> further pairs that should be kept (similar things, another data set), only
            measured.
        forget_sets: name -> further pairs that should be forgotten as well (unseen pictures, other
            wordings), only measured; the verdict is the worst over all of them.
        concept: what is forgotten, in words, such as "octopus": `forget_words` takes its meaning,
            and the report, the model card and the provenance name it. None: the names of a mapping.
        request: the removal request that is honoured, such as "REQ-17", for the report's record and
            the provenance.
        image_key, text_key: columns of tables, keys of dicts and fields of tar samples.
        callback: called after each step with its record; returning True ends the run cleanly.
        copy: work on a deep copy and leave `model` alone.
        overrides: fields of `UnlearnConfig`, such as `lr=1e-5` or `output_dir="erased"`.

    Returns:
        The result, whose `.model` is the object passed in.

    Raises:
        InputError: an argument is not usable; the model is untouched. If too many pairs turn out
            to be unreadable during training, the model keeps the weights of the last step.
        ResumeError: `output_dir` holds a checkpoint of another run, of more steps than are asked
            for, or an unreadable one; or `resume="must"` and there is none.
        DiskFullError: there was no room for a file; the last checkpoint is kept.
        NonFiniteError: the loss stayed non-finite; the model holds the last good weights.
        PreemptedError: SIGTERM or SIGUSR1 arrived; a training step was finished and, with an
            `output_dir`, saved. The same call continues. A second signal does not wait for it.
        fasterase.errors.LostRankError: another process of the run ended, or fell silent.
        KeyboardInterrupt: Ctrl-C; likewise. The message says how to go on.
    """
    arguments = dict(locals())
    clock = RunClock()
    check_arguments(config, callback, concept, request)
    config = (config or UnlearnConfig()).replace(**overrides)
    check_environment(config)
    output = None if config.output_dir is None else Path(config.output_dir)
    with (
        handling_signals(),
        explaining_interrupts(lambda: how_to_continue(output)),
        usual_defaults(),
        join_ranks(alone_too=config.deepspeed is not None) as ranks,
    ):
        if ranks.heartbeat is not None:
            ranks.heartbeat.limit = config.rank_timeout
        if not ranks.is_first:
            config = config.replace(progress=False, report_to=None)
        ranks.on_first(lambda: check_output_folder(output))
        with _warning(ranks), speaking(config.progress):
            parent_record = read_record(model)
            given = {"tokenizer": tokenizer, "preprocess": preprocess, "model_name": model_name}
            keys = {"image_key": image_key, "text_key": text_key}
            with ranks.raising_together():
                encoder, home = _load(model, given, copy=copy)
                found = open_sets(forget, retain, holdout, sets, forget_sets, keys)
                check_sets(found.tables["retain"], found.concepts, config)
                earlier = erasures(parent_record) if parent_record else []
                removed = clean_retain(found, earlier, links=config.erases_link)
            device = resolve_device(config.device, default=home)
            # Refuses a wrong `tune`, before minutes of measuring.
            scale, buffers = config.train_logit_scale, config.train_mode
            weights = keep_original(encoder, config.tune, logit_scale=scale, buffers=buffers)
            total = sum(map(len, found.tables.values()))
            job = Job(
                model=encoder,
                sets=found.tables,
                forget_sets=found.to_forget,
                config=config,
                ledger=SkipLedger(total, max_skipped=config.max_skipped),
                clock=clock,
                output=output,
                callback=callback,
                ranks=ranks,
                concept=concept or ", ".join(found.concepts) or None,
                concepts=found.concepts,
                request=request,
                arguments=arguments,
            )
            # Not before: a call with a wrong argument leaves no folder behind.
            with ranks.first_enters(lambda: lock_run(output)):
                result = _run(
                    job,
                    device,
                    removed_from_retain=removed,
                    original_weights=weights,
                    parent_record=parent_record,
                )
                with ranks.raising_together():
                    if output is not None and ranks.is_first:
                        _write_output(result, output)
            return result


def _write_output(result: UnlearnResult, output: Path) -> None:
    began = time.monotonic()
    result.write_output(output)
    say("model and report written", since=began, least=WRITING_SECONDS)


def _load(model: Model, given: dict[str, Any], *, copy: bool) -> tuple[DualEncoder, torch.device]:
    """Return the model to train, and the device that it is on or, by name, should be on."""
    # Weights loaded or copied inside a caller's inference mode could never be trained.
    with torch.inference_mode(False):
        encoder = load_model(model, **given)
        if isinstance(model, str | os.PathLike):
            return encoder, launched_device() or best_device()
        return separate_copy(encoder) if copy else encoder, encoder.device


def _run(job: Job, device: torch.device, **known: Any) -> UnlearnResult:
    """Make the run of a job on a device, tell trackers, and warn of what the user should know.

    `known` are the fields of the result that are known before.
    """
    encoder, config = job.model, job.config
    # A caller's no_grad or inference mode would train nothing, silently; autocast would round.
    with (
        tracking(config) as tracker,
        without_autocast(),
        torch.inference_mode(False),
        torch.enable_grad(),
        borrowed(
            encoder, device=device, activation_checkpointing=config.activation_checkpointing
        ) as round_weights,
    ):
        followed = replace(job, callback=tracker.followed_by(job.callback))
        outcome = Run(followed, round_weights=round_weights).erase()
        tracker.summarise(outcome.figures())
    if job.ranks.world_size > 1:
        hours = job.clock.seconds() * job.ranks.world_size / 3600
        unit = "GPU" if device.type == "cuda" else "process"
        say(f"{job.ranks.world_size} processes, {hours:.2f} {unit}-hours")
    advice = advise(outcome, config)
    if advice is not None:
        warnings.warn(advice, stacklevel=3)
    remember(encoder.module, encoder.companions)
    found = {name: value for name, value in vars(outcome).items() if name != "limit"}
    return UnlearnResult(
        model=encoder.given,
        encoder=encoder,
        config=config,
        skipped=job.ledger.skips,
        seconds=job.clock.seconds(),
        sets=job.sets,
        concept=job.concept,
        concepts=list(job.concepts),
        request=job.request,
        **found,
        **known,
    )


@contextmanager
def _warning(ranks: Ranks) -> Iterator[None]:
    """Let the first rank alone warn: all of them find the same."""
    if ranks.is_first:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def evaluate(
    model: Model,
    forget: Any,
    retain: Any,
    *,
    sets: Mapping[str, Any] = NO_SETS,
    forget_sets: Mapping[str, Any] = NO_SETS,
    holdout: Any = None,
    original: Model | None = None,
    references: Mapping[str, Model] = NO_SETS,
    class_names: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    tasks: Sequence[str] = (),
    attacks: Sequence[str] = (),
    non_members: Any = None,
    max_pairs: int | None = 5000,
    seed: int = 0,
    tokenizer: Any = None,
    preprocess: Any = None,
    model_name: str | None = None,
    image_key: str | None = None,
    text_key: str | None = None,
    device: str | None = None,
    num_workers: int | Literal["auto"] = 0,
    progress: bool = True,
) -> Evaluation:
    """Measure how well a model still knows the pairs to forget, and all others.

    On every set: zero-shot accuracy (where classes are known), image->text and text->image
    recall@1/5/10, image->image recall@1, concept hit@1/5 (an image's first captions hold any
    caption of the forget set), median rank of the true caption and mean matched cosine; each with
    a 95 % interval over pairs (Wilson's for shares, else from 1,000 bootstrap resamples) and its
    chance level. On sets to forget also the residues behind the verdict (see
    `fasterase.evaluation.verdict`).

    image->text ranks among the distinct first captions of all sets together, so that numbers
    compare across sets; any caption of the pair that is among them counts as right. text->image of
    a set ranks among its own images and the retain set's; any image with that caption is right.
    image->image ranks the other ones of these; right are those of the image's class, or else with
    its first caption, and images without any such other do not count. text->old image, if there is
    an `original`, ranks among its features of the same images: what an image index finds that is
    not rebuilt after erasing. Ties count as a random order would break them.

    Args:
        model: the model to measure, or a name or folder of one; see `fasterase.unlearn`.
        forget, retain, sets, forget_sets, holdout, image_key, text_key: the pairs, as
            `fasterase.unlearn` takes them.
        original: the model before erasing, measured on the same pairs beside `model`.
        references: name -> further models for comparison (retrained, fine-tuned on retain).
        class_names: classes of the zero-shot accuracy, kept ones too. None: the classes that the
            sources carry (class-per-folder), if any.
        templates: prompts with `{}` for the class name. None: "a photo of a {}.".
        tasks: what models are used for, on every set and model here (docs/attacks.md):
            "zero_shot", "retrieval", "image_retrieval", "linear_probe", "prototypes" and
            "paraphrases".
        attacks: attempts to bring the concept back, run on every model here (docs/attacks.md):
            "swap" looks for it with the original's image tower and the model's text tower, and the
            reverse; "probe" tries to tell its images from others by their features alone;
            "quantise" judges the model again with 8- and 4-bit weights; "relearn" fine-tunes
            copies of it on a few forget pairs and looks for all others, with made-up words as a
            control; "prompt" searches for words that find its images; "membership" tells the pairs
            to forget from `non_members` by their similarity.
        non_members: pairs of the same source that no model here was trained on.
        max_pairs: maximum number of pairs measured per set, drawn with `seed`; None measures all.
        seed: seed of the draw and of the bootstrap.
        tokenizer, preprocess: used for every model here; see `fasterase.unlearn`.
        model_name: open_clip's name for the architecture of every instance and checkpoint file
            here; see `fasterase.unlearn`. Models given by name or folder say it themselves.
        device: where to measure, such as `"cuda:0"`; a model passed in is moved back afterwards.
            None: where the model is, or the best available device for one given by name.
        num_workers: processes that load and decode pairs; see `UnlearnConfig`.
        progress: say how far it is.

    Pairs that cannot be read are left out for all models, and named in a warning. A model given by
    the folder that `result.save` wrote is compared with its record, in `evaluation.audit`, and
    measured as the run did: `retain` goes without pictures to forget (of a link: with a caption to
    forget) and without pairs that were erased before, which become sets to forget.

    Raises:
        InputError: an argument is unusable; the message names it.
        MissingExtraError: a task or an attack needs a package that is not installed (extra `eval`).
    """
    tasks = check_tasks(tasks)
    has_strangers = non_members is not None
    attacks = check_attacks(attacks, original=original is not None, non_members=has_strangers)
    keys: dict[str, Any] = {"image_key": image_key, "text_key": text_key}
    with speaking(progress):
        opened = open_sets(forget, retain, holdout, sets, forget_sets, keys)
        strangers = None
        if non_members is not None:
            strangers = open_pairs(non_members, name="non_members", **keys)
        record = read_record(model)
        if record is not None:
            links = record.get("config", {}).get("erase") == "link"
            clean_retain(opened, erasures(record)[:-1], links=links, may_vanish=True)
    sources = opened.tables
    if not len(sources["retain"]):
        raise InputError("`retain` is empty; a verdict needs pairs to keep, to compare with.")
    _check_references(references)
    check_model_name(model_name, [model, original, *references.values()])
    workers = count_workers(num_workers)
    evaluator = Evaluator(
        sources,
        forget_sets=opened.to_forget,
        max_pairs=max_pairs,
        seed=seed,
        class_names=class_names,
        templates=templates,
    )
    examiner = Examiner(evaluator, tasks=tasks, attacks=attacks, non_members=strangers)
    ledger = SkipLedger(sum(map(len, sources.values())), max_skipped=1.0)

    models: dict[str, Model] = {} if original is None else {"original": original}
    models |= {"model": model, **references}
    given = {"tokenizer": tokenizer, "preprocess": preprocess, "model_name": model_name}
    encoding = {"ledger": ledger, "num_workers": workers, "progress": progress}
    with (
        handling_signals(),
        explaining_interrupts(lambda: "Nothing was measured; make the same call again."),
        usual_defaults(),
        without_autocast(),
        torch.inference_mode(False),
        torch.no_grad(),
        speaking(progress),
    ):
        began = time.monotonic()
        measured, fingerprint = _measure_models(
            models, evaluator, examiner, given, encoding, device=device, audited=record is not None
        )
        pairs = sum(len(evaluator.rows(name)) for name in evaluator.sources)
        say(f"measured: {', '.join(models)}, on {counted(pairs, 'pair')}", since=began)
        evaluation = compare(
            evaluator,
            measured.pop("model"),
            original=measured.pop("original", None),
            references=measured,
            examiner=examiner,
        )
    if record is None:
        return evaluation
    return audit(evaluation, record, fingerprint=fingerprint, sets=sources)


def _measure_models(
    models: Mapping[str, Model],
    evaluator: Evaluator,
    examiner: Examiner,
    given: dict[str, Any],
    encoding: dict[str, Any],
    *,
    device: str | None,
    audited: bool,
) -> tuple[dict[str, Measurement], str]:
    """Measure one model at a time, so that of those given by name only one is in memory.

    Return also the fingerprint of "model", if it is to be audited.
    """
    # A model that cannot be loaded is told of now, not after minutes of measuring the others.
    for name in list(models)[1:]:
        if isinstance(models[name], (str, os.PathLike)):
            load_compared(name, models[name], **given)
    measured: dict[str, Measurement] = {}
    fingerprint = ""
    for name, model in models.items():
        encoder = load_compared(name, model, **given)
        default = best_device() if isinstance(model, (str, os.PathLike)) else encoder.device
        with placed(encoder, device=resolve_device(device, default=default)):
            pairs = PairEncoder(encoder, **encoding)
            features = evaluator.encode(pairs)
            if name == "original":
                evaluator.judge.calibrate(pairs, features)
            before = measured.get("original")
            is_compared = "original" in models and name in ("original", "model")
            measured[name] = evaluator.measure(
                pairs, features, original=before, with_things=is_compared
            )
            examiner.examine(name, pairs, features)
            if name == "model" and audited:
                fingerprint = fingerprint_weights(encoder.module)
        del encoder, pairs, features
    return measured, fingerprint


def _check_references(references: object) -> None:
    if not isinstance(references, Mapping):
        raise InputError(f"references must map names to models, found {type(references).__name__}.")
    for name in references:
        if not isinstance(name, str) or name in ("", "model", "original"):
            raise InputError(
                f"references: {name!r} cannot name a further model. Choose another name; "
                "the original has its own argument."
            )
