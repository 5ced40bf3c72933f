"""What testifies for a pair to show a concept: its caption by words, its picture by similarity."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasterase.encode import check_readable
from fasterase.engine.damage import closeness
from fasterase.engine.words import COMMON
from fasterase.errors import InputError
from fasterase.original.features import OriginalFeatures
from fasterase.pairs.table import PairTable
from fasterase.parallel.ranks import Ranks
from fasterase.progress import Progress
from fasterase.seeds import Stream, generator
from fasterase.vocabulary import GRAMMAR, UNSPACED, english_frequencies, words_of

# Pairs whose features are in memory at a time: 32 MB of D=512.
CHUNK = 1 << 13
# Unrelated pairs behind the mean and deviation of each kind of similarity.
PILOT = 4096
# Pairs with the nearest captions that are remembered, of which neighbours are chosen.
NEAREST_CAPTIONS = 1024
# An underscore ends a word, as in names of files.
_WORD_BEGINS, _WORD_ENDS = r"(?<![^\W_])", r"(?:e?s)?(?![^\W_])"


class NamedPairs(NamedTuple):
    """What the captions of n pairs say of a concept."""

    named: np.ndarray  # [n] bool, whether one of them names it
    related: np.ndarray  # [n] bool, whether one has a word of its name, but none names it


def fold(text: str) -> str:
    """Return a text without differences of case and of Unicode form."""
    return unicodedata.normalize("NFKC", text).casefold()


def naming_pattern(wordings: Sequence[str]) -> re.Pattern[str]:
    """Return what finds any of the wordings, as whole words, in a folded text.

    A plural in s or es counts, and so do hyphens and underscores for spaces. In scripts without
    spaces between words, any place counts.
    """
    return re.compile("|".join(map(_pattern_of, wordings)))


def _pattern_of(wording: str) -> str:
    text = fold(wording).strip()
    words = [re.escape(word) for word in re.split(r"[\s_-]+", text) if word]
    pattern = r"[\s_-]+".join(words) or re.escape(text)
    begins, ends = (e.isalnum() and not UNSPACED.search(e) for e in (text[0], text[-1]))
    return f"{_WORD_BEGINS * begins}{pattern}{_WORD_ENDS * ends}"


def shared_words(wordings: Sequence[str]) -> list[str]:
    """Return the common words in names of several words: other captions need them too.

    To forget guide dogs is not to forget dogs.
    """
    every = [words_of(fold(wording)) for wording in wordings]
    alone = {words[0] for words in every if len(words) == 1}
    parts = {word for words in every if len(words) > 1 for word in words} - alone
    frequencies = english_frequencies()
    return sorted(word for word in parts if COMMON <= frequencies.get(word, 0.0) < GRAMMAR)


def read_captions(
    source: PairTable, wordings: Sequence[str], not_about: Sequence[str]
) -> NamedPairs:
    """Look for the concept in all captions of each pair; one with `not_about` does not count.

    Raises:
        InputError: captions are token ids.
    """
    names, words = naming_pattern(wordings), shared_words(wordings)
    others = naming_pattern(not_about) if not_about else None
    parts = naming_pattern(words) if words else None
    named, related = np.zeros((2, len(source)), bool)
    description = f"reading captions of {source.name}"
    every, total = source.every_text(), len(source)
    bar = Progress(description, items=every, total=total, unit="pair", delay=2)
    for row, texts in enumerate(bar):
        if isinstance(texts, Tensor):
            raise InputError(
                f"`{source.name}`: the captions of {source.id(row)} are token ids, in which no "
                "name can be found; give them as strings"
            )
        folded = [fold(text) for text in texts]
        if others is not None:
            folded = [text for text in folded if not others.search(text)]
        named[row] = any(map(names.search, folded))
        related[row] = parts is not None and not named[row] and any(map(parts.search, folded))
    return NamedPairs(named, related)


def sample(captions: NamedPairs, max_pairs: int | None, seed: int) -> np.ndarray:
    """Return the rows (sorted) that are judged: all, or `max_pairs`, drawn at random.

    At most half of these name the concept, and a quarter share a word with it, as far as there are
    such pairs: at random, a rare concept would hardly be among them.
    """
    count = len(captions.named)
    if max_pairs is None or count <= max_pairs:
        return np.arange(count)
    order = generator(seed, Stream.FIND).permutation(count)
    is_named, is_related = captions.named[order], captions.related[order]
    first = np.concatenate([order[is_named][: max_pairs // 2], order[is_related][: max_pairs // 4]])
    is_other = ~np.isin(order, first)
    return np.sort(np.concatenate([first, order[is_other][: max_pairs - len(first)]]))


@dataclass(frozen=True)
class Queries:
    """Unit features of what a concept looks like, and of what it is not."""

    wordings: Tensor  # [q, D]
    examples: Tensor  # [e, D] images; e may be 0
    not_about: Tensor  # [a, D]; a may be 0

    def similarities(self, image: Tensor) -> Tensor:
        """Return [n, 3], the largest cosine of images [n, D] with each kind; 0 without any."""
        kinds = (self.wordings, self.examples, self.not_about)
        return torch.stack(
            [closeness(k, image) if len(k) else torch.zeros(len(image)) for k in kinds], dim=1
        )

    def scores(self, image: Tensor, unrelated: tuple[Tensor, Tensor]) -> Tensor:
        """Return [n], how near images [n, D] are to the concept.

        Cosines with texts and with images have different scales: they are counted in standard
        deviations from the mean of `unrelated` images, both [3].
        """
        mean, deviation = unrelated
        text, example, other = ((self.similarities(image) - mean) / deviation).unbind(1)
        own = torch.maximum(text, example) if len(self.examples) else text
        return torch.where(other > own, own - other, own) if len(self.not_about) else own


class PictureScores(NamedTuple):
    """How near the pictures of n pairs are to a concept, and which captions are nearest."""

    scores: np.ndarray  # [n] float32, NaN where the pair cannot be read
    nearest_captions: np.ndarray  # rows of the source, the nearest first


def score_pictures(
    original: OriginalFeatures,
    source: PairTable,
    rows: np.ndarray,
    named: np.ndarray,
    queries: Queries,
    *,
    ranks: Ranks,
    seed: int,
) -> PictureScores:
    """Score `rows` [n] (sorted), whose features `original` has; all ranks get all scores.

    Pairs that are `named` [n] are no unrelated ones. `InputError` if none can be read.
    """
    with ranks.raising_together():
        is_readable = np.ones(len(rows), bool)
        if source.stable:
            is_readable = original.images(source).has(source.base_rows(rows))
        check_readable(source, len(rows), int(is_readable.sum()))
        others = np.flatnonzero(is_readable & (~named | named[is_readable].all()))
        chosen = generator(seed, Stream.FIND, 1).permutation(others)[:PILOT]
        pilot = queries.similarities(original.pairs(source, np.sort(rows[chosen])).image)
        unrelated = pilot.mean(0), pilot.std(0, correction=0).clamp(min=1e-6)
        share = ranks.share(len(rows))
        own = np.full(len(share), np.nan, np.float32)
        near = np.empty((2, 0))
        for start in range(share.start, share.stop, CHUNK):
            here = np.arange(start, min(start + CHUNK, share.stop))
            here = here[is_readable[here]]
            if not len(here):
                continue
            found = original.pairs(source, rows[here])
            here = np.searchsorted(rows, found.rows)
            own[here - share.start] = queries.scores(found.image, unrelated).numpy()
            text = closeness(queries.wordings, found.first_text).numpy()
            near = _nearest(near, np.stack([text, found.rows])[:, ~named[here]])
    parts = ranks.gather_objects((own, near))
    nearest = _nearest(*(each for _, each in parts))
    return PictureScores(np.concatenate([own for own, _ in parts]), nearest[1].astype(np.int64))


def _nearest(*parts: np.ndarray) -> np.ndarray:
    """Return the `NEAREST_CAPTIONS` columns [2, m] (closeness, row) of largest closeness."""
    every = np.concatenate(parts, axis=1)
    return every[:, np.argsort(-every[0], kind="stable")[:NEAREST_CAPTIONS]]


def scarce_words(retain: PairTable, wordings: Sequence[str], enough: int) -> dict[str, int]:
    """Return shared word -> how many captions of `retain` have it, where fewer than `enough` do.

    It reads as far as all words are found.
    """
    missing = dict.fromkeys(shared_words(wordings), 0)
    texts: Iterator[list[str] | Tensor] = retain.every_text()
    while missing and (each := next(texts, None)) is not None:
        words = {word for text in each for word in words_of(fold(str(text)))}
        for word in words & missing.keys():
            missing[word] += 1
            if missing[word] >= enough:
                del missing[word]
    return missing
