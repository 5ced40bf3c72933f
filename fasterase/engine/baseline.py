"""The original before the first step: what it knows of the concept and of what is kept.

Each pair is encoded once, for floor, losses, verdict, damage and evaluation together.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fasterase.encode import PairEncoder, PairFeatures
from fasterase.engine.damage import (
    SAME_MEANING,
    DamageMeter,
    closeness,
    find_neighbours,
    first_places,
)
from fasterase.engine.decoys import Decoys
from fasterase.engine.job import Draws, Job
from fasterase.evaluation.evaluator import Evaluator, Measurement
from fasterase.evaluation.scores import TIE
from fasterase.evaluation.verdict import EARLIER, Judge, Trace, summarise
from fasterase.original.features import (
    CachedOriginal,
    LiveOriginal,
    Original,
    OriginalFeatures,
    Unmatched,
    floor_rows,
    unmatched_cosines,
)
from fasterase.pairs.table import PairTable

# Retain captions that a warning lists, and words of a forget caption that are looked for in them.
LISTED, MAX_WORDS = 5, 8
# Share of kept pictures nearer to a forget caption than to their own, above which pictures are not
# compared. Models that know their pairs are far below, those with random weights at a half.
MISTAKEN = 0.25
# Retain pairs nearest to the forget captions, where damage shows first.
MAX_NEIGHBOURS = 256
# Share of the retain pairs, the nearest to the forget captions, that is drawn more often.
NEAR_SHARE = 0.1


@dataclass(frozen=True)
class Baseline:
    """The original's measurements and features that a run uses."""

    floors: list[Unmatched]  # cosines of unrelated pairs, of each concept
    judged: dict[str, PairFeatures]  # set -> features of the pairs that the verdict judges
    traces: dict[str, Trace]  # set to forget -> what it knows of it, by the verdict's measure
    measured: Measurement | None  # by the evaluator
    original: Original | None  # features for each step, if a loss uses them
    damage: DamageMeter | None  # for an automatic run
    damage_rows: np.ndarray  # rows (sorted) of the retain set that it compares
    near_rows: np.ndarray  # rows (sorted) of it that an automatic run draws more often
    decoys: Decoys | None  # of a link

    @property
    def known_sets(self) -> list[str]:
        """The sets to forget that the original remembers."""
        return [
            name
            for name, trace in self.traces.items()
            if trace.is_remembered and not name.startswith(EARLIER)
        ]

    @property
    def earlier_sets(self) -> list[str]:
        """The sets that were erased before."""
        return [name for name in self.traces if name.startswith(EARLIER)]

    @property
    def is_never_known(self) -> bool:
        return bool(self.traces) and not self.known_sets

    @property
    def recall(self) -> tuple[int, float] | None:
        """See `Measurement`; without one, of the pairs that the damage is measured on."""
        if self.measured is not None:
            return self.measured.recall
        return None if self.damage is None else self.damage.recall


def measure_original(
    job: Job,
    draws: Draws,
    encoder: PairEncoder,
    original: OriginalFeatures,
    *,
    judge: Judge,
    evaluator: Evaluator | None,
) -> Baseline:
    """Encode the features of the original (which `encoder` holds) once, and measure it.

    The `judge` measures what it knows of the sets to forget, the `evaluator` everything.

    Raises:
        InputError: too many pairs cannot be read, or features are not finite.
    """
    wanted = _wanted_rows(job, draws, judge, evaluator)
    for name, rows in wanted.items():
        if len(rows):
            original.encode(job.sets[name], rows)

    def features(of_sets: Mapping[str, np.ndarray]) -> dict[str, PairFeatures]:
        return {name: original.pairs(job.sets[name], rows) for name, rows in of_sets.items()}

    of_retain = features(_floor_rows(job, "retain"))["retain"]
    of_concepts = features(_floor_rows(job, *(job.concepts or ["forget"]))).values()
    floors = [unmatched_cosines(each, of_retain) for each in of_concepts]
    is_link = job.config.erases_link
    decoys = Decoys.make(job, encoder, [*of_concepts], of_retain) if is_link else None
    judged = features(judge.rows)
    judge.calibrate(encoder, judged)
    traces = summarise(judge.judge(judged))
    measured = None
    if evaluator is not None:
        measured = evaluator.measure(encoder, features(measured_rows(evaluator, job.sets)))
    damage, damage_rows, near_rows = None, np.empty(0, np.int64), np.empty(0, np.int64)
    if draws.pool is not None and judged:
        drawn, concept = original.pairs(job.retain, draws.pool.drawn), judged["forget"].first_text
        near = find_neighbours(concept, drawn, MAX_NEIGHBOURS)
        damage_rows = np.union1d(near, draws.pool.withheld)
        damage = DamageMeter(original.pairs(job.retain, damage_rows))
        # What means the same as a forget caption would bring the concept back.
        count = int(NEAR_SHARE * len(drawn.rows))
        near_rows = find_neighbours(concept, drawn, count, most=SAME_MEANING)
    remembered = [judged[name] for name, trace in traces.items() if trace.is_remembered]
    if remembered:
        # `judge` leaves out retain captions that are forget captions: look at all that are encoded.
        kept = original.pairs(job.retain, wanted["retain"])
        named = _warn_of_naming_captions(remembered, kept)
        if traces["forget"].is_remembered:
            _warn_of_pictures(judged["forget"], kept, job.retain, named)
    of_steps = _open_original(job, encoder, original)
    return Baseline(
        floors, judged, traces, measured, of_steps, damage, damage_rows, near_rows, decoys
    )


def _wanted_rows(
    job: Job, draws: Draws, judge: Judge, evaluator: Evaluator | None
) -> dict[str, np.ndarray]:
    """Return set -> rows (sorted) that anything needs the original's features of.

    A retain set of millions is not encoded for a run that draws a fraction of it.
    """
    wanted: dict[str, list[np.ndarray]] = {name: [np.empty(0, np.int64)] for name in job.sets}
    if _is_cached(job):
        wanted["retain"].append(draws.rows[1])
        if _needs_forget(job):
            wanted["forget"].append(draws.rows[0])
    if draws.pool is not None:
        wanted["retain"] += [draws.pool.drawn, draws.pool.withheld]
    of_floors = _floor_rows(job, "retain", *(job.concepts or ["forget"]))
    for chosen in (of_floors, judge.rows, measured_rows(evaluator, job.sets)):
        for name, rows in chosen.items():
            wanted[name].append(rows)
    return {name: np.unique(np.concatenate(rows)) for name, rows in wanted.items()}


def measured_rows(
    evaluator: Evaluator | None, sets: Mapping[str, PairTable]
) -> dict[str, np.ndarray]:
    """Return set -> rows that the evaluation measures; nothing without one."""
    return {} if evaluator is None else {n: evaluator.rows(n) for n in sets if len(sets[n])}


def _floor_rows(job: Job, *names: str) -> dict[str, np.ndarray]:
    return {name: floor_rows(len(job.sets[name])) for name in names}


def _needs_original(job: Job) -> bool:
    """Whether a loss, or the automatic learning rate, compares with the original in each step."""
    config = job.config
    weights = (config.consistency_weight, config.anchor_weight, config.used_cross_weight)
    return any(weights) or config.lr == "auto"


def _needs_forget(job: Job) -> bool:
    """Whether a loss compares forget pairs too."""
    return job.config.negatives == "joint" or job.config.used_cross_weight > 0


def _is_cached(job: Job) -> bool:
    return _needs_original(job) and job.forget.stable and job.retain.stable


def _open_original(job: Job, encoder: PairEncoder, original: OriginalFeatures) -> Original | None:
    """Return the original's features for each step; None if no loss uses them."""
    if not _needs_original(job):
        return None
    if _is_cached(job):
        scale = encoder.model.scale().detach().clone()
        return CachedOriginal(
            original, job.forget, job.retain, scale=scale, with_forget=_needs_forget(job)
        )
    warnings.warn(
        "`forget` or `retain` returns a different item on a second read (random "
        "augmentation?), so the original model runs beside the trained one in every step. "
        "This is slower and needs a second copy of the weights. Pass images without random "
        "augmentation to have its features cached.",
        stacklevel=7,
    )
    return LiveOriginal(encoder.model, precision=encoder.precision)


def _warn_of_naming_captions(forget_sets: Sequence[PairFeatures], retain: PairFeatures) -> set[str]:
    """Warn of retain captions that name the concept: training on them would teach it again.

    Returns these captions.
    """
    place = first_places(retain)
    text = retain.first_text[list(place.values())]
    near = torch.stack([closeness(each.first_text, text) for each in forget_sets]).amax(0)
    phrases = {caption for each in forget_sets for caption in each.first_captions}
    says = _contains_one(place, phrases)
    found = {
        caption: cosine
        for caption, says_so, cosine in zip(place, says, near.tolist(), strict=True)
        if says_so or cosine > SAME_MEANING
    }
    if found:
        nearest = sorted(found, key=lambda caption: -found[caption])
        warnings.warn(
            f"retain: {len(found)} of {len(place)} captions seem to name what is to be forgotten "
            "(cosine with the nearest forget caption in brackets): "
            f"{_list_nearest([(repr(each), found[each]) for each in nearest])}. Training on them "
            "may undo the erasure. Move such pairs to `forget`, or leave them out of `retain`; "
            "ignore this if they mean something else.",
            stacklevel=7,
        )
    return set(found)


def _warn_of_pictures(
    forget: PairFeatures, retain: PairFeatures, source: PairTable, named: Collection[str] = ()
) -> None:
    """Warn of retain pictures that look like the forget set's; not of captions that are `named`.

    The original sees one as the concept if a forget caption is nearer to it than its own one, and a
    forget picture as near as those are to each other, in the median. Where it mistakes many for
    the concept by their captions, it cannot tell.
    """
    own = (retain.image * retain.first_text).sum(1)
    is_like = closeness(forget.first_text, retain.image) > own + TIE
    if len(forget.rows) < 2 or is_like.float().mean() > MISTAKEN:
        return
    is_like &= torch.tensor([caption not in named for caption in retain.first_captions])
    among = forget.image @ forget.image.T
    among.fill_diagonal_(-torch.inf)
    near = closeness(forget.image, retain.image)
    is_like &= near >= among.amax(1).median()
    order = near.where(is_like, -torch.inf).argsort(descending=True, stable=True)
    order = order[: int(is_like.sum())]
    if len(order):
        found = [(source.id(int(retain.rows[i])), float(near[i])) for i in order.tolist()]
        warnings.warn(
            f"retain: {len(found)} of {len(retain.rows)} pictures look like those to be forgotten "
            "to the original (cosine with the nearest in brackets): "
            f"{_list_nearest(found)}. Training on them may undo the erasure. To take them out, "
            "list their ids in a file and give `fasterase.split(retain, forget=file)[1]` as "
            "retain; `fasterase.find(model, source, concept)` sorts such pairs out of a whole "
            "corpus.",
            stacklevel=7,
        )


def _list_nearest(found: Sequence[tuple[str, float]]) -> str:
    shown = ", ".join(f"{name} ({cosine:.2f})" for name, cosine in found[:LISTED])
    return f"{shown}, ..." if len(found) > LISTED else shown


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
