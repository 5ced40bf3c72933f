"""What residues look like where nothing is known: made-up names in the captions' own templates.

Beside landscapes the caption of any person ranks high for a picture of a person, and the rank of a
single caption varies widely whatever a model knows. So a residue counts as a trace, or as a loud
absence, only beyond those of names that nobody ever learnt, under the original.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasterase.encode import PairEncoder, PairFeatures
from fasterase.evaluation.scores import distinct_firsts
from fasterase.seeds import Stream, generator
from fasterase.vocabulary import (
    GRAMMAR,
    UNREADABLE,
    UNSPACED,
    english_frequencies,
    replace_terms,
    terms_of,
)

PLACEBOS = 64
# The largest residue at which a run ends: a margin below the verdict's own limit.
MARGIN_RESIDUE = 0.65
# Residues of made-up names, .5 to .7 for most concepts, above which they show that the captions'
# kind alone brings them near the pictures: those of persons beside landscapes, of numbers in use.
HIGH_RESIDUE = 0.7
# Means of as many placebos as a set has captions, drawn to find where 95 % of them lie.
_DRAWS = 1000
# Words so frequent in English (Zipf) that they are part of a template: "photo", "small".
_TEMPLATE = 4.7
_SYLLABLES = [start + vowel for start in "bdfgklmnprstvz" for vowel in "aeiou"]


class Band(NamedTuple):
    """Residues between which 95 % of sets of made-up names lie, by direction."""

    image_to_text: tuple[float, float]
    text_to_image: tuple[float, float]

    @property
    def lifts(self) -> tuple[float, float]:
        """How far a margin is to be above `MARGIN_RESIDUE`: 0 where made-up names are below it."""
        to_text, to_image = (max((low + 3 * high) / 4 - MARGIN_RESIDUE, 0.0) for low, high in self)
        return (to_text, to_image) if self.is_high else (0.0, 0.0)

    @property
    def is_high(self) -> bool:
        """Whether made-up names rank so high that less would be a loud absence of the concept."""
        return min(sum(ends) / 2 for ends in self) > HIGH_RESIDUE


def placebo_captions(captions: Sequence[str], kept: Collection[str], seed: int) -> list[str]:
    """Return captions with made-up terms in place of their `_own_terms`, or else of the rarest."""
    numbers = generator(seed, Stream.PLACEBO)
    known = _known_terms(kept)
    own = {caption: _own_terms(caption, known) or _rarest(caption) for caption in captions}
    order = numbers.permutation(len(captions)).tolist()
    chosen = [captions[order[number % len(order)]] for number in range(PLACEBOS)]
    return [_renamed(caption, own[caption], numbers) for caption in chosen]


def made_up_captions(
    captions: Sequence[str], kept: Collection[str], seed: int, count: int
) -> list[str]:
    """Return at most `count` different captions with made-up terms, none of them a real caption.

    Captions that have no `_own_terms` are left out.
    """
    numbers = generator(seed, Stream.MADE_UP, 1)
    known = _known_terms(kept)
    own = {caption: _own_terms(caption, known) for caption in captions}
    usable = [caption for caption in captions if own[caption]]
    chosen = [usable[place % len(usable)] for place in range(count)] if usable else []
    found = dict.fromkeys(_renamed(caption, own[caption], numbers) for caption in chosen)
    return [caption for caption in found if caption not in {*captions, *kept}]


def _renamed(caption: str, own: Collection[str], numbers: np.random.Generator) -> str:
    return replace_terms(caption, {term: _made_up(numbers, term) for term in sorted(own)})


def nonsense_captions(
    captions: Collection[str], kept: Collection[str], seed: int
) -> dict[str, str] | None:
    """Return caption -> itself with made-up terms in place of those that `placebo_captions` takes.

    A term has the same made-up one wherever it goes, which is no word of English or of `kept`:
    equal captions stay equal, and what two captions share they still share. None for captions
    without terms, or in a script whose words have no spaces.
    """
    if not all(map(terms_of, captions)) or any(map(UNSPACED.search, captions)):
        return None
    numbers = generator(seed, Stream.PLACEBO, 2)
    known = _known_terms(kept)
    taken = known | _known_terms(captions) | english_frequencies().keys()
    own = {caption: _own_terms(caption, known) or _rarest(caption) for caption in captions}
    names: dict[str, str] = {}
    for term in sorted(set().union(*own.values())):
        name = _made_up(numbers, term)
        while name in taken:
            name += _made_up(numbers, term)
        names[term] = name
        taken.add(name)
    # A term that retain captions have goes only where there is no other.
    alone = {term: name for term, name in names.items() if term not in known}
    return {
        caption: replace_terms(caption, alone | {term: names[term] for term in terms})
        for caption, terms in own.items()
    }


def _known_terms(captions: Collection[str]) -> set[str]:
    return {term for caption in captions for term in terms_of(caption.lower())}


def _own_terms(caption: str, known: Collection[str]) -> set[str]:
    """Return the terms of a caption that are not `known`, without common words if any is rare.

    "dog" is common, but what "a dog" is about, and a number beside it says no more of what it is.
    """
    frequency = english_frequencies()
    unknown = {each for each in terms_of(caption.lower()) if each not in known}
    own_numbers = {each for each in unknown if each.isdecimal()}
    for most in (_TEMPLATE, GRAMMAR):
        if found := {e for e in unknown - own_numbers if frequency.get(e, 0.0) < most}:
            return found | own_numbers
    return own_numbers


def _rarest(caption: str) -> set[str]:
    """Return the word of a caption that English uses least, or a number where there is none."""
    terms, frequency = terms_of(caption.lower()), english_frequencies()
    order = sorted(terms, key=lambda term: (term.isdecimal(), frequency.get(term, 0.0)))
    return set(order[:1])


def _made_up(numbers: np.random.Generator, term: str) -> str:
    """Return a word, or a number as long as `term` is, in its digits."""
    if term.isdecimal():
        drawn = numbers.integers(10, size=len(term)).tolist()
        return "".join(chr(ord(d) - int(d) + n) for d, n in zip(term, drawn, strict=True))
    return "".join(numbers.choice(_SYLLABLES, int(numbers.integers(2, 4))))


def encode_placebos(
    encoder: PairEncoder, forget: PairFeatures, unrelated: PairFeatures, *, seed: int
) -> Tensor | None:
    """Return features [m, D] of placebos; None for captions that are no words it could replace."""
    captions = list(dict.fromkeys(forget.first_captions))
    is_unspaced = any(map(UNSPACED.search, captions))  # where a word ends is not known
    if encoder.model.text_tokenizer is None or is_unspaced or not any(map(terms_of, captions)):
        return None
    try:
        return encoder.texts(placebo_captions(captions, unrelated.first_captions, seed)).cpu()
    except UNREADABLE:  # a tokenizer that knows the words of its own data alone
        return None


def find_band(
    forget: PairFeatures, unrelated: PairFeatures, placebos: Tensor, *, seed: int
) -> Band:
    """Return where the residues of a set would lie if its captions were made-up names."""
    others, _ = distinct_firsts(unrelated)
    count = len(distinct_firsts(forget)[0])
    own = forget.image @ placebos.T  # [n, m]
    to_text = shares_below(own, forget.image @ unrelated.text[others].T).mean(0)
    to_image = shares_below(own.T, placebos @ unrelated.image.T).mean(1)
    drawn = generator(seed, Stream.PLACEBO, 1).integers(len(placebos), size=(_DRAWS, count))

    def ends(residues: Tensor) -> tuple[float, float]:
        low, high = np.quantile(residues.numpy()[drawn].mean(1), [0.025, 0.975]).tolist()
        return low, high

    return Band(ends(to_text), ends(to_image))


def shares_below(scores: Tensor, rivals: Tensor) -> Tensor:
    """Return [r, k], the share of the row's `rivals` [r, U] that each of `scores` [r, k] beats."""
    ordered = rivals.sort(1).values.contiguous()
    below = torch.searchsorted(ordered, scores.contiguous(), right=False).double()
    return below / rivals.shape[1]
