"""The checks during a run: what is left of the concept, and is the damage within `max_damage`?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from fasterase.encode import PairEncoder, PairFeatures
from fasterase.engine.baseline import Baseline
from fasterase.engine.damage import Damage
from fasterase.engine.findings import Check
from fasterase.engine.job import Job
from fasterase.engine.optim import Trained
from fasterase.evaluation.hurt import Outside, encode_things
from fasterase.evaluation.metrics import TOWER_HITS
from fasterase.evaluation.verdict import REMEMBERED, Judge, Trace, summarise

# Share of everyday words that may lose most of their neighbours before a run is too costly, for
# damage that retain does not show. Erasing fruit or birds from the demo's model takes .01 to .04.
MOST_HURT = 0.25


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
