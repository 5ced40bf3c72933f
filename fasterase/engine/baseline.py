"""The original before the first step: what it knows of the concept, and what a run may cost.

Each pair is encoded once, for floor, losses, verdict, damage and evaluation together.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasterase.encode import PairEncoder, PairFeatures
from fasterase.engine.decoys import Decoys
from fasterase.engine.job import Draws, Job
from fasterase.engine.optim import Trained
from fasterase.engine.pacing import Check
from fasterase.evaluation.evaluator import Evaluator, Measurement
from fasterase.evaluation.hurt import Outside, encode_things
from fasterase.evaluation.metrics import TOWER_HITS
from fasterase.evaluation.scores import TIE, find_position, similarity_chunks
from fasterase.evaluation.verdict import EARLIER, REMEMBERED, Judge, Trace, summarise
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
# Captions whose features under the original are this close mean the same: either counts as right.
SAME_MEANING = 0.95
# Share of everyday words that may lose most of their neighbours before a run is too costly, for
# damage that retain does not show. Erasing fruit or birds from the demo's model takes .01 to .04.
MOST_HURT = 0.25
# Retain pairs nearest to the forget captions, where damage shows first.
MAX_NEIGHBOURS = 256
# Share of the retain pairs, the nearest to the forget captions, that is drawn more often.
NEAR_SHARE = 0.1
NORMAL_Z = 1.645  # of a one-sided 95 % interval


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


@dataclass(frozen=True)
class Checks:
    """Measures the model in the middle of a run, on the pairs that the final verdict judges.

    Sets that the original does not remember are left out: nothing of them is to be forgotten. Those
    that were erased before count once they are remembered again.
    """

    job: Job
    encoder: PairEncoder
    judge: Judge
    baseline: Baseline
    trained: Trained
    withheld: Mapping[str, np.ndarray]  # set to forget -> rows that the run is not trained on
    things: Sequence[str] = ()  # everyday words, if the original's are measured

    def original(self) -> Check:
        """Return the check of the original: beside itself, each tower knows what both know."""
        traces = {
            name: replace(trace, towers=dict.fromkeys(TOWER_HITS, (trace.hit, trace.hit_low)))
            for name, trace in self.baseline.traces.items()
        }
        return Check(self._known(traces), 0.0, False)

    def __call__(self) -> Check:
        baseline = self.baseline
        judged = [*baseline.known_sets, *baseline.earlier_sets]
        rows = {name: self.judge.rows[name] for name in judged}
        rows["retain"] = np.union1d(self.judge.rows["retain"], baseline.damage_rows)
        features = {
            name: self.encoder.pairs(self.job.sets[name], these, description="is it forgotten?")
            for name, these in rows.items()
        }
        before = None if baseline.measured is None else baseline.measured.things
        things = None
        if before is not None and baseline.damage and self.job.config.max_damage is not None:
            things = encode_things(self.encoder, self.things)
        words = None if before is None or things is None else (things, before)
        # The first rank decides for all: others may round differently.
        return self.job.ranks.on_first(lambda: self._measure(features, words))

    def is_forgotten(self) -> bool:
        """Check only whether the verdict is no longer "remembered"."""
        return self.baseline.is_never_known or self().verdict != REMEMBERED

    def _measure(
        self, features: Mapping[str, PairFeatures], words: tuple[Tensor, Tensor] | None
    ) -> Check:
        """Return what is left, lost and hurt; `words`: features of everyday words, and before."""
        damage, meter = Damage(0.0, 0.0), self.baseline.damage
        if meter is not None:
            damage = meter.measure(features["retain"].at(self.baseline.damage_rows))
        hurt = 0.0 if words is None else Outside.compare(*words).summary()["hurt"]
        most = self.job.config.max_damage
        is_exceeded = most is not None and (damage.low > most or hurt > MOST_HURT)
        traces = self.judge.judge(features, self.baseline.judged)
        of_trained = {
            name: traces[name].without(rows)
            for name, rows in self.withheld.items()
            if name in traces and not np.isin(traces[name].rows, rows).all()
        }
        known = (self._known(summarise(each)) for each in (traces, of_trained))
        return Check(next(known), damage.mean, is_exceeded, trained=next(known))

    def _known(self, traces: Mapping[str, Trace]) -> dict[str, Trace]:
        """Return the traces that a run waits for."""
        # A tower that stays as it is will not forget, however long the run waits for it.
        moving = [name for name in ("image", "text") if getattr(self.trained, name)]
        return {
            name: trace.strictly(keep=moving)
            for name, trace in traces.items()
            if name in self.baseline.known_sets
            or (name in self.baseline.earlier_sets and trace.is_remembered)
        }


class Damage(NamedTuple):
    """Share of recall@1 image->text lost since the original, negative for a gain."""

    mean: float
    low: float  # near end of its interval (one-sided 95 %)


class DamageMeter:
    """Compares a model's recall@1 image->text on retain pairs with the original's, pair by pair.

    The first captions of all these pairs are the candidates.
    """

    def __init__(self, original: PairFeatures) -> None:
        place = {key: row for row, key in enumerate(original.captions)}
        self._keys = list(dict.fromkeys(original.first_captions))
        text = original.text[[place[key] for key in self._keys]]
        self._alike = text @ text.T > SAME_MEANING
        self._alike.fill_diagonal_(True)
        self._rows = original.rows
        self._before = self._hits(original)

    @property
    def recall(self) -> tuple[int, float]:
        """Number of pairs, and the original's share."""
        return len(self._before), float(self._before.mean())

    def measure(self, features: PairFeatures) -> Damage:
        """Return the loss of a model, on the pairs that both could read."""
        shared = np.intersect1d(self._rows, features.rows)
        if not len(shared):
            return Damage(0.0, 0.0)
        before = self._before[np.isin(self._rows, shared)]
        after = self._hits(features.at(shared))
        lost = before - after
        mean = float(lost.mean())
        deviation = float(lost.std(ddof=1)) if len(lost) > 1 else 0.0
        return Damage(mean, mean - NORMAL_Z * deviation / math.sqrt(len(lost)))

    def _hits(self, features: PairFeatures) -> np.ndarray:
        """[n], 1 if the nearest caption is the own one or means the same; a share for ties."""
        place = {key: row for row, key in enumerate(features.captions)}
        known = [place.get(key) for key in self._keys]
        # A caption that this model did not encode, since its pair was unreadable, is no candidate.
        text = features.text[[row or 0 for row in known]]
        missing = torch.tensor([row is None for row in known])
        similarity = (features.image @ text.T).masked_fill(missing, -torch.inf)
        column = {key: i for i, key in enumerate(self._keys)}
        own = torch.tensor([column[key] for key in features.first_captions])
        return find_position(similarity, self._alike[own]).hit(1)


def find_neighbours(
    forget_text: Tensor, retain: PairFeatures, count: int, *, most: float = math.inf
) -> np.ndarray:
    """Return `count` rows (sorted) of pairs whose captions are nearest to `forget_text` [m, D].

    Those that are nearer than the cosine `most` are left out. Equal captions are equally near.
    """
    first = _first_places(retain)
    number = {caption: i for i, caption in enumerate(first)}
    own = torch.tensor([number[caption] for caption in retain.first_captions], dtype=torch.long)
    nearest = closeness(forget_text, retain.first_text[list(first.values())])[own]
    order = nearest.argsort(descending=True, stable=True)
    order = order[nearest[order] <= most][:count]
    return np.sort(retain.rows[order.numpy()])


def _first_places(features: PairFeatures) -> dict[str, int]:
    """Return first caption -> the first pair with it, in order."""
    first: dict[str, int] = {}
    for place, caption in enumerate(features.first_captions):
        first.setdefault(caption, place)
    return first


def closeness(forget_text: Tensor, text: Tensor) -> Tensor:
    """Return [n], the largest cosine of each row of `text` [n, D] with `forget_text` [m, D]."""
    return torch.cat([chunk.amax(1) for _, chunk in similarity_chunks(text, forget_text)])


def _warn_of_naming_captions(forget_sets: Sequence[PairFeatures], retain: PairFeatures) -> set[str]:
    """Warn of retain captions that name the concept: training on them would teach it again.

    Returns these captions.
    """
    place = _first_places(retain)
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
