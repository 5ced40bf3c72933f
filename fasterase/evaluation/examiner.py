"""Run the chosen tasks and attacks on each model, and put their figures side by side."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from fasterase.encode import PairEncoder, PairFeatures
from fasterase.errors import InputError
from fasterase.evaluation.attacks.table import ATTACKS
from fasterase.evaluation.evaluator import Evaluator
from fasterase.evaluation.features import sampled_rows
from fasterase.evaluation.figures import Figure, Figures
from fasterase.evaluation.target import Target
from fasterase.evaluation.tasks.table import TASKS
from fasterase.pairs.table import PairTable
from fasterase.report.curves import Series


class Examiner:
    """Runs tasks and attacks on models one after the other: the original first, if there is one.

    Args:
        tasks, attacks: names, checked.
        evaluator: has measured, or will measure, the models on its pairs.
        non_members: pairs that no model was trained on; as many as the evaluator measures of a set.

    Raises:
        InputError: no retain pair is unrelated to the sets to forget.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        *,
        tasks: Sequence[str] = (),
        attacks: Sequence[str] = (),
        non_members: PairTable | None = None,
    ) -> None:
        if attacks and not evaluator.judge.rows:
            raise InputError(
                "attacks: every caption of `retain` is also one to forget, so there is nothing to "
                "compare with. Give retain pairs with other captions, or no attacks."
            )
        self._tasks, self._attacks = tasks, attacks
        self._evaluator = evaluator
        self._non_members = non_members
        self._original: Mapping[str, PairFeatures] | None = None
        self._original_non_members: PairFeatures | None = None
        names = (*tasks, *attacks)
        self._found: dict[str, dict[str, Figures]] = {name: {} for name in names}
        self._series: dict[str, list[Series]] = {name: [] for name in names}

    def examine(
        self, name: str, encoder: PairEncoder, features: Mapping[str, PairFeatures]
    ) -> None:
        """Run all tasks and attacks on one model.

        Args:
            name: `"model"`, `"original"` or the name of a reference.
            encoder: the model, which is left as it is.
            features: set -> its features of the evaluator's pairs.

        Raises:
            InputError: one of them cannot be run on the model.
        """
        if not self._found:
            return
        strangers = self._encode_non_members(encoder)
        if name == "original":
            self._original, self._original_non_members = features, strangers
        target = Target(
            name,
            encoder,
            features,
            self._original,
            strangers,
            self._original_non_members,
            self._evaluator,
        )
        chosen = {each: TASKS[each].run for each in self._tasks}
        chosen |= {each: ATTACKS[each].run for each in self._attacks}
        for key, run in chosen.items():
            start = time.perf_counter()
            figures, series = run(target)
            seconds = time.perf_counter() - start
            if figures:
                figures.append(Figure("seconds", "cost", "seconds", "seconds", "", seconds))
            self._found[key][name] = {figure.key: figure for figure in figures}
            self._series[key] += [replace(each, model=name) for each in series]

    def _encode_non_members(self, encoder: PairEncoder) -> PairFeatures | None:
        if self._non_members is None:
            return None
        evaluator = self._evaluator
        rows = sampled_rows(len(self._non_members), evaluator.max_pairs, seed=evaluator.seed)
        return encoder.pairs(self._non_members, rows, description="measuring (non-members)")

    def task_figures(self) -> dict[str, Figures]:
        """Return task -> the model's figures beside those of all others."""
        return {name: _side_by_side(self._found[name]) for name in self._tasks}

    def attack_figures(self) -> dict[str, Figures]:
        """Return attack -> the model's figures beside those of all others."""
        return {name: _side_by_side(self._found[name]) for name in self._attacks}

    def series(self) -> dict[str, list[Series]]:
        """Return attack -> what its plot shows, the model first; without those that have none."""
        return {
            name: sorted(those, key=lambda each: each.model != "model")
            for name, those in self._series.items()
            if those
        }


def _side_by_side(found: Mapping[str, Figures]) -> Figures:
    others = {name: figures for name, figures in found.items() if name != "model"}
    merged = {}
    for key, figure in found["model"].items():
        same = {name: figures[key] for name, figures in others.items() if key in figures}
        values = {name: other.value for name, other in same.items()}
        original = values.pop("original", None)
        intervals = {
            name: [other.low, other.high]
            for name, other in same.items()
            if other.low is not None and other.high is not None
        }
        merged[key] = replace(
            figure, original=original, references=values, other_intervals=intervals
        )
    return merged
