"""`UnlearnResult`: what a run leaves in the caller's hands."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from fasterase.config import UnlearnConfig
from fasterase.engine.history import StepRecord
from fasterase.evaluation.evaluation import Evaluation
from fasterase.models.dual_encoder import DualEncoder
from fasterase.pairs.skips import Skip
from fasterase.report.run_report import run_report


@dataclass(frozen=True)
class UnlearnResult:
    """Result of `fasterase.unlearn`.

    Attributes:
        model: the object that was passed in (its copy with `copy=True`), erased.
        history: a record a step: `step` (from 1), `total`, `forget`, `retain`, `consistency`,
            `anchor`, `lr`, `grad_norm`, `applied`, `seconds`; as keys and as attributes.
        evaluation: before and after, `None` where the config asked for none.
        forgotten: whether the mean excess of matched forget cosines over `floor` is below 0.01.
        config: the active recipe.
        skipped: pairs that could not be read: `(id, reason)`.
        floor: the original's mean cosine of unrelated pairs, or the config's.
        excess: mean over the forget set of `max(cos - floor, 0)`; below 0.01 is forgotten.
        removed_from_retain: ids of retain pairs left out because they stand in the forget set too.
        seconds: wall time of the whole call.
    """

    model: nn.Module
    history: list[StepRecord]
    evaluation: Evaluation | None
    forgotten: bool
    config: UnlearnConfig
    skipped: Sequence[Skip]
    floor: float
    excess: float
    removed_from_retain: Sequence[str]
    seconds: float
    encoder: DualEncoder = field(repr=False)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the erased model: what open_clip (`local-dir:`) or `from_pretrained` loads.

        One safetensors file up to 5 GB. The folder appears whole or not at all.

        Raises:
            InputError: `folder` holds something else.
        """
        path = Path(folder)
        self.encoder.save(path)
        return path

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Write a Markdown report: recipe, losses, forgetting, and the evaluation's table."""
        file = Path(path)
        run_report(
            file,
            config=self.config,
            history=self.history,
            evaluation=self.evaluation.table() if self.evaluation else None,
            forgotten=self.forgotten,
            floor=self.floor,
            excess=self.excess,
            skipped=self.skipped,
            removed_from_retain=self.removed_from_retain,
            seconds=self.seconds,
        )
        return file
