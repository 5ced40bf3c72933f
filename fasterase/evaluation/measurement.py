"""What one model scores on each set, per pair and on average."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from fasterase.errors import InputError
from fasterase.evaluation.evaluation import Scores
from fasterase.evaluation.features import SetFeatures
from fasterase.evaluation.metrics import METRICS, OLD_INDEX, bootstrap_intervals
from fasterase.evaluation.scores import SetScores, old_index_scores
from fasterase.evaluation.verdict import Trace


@dataclass(frozen=True)
class Measurement:
    """One model's values.

    Attributes:
        model: its name.
        sets: set -> per-pair values.
        traces: set to forget -> what is left of it; empty without unrelated pairs.
        candidates: number of candidate captions.
        images: set -> image features of its pairs [n, D].
    """

    model: str
    sets: dict[str, SetScores]
    traces: dict[str, Trace]
    candidates: int
    images: dict[str, Tensor]

    def add_old_index(self, original: Measurement, sets: Mapping[str, SetFeatures]) -> None:
        """Add the recall of the captions among the original's image features.

        Without effect if their width differs from that of this model's.

        Args:
            original: measured on the same pairs.
            sets: set -> this model's features.
        """
        self.check_same_pairs(original, "original")
        if self.images["forget"].shape[1] != original.images["forget"].shape[1]:
            return
        old = {name: replace(each, image=original.images[name]) for name, each in sets.items()}
        for name, features in old.items():
            distractors = None if name == "retain" else old.get("retain")
            values, chance = old_index_scores(features, distractors)
            self.sets[name].add(OLD_INDEX, values, chance)

    def check_same_pairs(self, other: Measurement, name: str) -> None:
        """Check that another model, called `name` in the message, was measured on the same pairs.

        Raises:
            InputError: it was not.
        """
        for set_name, scores in self.sets.items():
            if set_name not in other.sets or other.sets[set_name].ids != scores.ids:
                raise InputError(
                    f"{name}: measured on other pairs of {set_name!r} than the model. "
                    "Measure both with the same Evaluator."
                )

    def averages(self) -> Scores:
        """Return set -> metric -> value."""
        return {
            name: {
                metric.key: metric.average_of(scores.values[metric.key])
                for metric in METRICS
                if metric.key in scores.values
            }
            for name, scores in self.sets.items()
        }

    def averages_as_original_of(self, model: Measurement) -> Scores:
        """Return the averages of an original beside `model`.

        If that has a recall in the old index, so has the original: its own images are that index.
        """
        averages = self.averages()
        for name, values in averages.items():
            if OLD_INDEX in model.sets[name].values:
                values[OLD_INDEX] = values["text_to_image_recall@1"]
        return averages

    def intervals(self, *, resamples: int, seed: int) -> dict[str, dict[str, tuple[float, float]]]:
        """Return set -> metric -> 95 % bootstrap interval over pairs."""
        return {
            name: _intervals(scores, resamples=resamples, seed=seed)
            for name, scores in self.sets.items()
        }

    def chances(self) -> Scores:
        """Return set -> metric -> value of a random order."""
        return {
            name: {
                metric.key: scores.chance[metric.key]
                for metric in METRICS
                if metric.key in scores.chance
            }
            for name, scores in self.sets.items()
        }


def _intervals(scores: SetScores, *, resamples: int, seed: int) -> dict[str, tuple[float, float]]:
    by_average: dict[str, dict[str, np.ndarray]] = {"mean": {}, "median": {}}
    for metric in METRICS:
        if metric.key in scores.values:
            by_average[metric.average][metric.key] = scores.values[metric.key]
    found = bootstrap_intervals(
        by_average["mean"], by_average["median"], resamples=resamples, seed=seed
    )
    return {metric.key: found[metric.key] for metric in METRICS if metric.key in found}
