"""What a check in the middle of a run has found, against the margins inside the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from fasterase.evaluation.metrics import wilson_interval
from fasterase.evaluation.placebo import MARGIN_RESIDUE
from fasterase.evaluation.verdict import (
    FORGOTTEN,
    LEAST_RANKED,
    OVER_ERASED,
    REMEMBERED,
    TOWER_HIT,
    UNDECIDED,
    WITHHELD,
    Trace,
    decide,
)

# lr fades once the residue is at most `MARGIN_RESIDUE` and images are won hardly more often than by
# chance: fading and unseen pictures need a margin below the verdict's own thresholds.
MARGIN_HIT = 0.05
# ... and neither tower, beside the original's other one, wins more of a set's images than this; in
# the mean of retrained models (benchmarks/evidence) the image tower wins 9 %. A fade may bring some
# back, and is better all the same.
TOLD_HIT, TOLD_AGAIN = 0.1, 0.05
# Waiting ends below this residue, before it leads to "over-erased".
LEAST_RESIDUE = 0.35
# Residues at which final weights may rest: the verdict's thresholds with a margin, for other pairs
# and other processors.
RESTING = (0.3, 0.7)

# Ranks of verdicts among the candidates for the best weights.
RANKS = {
    verdict: rank for rank, verdict in enumerate((FORGOTTEN, UNDECIDED, OVER_ERASED, REMEMBERED))
}


class Check(NamedTuple):
    """A measurement in the middle of a run."""

    traces: Mapping[str, Trace]  # set to forget -> what is left of it
    damage: float  # share of recall@1 lost on retain pairs
    exceeded: bool  # whether that is above `max_damage`, beyond chance
    trained: Mapping[str, Trace] = MappingProxyType({})  # `traces` without withheld pairs, if any

    @property
    def verdict(self) -> str:
        return decide(self.traces) or REMEMBERED

    def findings(self) -> dict[str, float]:
        """Return what the history keeps of it."""
        residues = {"residue": self.residue, "least_residue": self.least_residue}
        return {**(residues if self._residues else {}), "damage": self.damage}

    @property
    def _residues(self) -> list[float]:
        return [each for t in self._ranked for each in t.lowered]

    @property
    def _ranked(self) -> list[Trace]:
        """The traces whose residues and few hits say something."""
        return [trace for trace in self.traces.values() if not trace.by_hits]

    @property
    def residue(self) -> float:
        """The largest residue of a direction; 0 if no set was ever known."""
        return max(self._residues, default=0.0)

    @property
    def least_residue(self) -> float:
        """The smallest residue of a direction; 1 if no set was ever known."""
        return min(self._residues, default=1.0)

    @property
    def excess(self) -> float:
        """How far what is left is above the verdict's thresholds, of all of them together."""
        known = max((t.known_beyond for t in self._ranked), default=0.0)
        towers = sum(
            max(low - TOWER_HIT, 0.0) for t in self._ranked for _, low in t.towers.values()
        )
        hits = sum(max(t.hit_low - t.harmless_hit, 0.0) for t in self.traces.values())
        return known + towers + hits

    @property
    def beyond_rest(self) -> float:
        """How far the worst residue of a direction is outside `RESTING`."""
        return max(RESTING[0] - self.least_residue, self.residue - RESTING[1], 0.0)

    @property
    def lacks_withheld_alone(self) -> bool:
        """Whether all is low enough, but the withheld pairs are still remembered."""
        others = {n: trace for n, trace in self.traces.items() if n != WITHHELD}
        rest = Check({**others, **self.trained}, self.damage, self.exceeded)
        return bool(self.trained) and rest.is_low and self.verdict == REMEMBERED

    @property
    def is_indecisive(self) -> bool:
        """Whether too many images are still won to be sure, of a set that has enough of them."""
        return any(trace.could_decide for trace in self.traces.values())

    @property
    def is_low(self) -> bool:
        """Whether the traces are below the verdict's thresholds, residues by a margin.

        If one direction has already fallen far, further training would push it below its margin.
        """
        margin = MARGIN_RESIDUE if self.least_residue > LEAST_RESIDUE else RESTING[1]
        return self.verdict != REMEMBERED and self.residue <= margin

    @property
    def is_safely_forgotten(self) -> bool:
        """Whether all traces are below the thresholds, and those of drawn pairs by a margin.

        Withheld pairs would take the whole budget for it.
        """
        given = {**self.traces, **self.trained}.values()
        return self.is_low and all(
            trace.hit <= max(MARGIN_HIT, 1.5 * trace.chance) for trace in given if not trace.by_hits
        )

    @property
    def told(self) -> list[float]:
        """How much more of each set the towers give away than they may, beside the original's.

        Withheld pairs do not count, nor do sets of so few images that one or two would decide.
        """
        return [
            sum(max(hit - max(TOLD_HIT, 1.5 * t.chance), 0.0) for hit, _ in t.towers.values())
            for name, t in {**self.traces, **self.trained}.items()
            if name != WITHHELD and not t.by_hits and t.pairs >= LEAST_RANKED
        ]

    def rank(self, *, faded: bool, waits: bool = True) -> list[float]:
        """Return what orders candidates for the best weights, the smallest first."""
        if self.verdict == REMEMBERED:
            order = [self.excess, self.beyond_rest, self.damage]
        elif self.verdict == OVER_ERASED:
            order = [self.damage]
        else:
            tells = int(waits and max(self.told, default=0.0) > TOLD_AGAIN)
            rest = self.beyond_rest, tells, int(not faded), self.damage
            order = [int(self.is_indecisive), *rest]
        return [int(self.exceeded), RANKS[self.verdict], *order]

    @property
    def has_few(self) -> bool:
        """Whether all sets have so few images that little can be known of them."""
        return all(trace.pairs < LEAST_RANKED for trace in self.traces.values())

    def keeps_low(self, whole: Check) -> bool:
        """Whether residues are at most at their margin, and else nothing worse than in `whole`.

        A tower may win images again, unless with one more it would tell.
        """
        if (self.verdict, self.exceeded) != (whole.verdict, whole.exceeded):
            return False
        for name, trace in self.traces.items():
            high = not trace.by_hits and max(trace.lowered) > MARGIN_RESIDUE
            if high or trace.hit > whole.traces[name].hit:
                return False
            for tower, (hit, _) in trace.towers.items():
                more = wilson_interval(min(1.0, hit + 1 / trace.pairs), trace.pairs)[0]
                if hit > whole.traces[name].towers[tower][0] and more > TOWER_HIT:
                    return False
        return True
