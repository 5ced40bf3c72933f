"""`UnlearnResult`: the erased model, the record of the run, and its Markdown report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from fasterase.config import UnlearnConfig, describe_recipe, format_yaml
from fasterase.engine.history import StepRecord
from fasterase.evaluation.evaluation import Evaluation
from fasterase.files import write_text
from fasterase.models.delta import save_delta
from fasterase.models.dual_encoder import DualEncoder
from fasterase.objective import EraseLoss
from fasterase.pairs.skips import Skip


@dataclass(frozen=True)
class UnlearnResult:
    """Result of `fasterase.unlearn`.

    Attributes:
        model: the erased model: the object that was passed in, or its copy with `copy=True`.
        history: one record per step: `step` (from 1), `total`, `forget`, `retain`, `consistency`,
            `anchor`, `lr`, `grad_norm`, `applied`, `seconds`; as keys and as attributes.
        evaluation: measurements before and after; `None` if the config asked for none.
        forgotten: whether the mean excess of matched forget cosines over `floor` is below 0.01.
        config: the configuration of the run.
        skipped: pairs that could not be read, as `(id, reason)`.
        floor: the floor of the config, or the original's mean cosine of unrelated pairs.
        excess: mean over the forget set of `max(cos - floor, 0)`.
        removed_from_retain: ids of retain pairs left out because they are also in the forget set.
        seconds: wall time of the whole call.
        encoder: `model` with its tokenizer and preprocessing, under fasterase's own interface.
        original_weights: what the run may have changed, as it was before, on the CPU.
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
    original_weights: Mapping[str, Tensor] = field(repr=False)

    def save(self, folder: str | os.PathLike[str], *, delta: bool = False) -> Path:
        """Write the erased model so that open_clip (`local-dir:`) or `from_pretrained` loads it.

        The weights are one safetensors file up to 5 GB. The folder is written atomically.

        Args:
            folder: the folder to write.
            delta: write only what changed, for `fasterase.apply_delta`; no library loads that by
                itself.

        Raises:
            InputError: `folder` holds files that fasterase did not write.
        """
        path = Path(folder)
        if delta:
            return save_delta(self.encoder, self.original_weights, path)
        self.encoder.save(path)
        return path

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Write a Markdown report: recipe, losses, forgetting, and the evaluation's table."""
        return write_text(Path(path), _format_report(self))


def _format_report(result: UnlearnResult) -> str:
    lines = [
        "# Erasure report",
        "",
        f"- forgotten: **{'yes' if result.forgotten else 'no'}** (mean excess of matched forget "
        f"cosines over the floor {result.floor:+.3f}: {result.excess:.4f}; below 0.01 counts as "
        "forgotten)",
        f"- steps: {len(result.history)}, {result.seconds:.1f} s in all",
        f"- recipe: {describe_recipe(result.config)}",
        f"- unreadable pairs skipped: {len(result.skipped)}",
        f"- retain pairs left out because they are also in the forget set: "
        f"{len(result.removed_from_retain)}",
        "",
    ]
    if result.history:
        terms = EraseLoss._fields
        lines += ["## Losses", "", "| | " + " | ".join(terms) + " |"]
        lines.append("|---" * (len(terms) + 1) + "|")
        for label, record in (
            ("first step", result.history[0]),
            ("last step", result.history[-1]),
        ):
            lines.append(f"| {label} | " + " | ".join(f"{record[t]:.4f}" for t in terms) + " |")
        lines.append("")
    if result.evaluation is not None:
        lines += ["## Evaluation", "", "```", result.evaluation.table(), "```", ""]
    lines += ["## Settings", "", "```yaml", format_yaml(result.config.to_dict()) + "```", ""]
    if result.skipped:
        lines += ["## Skipped pairs", ""]
        lines += [*(f"- {id}: {reason}" for id, reason in result.skipped), ""]
    return "\n".join(lines)
