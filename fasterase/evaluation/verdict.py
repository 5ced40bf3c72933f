"""Whether a concept is forgotten: what is left of it among unrelated pairs, and the verdict.

No threshold on a cosine could serve two models: their scales differ. Verdicts rest on ranks of the
concept's own pairs among unrelated captions and images, where 0.5 means that nothing is known.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasterase.encode import PairEncoder, PairFeatures
from fasterase.evaluation.metrics import NEAR, TOWER_HITS, wilson_interval
from fasterase.evaluation.placebo import Band, encode_placebos, find_band
from fasterase.evaluation.scores import (
    Position,
    all_captions,
    captions_of,
    chance_position,
    distinct_firsts,
    find_position,
    share_below,
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
    """What is left of a set to forget.

    Attributes:
        image_to_text: mean over pairs of the share of unrelated captions that are less similar to
            the image than its own caption: 1 is known, 0.5 no trace, 0 loudly absent.
        text_to_image: the same of unrelated images and the caption.
        hit: share of images won by a caption of the set in a contest with the unrelated captions.
        hit_low: low end of the 95 % Wilson interval of `hit`.
        hit_high: its high end.
        chance: share that a random order would give.
        pairs: number of pairs judged.
        towers: `"image"`, `"text"` -> `hit` of this tower beside the original's other one, and the
            low end of its interval; empty if there was no original to compare with.
        by_hits: whether `hit` alone decides, whatever the number of images.
        band: residues that made-up names have; what lies between them is no trace.
        lifts: how much higher the margins of residues are, by direction.
    """

    image_to_text: float
    text_to_image: float
    hit: float
    hit_low: float
    hit_high: float
    chance: float
    pairs: int
    towers: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    by_hits: bool = False
    band: Band | None = None
    lifts: tuple[float, float] = (0.0, 0.0)

    @property
    def residue(self) -> float:
        """Mean of both directions."""
        return (self.image_to_text + self.text_to_image) / 2

    @property
    def lowered(self) -> tuple[float, float]:
        """The residues of both directions as far as made-up names do not explain them."""
        return self.image_to_text - self.lifts[0], self.text_to_image - self.lifts[1]

    @property
    def is_remembered(self) -> bool:
        known = self.known_beyond > 0 and not self.by_hits
        return known or self.hit_low > self.harmless_hit or bool(self.telling_towers)

    @property
    def harmless_hit(self) -> float:
        """What `hit` may be for certain without a trace."""
        return max(HARMLESS_HIT, 2 * self.chance)

    @property
    def telling_towers(self) -> list[str]:
        """The towers that give the concept away beside the original's other one."""
        towers = {} if self.by_hits else self.towers
        return [name for name, (_, low) in towers.items() if low > TOWER_HIT]

    def strictly(self, *, keep: Collection[str]) -> Trace:
        """Return the trace with the shares of some towers alone, and only a high band."""
        towers = {name: found for name, found in self.towers.items() if name in keep}
        if self.band is None or not self.band.is_high:
            return replace(self, towers=towers, band=None)
        return replace(self, towers=towers, lifts=self.band.lifts)

    @property
    def is_over_erased(self) -> bool:
        return self._beyond(OVER_ERASED_RESIDUE, 0) > 0 and not self.by_hits

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
    def is_decisive(self) -> bool:
        """Whether the images are enough to exclude that many of them are still found."""
        return self.hit_high < DECISIVE_HIT or self.by_hits

    @property
    def could_decide(self) -> bool:
        """Whether it is not decisive although the images would be enough, if fewer were won."""
        enough = wilson_interval(0.0, self.pairs)[1] < DECISIVE_HIT
        return enough and not self.is_decisive

    def _describe_band(self) -> str:
        """Say what made-up names have, where that decides."""
        bare = replace(self, band=None)
        if (bare.is_remembered, bare.is_over_erased) == (self.is_remembered, self.is_over_erased):
            return ""
        ends = (f"{low:.2f} to {high:.2f}" for low, high in self.band or ())
        return f"; made-up names {' and '.join(ends)}"

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


def decide(traces: Mapping[str, Trace], original: Mapping[str, Trace] | None = None) -> str | None:
    """Return the worst of the verdicts of `decide_each`; None without traces."""
    verdicts = decide_each(traces, original).values()
    return next((verdict for verdict in PRECEDENCE if verdict in verdicts), None)


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


def describe_verdict(verdict: str, traces: Mapping[str, Trace]) -> str:
    """Return the verdict with the figures of each set, one line per set."""
    lines = [f"{name}: {trace.describe()}" for name, trace in traces.items()]
    return "\n".join([f"verdict: {verdict}", *lines])


class PairTraces(NamedTuple):
    """What is left of each of n judged pairs of a set to forget."""

    rows: np.ndarray  # [n] of the source
    image_to_text: np.ndarray  # [n] residues
    text_to_image: np.ndarray  # [n]
    hit: np.ndarray  # [n] 1 if a caption of the set wins the image, 0 if not; a share for ties
    chance: float  # of `hit`
    near: np.ndarray  # [n] likewise, if one is among the first `NEAR`
    near_chance: float
    towers: Mapping[str, np.ndarray]  # see `Trace`; [n] each, as `hit`
    band: Band | None  # see `Trace`

    @property
    def residue(self) -> np.ndarray:
        """Mean of both directions."""
        return (self.image_to_text + self.text_to_image) / 2

    def without(self, rows: np.ndarray) -> PairTraces:
        """Return what is left of the pairs that are not in `rows` of the source."""
        keep = ~np.isin(self.rows, rows)
        names = ("rows", "image_to_text", "text_to_image", "hit", "near")
        kept = {name: getattr(self, name)[keep] for name in names}
        towers = {name: values[keep] for name, values in self.towers.items()}
        return self._replace(**kept, towers=towers)

    def metrics(self) -> dict[str, tuple[np.ndarray, float]]:
        """Return metric -> per-pair values and chance level, as the evaluation lists them."""
        near = {f"contest_hit@{NEAR}": (self.near, self.near_chance)}
        return {
            "image_to_text_residue": (self.image_to_text, 0.5),
            "text_to_image_residue": (self.text_to_image, 0.5),
            "contest_hit@1": (self.hit, self.chance),
            **(near if self.near_chance < 1 else {}),  # with so few rivals it says nothing
            **{TOWER_HITS[name]: (hit, self.chance) for name, hit in self.towers.items()},
        }

    def metrics_at(self, rows: np.ndarray) -> dict[str, tuple[np.ndarray, float]]:
        """Return `metrics` for `rows` of the source, among them the judged; NaN for all others."""
        judged = np.isin(rows, self.rows)
        found = {}
        for key, (values, chance) in self.metrics().items():
            spread = np.full(len(rows), np.nan)
            spread[judged] = values
            found[key] = spread, chance
        return found

    def summary(self) -> Trace:
        hit, count = float(self.hit.mean()), len(self.rows)
        residues = float(self.image_to_text.mean()), float(self.text_to_image.mean())
        shares = {name: float(values.mean()) for name, values in self.towers.items()}
        towers = {name: (share, wilson_interval(share, count)[0]) for name, share in shares.items()}
        interval = wilson_interval(hit, count)
        return Trace(*residues, hit, *interval, self.chance, count, towers, band=self.band)


class Judge:
    """Compares the pairs of sets to forget with unrelated pairs of the retain set.

    Unrelated pairs are retain pairs whose first caption is none of the captions to forget.

    Args:
        sources: set -> pairs, with a set `"retain"`.
        forget_sets: names of the sets to forget.
        seed: of the choice of pairs.
        rows: set -> rows (sorted) to choose from; all rows of a set that is missing here.
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

    def calibrate(self, encoder: PairEncoder, features: Mapping[str, PairFeatures]) -> None:
        """Find what residues mean, from the `features` of the original, which `encoder` holds."""
        sets = self.judged(features)
        unrelated = sets.pop("retain", None)
        for name, pairs in sets.items():
            if unrelated is None or not len(pairs.rows):
                continue
            placebos = encode_placebos(encoder, pairs, unrelated, seed=self._seed)
            if placebos is not None:
                self.bands[name] = find_band(pairs, unrelated, placebos, seed=self._seed)

    def judge(
        self,
        features: Mapping[str, PairFeatures],
        original: Mapping[str, PairFeatures] | None = None,
    ) -> dict[str, PairTraces]:
        """Return set to forget -> what is left of its judged pairs among `features` of a model.

        Each of its towers is judged beside the other one of the `original` too, if that is given
        and its features have the same width.
        """
        judged = self.judged(features)
        if original is None or not judged or _width(features) != _width(original):
            return self._compare(judged)
        before = {name: original[name].at(pairs.rows) for name, pairs in judged.items()}
        judged = {name: pairs.at(before[name].rows) for name, pairs in judged.items()}
        found = self._compare(judged)
        hits: dict[str, dict[str, np.ndarray]] = {name: {} for name in found}
        for tower, images, texts in (("image", judged, before), ("text", before, judged)):
            if tower not in self._towers:
                continue
            mixed = {name: replace(texts[name], image=images[name].image) for name in judged}
            for name, traces in self._compare(mixed).items():
                hits[name][tower] = traces.hit
        return {name: traces._replace(towers=hits[name]) for name, traces in found.items()}

    def judged(self, features: Mapping[str, PairFeatures]) -> dict[str, PairFeatures]:
        """Return set -> features of its judged pairs, of the sets that there are."""
        known = [name for name in self.rows if name in features]
        return {name: features[name].at(self.rows[name]) for name in known}

    def _compare(self, judged: Mapping[str, PairFeatures]) -> dict[str, PairTraces]:
        sets = {name: pairs for name, pairs in judged.items() if len(pairs.rows)}
        unrelated = sets.pop("retain", None)
        if unrelated is None:
            return {}
        return {
            name: _compare(found, unrelated, seed=self._seed)._replace(band=self.bands.get(name))
            for name, found in sets.items()
        }


def summarise(traces: Mapping[str, PairTraces]) -> dict[str, Trace]:
    """Return set -> summary."""
    return {
        name: replace(found.summary(), by_hits=name == WITHHELD) for name, found in traces.items()
    }


def _width(features: Mapping[str, PairFeatures]) -> int:
    return features["retain"].image.shape[1]


def _compare(forget: PairFeatures, unrelated: PairFeatures, *, seed: int) -> PairTraces:
    captions, place = distinct_firsts(forget)
    others, _ = distinct_firsts(unrelated)
    own = torch.tensor(place)
    text = forget.text[captions]
    matched = (forget.image * text[own]).sum(1)
    image_rivals = forget.image @ unrelated.text[others].T
    text_rivals = (text @ unrelated.image.T)[own]
    size = min(len(captions), max(1, len(others) // RIVALS))
    found = _contest(forget.image @ text.T, image_rivals, own, size=size, seed=seed)
    by_chance = chance_position(size + len(others), np.array([size]))
    return PairTraces(
        rows=forget.rows,
        image_to_text=share_below(matched, image_rivals),
        text_to_image=share_below(matched, text_rivals),
        hit=found.hit(1),
        chance=size / (size + len(others)),
        near=found.hit(NEAR),
        near_chance=float(by_chance.hit(NEAR)[0]),
        towers={},
        band=None,
    )


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
