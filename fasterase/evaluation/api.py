"""`fasterase.evaluate`: models and pair sets of any accepted form to one Evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from types import MappingProxyType
from typing import Any

from torch import nn

from fasterase.errors import InputError
from fasterase.evaluation.evaluation import Evaluation
from fasterase.evaluation.evaluator import Evaluator
from fasterase.models.dual_encoder import DualEncoder
from fasterase.models.load import load_model
from fasterase.pairs.open import open_pairs
from fasterase.pairs.skips import SkipLedger
from fasterase.pairs.source import PairSource

Model = nn.Module | str | PathLike[str] | DualEncoder

NONE: Mapping[str, Any] = MappingProxyType({})


def evaluate(
    model: Model,
    forget: Any,
    retain: Any,
    *,
    sets: Mapping[str, Any] = NONE,
    holdout: Any = None,
    original: Model | None = None,
    references: Mapping[str, Model] = NONE,
    class_names: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    attacks: Sequence[str] = (),
    max_pairs: int | None = 5000,
    seed: int = 0,
    tokenizer: Any = None,
    preprocess: Any = None,
) -> Evaluation:
    """Measure what a model knows of the pairs to forget and of all others.

    On every set: zero-shot accuracy (where classes are known), image->text and text->image
    recall@1/5/10, concept hit@1/5 (an image's first captions hold any caption of the forget set),
    median rank of the true caption and mean matched cosine; each with a 95 % percentile-bootstrap
    interval over pairs (1,000 resamples) and its chance level.

    image->text ranks among the distinct first captions of all sets together, so that numbers
    compare across sets; any caption of the pair that is among them counts as right. text->image of
    a set ranks among its own images and the retain set's; any image with that caption is right.
    Ties count as a random order would break them.

    Args:
        model: the model to measure, or a name or folder of one; see `fasterase.unlearn`.
        forget: pairs to forget, in any form that `fasterase.unlearn` takes.
        retain: pairs to keep.
        sets: name -> further pairs. Names that start with "forget" (forget-unseen) should be
            forgotten, all others kept.
        holdout: pairs in neither set, reported as "holdout".
        original: the model before erasing, measured on the same pairs beside `model`.
        references: name -> further models for comparison (retrained, fine-tuned on retain).
        class_names: classes of the zero-shot accuracy, kept ones too. None: the classes that the
            sources carry (class-per-folder), if any.
        templates: prompts with `{}` for the class name. None: "a photo of a {}.".
        attacks: none are known yet; anything but an empty sequence is an error.
        max_pairs: pairs measured of each set, drawn by `seed` where it has more. None: all.
        seed: of that drawing and of the bootstrap.
        tokenizer: for string captions, used for every model here; see `fasterase.unlearn`.
        preprocess: from image to tensor, likewise.

    Pairs that cannot be read are left out for all models, and named in a warning.

    Raises:
        InputError: an argument is unusable; the message names it.
    """
    if attacks:
        raise InputError(f"attacks={attacks!r}: none are known yet. Leave `attacks` empty.")
    sources = _open_sets(forget, retain, holdout, sets)
    others = _named_models(original, references)
    evaluator = Evaluator(
        sources, max_pairs=max_pairs, seed=seed, class_names=class_names, templates=templates
    )
    measured = evaluator.measure(_tower("model", model, tokenizer, preprocess))
    # One at a time, so that of models given by name only one is in memory.
    compared = {
        name: evaluator.measure(_tower(name, other, tokenizer, preprocess))
        for name, other in others.items()
    }
    if evaluator.skipped:
        ledger = SkipLedger(sum(map(len, sources.values())), max_skipped=1.0)
        ledger.add((), evaluator.skipped)
        ledger.warn()
    return evaluator.compare(measured, original=compared.pop("original", None), references=compared)


def _open_sets(
    forget: Any, retain: Any, holdout: Any, sets: Mapping[str, Any]
) -> dict[str, PairSource]:
    given = {"forget": forget, "retain": retain}
    if holdout is not None:
        given["holdout"] = holdout
    if not isinstance(sets, Mapping):
        raise InputError(f"sets must map names to pairs, found {type(sets).__name__}.")
    for name, source in sets.items():
        if not isinstance(name, str) or not name.strip():
            raise InputError(f"sets: {name!r} is not a name.")
        if name in ("forget", "retain", "holdout"):
            raise InputError(f"sets: {name!r} is an argument of its own. Choose another name.")
        given[name] = source
    return {name: open_pairs(source, name=name) for name, source in given.items()}


def _named_models(original: Model | None, references: Mapping[str, Model]) -> dict[str, Model]:
    if not isinstance(references, Mapping):
        raise InputError(f"references must map names to models, found {type(references).__name__}.")
    for name in references:
        if not isinstance(name, str) or name in ("", "model", "original"):
            raise InputError(
                f"references: {name!r} cannot name a further model. Choose another name; "
                "the original has its own argument."
            )
    return {**({} if original is None else {"original": original}), **references}


def _tower(name: str, model: Model, tokenizer: Any, preprocess: Any) -> DualEncoder:
    if isinstance(model, DualEncoder):
        return model
    try:
        return load_model(model, tokenizer=tokenizer, preprocess=preprocess)
    except InputError as error:
        if name == "model":
            raise
        argument = name if name == "original" else f"references[{name!r}]"
        raise type(error)(f"{argument}: {error}") from error
