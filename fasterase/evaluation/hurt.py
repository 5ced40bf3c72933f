"""What erasing hurt outside the forget set, by name: captions, classes, everyday words.

Averages hide narrow damage: "dog" may be gone with "guide dog" while recall stays as it was.
Everyday things need no pictures: a text that has other neighbours than under the original has
another meaning.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasterase.encode import PairEncoder
from fasterase.evaluation.metrics import CONTEST_HIT
from fasterase.evaluation.scores import SetScores, check_finite
from fasterase.numerals import counted
from fasterase.progress import printable
from fasterase.vocabulary import UNREADABLE, everyday_things, parts_of, words_of

TEMPLATE = "a photo of {}"
NEIGHBOURS = 10
# Share of its neighbours below which a thing counts as hurt.
ENOUGH_NEIGHBOURS = 0.5
RECALL = "image_to_text_recall@1"


class Hurt(NamedTuple):
    """Something that lost by erasing."""

    name: str  # a caption, the name of a class, or an everyday thing
    # `"caption"` (before and after are recall@1 of its pictures, among the captions of all sets),
    # `"class"` (zero-shot accuracy) or `"word"` (share of the nearest everyday things under the
    # original that are still nearest).
    kind: str
    before: float  # shares: of the original
    after: float  # and of the model
    # Pictures; of a word, neighbours.
    count: int  # type: ignore[assignment]  # of tuples, which nobody counts in

    def describe(self) -> str:
        """Return `ant 100 -> 0 % of 2 pictures`."""
        things = counted(self.count, "neighbour" if self.kind == "word" else "picture")
        kind = " (class)" if self.kind == "class" else ""
        before, after = 100 * self.before, 100 * self.after
        return f"{printable(self.name)}{kind} {before:.0f} -> {after:.0f} % of {things}"


class Remaining(NamedTuple):
    """A caption to forget that still wins pictures, in the contest of the verdict."""

    name: str
    found: float  # share of its pictures that a caption of the set wins
    count: int  # type: ignore[assignment]  # pictures

    def describe(self) -> str:
        """Return `octopus 50 % of 2 pictures`."""
        return (
            f"{printable(self.name)} {100 * self.found:.0f} % of {counted(self.count, 'picture')}"
        )


def find_remaining(
    captions: Mapping[str, Sequence[str]], sets: Mapping[str, SetScores]
) -> list[Remaining]:
    """Return the captions that still win a picture, those that win most of theirs first.

    `captions` maps a set to forget to the first caption of each of its pairs.
    """
    hits: dict[str, dict[str, float]] = defaultdict(dict)
    for set_name, of_pairs in captions.items():
        scores = sets[set_name]
        values = scores.values.get(CONTEST_HIT, np.full(len(of_pairs), np.nan))
        for caption, id, hit in zip(of_pairs, scores.ids, values.tolist(), strict=True):
            if not np.isnan(hit):
                hits[caption][id] = hit
    found = [
        Remaining(name, float(np.mean(list(each.values()))), len(each))
        for name, each in hits.items()
    ]
    return sorted((each for each in found if each.found), key=lambda each: (-each.found, each.name))


def choose_things(captions: Collection[str], count: int | None) -> list[str]:
    """Return `count` everyday things to measure, or all of them if it is None.

    Those that share words or letters with the `captions` to forget come first. Things that a
    caption names as a whole are left out.
    """
    named = {" ".join(words_of(caption.lower())) for caption in captions}
    words = {word for caption in captions for word in words_of(caption.lower())}
    parts = set().union(*map(parts_of, words))
    things = [thing for thing in everyday_things() if " ".join(words_of(thing)) not in named]
    order = np.random.default_rng(0).permutation(len(things)).tolist()  # the same for every run

    def shared(place: int) -> tuple[int, int]:
        own = words_of(things[place])
        return len(words.intersection(own)), len(parts & set().union(*map(parts_of, own)))

    order.sort(key=shared, reverse=True)
    return sorted(things[place] for place in order[:count])


def encode_things(encoder: PairEncoder, things: Sequence[str]) -> Tensor | None:
    """Return features [n, D] of things, each in a plain phrase; None if it cannot read them."""
    if not things or encoder.model.text_tokenizer is None:
        return None
    try:
        found = encoder.texts([TEMPLATE.format(thing) for thing in things]).float().cpu()
    except UNREADABLE as error:  # a device that fails says so itself
        warnings.warn(
            f"everyday words are not measured: the tokenizer of {encoder.model.name} cannot read "
            f"them ({type(error).__name__}: {error})",
            stacklevel=2,
        )
        return None
    check_finite(found, things, encoder.model.name)
    return found


class Outside(NamedTuple):
    """How far everyday things moved."""

    cosine: np.ndarray  # [n] with the feature of the same text under the original
    neighbours: np.ndarray  # [n] share of the nearest things under the original that still are

    @classmethod
    def compare(cls, model: Tensor, original: Tensor) -> Outside:
        """Compare features [n, D] of the same things; the cosines are NaN for another D."""
        count = min(NEIGHBOURS, len(model) - 1)
        now, before = _neighbours(model, count), _neighbours(original, count)
        same = (now[:, :, None] == before[:, None, :]).any(2).double().mean(1)
        if model.shape == original.shape:
            cosine = torch.cosine_similarity(model, original).double()
        else:
            cosine = torch.full((len(model),), torch.nan)
        return cls(cosine.numpy(), same.numpy())

    def summary(self) -> dict[str, float]:
        """Return name -> value, ready for JSON; cosines only if there are any."""
        found = {
            "things": len(self.neighbours),
            "neighbours": float(self.neighbours.mean()),
            "hurt": float((self.neighbours < ENOUGH_NEIGHBOURS).mean()),
        }
        if not np.isnan(self.cosine).any():
            found["cosine"] = float(self.cosine.mean())
            found["cosine_of_5_percent"] = float(np.quantile(self.cosine, 0.05))
        return found

    def hurt(self, things: Sequence[str]) -> Iterator[Hurt]:
        """Yield the things that kept less than half of their neighbours."""
        count = min(NEIGHBOURS, len(things) - 1)
        for thing, share in zip(things, self.neighbours.tolist(), strict=True):
            if share < ENOUGH_NEIGHBOURS:
                yield Hurt(thing, "word", 1.0, share, count)


def hurt_groups(
    kind: str,
    names: Mapping[str, Sequence[str | None]],
    model: Mapping[str, SetScores],
    original: Mapping[str, SetScores],
    metric: str,
) -> Iterator[Hurt]:
    """Yield the groups of pairs whose mean of a metric fell.

    `names` maps a set to the group of each of its pairs, or None; `model` and `original` to scores
    of the same pairs.
    """
    groups: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
    for set_name, of_pairs in names.items():
        before, after = (scores[set_name].values.get(metric) for scores in (original, model))
        if before is None or after is None:
            continue
        ids = model[set_name].ids  # a pair may be in two sets
        for name, id, old, new in zip(of_pairs, ids, before.tolist(), after.tolist(), strict=True):
            if name is not None:
                groups[name][id] = old, new
    for name, values in groups.items():
        old, new = np.mean(list(values.values()), axis=0).tolist()
        if new < old:
            yield Hurt(name, kind, old, new, len(values))


def worst_first(found: Iterable[Hurt]) -> list[Hurt]:
    """Sort by what was lost; where that is equal pictures before texts, many before few."""

    def key(each: Hurt) -> tuple[float, bool, int, str]:
        return each.after - each.before, each.kind == "word", -each.count, each.name

    return sorted(found, key=key)


def _neighbours(features: Tensor, count: int) -> Tensor:
    similarity = features @ features.T
    similarity.fill_diagonal_(-torch.inf)
    return similarity.topk(count).indices
