"""The original before the first step: what it knows of the concept, and what a run may cost.

Each pair is encoded once, for floor, reference, verdict, damage and evaluation together.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fasterase.encode import PairEncoder, PairFeatures
from fasterase.engine.damage import (
    MAX_NEIGHBOURS,
    SAME_MEANING,
    Damage,
    DamageMeter,
    closeness,
    find_neighbours,
)
from fasterase.engine.job import Draws, Job
from fasterase.engine.pacing import Check
from fasterase.evaluation.evaluator import Evaluator, Measurement
from fasterase.evaluation.verdict import REMEMBERED, Judge, Trace, summarise
from fasterase.original.features import (
    CachedOriginal,
    FeatureCache,
    LiveOriginal,
    Original,
    OriginalFeatures,
)
from fasterase.original.floor import floor_rows, unmatched_cosine
from fasterase.pairs.table import PairTable

# Retain captions that a warning lists, and words of a forget caption that are looked for in them.
LISTED, MAX_WORDS = 5, 8


@dataclass(frozen=True)
class Baseline:
    """The original's measurements and features that a run uses.

    Attributes:
        floor: mean cosine of unrelated pairs, the automatic floor.
        traces: set to forget -> what the original knows of it, by the verdict's measure.
        measured: its scores, None without an evaluator.
        reference: its features for each step, None if nothing uses them.
        damage: compares recall on kept pairs with the original's; None without an automatic run.
        damage_rows: rows (sorted) of the retain set that it compares.
    """

    floor: float
    traces: dict[str, Trace]
    measured: Measurement | None
    reference: Original | None
    damage: DamageMeter | None
    damage_rows: np.ndarray

    @property
    def known_sets(self) -> list[str]:
        """The sets to forget that the original remembers."""
        return [name for name, trace in self.traces.items() if trace.is_remembered]

    @property
    def is_never_known(self) -> bool:
        return bool(self.traces) and not self.known_sets


def measure_original(
    job: Job,
    draws: Draws,
    encoder: PairEncoder,
    cache: FeatureCache,
    *,
    judge: Judge,
    evaluator: Evaluator | None,
) -> Baseline:
    """Encode the original's features, once, and measure it.

    Args:
        job, draws: the run.
        encoder: the original.
        cache: where its features are kept.
        judge: measures what it knows of the sets to forget.
        evaluator: measures everything; None to measure nothing else.

    Raises:
        InputError: too many pairs cannot be read, or features are not finite.
    """
    wanted = _wanted_rows(job, draws, judge, evaluator)
    original = OriginalFeatures(encoder, cache)
    for name, rows in wanted.items():
        if len(rows):
            original.encode(job.sets[name], rows)
    forget, retain = (
        original.pairs(job.sets[name], floor_rows(len(job.sets[name])))
        for name in ("forget", "retain")
    )
    floor = unmatched_cosine(forget, retain)
    judged = {name: original.pairs(job.sets[name], rows) for name, rows in judge.rows.items()}
    traces = summarise(judge.judge(judged))
    measured = None
    if evaluator is not None:
        features = {
            name: original.pairs(job.sets[name], rows)
            for name, rows in measured_rows(evaluator, job.sets).items()
        }
        measured = evaluator.measure(encoder, features)
    damage, damage_rows = None, np.empty(0, np.int64)
    if draws.pool is not None and judged:
        near = find_neighbours(
            judged["forget"].first_text,
            original.pairs(job.retain, draws.pool.drawn),
            MAX_NEIGHBOURS,
        )
        damage_rows = np.union1d(near, draws.pool.withheld)
        damage = DamageMeter(original.pairs(job.retain, damage_rows))
    remembered = [judged[name] for name, trace in traces.items() if trace.is_remembered]
    if remembered:
        # `judge` leaves out retain captions that are forget captions: look at all that are encoded.
        _warn_of_naming_captions(remembered, original.pairs(job.retain, wanted["retain"]))
    reference = _open_reference(job, encoder, cache)
    return Baseline(floor, traces, measured, reference, damage, damage_rows)


def _wanted_rows(
    job: Job, draws: Draws, judge: Judge, evaluator: Evaluator | None
) -> dict[str, np.ndarray]:
    """Return set -> rows (sorted) that anything needs the original's features of.

    A retain set of millions is not encoded for a run that draws a fraction of it.
    """
    wanted: dict[str, list[np.ndarray]] = {name: [np.empty(0, np.int64)] for name in job.sets}
    if _caches_reference(job):
        wanted["retain"].append(draws.rows[1])
        if _with_forget(job):
            wanted["forget"].append(draws.rows[0])
    if draws.pool is not None:
        wanted["retain"] += [draws.pool.drawn, draws.pool.withheld]
    floor_samples = {name: floor_rows(len(job.sets[name])) for name in ("forget", "retain")}
    for chosen in (floor_samples, judge.rows, measured_rows(evaluator, job.sets)):
        for name, rows in chosen.items():
            wanted[name].append(rows)
    return {name: np.unique(np.concatenate(rows)) for name, rows in wanted.items()}


def _uses_reference(job: Job) -> bool:
    config = job.config
    return bool(
        config.consistency_weight
        or config.anchor_weight
        or config.used_cross_weight
        or config.lr == "auto"
    )


def _caches_reference(job: Job) -> bool:
    return _uses_reference(job) and job.forget.stable and job.retain.stable


def _with_forget(job: Job) -> bool:
    return job.config.negatives == "joint" or job.config.used_cross_weight > 0


def _open_reference(job: Job, encoder: PairEncoder, cache: FeatureCache) -> Original | None:
    """Return the original's features for each step; None if no loss uses them."""
    if _caches_reference(job):
        scale = encoder.model.scale().detach().clone()
        return CachedOriginal(
            cache, job.forget, job.retain, scale=scale, with_forget=_with_forget(job)
        )
    if not _uses_reference(job):
        return None
    warnings.warn(
        "`forget` or `retain` returns a different item on a second read (random "
        "augmentation?), so the original model runs beside the trained one in every step. "
        "This is slower and needs a second copy of the weights. Pass images without random "
        "augmentation to have its features cached.",
        stacklevel=7,
    )
    return LiveOriginal(encoder.model, precision=encoder.precision)


class Checks:
    """Measures the model in the middle of a run, on the pairs that the final verdict judges.

    Args:
        job: whose model is measured.
        encoder: the model.
        judge: the judge of the final verdict.
        baseline: the original. Sets that it does not remember are left out.
    """

    def __init__(self, job: Job, encoder: PairEncoder, judge: Judge, baseline: Baseline) -> None:
        self._encoder = encoder
        self._sets = job.sets
        self._judge = judge
        self._baseline = baseline
        self._max_damage = job.config.max_damage

    def original(self) -> Check:
        """Return the check of the original."""
        return self._make_check(self._baseline.traces, Damage(0.0, 0.0))

    def __call__(self) -> Check:
        rows = {name: self._judge.rows[name] for name in self._baseline.known_sets}
        rows["retain"] = np.union1d(self._judge.rows["retain"], self._baseline.damage_rows)
        features = {
            name: self._encoder.pairs(
                self._sets[name], these, description="is it forgotten?", leave=False
            )
            for name, these in rows.items()
        }
        # The first rank decides for all: others may round differently.
        return self._encoder.ranks.on_first(lambda: self._measure(features))

    def _measure(self, features: Mapping[str, PairFeatures]) -> Check:
        # Sets that were never known are not encoded: nothing of them is to be forgotten.
        judged = self._judge.judge(features)
        meter = self._baseline.damage
        damage = Damage(0.0, 0.0)
        if meter is not None:
            damage = meter.measure(features["retain"].at(self._baseline.damage_rows))
        return self._make_check(summarise(judged), damage)

    def _make_check(self, traces: Mapping[str, Trace], damage: Damage) -> Check:
        known = {name: traces[name] for name in self._baseline.known_sets}
        exceeded = self._max_damage is not None and damage.low > self._max_damage
        return Check(known, damage.mean, exceeded)

    def is_forgotten(self) -> bool:
        """Check only whether the verdict is no longer "remembered"."""
        return self._baseline.is_never_known or self().verdict != REMEMBERED


def measured_rows(
    evaluator: Evaluator | None, sets: Mapping[str, PairTable]
) -> dict[str, np.ndarray]:
    """Return set -> rows that the evaluation measures; nothing without one."""
    return {} if evaluator is None else {n: evaluator.rows(n) for n in sets if len(sets[n])}


def _warn_of_naming_captions(forget_sets: Sequence[PairFeatures], retain: PairFeatures) -> None:
    """Warn of retain captions that name the concept: training on them would teach it again."""
    place: dict[str, int] = {}
    for row, caption in enumerate(retain.first_captions):
        place.setdefault(caption, row)
    text = retain.first_text[list(place.values())]
    near = torch.stack([closeness(each.first_text, text) for each in forget_sets]).amax(0)
    phrases = {caption for each in forget_sets for caption in each.first_captions}
    named = _contains_one(place, phrases)
    found = [
        (bool(says), float(cosine), caption)
        for says, cosine, caption in zip(named, near, place, strict=True)
        if says or cosine > SAME_MEANING
    ]
    if not found:
        return
    shown = ", ".join(
        f"{caption!r} ({cosine:.2f})"
        for _, cosine, caption in sorted(found, key=lambda each: -each[1])[:LISTED]
    )
    warnings.warn(
        f"retain: {len(found)} of {len(place)} captions seem to name what is to be forgotten "
        f"(cosine with the nearest forget caption in brackets): {shown}"
        f"{', ...' if len(found) > LISTED else ''}. Training on them may undo the erasure. Move "
        "such pairs to `forget`, or leave them out of `retain`; ignore this if they mean "
        "something else.",
        stacklevel=7,
    )


def _contains_one(captions: Iterable[str], phrases: Iterable[str]) -> list[bool]:
    """Tell which captions contain one of the phrases as whole words, ignoring case."""
    wanted = {tuple(phrase.casefold().split()) for phrase in phrases}
    lengths = sorted({len(words) for words in wanted if 0 < len(words) <= MAX_WORDS})

    def contains(caption: str) -> bool:
        words = tuple(word.strip(".,;:!?\"'()") for word in caption.casefold().split())
        return any(
            words[start : start + length] in wanted
            for length in lengths
            for start in range(len(words) - length + 1)
        )

    return [contains(caption) for caption in captions]
