"""What a task or an attack is given, and the figures that several of them make of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fasterase.encode import PairEncoder, PairFeatures
from fasterase.evaluation.evaluator import Evaluator
from fasterase.evaluation.figures import Figure, share_figure
from fasterase.evaluation.metrics import bootstrap_intervals
from fasterase.evaluation.scores import Position

# Share of unrelated images that may be taken for the concept when an image counts as found.
FALSE_POSITIVES = 0.05


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
        return self.resampled_figure(
            values,
            key=f"{name}/{key}",
            group=name,
            title=title,
            wanted=f"↓{aim}" if name in self.evaluator.forget_sets else "↑",
            chance=chance,
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

    def separation_figures(
        self,
        below: np.ndarray,  # [n] share of unrelated images below each image of the concept
        *,
        key: str,
        group: str,
        chance: float,
        prefix: str = "",
    ) -> list[Figure]:
        """Return how well a score tells images of the concept from unrelated ones.

        The AUC, and the share of images found: above all but `FALSE_POSITIVES` of the others.

        Args:
            key: `"/auc"` and `"/found"` follow.
            group: heading.
            chance: share that a random score finds.
            prefix: of the titles.
        """
        return [
            self.resampled_figure(
                below,
                key=f"{key}/auc",
                group=group,
                title=f"{prefix}AUC, %",
                wanted="↓",
                chance=0.5,
            ),
            share_figure(
                (below >= 1 - FALSE_POSITIVES).astype(float),
                key=f"{key}/found",
                group=group,
                title=f"{prefix}found at 5 % FPR, %",
                wanted="↓",
                chance=chance,
            ),
        ]

    def resampled_figure(
        self,
        values: np.ndarray,  # [n] shares; NaN for pairs that do not count
        *,
        key: str,
        group: str,
        title: str,
        wanted: str,
        chance: float,
    ) -> Figure:
        """Return the mean over pairs with its bootstrap interval."""
        evaluator = self.evaluator
        intervals = bootstrap_intervals(
            {key: values}, {}, resamples=evaluator.resamples, seed=evaluator.seed
        )
        mean = float(np.nanmean(values))
        return Figure(key, group, title, "share", wanted, mean, *intervals[key], chance)
