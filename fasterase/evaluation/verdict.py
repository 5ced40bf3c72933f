"""Whether a concept is forgotten: what is left of it among unrelated pairs, and the verdict.

No threshold on a cosine could serve two models: their scales differ. Verdicts rest on ranks of the
concept's own pairs among unrelated captions and images, where 0.5 means that nothing is known.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasterase.encode import PairEncoder, PairFeatures
from fasterase.evaluation.metrics import (
    CONTEST_HIT,
    CONTEST_NEAR,
    NEAR,
    RESIDUES,
    TOWER_HITS,
    wilson_interval,
)
from fasterase.evaluation.placebo import Band, encode_placebos, find_band
from fasterase.evaluation.scores import (
    Position,
    all_captions,
    captions_of,
    chance_hit,
    distinct_firsts,
    find_position,
    share_below,
    spread_values,
)
from fasterase.numerals import counted
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.table import PairTable
from fasterase.seeds import Stream, generator

FORGOTTEN, REMEMBERED = "forgotten", "remembered"
OVER_ERASED, NEVER_KNOWN, UNDECIDED = "over-erased", "never known", "undecided"
# The worst first: a result of several sets is the worst of theirs.
PRECEDENCE = (REMEMBERED, OVER_ERASED, UNDECIDED, FORGOTTEN, NEVER_KNOWN)

# Models retrained without a concept have residues of .60 to .70: they still know that an apple is
# food and red. Above this a direction counts as known.
REMEMBERED_RESIDUE = 0.75
# As far below "no trace" (0.5) as the other threshold is above it: loudly absent.
OVER_ERASED_RESIDUE = 0.25
# Hit rates that chance and a few lucky images explain.
HARMLESS_HIT = 0.10
# "forgotten" needs an upper end of the hit rate's interval below this: twelve images without a hit.
DECISIVE_HIT = 0.25
# A tower that wins so many images beside the original's other one gives the concept away. Models
# retrained without a concept win up to 42 %.
TOWER_HIT = 0.5
# The set of those pairs to forget that the run was not trained on. They are few: the ranks of a
# handful of captions vary widely where nothing is known of them, and one picture decides a tower.
WITHHELD = "withheld"
# What names of sets begin with that were erased before: they are to stay so.
EARLIER = "erased before"
# Forget images below which a verdict shows little.
FEW_IMAGES = 20

# Images from which on residues count, where made-up names tell what they mean.
LEAST_RANKED = 12

# Pairs of each set, and unrelated pairs, that are judged at most.
JUDGED_PAIRS = 1000
# Unrelated captions per caption of the concept in the contest, so that chance is at most 5 %.
RIVALS = 19


@dataclass(frozen=True)
class Trace:
    """What is left of a set to forget."""

    # Mean over pairs of the share of unrelated captions that are less similar to the image than its
    # own caption: 1 is known, 0.5 no trace, 0 loudly absent.
    image_to_text: float
    text_to_image: float  # the same of unrelated images and the caption
    hit: float  # share of images won by a caption of the set in a contest with unrelated captions
    hit_low: float  # ends of its 95 % Wilson interval
    hit_high: float
    chance: float  # of `hit`, by a random order
    pairs: int  # judged
    # `"image"`, `"text"` -> `hit` of this tower beside the original's other one, and the low end of
    # its interval; empty if there was no original to compare with.
    towers: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    by_hits: bool = False  # whether `hit` alone decides, whatever the number of images
    band: Band | None = None  # residues that made-up names have: between them there is no trace
    lifts: tuple[float, float] = (0.0, 0.0)  # how much higher margins of residues are, by direction

    @property
    def is_remembered(self) -> bool:
        known = self.known_beyond > 0 and not self.by_hits
        return known or self.hit_low > self.harmless_hit or bool(self.telling_towers)

    @property
    def is_over_erased(self) -> bool:
        return self._beyond(OVER_ERASED_RESIDUE, 0) > 0 and not self.by_hits

    @property
    def is_decisive(self) -> bool:
        """Whether the images are enough to exclude that many of them are still found."""
        return self.hit_high < DECISIVE_HIT or self.by_hits

    @property
    def could_decide(self) -> bool:
        """Whether it is not decisive although the images would be enough, if fewer were won."""
        enough = wilson_interval(0.0, self.pairs)[1] < DECISIVE_HIT
        return enough and not self.is_decisive

    @property
    def harmless_hit(self) -> float:
        """What `hit` may be for certain without a trace."""
        return max(HARMLESS_HIT, 2 * self.chance)

    @property
    def telling_towers(self) -> list[str]:
        """The towers that give the concept away beside the original's other one."""
        towers = {} if self.by_hits else self.towers
        return [name for name, (_, low) in towers.items() if low > TOWER_HIT]

    @property
    def known_beyond(self) -> float:
        """How far the worse residue is above its limit for "remembered"; 0 if it is not."""
        return self._beyond(REMEMBERED_RESIDUE, 1)

    def _beyond(self, limit: float, end: int) -> float:
        """How far a residue is beyond a limit and beyond an end of the band, if images suffice."""
        if self.band is not None and self.pairs < LEAST_RANKED:
            return 0.0
        sign = 1 if end else -1
        ends = [limit] * 2 if self.band is None else [found[end] for found in self.band]
        residues = self.image_to_text, self.text_to_image
        return max(
            max(sign * residue - max(sign * limit, sign * end), 0.0)
            for residue, end in zip(residues, ends, strict=True)
        )

    @property
    def residue(self) -> float:
        """Mean of both directions."""
        return (self.image_to_text + self.text_to_image) / 2

    @property
    def lowered(self) -> tuple[float, float]:
        """The residues of both directions as far as made-up names do not explain them."""
        return self.image_to_text - self.lifts[0], self.text_to_image - self.lifts[1]

    def strictly(self, *, keep: Collection[str]) -> Trace:
        """Return the trace with the shares of some towers alone, and only a high band."""
        towers = {name: found for name, found in self.towers.items() if name in keep}
        if self.band is None or not self.band.is_high:
            return replace(self, towers=towers, band=None)
        return replace(self, towers=towers, lifts=self.band.lifts)

    def describe(self) -> str:
        towers = "".join(
            f"; {100 * hit:.0f} % by the {name} tower beside the original's other one"
            for name, (hit, _) in self.towers.items()
        )
        return (
            f"residue {self.image_to_text:.2f} image->text, {self.text_to_image:.2f} text->image "
            f"(1 known, 0.5 no trace, 0 loudly absent{self._describe_band()}); "
            f"hit@1 {100 * self.hit:.0f} % (chance {100 * self.chance:.0f} %) of "
            f"{counted(self.pairs, 'image')}{towers}"
        )

    def _describe_band(self) -> str:
        """Say what made-up names have, where that decides."""
        bare = replace(self, band=None)
        if (bare.is_remembered, bare.is_over_erased) == (self.is_remembered, self.is_over_erased):
            return ""
        ends = (f"{low:.2f} to {high:.2f}" for low, high in self.band or ())
        return f"; made-up names {' and '.join(ends)}"


def decide_each(
    traces: Mapping[str, Trace], original: Mapping[str, Trace] | None = None
) -> dict[str, str]:
    """Return set to forget -> verdict on it.

    It is `"remembered"`, `"over-erased"`, `"undecided"`, `"forgotten"`, or `"never known"` where
    the `original`, if it was measured, does not remember the set. What was erased before may have
    been learnt again: it is "remembered" then.
    """

    def of(name: str, trace: Trace) -> str:
        is_back = name.startswith(EARLIER) and trace.is_remembered
        if original is not None and not original[name].is_remembered and not is_back:
            return NEVER_KNOWN
        if trace.is_remembered:
            return REMEMBERED
        if trace.is_over_erased:
            return OVER_ERASED
        return FORGOTTEN if trace.is_decisive else UNDECIDED

    return {name: of(name, trace) for name, trace in traces.items()}


def decide(traces: Mapping[str, Trace], original: Mapping[str, Trace] | None = None) -> str | None:
    """Return the worst of the verdicts of `decide_each`; None without traces."""
    verdicts = decide_each(traces, original).values()
    return next((verdict for verdict in PRECEDENCE if verdict in verdicts), None)


def describe_verdict(verdict: str, traces: Mapping[str, Trace]) -> str:
    """Return the verdict with the figures of each set, one line per set."""
    lines = [f"{name}: {trace.describe()}" for name, trace in traces.items()]
    return "\n".join([f"verdict: {verdict}", *lines])


class PairTraces(NamedTuple):
    """What is left of each of n judged pairs of a set to forget."""

    rows: np.ndarray  # [n] of the source
    # Metric (`RESIDUES`, hits in the contest, `TOWER_HITS`) -> [n]. A hit is 1 if a caption of the
    # set wins the image, 0 if not, and a share for ties.
    values: dict[str, np.ndarray]
    chance: dict[str, float]  # metric -> chance level
    band: Band | None = None  # see `Trace`

    @property
    def hit(self) -> np.ndarray:
        return self.values[CONTEST_HIT]

    @property
    def residue(self) -> np.ndarray:
        """Mean of both directions."""
        to_text, to_image = (self.values[key] for key in RESIDUES)
        return (to_text + to_image) / 2

    def without(self, rows: np.ndarray) -> PairTraces:
        """Return what is left of the pairs that are not in `rows` of the source."""
        keep = ~np.isin(self.rows, rows)
        values = {key: those[keep] for key, those in self.values.items()}
        return self._replace(rows=self.rows[keep], values=values)

    def spread(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return `values` for `rows` of the source, among them the judged; NaN for all others."""
        judged = np.isin(rows, self.rows)
        return {key: spread_values(those, judged) for key, those in self.values.items()}

    def summary(self) -> Trace:
        means = {key: float(those.mean()) for key, those in self.values.items()}
        ends = {key: wilson_interval(means[key], len(self.rows)) for key in means}
        to_text, to_image = RESIDUES
        return Trace(
            means[to_text],
            means[to_image],
            means[CONTEST_HIT],
            *ends[CONTEST_HIT],
            self.chance[CONTEST_HIT],
            len(self.rows),
            {name: (means[k], ends[k][0]) for name, k in TOWER_HITS.items() if k in means},
            band=self.band,
        )


def summarise(traces: Mapping[str, PairTraces]) -> dict[str, Trace]:
    return {
        name: replace(found.summary(), by_hits=name == WITHHELD) for name, found in traces.items()
    }


class Judge:
    """Compares the pairs of sets to forget with unrelated pairs of the retain set.

    Unrelated pairs are retain pairs whose first caption is none of the captions to forget.

    Args:
        sources: set -> pairs, with a set `"retain"`.
        forget_sets: names of the sets to forget.
        seed: of the choice of pairs.
        rows: set -> rows (sorted) to choose from; of a set that is missing, all.
        towers: those that are judged beside the original's other one.

    Attributes:
        rows: set -> rows (sorted) that are judged; empty, and no verdict, without unrelated pairs.
        bands: set -> residues of made-up names, once `calibrate` has found them.
    """

    def __init__(
        self,
        sources: Mapping[str, PairTable],
        forget_sets: Collection[str],
        *,
        seed: int,
        rows: Mapping[str, np.ndarray] | None = None,
        towers: Collection[str] = ("image", "text"),
    ) -> None:
        self._seed, self._towers = seed, towers
        concept = set().union(*(all_captions(sources[name]) for name in forget_sets))

        def is_unrelated(row: int) -> bool:
            try:
                return captions_of(sources["retain"], row)[0] not in concept
            except BrokenPair:  # counted and named when the pair is encoded
                return True

        def choose(name: str) -> np.ndarray:
            given = (rows or {}).get(name, np.arange(len(sources[name])))
            order = generator(seed, Stream.VERDICT).permutation(given)
            if name == "retain":
                unrelated = islice(filter(is_unrelated, order.tolist()), JUDGED_PAIRS)
                order = np.fromiter(unrelated, dtype=np.int64)
            return np.sort(order[:JUDGED_PAIRS])

        chosen = {name: choose(name) for name in ("retain", *forget_sets)}
        self.rows = chosen if len(chosen["retain"]) else {}
        self.bands: dict[str, Band] = {}

    def judged(self, features: Mapping[str, PairFeatures]) -> dict[str, PairFeatures]:
        """Return set -> features of its judged pairs, of the sets that there are."""
        return features_at(features, {n: rows for n, rows in self.rows.items() if n in features})

    def calibrate(self, encoder: PairEncoder, features: Mapping[str, PairFeatures]) -> None:
        """Find what residues mean, from the `features` of the original, which `encoder` holds."""
        for name, pairs, unrelated in _beside_unrelated(self.judged(features)):
            placebos = encode_placebos(encoder, pairs, unrelated, seed=self._seed)
            if placebos is not None:
                self.bands[name] = find_band(pairs, unrelated, placebos, seed=self._seed)

    def judge(
        self,
        features: Mapping[str, PairFeatures],
        original: Mapping[str, PairFeatures] | None = None,
    ) -> dict[str, PairTraces]:
        """Return set to forget -> what is left of its judged pairs among `features` of a model.

        Beside the `original`, if it is given and has features of the same width, each tower too.
        """
        judged = self.judged(features)
        if original is None or not judged or _width(features) != _width(original):
            return self._compare(judged)
        before = {name: original[name].at(pairs.rows) for name, pairs in judged.items()}
        judged = {name: pairs.at(before[name].rows) for name, pairs in judged.items()}
        found = self._compare(judged)
        for tower, images, texts in (("image", judged, before), ("text", before, judged)):
            if tower not in self._towers:
                continue
            mixed = {name: replace(texts[name], image=images[name].image) for name in judged}
            for name, beside in self._compare(mixed).items():
                found[name].values[TOWER_HITS[tower]] = beside.hit
                found[name].chance[TOWER_HITS[tower]] = beside.chance[CONTEST_HIT]
        return found

    def _compare(self, judged: Mapping[str, PairFeatures]) -> dict[str, PairTraces]:
        found = {}
        for name, pairs, unrelated in _beside_unrelated(judged):
            traces = compare_pairs(pairs, unrelated, seed=self._seed)
            found[name] = traces._replace(band=self.bands.get(name))
        return found


def _beside_unrelated(
    judged: Mapping[str, PairFeatures],
) -> Iterator[tuple[str, PairFeatures, PairFeatures]]:
    """Yield the name and the pairs of each set to forget that has any, and the unrelated pairs."""
    unrelated = judged.get("retain")
    for name, pairs in judged.items():
        if name != "retain" and unrelated is not None and len(pairs.rows) and len(unrelated.rows):
            yield name, pairs, unrelated


def features_at(
    features: Mapping[str, PairFeatures], rows: Mapping[str, np.ndarray]
) -> dict[str, PairFeatures]:
    """Return set -> its features at `rows`."""
    return {name: features[name].at(those) for name, those in rows.items()}


def _width(features: Mapping[str, PairFeatures]) -> int:
    return features["retain"].image.shape[1]


def compare_pairs(forget: PairFeatures, unrelated: PairFeatures, *, seed: int) -> PairTraces:
    captions, place = distinct_firsts(forget)
    others, _ = distinct_firsts(unrelated)
    own = torch.tensor(place)
    text = forget.text[captions]
    matched = (forget.image * text[own]).sum(1)
    rivals = {
        "image_to_text": forget.image @ unrelated.text[others].T,
        "text_to_image": (text @ unrelated.image.T)[own],
    }
    size = min(len(captions), max(1, len(others) // RIVALS))
    total = size + len(others)
    hits = _contest(forget.image @ text.T, rivals["image_to_text"], own, size=size, seed=seed)
    values = {f"{key}_residue": share_below(matched, those) for key, those in rivals.items()}
    chance = {**dict.fromkeys(values, 0.5), CONTEST_HIT: size / total}
    values[CONTEST_HIT] = hits.hit(1)
    near_chance = chance_hit(NEAR, np.array([total]), np.array([size]))
    if near_chance < 1:  # with fewer rivals it says nothing
        values[CONTEST_NEAR], chance[CONTEST_NEAR] = hits.hit(NEAR), near_chance
    return PairTraces(forget.rows, values, chance)


def _contest(
    concept: Tensor,  # [n, m] cosines of images with captions of the set
    rivals: Tensor,  # [n, U] cosines of images with unrelated captions
    own: Tensor,  # [n] column of each image's own caption
    *,
    size: int,
    seed: int,
) -> Position:
    """Return where the best of `size` captions of the set, the own included, stands."""
    drawn = generator(seed, Stream.VERDICT, 1).permutation(concept.shape[1])
    runs = torch.zeros(concept.shape, dtype=torch.bool)
    runs[:, drawn[: size - 1].tolist()] = True
    # The own caption takes a place of its own; where it was drawn anyway, the next one does.
    already = runs.gather(1, own[:, None])[:, 0]
    runs[torch.arange(len(own)), own] = True
    runs[already, int(drawn[size - 1])] = True
    entered = torch.cat([concept.masked_fill(~runs, -torch.inf), rivals], 1)
    return find_position(entered, torch.cat([runs, torch.zeros_like(rivals, dtype=torch.bool)], 1))
