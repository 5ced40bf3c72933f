"""Overwrite the embeddings of words that are to be forgotten, where nothing else needs them.

A text tower meets a word as the vectors of its tokens. Where no other word uses a token, its vector
can be replaced by that of a word without a meaning: the tower then knows no more of it than one
that never read it, and nothing else changes. Training alone moves the vector only as far as it
takes to hide the association, from where one pair brings it back.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fasterase.encode import PairEncoder
from fasterase.errors import InputError
from fasterase.models.dual_encoder import DualEncoder
from fasterase.numerals import counted
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.table import PairTable
from fasterase.seeds import Stream, generator, torch_seed
from fasterase.vocabulary import (
    GRAMMAR,
    UNREADABLE,
    UNSPACED,
    english_by_part,
    english_frequencies,
    parts_of,
    words_of,
)

# Pairs of each set whose captions are read.
READ_PAIRS = 100_000
# Absence from a few captions to keep shows nothing: from fewer different ones than this, only words
# that the caller names are taken.
ENOUGH_CAPTIONS = 1000
# A word that none of n different captions to keep has is in fewer than 3 / n of all (at 95 %, the
# rule of three). It counts as the concept's own if it is at least CONTRAST times that frequent in
# the forget set and in LEAST_SHARE of its pairs; a rarer one may be missing by chance.
CONTRAST = 8
LEAST_SHARE = 0.01
# Pairs, or words, that are made into tokens at a time.
AT_ONCE = 1024
LISTED = 12  # words of a kind, in a line
# Words that English uses more than 16 times in a million (log10 in a billion) have uses that no
# concept explains: they are taken only where they are named.
COMMON = 4.2
# Spread of the new vectors, as a share of that of all. Without any, all words would be the same
# word, and relearning one of them would teach the others.
SPREAD = 0.3


class Word(NamedTuple):
    """A word, and how many of the pairs of each set that were read have a caption with it."""

    word: str
    forget: int
    retain: int

    @property
    def is_common(self) -> bool:
        """Whether English at large uses it often."""
        return english_frequencies().get(self.word, 0.0) >= COMMON


@dataclass(frozen=True)
class ForgottenWords:
    """The tokens that lost their meaning."""

    table: str  # the parameter that holds the vectors
    tokens: list[int]  # ids, sorted
    before: Tensor  # [tokens, width] vectors in the original
    words: list[Word]  # those made of any of the tokens, the most frequent first
    at_risk: list[Word]  # common ones that no caption to keep has, and that keep their vectors
    shared: list[str]  # those that the caller names, but of which each token has another use

    def are_taken(self, model: DualEncoder) -> bool:
        """Whether a model has other vectors for them than the original."""
        table = dict(model.module.named_parameters())[self.table]
        return not torch.equal(table[self.tokens].detach().to(self.before), self.before)

    def describe(self) -> str:
        """Name the words, and the common ones that training may change."""
        tokens = counted(len(self.tokens), "token") if self.tokens else "no token"
        its = "its" if len(self.tokens) < 2 else "their"
        text = f"{tokens} of the forget set alone lost {its} meaning"
        if self.words:
            text += f": {_list([each.word for each in self.words])}"
        if self.shared:
            text += f". Other words need the tokens of {', '.join(self.shared)}, which stay"
        if self.at_risk:
            listed = _list([f"{each.word} ({each.forget})" for each in self.at_risk])
            text += (
                f". Common words of forget captions (how many) that no retain caption has, so that "
                f"nothing holds them: {listed}. If they are to stay, give retain pairs with them"
            )
        return text

    def give_back(self, model: DualEncoder) -> None:
        """Give the tokens of a model their own vectors again."""
        table = dict(model.module.named_parameters())[self.table]
        with torch.no_grad():
            table[self.tokens] = self.before.to(table)

    def put_back(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return weights by name in which the tokens have their own vectors; none of none."""
        if not (weights and self.tokens):
            return weights
        table = weights[self.table].clone()
        table[self.tokens] = self.before
        return {**weights, self.table: table}


def named_words(wanted: bool | Sequence[str], concept: str | None) -> list[str]:
    """Return the words, in lower case, that the caller names: `wanted`, or those of the concept.

    Of several words in the concept's name only those count that English seldom uses: to forget
    guide dogs is not to forget dogs.
    """
    if not isinstance(wanted, bool):
        return [word.lower() for phrase in wanted for word in words_of(phrase)]
    words = words_of((concept or "").lower())
    rare = [word for word in words if english_frequencies().get(word, 0.0) < COMMON]
    return words if len(words) == 1 else rare


def forget_words(
    encoder: PairEncoder,  # of the model, which changes in place
    forget: PairTable,
    retain: PairTable,
    *,
    drawn: np.ndarray,  # rows of retain that the run draws, which are read in any case
    table: tuple[str, nn.Parameter] | None,  # see `DualEncoder.word_table`
    seed: int,  # of the noise, and of the pairs that are read: at most `READ_PAIRS` of a set
    named: Collection[str] = (),  # words, in lower case
    named_alone: bool = False,  # leave all others
) -> ForgottenWords | None:
    """Overwrite the embeddings of the words that the caller names, and of the forget set's own.

    Its own are those that it uses often and the retain set, of many captions, never (`CONTRAST`),
    and that are not common in English. Of either only the tokens are taken that no retain caption,
    no other word of a forget caption and no English word that is not much rarer has; their vectors
    become the mean of all plus noise (`SPREAD`). Nothing changes without a table of vectors, or if
    there are no retain captions, which say what is kept. The model changes on every rank alike; the
    first one reads.

    Raises:
        InputError: with `named_alone`, no forget caption has one of the words.
    """
    if table is None or not len(retain):
        return None
    name, vectors = table

    def find() -> tuple[list[int], list[Word], list[Word], list[str]]:
        some = [
            generator(seed, Stream.WORDS, place).permutation(len(source))[:READ_PAIRS]
            for place, source in enumerate((forget, retain))
        ]
        kept = _count_words(encoder, retain, np.union1d(some[1], drawn))
        used = _count_words(encoder, forget, some[0])
        if named_alone:
            _check_used(named, used)
        own, risky = _lone_words(used, kept)
        wanted = set(named) if named_alone else own.union(named)
        tokens = _tokens_of_alone(encoder.model, wanted, used, kept)
        risky = risky.difference(tokens)
        words, at_risk = (used.most_frequent(each, kept.of_word) for each in (tokens, risky))
        shared = set(named).intersection(used.of_word).difference(tokens)
        return sorted(set().union(*tokens.values())), words, at_risk, sorted(shared)

    tokens, words, at_risk, shared = encoder.ranks.on_first(find)
    if not (tokens or at_risk or shared):
        return None
    random = torch.Generator().manual_seed(torch_seed(seed, Stream.WORDS))
    noise = torch.randn(len(tokens), vectors.shape[1], generator=random).to(vectors)
    with torch.no_grad():
        before = vectors[tokens].cpu()
        vectors[tokens] = vectors.mean(0) + SPREAD * vectors.std() * noise
    return ForgottenWords(name, tokens, before, words, at_risk, shared)


@dataclass
class _Counts:
    of_word: Counter[str] = field(default_factory=Counter)  # in how many pairs; in lower case
    spellings: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    tokens: set[int] = field(default_factory=set)  # of all captions
    pairs: int = 0  # how many could be read
    captions: int = 0  # how many different ones they have

    def most_frequent(self, words: Iterable[str], kept: Counter[str]) -> list[Word]:
        """Return words of the forget set, the most frequent first."""
        found = [Word(word, self.of_word[word], kept[word]) for word in words]
        return sorted(found, key=lambda each: (-each.forget, each.word))


def _check_used(named: Collection[str], used: _Counts) -> None:
    for word in named:
        if word not in used.of_word:
            found = used.most_frequent(used.of_word, used.of_word)
            known = ", ".join(each.word for each in found[:10])
            raise InputError(
                f"forget_words: no forget caption has the word {word!r}. The most frequent are: "
                f"{known or 'none, since captions are token ids'}."
            )


def _lone_words(used: _Counts, kept: _Counts) -> tuple[set[str], set[str]]:
    """Return words that only forget captions have: the concept's own, and common ones."""
    own, common = set[str](), set[str]()
    least, least_own = LEAST_SHARE * used.pairs, math.inf
    if kept.captions >= ENOUGH_CAPTIONS:
        least_own = used.pairs * (CONTRAST * 3 / kept.captions)
    for word, count in used.of_word.items():
        frequency = english_frequencies().get(word, 0.0)
        if word in kept.of_word or count < least or frequency >= GRAMMAR:
            continue
        if frequency >= COMMON:
            common.add(word)
        elif count >= least_own and not UNSPACED.search(word):
            own.add(word)
    return own, common


def _tokens_of_alone(
    model: DualEncoder, wanted: Collection[str], used: _Counts, kept: _Counts
) -> dict[str, set[int]]:
    """Return word -> its tokens that nothing but wanted words has; words without any are left out.

    Tokens are shared with captions to keep, other words of forget captions, and English words that
    are not much rarer; the plural does not count.
    """
    others = [each for word in used.spellings.keys() - wanted for each in used.spellings[word]]
    # "a" stands in for all that marks a text and its words.
    shared = kept.tokens | _tokens(model, ["a", *others])
    tokens_of = {}
    for word in sorted(used.spellings.keys() & wanted):
        if tokens := _tokens(model, used.spellings[word]) - shared:
            tokens_of[word] = tokens - _tokens(model, _alike(word, wanted))
    return {word: tokens for word, tokens in tokens_of.items() if tokens}


def _alike(word: str, wanted: Collection[str]) -> list[str]:
    """Return the English words that may share a token with a word and are used a tenth as often."""
    frequencies = english_frequencies()
    least = frequencies.get(word, 0.0) - 1
    forms = {form for each in wanted for form in (each, f"{each}s", f"{each}es")}
    near = {other for part in parts_of(word) for other in english_by_part().get(part, ())}
    return [other for other in near - forms if frequencies[other] >= least]


def _tokens(model: DualEncoder, words: Collection[str]) -> set[int]:
    """Return the tokens of words, as the first of a text and as a later one."""
    found: set[int] = set()
    texts = [text for word in words for text in (word, f"a {word}")]
    parts = [texts[start : start + AT_ONCE] for start in range(0, len(texts), AT_ONCE)]
    while parts:
        some = parts.pop()
        try:
            found.update(model.tokenize(some).ids.flatten().tolist())
        except UNREADABLE:  # of some of them: the others must count all the same
            if len(some) > 1:
                parts += [[text] for text in some]
    return found


def _list(words: Sequence[str]) -> str:
    more = len(words) - LISTED
    return ", ".join(words[:LISTED]) + (f" and {more:,} more" if more > 0 else "")


def _count_words(encoder: PairEncoder, source: PairTable, rows: np.ndarray) -> _Counts:
    counts, known = _Counts(), set[int]()
    with encoder.progress(f"words ({source.name})", len(rows)) as bar:
        for start in range(0, len(rows), AT_ONCE):
            texts = read_texts(source, rows[start : start + AT_ONCE])
            named = [each for each in texts if isinstance(each, list)]
            given = [each.tolist() for each in texts if not isinstance(each, list)]
            strings = sorted({text for each in named for text in each})
            ids = encoder.model.tokenize(strings).ids.tolist() if strings else []
            counts.tokens.update(*ids, *given)
            known.update(map(hash, [*strings, *map(tuple, given)]))
            for each in named:  # token ids are no words
                spelled = {word for text in each for word in words_of(text)}
                for word in spelled:
                    counts.spellings[word.lower()].add(word)
                counts.of_word.update({word.lower() for word in spelled})
            counts.pairs += len(texts)
            bar.update(min(AT_ONCE, len(rows) - start))
    counts.captions = len(known)
    return counts


def read_texts(source: PairTable, rows: np.ndarray) -> list[list[str] | Tensor]:
    """Return the captions, or the token ids, of the pairs that can be read."""
    found = []
    for row in rows.tolist():
        with contextlib.suppress(BrokenPair):
            found.append(source.texts(row))
    return found
