"""What came of a run, and what it means for its user, in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fasterase.config import UnlearnConfig
from fasterase.engine.history import StepRecord
from fasterase.engine.words import Word
from fasterase.evaluation.verdict import (
    FEW_IMAGES,
    FORGOTTEN,
    NEVER_KNOWN,
    OVER_ERASED,
    UNDECIDED,
    Trace,
    describe_verdict,
)
from fasterase.models.lora import LoraAdapter
from fasterase.numerals import counted
from fasterase.report.evaluation import Evaluation

# What `tune` leaves as it is.
FROZEN_TOWER = {"image": "text", "text": "image"}

TOLD_SETS = 3  # to forget, in a line


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run."""

    history: list[StepRecord]
    floor: float  # cosine of unrelated pairs under the original
    verdict: str | None  # None if there was nothing to compare with
    traces: dict[str, Trace]  # set to forget -> what is left of it
    evaluation: Evaluation | None  # the erased model beside the original
    limit: str | None  # what kept an automatic run from forgetting: "damage", "steps" or None
    withheld_until: int | None = None  # see `Pacing`
    adapter: LoraAdapter | None = None  # what tune="lora:N" has added to the weights
    words: list[Word] = field(default_factory=list)  # whose embeddings were overwritten
    verdicts: Mapping[str, str] = field(default_factory=dict)  # set to forget -> verdict

    def figures(self) -> dict[str, float]:
        """Return `set/name` -> value of what is left of each set, and of the evaluation."""
        residues = {f"{name}/residue": trace.residue for name, trace in self.traces.items()}
        return residues | ({} if self.evaluation is None else self.evaluation.flat())


def describe_known(traces: Mapping[str, Trace], recall: tuple[int, float] | None) -> str:
    """Tell in a line what a model knows of sets to forget, and of retain (`Measurement.recall`)."""
    facts = [
        f"{counted(trace.pairs, f'{name} pair')}, residue {trace.residue:.2f}"
        for name, trace in traces.items()
    ]
    if len(facts) > TOLD_SETS:
        facts[TOLD_SETS:] = [counted(len(facts) - TOLD_SETS, "further set")]
    if recall is not None:
        facts.append(f"{counted(recall[0], 'retain pair')}, recall {100 * recall[1]:.1f} %")
    return "; ".join(facts)


def advise(outcome: Outcome, config: UnlearnConfig) -> str | None:
    """Return a warning with figures and what to do next; None if there is nothing to warn of."""
    if outcome.verdict is None:
        return (
            "no verdict: there is no retain caption that is not also a caption of the forget set, "
            "so there is nothing to tell by whether it is forgotten. Give retain pairs with other "
            "captions."
        )
    advice = "" if outcome.verdict == FORGOTTEN else f" {_next_step(outcome, config)}"
    images = outcome.traces["forget"].pairs
    if images < FEW_IMAGES and outcome.verdict != UNDECIDED:
        advice += (
            f" {counted(images, 'forget image shows', 'forget images show')} little: one picture "
            "more or less may change the verdict. Give more pictures of the concept, if only as "
            "forget_sets."
        )
    return f"{describe_verdict(outcome.verdict, outcome.traces)}.{advice}" if advice else None


def _next_step(outcome: Outcome, config: UnlearnConfig) -> str:
    steps = len(outcome.history)
    known = f"It is still known after {counted(steps, 'step')}"
    if outcome.verdict == NEVER_KNOWN:
        return (
            "The original model does not know these pairs, so there is nothing to forget"
            f"{'; it was left as it is' if not steps else ''}. Unless they were erased before, "
            "check the model, its tokenizer and preprocess, and that the captions belong to the "
            "images."
        )
    if outcome.verdict == UNDECIDED:
        open_sets = [trace for trace in outcome.traces.values() if not trace.is_decisive]
        possible = f"{100 * max(trace.hit_high for trace in open_sets):.0f} %"
        if all(trace.could_decide for trace in open_sets):
            return (
                f"Some images are still found, so that up to {possible} of such images may be. "
                "Give more pictures of the concept to forget."
            )
        return (
            "No trace was found, but too few images, or retain captions, were there to tell: up to "
            f"{possible} of such images may still be found. Give at least 12 pictures of every set "
            "to forget, and 20 different retain captions."
        )
    telling = {tower for trace in outcome.traces.values() for tower in trace.telling_towers}
    if telling and telling == {FROZEN_TOWER.get(config.tune)}:
        return (
            f"tune={config.tune!r} leaves the {telling.pop()} tower as it is, and beside the "
            "original's other tower it still finds the concept. Use tune='all'."
        )
    if outcome.verdict == OVER_ERASED:
        remedy = (
            "The pairs are less similar than unrelated ones, which shows what was erased. Train "
            "for fewer steps, with a lower lr, or with the automatic recipe (lr, epochs and floor "
            "'auto')."
        )
    elif outcome.limit == "damage":
        remedy = (
            f"Forgetting it costs kept pairs more than max_damage={config.max_damage:g} of their "
            "recall@1, or a quarter of everyday words most of their neighbours, so the weights "
            "with the least residue within that were kept. Allow more (max_damage=None allows "
            "any), or give more retain pairs close to the concept."
        )
    elif config.runs_until_forgotten:
        most = ", the most that an automatic run takes" if outcome.limit == "steps" else ""
        remedy = (
            f"{known}{most}. Give more forget pairs or larger batches, or numbers for max_steps "
            "and lr."
        )
    else:
        further = "" if config.output_dir is None else ": the run in output_dir continues"
        lr = "" if config.lr == "auto" else f", a higher lr (now {config.lr:g})"
        remedy = (
            f"{known}. Give more steps (max_steps or epochs{further}){lr} or a higher "
            f"forget_weight (now {config.forget_weight:g}); or give neither lr nor epochs nor "
            "max_steps: the run then ends once it is forgotten."
        )
    # The checkpoints of this run refuse other settings.
    other = " Other settings need another output_dir, or resume='never'."
    return remedy if config.output_dir is None else remedy + other
