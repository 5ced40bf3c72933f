"""Compare pairs to forget with unrelated pairs: their residues, and a contest of captions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasterase.encode import PairFeatures
from fasterase.evaluation.features import all_captions, captions_of
from fasterase.evaluation.metrics import wilson_interval
from fasterase.evaluation.scores import TIE
from fasterase.evaluation.verdict import Trace
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.table import PairTable
from fasterase.seeds import Stream, generator

# Pairs of each set, and unrelated pairs, that are judged at most.
JUDGED_PAIRS = 1000
# Unrelated captions per caption of the concept in the contest, so that chance is at most 5 %.
RIVALS = 19


class PairTraces(NamedTuple):
    """Per-pair figures of one set, [n] each; the chance of its contest.

    Attributes:
        rows: rows of the source.
        image_to_text, text_to_image: residues.
        hit: 1 if a caption of the set wins the image, 0 if not; a share for ties.
        chance: of `hit`.
    """

    rows: np.ndarray
    image_to_text: np.ndarray
    text_to_image: np.ndarray
    hit: np.ndarray
    chance: float

    def metrics(self) -> dict[str, tuple[np.ndarray, float]]:
        """Return metric -> per-pair values and chance level, as the evaluation lists them."""
        return {
            "image_to_text_residue": (self.image_to_text, 0.5),
            "text_to_image_residue": (self.text_to_image, 0.5),
            "contest_hit@1": (self.hit, self.chance),
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
        count = len(self.rows)
        hit = float(self.hit.mean())
        low, high = wilson_interval(hit, count)
        return Trace(
            float(self.image_to_text.mean()),
            float(self.text_to_image.mean()),
            hit,
            low,
            high,
            self.chance,
            count,
        )


class Judge:
    """Compares the pairs of sets to forget with unrelated pairs of the retain set.

    Unrelated pairs are retain pairs whose first caption is none of the captions to forget.

    Args:
        sources: set -> pairs, with a set `"retain"`.
        forget_sets: names of the sets to forget.
        seed: seed of the choice of pairs.
        rows: set -> rows (sorted) to choose from; all rows of a set that is missing here.
        limit: pairs judged of each set at most.

    Attributes:
        rows: set -> rows (sorted) that are judged. Empty if no retain pair is unrelated: then there
            is nothing to compare with, and no verdict.
    """

    def __init__(
        self,
        sources: Mapping[str, PairTable],
        forget_sets: Collection[str],
        *,
        seed: int,
        rows: Mapping[str, np.ndarray] | None = None,
        limit: int = JUDGED_PAIRS,
    ) -> None:
        self._seed = seed
        given = rows or {}
        concept = set().union(*(all_captions(sources[name]) for name in forget_sets))

        def choose(name: str) -> np.ndarray:
            count = len(sources[name])
            order = generator(seed, Stream.VERDICT).permutation(given.get(name, np.arange(count)))
            if name != "retain":
                return order[:limit]
            unrelated: list[int] = []
            for row in order.tolist():
                if len(unrelated) == limit:
                    break
                if _first_caption(sources[name], row) not in concept:
                    unrelated.append(row)
            return np.array(unrelated, dtype=np.int64)

        chosen = {name: choose(name) for name in ("retain", *forget_sets)}
        judged = chosen if len(chosen["retain"]) else {}
        self.rows = {name: np.sort(those) for name, those in judged.items()}

    def judge(self, features: Mapping[str, PairFeatures]) -> dict[str, PairTraces]:
        """Return set -> figures of the judged pairs among `features`; unreadable ones are left out.

        Args:
            features: set -> features under the model, of `rows` or more. Sets to forget that are
                missing are not judged.
        """
        judged = {
            name: features[name].at(rows) for name, rows in self.rows.items() if name in features
        }
        unrelated = judged.pop("retain", None)
        if unrelated is None or not len(unrelated.rows):
            return {}
        return {
            name: _compare(found, unrelated, seed=self._seed)
            for name, found in judged.items()
            if len(found.rows)
        }


def summarise(traces: Mapping[str, PairTraces]) -> dict[str, Trace]:
    """Return set -> summary."""
    return {name: found.summary() for name, found in traces.items()}


def _compare(forget: PairFeatures, unrelated: PairFeatures, *, seed: int) -> PairTraces:
    captions, own = _distinct(forget)
    others, _ = _distinct(unrelated)
    text, rival_text = forget.text[captions], unrelated.text[others]
    matched = (forget.image * text[own]).sum(1, keepdim=True)
    image_rivals = forget.image @ rival_text.T
    text_rivals = (text @ unrelated.image.T)[own]
    size = min(len(captions), max(1, len(others) // RIVALS))
    hit = _contest(forget.image @ text.T, image_rivals, own, size=size, seed=seed)
    return PairTraces(
        rows=forget.rows,
        image_to_text=_share_below(image_rivals, matched),
        text_to_image=_share_below(text_rivals, matched),
        hit=hit,
        chance=size / (size + len(others)),
    )


def _contest(
    concept: Tensor,  # [n, m] cosines of images with captions of the set
    rivals: Tensor,  # [n, U] cosines of images with unrelated captions
    own: Tensor,  # [n] column of each image's own caption
    *,
    size: int,
    seed: int,
) -> np.ndarray:
    """Return [n], 1 where one of `size` captions of the set, the own included, beats all rivals.

    Ties count as a random order would break them.
    """
    drawn = generator(seed, Stream.VERDICT, 1).permutation(concept.shape[1])
    runs = torch.zeros(concept.shape, dtype=torch.bool)
    runs[:, drawn[: size - 1].tolist()] = True
    # The own caption takes a place of its own; where it was drawn anyway, the next one does.
    already = runs.gather(1, own[:, None])[:, 0]
    runs[torch.arange(len(own)), own] = True
    runs[already, int(drawn[size - 1])] = True
    entered = concept.masked_fill(~runs, -torch.inf)
    best = torch.maximum(entered.amax(1), rivals.amax(1))[:, None] - TIE
    winners = (entered >= best).sum(1)
    losers = (rivals >= best).sum(1)
    return (winners / (winners + losers)).double().numpy()


def _share_below(rivals: Tensor, matched: Tensor) -> np.ndarray:
    """Return [n], the share of each row of `rivals` [n, U] below `matched` [n, 1]; ties half."""
    below = (rivals < matched - TIE).double() + (rivals <= matched + TIE).double()
    return (below.mean(1) / 2).numpy()


def _distinct(pairs: PairFeatures) -> tuple[list[int], Tensor]:
    """Return the rows in `pairs.text` of distinct first captions, and each pair's among them."""
    firsts = [captions[0] for captions in pairs.pair_text]
    place: dict[int, int] = {}
    own = [place.setdefault(row, len(place)) for row in firsts]
    return list(place), torch.tensor(own, dtype=torch.int64)


def _first_caption(source: PairTable, row: int) -> str | None:
    try:
        return captions_of(source, row)[0]
    except BrokenPair:  # counted and named when the pair is encoded
        return None
