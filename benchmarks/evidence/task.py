"""What every method gets: a model, the demo's sets, and the engine to train with."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fasterase
from fasterase.config import UnlearnConfig
from fasterase.demo.run import recipe_config
from fasterase.demo.sets import DemoSets
from fasterase.models.dual_encoder import DualEncoder
from fasterase.report.evaluation import Evaluation

Setting = Mapping[str, Any]
# The sets of the demo, by what a method should do to them.
FORGET_SETS = ("forget", "forget-unseen")
KEEP_SETS = ("retain", "neighbour", "holdout")
# Metrics of either kind.
HIT, RECALL = "concept_hit@1", "image_to_text_recall@1"


@dataclass(frozen=True)
class Task:
    """One erasure to be carried out."""

    model: DualEncoder  # the model, to be changed in place
    sets: DemoSets  # the pairs; a method uses forget and retain alone
    seed: int  # of everything random
    # To be called with the number of steps taken wherever the model may be judged.
    measure: Callable[[int], None]


@dataclass(frozen=True)
class Method:
    """A way to forget."""

    title: str  # its name in tables
    source: str  # where it comes from
    erase: Callable[[Task, Setting], None]  # carries out a task with a setting
    # Those tried on the validation concepts; one alone is taken as it is.
    settings: Sequence[Setting]
    most_seeds: int | None = None  # of a finalist; None: as many as asked for


def train(
    task: Task, config: UnlearnConfig, *, forget: Any, retain: Any, measured_at: Sequence[int] = ()
) -> int:
    """Train the task's model with the library's engine; return the number of steps taken."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "verdict: ")  # the model is judged by the measurements
        result = fasterase.unlearn(
            task.model.module,
            forget,
            retain,
            config=config.replace(seed=task.seed, progress=False),
            tokenizer=task.model.text_tokenizer,
            callback=lambda record: (
                task.measure(record.step) if record.step in measured_at else None
            ),
        )
    return len(result.history)


def plain_config(**fields: Any) -> UnlearnConfig:
    """Return the paper's recipe for the demo's model with `fields`: no floor, no augmenting."""
    return recipe_config("cliperase", small_model=True, **fields)


def keep_evaluation(path: Path, measure: Callable[[], Evaluation]) -> Evaluation:
    """Return the evaluation in a file; where there is none, it is measured first."""
    if not path.is_file():
        measure().to_json(path)
    return Evaluation.from_json(path)
