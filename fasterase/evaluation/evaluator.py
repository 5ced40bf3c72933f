"""Measure models on the same pairs and candidates."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fasterase.encode import PairEncoder, PairFeatures
from fasterase.errors import InputError
from fasterase.evaluation.hurt import choose_things, encode_things
from fasterase.evaluation.metrics import (
    IMAGE_TO_IMAGE,
    OLD_INDEX,
    metric_intervals,
    metrics_among,
)
from fasterase.evaluation.scores import (
    CaptionPool,
    SetFeatures,
    SetScores,
    all_captions,
    check_finite,
    image_labels,
    retrieval_scores,
    search_images,
    spread_values,
    text_to_image,
)
from fasterase.evaluation.verdict import Judge, Trace, summarise
from fasterase.evaluation.zero_shot import (
    carried_classes,
    check_class_names,
    check_templates,
    encode_classes,
    label_pairs,
    score_accuracy,
)
from fasterase.option_values import parse_count
from fasterase.pairs.table import PairTable
from fasterase.seeds import Stream, generator

FULL_RESAMPLES = 1000
QUICK_RESAMPLES = 200
QUICK_PAIRS = 1000
QUICK_THINGS = 500

Scores = dict[str, dict[str, float]]  # set -> metric -> value


@dataclass(frozen=True)
class Measurement:
    """One model's values."""

    model: str  # its name
    sets: dict[str, SetScores]
    judged: dict[str, PairFeatures]  # set -> features of the pairs that the verdict judges
    traces: dict[str, Trace]  # of the sets to forget; empty without unrelated pairs
    candidates: int  # number of candidate captions
    features: dict[str, SetFeatures]
    classes: dict[str, list[str | None]]  # set -> class of each pair, with classes
    things: Tensor | None  # features of everyday things, if they were measured

    def check_same_pairs(self, other: Measurement, name: str) -> None:
        """Raise `InputError` if another model, called `name`, was measured on other pairs."""
        for set_name, scores in self.sets.items():
            if set_name not in other.sets or other.sets[set_name].ids != scores.ids:
                raise InputError(
                    f"{name}: measured on other pairs of {set_name!r} than the model. "
                    "Measure both with the same Evaluator."
                )

    @property
    def recall(self) -> tuple[int, float] | None:
        """Number of retain pairs, and the share whose image finds its own caption first."""
        if "retain" not in self.sets:
            return None
        values = self.sets["retain"].values["image_to_text_recall@1"]
        return len(values), float(values.mean())

    def averages(self) -> Scores:
        """Return set -> metric -> value."""
        return {
            name: {
                metric.key: metric.average_of(scores.values[metric.key])
                for metric in metrics_among(scores.values)
            }
            for name, scores in self.sets.items()
        }

    def intervals(self, *, resamples: int, seed: int) -> dict[str, dict[str, tuple[float, float]]]:
        """Return set -> metric -> 95 % interval over pairs; see `metric_intervals`."""
        return {
            name: metric_intervals(scores.values, resamples=resamples, seed=seed)
            for name, scores in self.sets.items()
        }


class Evaluator:
    """Measures any number of models on the same pairs.

    Pairs are read and decoded anew for each model: pixels of all sets need not fit in memory, and
    models may preprocess differently. Peak memory is the features, O(n D), and one chunk of
    similarities.

    Args:
        sources: set name -> pairs, with `"forget"` and `"retain"`. An empty set is not measured.
        forget_sets: names of further sets to forget; all others are sets to keep.
        preferred: set -> rows that make up half of the sample, where they are enough.
        max_pairs, seed, class_names, templates: as in `fasterase.evaluate`.
        quick: at most 1,000 pairs per set, 200 bootstrap resamples instead of 1,000, and 500
            everyday things instead of all.

    Attributes:
        judge: judges the sets to forget, on pairs that are measured anyway.
        things: everyday things whose texts are measured too.

    Raises:
        InputError: a value is unusable.
    """

    def __init__(
        self,
        sources: dict[str, PairTable],
        *,
        forget_sets: Collection[str] = (),
        preferred: Mapping[str, np.ndarray] | None = None,
        max_pairs: int | None = 5000,
        seed: int = 0,
        class_names: Sequence[str] | None = None,
        templates: Sequence[str] | None = None,
        quick: bool = False,
        towers: Collection[str] = ("image", "text"),
    ) -> None:
        if max_pairs is not None:
            max_pairs = parse_count("max_pairs", max_pairs, least=1)
        if quick:
            max_pairs = min(max_pairs or QUICK_PAIRS, QUICK_PAIRS)
        self.forget_sets = ("forget", *(name for name in sources if name in forget_sets))
        names = dict.fromkeys((*self.forget_sets, *sources))
        self.sources = {name: sources[name] for name in names if len(sources[name])}
        self.max_pairs = max_pairs
        self.seed = seed = parse_count("seed", seed, least=0)
        self.templates = check_templates(templates)
        asked_for = check_class_names(class_names)
        self.class_names = carried_classes(sources) if asked_for is None else asked_for
        self._classes_asked_for = asked_for is not None
        self.resamples = QUICK_RESAMPLES if quick else FULL_RESAMPLES
        self._preferred = dict(preferred or {})
        # Of the whole forget set, sampled or not: other sets may have its captions too.
        self._concept = all_captions(sources["forget"])
        rows = {name: self.rows(name) for name in self.sources}
        self.judge = Judge(sources, self.forget_sets, seed=seed, rows=rows, towers=towers)
        self.things = choose_things(self._concept, QUICK_THINGS if quick else None)

    def rows(self, name: str) -> np.ndarray:
        """Return the rows (ascending) of a set that are measured."""
        preferred = self._preferred.get(name)
        length = len(self.sources[name])
        return sampled_rows(length, self.max_pairs, seed=self.seed, preferred=preferred)

    def encode(self, encoder: PairEncoder) -> dict[str, PairFeatures]:
        """Return set -> features of its `rows`; `InputError` if a set has no readable pair."""
        return {
            name: encoder.pairs(source, self.rows(name), description=f"measuring ({name})")
            for name, source in self.sources.items()
        }

    def measure(
        self,
        encoder: PairEncoder,
        features: Mapping[str, PairFeatures] | None = None,
        *,
        original: Measurement | None = None,
        with_things: bool = True,
    ) -> Measurement:
        """Score a model on all sets.

        Args:
            encoder: the model.
            features: what `encode` returned for it, if that has been called already.
            original: in whose image features captions are searched too, if their width is the same.
            with_things: measure everyday things too, which an original is compared with.

        Raises:
            InputError: a set has no readable pair, features are not finite, or `class_names` were
                given and no pair of any set belongs to one of them.
        """
        if features is None:
            features = self.encode(encoder)
        model = encoder.model.name
        pool = CaptionPool.of(features[name] for name in self.sources)
        check_finite(pool.text, list(pool.row), model)
        sets = {name: SetFeatures.of(each, features[name]) for name, each in self.sources.items()}
        concept = torch.tensor([caption in self._concept for caption in pool.row])
        scores = {}
        for name, found in sets.items():
            check_finite(found.image, found.ids, model)
            scores[name] = retrieval_scores(found, pool, concept, _distractors(sets, name))
        labels = label_pairs(self.class_names, self.sources, features)
        self._add_accuracy(encoder, features, scores, labels)
        shown = image_labels({name: features[name] for name in self.sources}, labels)
        for name, (counted, position) in search_images(features, shown).items():
            values, chance = position.at(1)
            scores[name].add(IMAGE_TO_IMAGE, spread_values(values, counted), chance)
        traces = self.judge.judge(features, None if original is None else original.judged)
        for name, trace in traces.items():
            scores[name].values.update(trace.spread(features[name].rows))
            scores[name].chance.update(trace.chance)
        things = encode_things(encoder, self.things) if with_things else None
        judged, traced = self.judge.judged(features), summarise(traces)
        classes = {
            name: [self.class_names[place] if place >= 0 else None for place in those.tolist()]
            for name, those in labels.items()
        }
        measured = Measurement(model, scores, judged, traced, len(pool.row), sets, classes, things)
        if original is not None:
            measured.check_same_pairs(original, "original")
            old = original.features  # of the same pairs
            if pool.text.shape[1] == old["forget"].image.shape[1]:
                for name, each in old.items():
                    position = text_to_image(each, pool, _distractors(old, name))
                    scores[name].add(OLD_INDEX, *position.at(1))
        return measured

    def _add_accuracy(
        self,
        encoder: PairEncoder,
        features: Mapping[str, PairFeatures],
        scores: Mapping[str, SetScores],
        labels: Mapping[str, np.ndarray],
    ) -> None:
        """Add the zero-shot accuracy of the sets that `labels` has, those with known classes."""
        names = self.class_names
        if labels:
            classes = encode_classes(encoder.texts, names, self.templates)
        elif self._classes_asked_for:
            raise InputError(
                f"class_names: no pair of {', '.join(self.sources)} belongs to one of "
                f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}. "
                "A pair's class is its folder or the one class that its caption names."
            )
        for name, those in labels.items():
            values = score_accuracy(features[name].image, classes, those)
            scores[name].add("zero_shot_accuracy", values, 1 / len(names))


def sampled_rows(
    length: int, max_pairs: int | None, *, seed: int, preferred: np.ndarray | None = None
) -> np.ndarray:
    """Return ascending rows of a set of `length`, at most `max_pairs`; None takes all.

    Sets of one length get the same rows: those that list the same concepts in the same order stay
    comparable. `preferred` rows make up half of a draw, or as much of it as there are.
    """
    if max_pairs is None or length <= max_pairs:
        return np.arange(length)
    order = generator(seed, Stream.EVALUATION).permutation(length)
    if preferred is not None and len(preferred):
        first = order[np.isin(order, preferred)][: -(-max_pairs // 2)]
        order = np.concatenate([first, order[~np.isin(order, first)]])
    return np.sort(order[:max_pairs])


def _distractors(sets: Mapping[str, SetFeatures], name: str) -> SetFeatures | None:
    """Return the pairs whose images compete with those of a set."""
    return None if name == "retain" else sets.get("retain")
