"""What a run's verdict means for its user, in words: the figures, and what to do next."""

from __future__ import annotations

from fasterase.config import UnlearnConfig
from fasterase.engine.erase import Outcome
from fasterase.evaluation.verdict import (
    FEW_IMAGES,
    FORGOTTEN,
    NEVER_KNOWN,
    OVER_ERASED,
    describe_verdict,
)


def advise(outcome: Outcome, config: UnlearnConfig) -> str | None:
    """Return a warning of any verdict but "forgotten", of none, and of one that few images show.

    None if there is nothing to warn of.
    """
    if outcome.verdict is None:
        return (
            "no verdict: there is no retain caption that is not also a caption of the forget set, "
            "so there is nothing to tell by whether it is forgotten. Give retain pairs with other "
            "captions."
        )
    advice = "" if outcome.verdict == FORGOTTEN else f" {_next_step(outcome, config)}"
    images = outcome.traces["forget"].pairs
    if images < FEW_IMAGES:
        advice += (
            f" {images} forget image{' shows' if images == 1 else 's show'} little: one picture "
            "more or less may change the verdict. Give more pictures of the concept, if only as "
            "forget_sets."
        )
    return f"{describe_verdict(outcome.verdict, outcome.traces)}.{advice}" if advice else None


def _next_step(outcome: Outcome, config: UnlearnConfig) -> str:
    steps = len(outcome.history)
    if outcome.verdict == NEVER_KNOWN:
        return (
            "The original model does not know these pairs, so there is nothing to forget"
            f"{'; it was left as it is' if not steps else ''}. Unless they were erased before, "
            "check the model, its tokenizer and preprocess, and that the captions belong to the "
            "images."
        )
    return f"{_remedy(outcome, config, steps)}{_where(config)}"


def _remedy(outcome: Outcome, config: UnlearnConfig, steps: int) -> str:
    known = f"It is still known after {steps} step{'' if steps == 1 else 's'}"
    if outcome.verdict == OVER_ERASED:
        return (
            "The pairs are less similar than unrelated ones, which shows what was erased. Train "
            "for fewer steps, with a lower lr, or with the automatic recipe (lr, epochs and floor "
            "'auto')."
        )
    if outcome.limit == "damage":
        return (
            f"Forgetting it costs kept pairs more than max_damage={config.max_damage:g} of their "
            "recall@1, so the weights with the least residue within it were kept. Allow more "
            "(max_damage=None allows any), or give more retain pairs close to the concept."
        )
    if config.runs_until_forgotten:
        most = ", the most that an automatic run takes" if outcome.limit == "steps" else ""
        return (
            f"{known}{most}. Give more forget pairs or larger "
            "batches, or numbers for max_steps and lr."
        )
    further = "" if config.output_dir is None else ": the run in output_dir continues"
    lr = "" if config.lr == "auto" else f", a higher lr (now {config.lr:g})"
    return (
        f"{known}. Give more steps (max_steps or epochs{further})"
        f"{lr} or a higher forget_weight (now {config.forget_weight:g}); or give neither lr nor "
        "epochs nor max_steps: the run then ends once it is forgotten."
    )


def _where(config: UnlearnConfig) -> str:
    """Say where a run with other settings can go: checkpoints of this one refuse them."""
    if config.output_dir is None:
        return ""
    return " Other settings need another output_dir, or resume='never'."
