"""`fasterase.unlearn`: wires models, pairs, engine and evaluation, and decides nothing else."""

from __future__ import annotations

import copy as copying
import logging
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from fasterase.config import UnlearnConfig, describe_recipe
from fasterase.engine.erase import FORGOTTEN_EXCESS, Outcome, erase
from fasterase.engine.history import StepRecord
from fasterase.engine.model_state import best_device, borrowed, resolve_device
from fasterase.engine.settings import check_environment
from fasterase.errors import InputError
from fasterase.evaluation.evaluator import Evaluator, Measurement
from fasterase.files import check_replaceable
from fasterase.models.dual_encoder import DualEncoder
from fasterase.models.load import load_model
from fasterase.pairs.open import open_pairs
from fasterase.pairs.prepare import Preparer
from fasterase.pairs.skips import SkipLedger
from fasterase.pairs.source import PairSource
from fasterase.pairs.split import remove_overlap
from fasterase.result import UnlearnResult

log = logging.getLogger(__name__)


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
    image_key: str | None = None,
    text_key: str | None = None,
    callback: Callable[[StepRecord], object] | None = None,
    copy: bool = False,
    **overrides: Any,
) -> UnlearnResult:
    """Make `model` forget the associations of the `forget` pairs and keep the rest (CLIPErase).

    Minimises `forget_weight L_F + retain_weight L_R + consistency_weight L_C + anchor_weight L_A`
    (Yang et al., CLIPErase, ACL 2025, and our floor and anchor; see `fasterase.erase_loss`) over
    both towers, and changes the weights in place.

    Args:
        model: an open_clip model; a transformers `CLIPModel`, `SiglipModel` or `Siglip2Model`; or a
            string: `"ViT-B-32/laion2b_s34b_b79k"` (open_clip name/tag), `"hf-hub:org/name"`
            (open_clip), `"hf:org/name"` (transformers), or a folder that either library or
            `result.save` wrote. For SigLIP the softmax objective acts on its similarities;
            logit_bias is left alone.
        forget: pairs whose association goes. A map-style dataset, a DataLoader (its dataset is
            taken), an iterable of `(image, text)` pairs, `{"image", "text"}` or
            `{"pixel_values", "input_ids"}` dicts or batches of these; a CSV/TSV/JSONL path; a
            class-per-folder directory; a folder of `x.jpg` + `x.txt`; a WebDataset pattern; what
            `fasterase.split` returned. An image that is a float tensor (3, H, W) counts as
            preprocessed; a text is a str, a list of str of which one is drawn each time, or token
            ids.
        retain: pairs to keep. Those that also stand in `forget` are left out, with a warning.
        config: settings; `overrides` are fields of it by name.
        tokenizer, preprocess: of the model, where it does not carry its own.
        model_name: architecture of an open_clip instance, for its tokenizer and `save`.
        holdout: pairs in neither set, for the evaluation only.
        image_key, text_key: columns of tables, keys of dicts and fields of tar samples.
        callback: called after each step with its record; returning True ends the run cleanly.
        copy: work on a deep copy and leave `model` alone.
        overrides: fields of `UnlearnConfig`, such as `lr=1e-5` or `output_dir="erased"`.

    Returns:
        The result, whose `.model` is the object passed in.

    Raises:
        InputError: an argument is not usable; the model is untouched.
        ResumeError: `output_dir` holds a checkpoint of another run.
        NonFiniteError: the loss stayed non-finite; the model holds the last good weights.
        PreemptedError: SIGTERM arrived; a checkpoint was written.
    """
    started = time.perf_counter()
    _check_arguments(config, callback)
    settings = (config or UnlearnConfig()).replace(**overrides)
    check_environment(settings)
    output = _output_folder(settings)
    named = isinstance(model, (str, os.PathLike))
    # What is loaded or copied inside a caller's inference mode could never be trained.
    with torch.inference_mode(False):
        tower = load_model(model, tokenizer=tokenizer, preprocess=preprocess, model_name=model_name)
        if copy and not named:
            tower = copying.copy(tower)
            tower.module = copying.deepcopy(tower.module)
    device = resolve_device(settings.device, default=best_device() if named else tower.device)

    sets = {
        name: open_pairs(source, name=name, image_key=image_key, text_key=text_key)
        for name, source in (("forget", forget), ("retain", retain), ("holdout", holdout))
        if source is not None or name != "holdout"
    }
    sets["retain"], removed = remove_overlap(sets["retain"], sets["forget"])
    _warn_overlap(removed)
    ledger = SkipLedger(sum(map(len, sets.values())), max_skipped=settings.max_skipped)
    prepare = Preparer(
        tower.image_transform,
        tower.text_tokenizer,
        image_size=tower.image_size,
        context_length=tower.context_length,
        vocab_size=tower.vocab_size,
    )
    if settings.progress:
        tqdm.write(f"fasterase: erasing from {tower.name}; recipe: {describe_recipe(settings)}")

    tower.trainable(settings.tune)  # refuses a wrong `tune` before minutes of measuring
    evaluator = _evaluator(sets, settings)
    # A caller's no_grad or inference mode would train nothing without a word.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        borrowed(tower, device=device) as state,
    ):
        original = _measured(evaluator, tower, ledger) if evaluator else None
        outcome = erase(
            tower,
            sets["forget"],
            sets["retain"],
            prepare,
            ledger,
            state=state,
            settings=settings,
            output_dir=output,
            callback=callback,
        )
        evaluation = None
        if evaluator and original:
            evaluation = evaluator.compare(evaluator.measure(tower), original=original)
    _warn_not_forgotten(outcome, settings)
    result = UnlearnResult(
        model=tower.module,
        history=outcome.history,
        evaluation=evaluation,
        forgotten=outcome.forgotten,
        config=settings,
        skipped=ledger.skips,
        floor=outcome.floor,
        excess=outcome.excess,
        removed_from_retain=removed,
        seconds=time.perf_counter() - started,
        tower=tower,
    )
    if output is not None:
        _write(result, output)
    return result


def _check_arguments(config: object, callback: object) -> None:
    if not isinstance(config, UnlearnConfig | None):
        raise InputError(
            f"config: expected an UnlearnConfig, found {type(config).__name__}. Use "
            "UnlearnConfig(**fields) or UnlearnConfig.from_yaml(path)."
        )
    if callback is not None and not callable(callback):
        raise InputError(
            f"callback: expected a function of the step's record, found {type(callback).__name__}."
        )


def _output_folder(settings: UnlearnConfig) -> Path | None:
    """`output_dir`, made; refused now where the result could not be written hours later."""
    if settings.output_dir is None:
        return None
    output = Path(settings.output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"output_dir: {output} cannot be made a folder ({error.strerror}). Give another path."
        ) from error
    check_replaceable(output / "model")
    return output


def _evaluator(sets: dict[str, PairSource], settings: UnlearnConfig) -> Evaluator | None:
    if settings.evaluation is None:
        return None
    return Evaluator(
        sets,
        seed=settings.seed,
        quick=settings.evaluation == "quick",
        num_workers=settings.num_workers,
    )


def _measured(evaluator: Evaluator, tower: DualEncoder, ledger: SkipLedger) -> Measurement:
    """The original measured; what could not be read, of a holdout set too, counts as skipped."""
    measured = evaluator.measure(tower)
    read = (id for scores in measured.sets.values() for id in scores.ids)
    ledger.add(read, evaluator.skipped)
    ledger.warn()
    return measured


def _warn_overlap(removed: list[str]) -> None:
    if removed:
        shown = ", ".join(removed[:5]) + (", ..." if len(removed) > 5 else "")
        warnings.warn(
            f"{len(removed)} retain pairs also stand in the forget set and are left out of retain, "
            f"since they would undo the erasure: {shown}",
            stacklevel=3,
        )


def _warn_not_forgotten(outcome: Outcome, settings: UnlearnConfig) -> None:
    if not outcome.forgotten:
        warnings.warn(
            f"not forgotten: the forget pairs' cosines are on average {outcome.excess:.3f} above "
            f"the floor {outcome.floor:+.3f} after {len(outcome.history)} steps (below "
            f"{FORGOTTEN_EXCESS} counts as forgotten). Train longer (max_steps or epochs), or "
            f"raise lr (now {settings.lr:g}) or forget_weight (now {settings.forget_weight:g}).",
            stacklevel=3,
        )


def _write(result: UnlearnResult, output: Path) -> None:
    result.save(output / "model")
    if result.evaluation is not None:
        result.evaluation.to_json(output / "evaluation.json")
    result.report(output / "report.md")
