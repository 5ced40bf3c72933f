"""Measure models on the same pairs and candidates, and put the measurements side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fasterase.config import parse_value
from fasterase.errors import InputError
from fasterase.evaluation.evaluation import Evaluation
from fasterase.evaluation.features import (
    SetFeatures,
    all_captions,
    encode_set,
    encode_texts,
    evaluating,
)
from fasterase.evaluation.metrics import METRICS, bootstrap_intervals, is_forget_set
from fasterase.evaluation.scores import (
    CaptionPool,
    ClassLabels,
    SetScores,
    accuracy,
    checked_class_names,
    checked_templates,
    class_vectors,
    retrieval_scores,
)
from fasterase.models.dual_encoder import DualEncoder
from fasterase.pairs.skips import Skip
from fasterase.pairs.source import PairSource

FULL_RESAMPLES = 1000
QUICK_RESAMPLES = 200
QUICK_PAIRS = 1000


@dataclass(frozen=True)
class Measurement:
    """One model's per-pair values on every set, and the number of candidate captions."""

    model: str
    sets: dict[str, SetScores]
    candidates: int


class Evaluator:
    """Measures any number of models on the same pairs.

    Pairs are read and decoded anew for each model: pixels of all sets need not fit in memory, and
    models may preprocess differently. Peak memory is the features, O(n D), and one chunk of
    similarities.

    Args:
        sources: set name -> pairs; `"forget"` and `"retain"` must be there. Names that start with
            "forget" are sets to forget and come first, all others are sets to keep.
        max_pairs: pairs taken from each set, drawn by `seed` where it has more. None takes all.
        seed: of that drawing and of the bootstrap.
        class_names: classes for zero-shot accuracy. None: those that the sources carry, if any.
        templates: prompts with `{}` for the class name. None: "a photo of a {}.".
        quick: at most 1,000 pairs a set and 200 bootstrap resamples instead of 1,000.
        batch_size: pairs encoded at a time.
        num_workers: processes that decode images.

    Attributes:
        skipped: pairs that the last `measure` could not read.

    Raises:
        InputError: a name or value is unusable.
    """

    def __init__(
        self,
        sources: dict[str, PairSource],
        *,
        max_pairs: int | None = 5000,
        seed: int = 0,
        class_names: Sequence[str] | None = None,
        templates: Sequence[str] | None = None,
        quick: bool = False,
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        for name in ("forget", "retain"):
            if name not in sources:
                raise InputError(f"sources has no set {name!r}, only {', '.join(sources)}.")
        max_pairs = parse_value("max_pairs", max_pairs, int | None)
        if max_pairs is not None and max_pairs < 1:
            raise InputError(f"max_pairs={max_pairs!r} must be 1 or more, or None for all pairs.")
        if parse_value("seed", seed, int) < 0:
            raise InputError(f"seed={seed!r} must be 0 or more.")
        if quick:
            max_pairs = min(max_pairs or QUICK_PAIRS, QUICK_PAIRS)
        self.sources = {
            name: sources[name] for name in sorted(sources, key=is_forget_set, reverse=True)
        }
        self.max_pairs = max_pairs
        self.seed = seed
        self.templates = checked_templates(templates)
        self.class_names = checked_class_names(class_names)
        self._classes_asked_for = self.class_names is not None
        if self.class_names is None:
            self.class_names = _carried_classes(sources)
        self._resamples = QUICK_RESAMPLES if quick else FULL_RESAMPLES
        self._batch_size = batch_size
        self._num_workers = num_workers
        self.skipped: list[Skip] = []
        # All of the forget set, sampled or not: its captions may stand in other sets too.
        self._concept = all_captions(sources["forget"])

    def measure(self, tower: DualEncoder) -> Measurement:
        """Encode all sets with `tower` and score them. The module's mode and gradients are kept.

        Raises:
            InputError: a set has no readable pair, features are not finite, or `class_names` were
                given and no pair of any set belongs to one of them.
        """
        with evaluating(tower):
            features = {
                name: encode_set(
                    tower,
                    source,
                    max_pairs=self.max_pairs,
                    seed=self.seed,
                    batch_size=self._batch_size,
                    num_workers=self._num_workers,
                )
                for name, source in self.sources.items()
            }
            self.skipped = [skip for found in features.values() for skip in found.skipped]
            pool = CaptionPool.of(features)
            concept = torch.tensor([caption in self._concept for caption in pool.captions])
            scores = {}
            for name, found in features.items():
                distractors = None if name == "retain" else features["retain"]
                scores[name] = retrieval_scores(found, pool, concept, distractors)
            if self.class_names is not None:
                self._add_accuracy(tower, features, scores, self.class_names)
        return Measurement(tower.name, scores, len(pool.captions))

    def _add_accuracy(
        self,
        tower: DualEncoder,
        features: Mapping[str, SetFeatures],
        scores: Mapping[str, SetScores],
        class_names: list[str],
    ) -> None:
        labels_of = ClassLabels(class_names)
        labels = {
            name: [
                labels_of.of(meta, captions)
                for meta, captions in zip(found.meta, found.pair_captions, strict=True)
            ]
            for name, found in features.items()
        }
        known = [name for name, those in labels.items() if any(i is not None for i in those)]
        if not known:
            if self._classes_asked_for:
                raise InputError(
                    f"class_names: no pair of {', '.join(features)} belongs to one of "
                    f"{', '.join(class_names[:5])}{', ...' if len(class_names) > 5 else ''}. "
                    "A pair's class is its folder or the one class that its caption names."
                )
            return
        classes = class_vectors(
            lambda texts: encode_texts(tower, texts, batch_size=self._batch_size),
            class_names,
            self.templates,
        )
        for name in known:
            values = accuracy(features[name].image, classes, labels[name])
            scores[name].values["zero_shot_accuracy"] = values
            scores[name].chance["zero_shot_accuracy"] = 1 / len(class_names)

    def compare(
        self,
        model: Measurement,
        *,
        original: Measurement | None = None,
        references: Mapping[str, Measurement] | None = None,
    ) -> Evaluation:
        """Set values, intervals and chance levels of `model` beside those of the others.

        Raises:
            InputError: the measurements do not stand on the same pairs.
        """
        others = {**({} if original is None else {"original": original}), **(references or {})}
        for name, other in others.items():
            _check_same_pairs(model, other, name)
        return Evaluation(
            scores=_averages(model),
            intervals={
                name: self._intervals(set_scores) for name, set_scores in model.sets.items()
            },
            chance={
                name: {
                    metric.key: s.chance[metric.key] for metric in METRICS if metric.key in s.chance
                }
                for name, s in model.sets.items()
            },
            pairs={name: len(set_scores.ids) for name, set_scores in model.sets.items()},
            original=None if original is None else _averages(original),
            references={name: _averages(other) for name, other in (references or {}).items()},
            settings={
                "model": model.model,
                "candidates": model.candidates,
                "max_pairs": self.max_pairs,
                "seed": self.seed,
                "resamples": self._resamples,
            },
        )

    def _intervals(self, scores: SetScores) -> dict[str, tuple[float, float]]:
        by_average: dict[str, dict] = {"mean": {}, "median": {}}
        for metric in METRICS:
            if metric.key in scores.values:
                by_average[metric.average][metric.key] = scores.values[metric.key]
        found = bootstrap_intervals(
            by_average["mean"], by_average["median"], resamples=self._resamples, seed=self.seed
        )
        return {metric.key: found[metric.key] for metric in METRICS if metric.key in found}


def _averages(measurement: Measurement) -> dict[str, dict[str, float]]:
    averages = {}
    for name, scores in measurement.sets.items():
        averages[name] = {
            metric.key: metric.averaged(scores.values[metric.key])
            for metric in METRICS
            if metric.key in scores.values
        }
    return averages


def _carried_classes(sources: Mapping[str, PairSource]) -> list[str] | None:
    names = [name for source in sources.values() for name in source.classes or ()]
    distinct = list(dict.fromkeys(names))
    return distinct if len(distinct) > 1 else None


def _check_same_pairs(model: Measurement, other: Measurement, name: str) -> None:
    for set_name, scores in model.sets.items():
        if set_name not in other.sets or other.sets[set_name].ids != scores.ids:
            raise InputError(
                f"{name}: measured on other pairs of {set_name!r} than the model. "
                "Measure both with the same Evaluator."
            )
