"""Measure models on the same pairs and candidates, and put the measurements side by side."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch

from fasterase.encode import PairEncoder, PairFeatures
from fasterase.errors import InputError
from fasterase.evaluation.evaluation import Evaluation
from fasterase.evaluation.features import SetFeatures, all_captions, sampled_rows
from fasterase.evaluation.figures import Figures
from fasterase.evaluation.judge import Judge, summarise
from fasterase.evaluation.measurement import Measurement
from fasterase.evaluation.scores import CaptionPool, SetScores, retrieval_scores
from fasterase.evaluation.verdict import decide, decide_each
from fasterase.evaluation.zero_shot import (
    carried_classes,
    check_class_names,
    check_templates,
    encode_classes,
    label_pairs,
    score_accuracy,
)
from fasterase.option_values import parse_value
from fasterase.pairs.skips import Skip
from fasterase.pairs.table import PairTable
from fasterase.report.curves import Series

FULL_RESAMPLES = 1000
QUICK_RESAMPLES = 200
QUICK_PAIRS = 1000


class Evaluator:
    """Measures any number of models on the same pairs.

    Pairs are read and decoded anew for each model: pixels of all sets need not fit in memory, and
    models may preprocess differently. Peak memory is the features, O(n D), and one chunk of
    similarities.

    Args:
        sources: set name -> pairs; `"forget"` and `"retain"` are required. An empty set is not
            measured.
        forget_sets: names of further sets to forget. They come first, with `"forget"`; all others
            are sets to keep.
        preferred: set -> rows that make up half of the sample, where they are enough.
        max_pairs: pairs taken from each set, drawn by `seed` if it has more. None takes all.
        seed: of that drawing and of the bootstrap.
        class_names: classes for zero-shot accuracy. None: those that the sources carry, if any.
        templates: prompts with `{}` for the class name. None: "a photo of a {}.".
        quick: at most 1,000 pairs per set and 200 bootstrap resamples instead of 1,000.

    Attributes:
        skipped: pairs that the last `measure` could not read.
        judge: judges the sets to forget, on pairs that are measured anyway.
        resamples: number of bootstrap resamples.

    Raises:
        InputError: a name or value is unusable.
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
    ) -> None:
        for name in ("forget", "retain", *forget_sets):
            if name not in sources:
                raise InputError(f"sources has no set {name!r}, only {', '.join(sources)}.")
        max_pairs = parse_value("max_pairs", max_pairs, int | None)
        if max_pairs is not None and max_pairs < 1:
            raise InputError(f"max_pairs={max_pairs!r} must be 1 or more, or None for all pairs.")
        if parse_value("seed", seed, int) < 0:
            raise InputError(f"seed={seed!r} must be 0 or more.")
        if quick:
            max_pairs = min(max_pairs or QUICK_PAIRS, QUICK_PAIRS)
        self.forget_sets = ("forget", *(name for name in sources if name in forget_sets))
        names = dict.fromkeys((*self.forget_sets, *sources))
        self.sources = {name: sources[name] for name in names if len(sources[name])}
        self.max_pairs = max_pairs
        self.seed = seed
        self.templates = check_templates(templates)
        self.class_names = check_class_names(class_names)
        self._classes_asked_for = self.class_names is not None
        if self.class_names is None:
            self.class_names = carried_classes(sources)
        self.resamples = QUICK_RESAMPLES if quick else FULL_RESAMPLES
        self.skipped: list[Skip] = []
        self._preferred = dict(preferred or {})
        # Of the whole forget set, sampled or not: other sets may have its captions too.
        self._concept = all_captions(sources["forget"])
        self.judge = Judge(
            sources,
            self.forget_sets,
            seed=seed,
            rows={name: self.rows(name) for name in self.sources},
        )

    def rows(self, name: str) -> np.ndarray:
        """Return the rows (ascending) of a set that are measured."""
        return sampled_rows(
            len(self.sources[name]),
            self.max_pairs,
            seed=self.seed,
            preferred=self._preferred.get(name),
        )

    def encode(self, encoder: PairEncoder) -> dict[str, PairFeatures]:
        """Return set -> features of its `rows`.

        Raises:
            InputError: a set has no readable pair.
        """
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
    ) -> Measurement:
        """Score a model on all sets.

        Args:
            encoder: the model.
            features: its features of the `rows` of each set, if they have been computed already.
            original: of the original, whose image features the captions are also searched in,
                unless their width differs.

        Raises:
            InputError: a set has no readable pair, features are not finite, or `class_names` were
                given and no pair of any set belongs to one of them.
        """
        if features is None:
            features = self.encode(encoder)
        self.skipped = [skip for name in self.sources for skip in features[name].skipped]
        sets = {
            name: SetFeatures.of(source, features[name], model=encoder.model.name)
            for name, source in self.sources.items()
        }
        pool = CaptionPool.of(sets)
        concept = torch.tensor([caption in self._concept for caption in pool.captions])
        scores = {}
        for name, found in sets.items():
            distractors = None if name == "retain" else sets.get("retain")
            scores[name] = retrieval_scores(found, pool, concept, distractors)
        if self.class_names is not None:
            self._add_accuracy(encoder, features, scores, self.class_names)
        traces = self.judge.judge(features)
        for name, trace in traces.items():
            for key, (values, chance) in trace.metrics_at(features[name].rows).items():
                scores[name].add(key, values, chance)
        measured = Measurement(
            encoder.model.name,
            scores,
            summarise(traces),
            len(pool.captions),
            {name: features.image for name, features in sets.items()},
        )
        if original is not None:
            measured.add_old_index(original, sets)
        return measured

    def _add_accuracy(
        self,
        encoder: PairEncoder,
        features: Mapping[str, PairFeatures],
        scores: Mapping[str, SetScores],
        class_names: list[str],
    ) -> None:
        """Add the zero-shot accuracy of the sets of which some pair has a known class."""
        labels = label_pairs(class_names, self.sources, features)
        known = {name: those for name, those in labels.items() if (those >= 0).any()}
        if not known:
            if self._classes_asked_for:
                raise InputError(
                    f"class_names: no pair of {', '.join(labels)} belongs to one of "
                    f"{', '.join(class_names[:5])}{', ...' if len(class_names) > 5 else ''}. "
                    "A pair's class is its folder or the one class that its caption names."
                )
            return
        classes = encode_classes(encoder.texts, class_names, self.templates)
        for name, those in known.items():
            values = score_accuracy(features[name].image, classes, those)
            scores[name].add("zero_shot_accuracy", values, 1 / len(class_names))

    def compare(
        self,
        model: Measurement,
        *,
        original: Measurement | None = None,
        references: Mapping[str, Measurement] | None = None,
        tasks: Mapping[str, Figures] | None = None,
        attacks: Mapping[str, Figures] | None = None,
        series: Mapping[str, list[Series]] | None = None,
    ) -> Evaluation:
        """Return values, intervals and chance levels of `model` beside those of the others.

        `tasks`, `attacks` and `series` are handed on: what each of them found, and what its plot
        shows.

        Raises:
            InputError: the measurements are of different pairs.
        """
        others = {**({} if original is None else {"original": original}), **(references or {})}
        for name, other in others.items():
            model.check_same_pairs(other, name)
        before = None if original is None else original.traces
        verdicts, set_verdicts = {}, {}
        for name, each in {"model": model, **others}.items():
            verdict = decide(each.traces, before)
            if verdict is not None:
                verdicts[name] = verdict
            set_verdicts[name] = decide_each(each.traces, before)
        return Evaluation(
            scores=model.averages(),
            intervals=model.intervals(resamples=self.resamples, seed=self.seed),
            chance=model.chances(),
            pairs={name: len(scores.ids) for name, scores in model.sets.items()},
            forget_sets=list(self.forget_sets),
            verdicts=verdicts,
            set_verdicts=set_verdicts,
            original=None if original is None else original.averages_as_original_of(model),
            references={name: other.averages() for name, other in (references or {}).items()},
            settings={
                "model": model.model,
                "candidates": model.candidates,
                "max_pairs": self.max_pairs,
                "seed": self.seed,
                "resamples": self.resamples,
            },
            tasks=dict(tasks or {}),
            attacks=dict(attacks or {}),
            series=dict(series or {}),
        )
