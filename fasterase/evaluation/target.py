"""What a task or an attack is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fasterase.encode import PairEncoder, PairFeatures
from fasterase.evaluation.evaluator import Evaluator
from fasterase.evaluation.figures import Figure
from fasterase.evaluation.metrics import bootstrap_intervals
from fasterase.evaluation.scores import Position


@dataclass(frozen=True)
class Target:
    """A model that is used or attacked.

    Attributes:
        name: `"model"`, `"original"` or the name of a reference.
        encoder: the model. What changes it puts it back as it was.
        features: set -> its features of the measured pairs.
        original: the same of the original; None if it is not among the models.
        non_members: the model's features of pairs that no model was trained on; None without any.
        original_non_members: the same of the original.
        evaluator: the pairs, and the judge of the sets to forget.
    """

    name: str
    encoder: PairEncoder
    features: Mapping[str, PairFeatures]
    original: Mapping[str, PairFeatures] | None
    non_members: PairFeatures | None
    original_non_members: PairFeatures | None
    evaluator: Evaluator

    def mean_figure(
        self,
        name: str,
        values: np.ndarray,  # [n] shares; NaN for pairs that do not count
        *,
        key: str,
        title: str,
        chance: float,
        aim: str = "",
    ) -> Figure:
        """Return the mean over the pairs of the set `name`, with its bootstrap interval.

        It should fall on sets to forget, to chance at most if `aim` says so, and not on others.
        """
        evaluator = self.evaluator
        intervals = bootstrap_intervals(
            {key: values}, {}, resamples=evaluator.resamples, seed=evaluator.seed
        )
        return Figure(
            f"{name}/{key}",
            name,
            title,
            "share",
            f"↓{aim}" if name in evaluator.forget_sets else "↑",
            float(np.nanmean(values)),
            *intervals[key],
            chance,
        )

    def hit_figures(
        self,
        name: str,
        found: Position,  # [n] queries
        chances: Mapping[int, float],
        *,
        key: str,
        title: str,
    ) -> list[Figure]:
        """Return how often the first k candidates hold a right one, for several k.

        Args:
            name: the set.
            found: where each query finds its best right candidate.
            chances: k -> chance level.
            key: of the figures; `"@k"` follows.
            title: of the figures, with `{}` for k.
        """
        return [
            self.mean_figure(
                name, found.hit(k), key=f"{key}@{k}", title=title.format(k), chance=chance
            )
            for k, chance in chances.items()
        ]
