"""Overwrite the embeddings of tokens that only forget captions use.

A text tower meets a word as the vector of its tokens. Where no caption to keep uses a token, its
vector can be replaced by that of a word without a meaning: the tower then knows no more of it than
one that never read it, and nothing else changes. Training alone moves the vector only as far as it
takes to hide the association, from where one pair brings it back.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fasterase.encode import PairEncoder
from fasterase.engine.optim import Trained
from fasterase.models.dual_encoder import DualEncoder
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.table import PairTable
from fasterase.seeds import Stream, generator, torch_seed
from fasterase.vocabulary import english_frequencies, words_of

# Pairs of each set whose captions are read.
READ_PAIRS = 100_000
# A token that none of n different captions to keep has is in fewer than 3 / n of all (at 95 %, the
# rule of three). It counts as the concept's own if it is at least CONTRAST times that frequent in
# the forget set and in LEAST_SHARE of its pairs; a rarer one may be missing by chance.
CONTRAST = 8
LEAST_SHARE = 0.01
# Pairs, or words, that are made into tokens at a time.
AT_ONCE = 1024
# Words that English uses more than 16 times in a million (log10 in a billion) have uses that no
# concept explains.
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

    def are_taken(self, model: DualEncoder) -> bool:
        """Whether a model has other vectors for them than the original."""
        table = dict(model.module.named_parameters())[self.table]
        return not torch.equal(table[self.tokens].detach().to(self.before), self.before)

    def describe(self) -> str:
        """Name the words, and those of them that are common."""
        words = [each.word for each in self.words]
        common = [each.word for each in self.words if each.is_common]
        text = f"{len(self.tokens)} tokens of the forget set alone lost their meaning"
        text += f": {', '.join(words)}" if words else ""
        if common:
            text += (
                f". Common words among them, which captions outside both sets may need: "
                f"{', '.join(common)}. A retain caption with a word keeps it"
            )
        return text

    def put_back(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return weights by name in which the tokens have their own vectors; none of none."""
        if not weights:
            return weights
        table = weights[self.table].clone()
        table[self.tokens] = self.before
        return {**weights, self.table: table}


def forget_words(
    encoder: PairEncoder,
    forget: PairTable,
    retain: PairTable,
    *,
    drawn: np.ndarray,
    trained: Trained,
    seed: int,
) -> ForgottenWords | None:
    """Overwrite the embeddings of tokens that the forget set uses often and the retain set never.

    Their vectors become the mean of all plus noise (`SPREAD`). How often: see `CONTRAST`. Nothing
    changes if the table of vectors is not trained or not known, or if there are no retain captions,
    which say what is kept. The model changes on every rank alike; the first one reads.

    Args:
        encoder: of the model, which changes in place.
        forget, retain: of each, the captions of at most `READ_PAIRS` pairs are read.
        drawn: rows of retain that are read in any case: those that the run draws.
        trained: what may change.
        seed: of the noise, and of the pairs that are read.
    """
    table = _find_table(encoder.model)
    may_change = trained.parameters(encoder.model.module)
    name = next((name for name, each in may_change.items() if each is table), None)
    if table is None or name is None or not len(retain):
        return None

    def find() -> tuple[list[int], list[Word]]:
        some = [
            generator(seed, Stream.WORDS, place).permutation(len(source))[:READ_PAIRS]
            for place, source in enumerate((forget, retain))
        ]
        kept = _count_tokens(encoder, retain, np.union1d(some[1], drawn))
        used = _count_tokens(encoder, forget, some[0])
        least = used.pairs * max(LEAST_SHARE, CONTRAST * 3 / max(kept.captions, 1))
        found = (token for token, count in used.of_token.items() if count >= least)
        tokens = sorted(token for token in found if token not in kept.of_token)
        return tokens, list(_words_with(tokens, encoder.model, used, kept))

    tokens, words = encoder.ranks.on_first(find)
    if not tokens:
        return None
    random = torch.Generator().manual_seed(torch_seed(seed, Stream.WORDS))
    noise = torch.randn(len(tokens), table.shape[1], generator=random).to(table)
    with torch.no_grad():
        before = table[tokens].cpu()
        table[tokens] = table.mean(0) + SPREAD * table.std() * noise
    return ForgottenWords(name, tokens, before, words)


def _find_table(model: DualEncoder) -> Tensor | None:
    """Return the vectors of all tokens, [vocab_size, width]."""
    tables = {
        part.weight
        for parts in model.text_parts().everything
        if isinstance(parts, nn.Module)
        for part in parts.modules()
        if isinstance(part, nn.Embedding) and part.num_embeddings == model.vocab_size
    }
    return tables.pop() if len(tables) == 1 else None


@dataclass
class _Counts:
    of_token: Counter[int] = field(default_factory=Counter)  # in how many pairs each token occurs
    of_word: Counter[str] = field(default_factory=Counter)  # likewise; as it stands there
    pairs: int = 0  # how many could be read
    captions: int = 0  # how many different ones they have


def _words_with(
    tokens: Collection[int], model: DualEncoder, used: _Counts, kept: _Counts
) -> Iterator[Word]:
    """Yield the words of forget captions that have any of the tokens, the most frequent first."""
    wanted = set(tokens)
    found: Counter[str] = Counter()
    words = list(used.of_word) if wanted else []
    for start in range(0, len(words), AT_ONCE):
        some = words[start : start + AT_ONCE]
        for word, ids in zip(some, model.tokenize(some).ids.tolist(), strict=True):
            if wanted.intersection(ids):
                found[word.lower()] += used.of_word[word]
    for word, count in sorted(found.items(), key=lambda each: (-each[1], each[0])):
        yield Word(word, count, kept.of_word[word])


def _count_tokens(encoder: PairEncoder, source: PairTable, rows: np.ndarray) -> _Counts:
    counts, known = _Counts(), set[int]()
    with encoder.progress_bar(f"words ({source.name})", len(rows), leave=False) as bar:
        for start in range(0, len(rows), AT_ONCE):
            texts = _read_texts(source, rows[start : start + AT_ONCE])
            strings = sorted({text for each in texts if isinstance(each, list) for text in each})
            ids = encoder.model.tokenize(strings).ids.tolist() if strings else []
            ids_of = dict(zip(strings, ids, strict=True))
            for each in texts:
                captions = (
                    [ids_of[text] for text in each] if isinstance(each, list) else [each.tolist()]
                )
                counts.of_token.update({token for caption in captions for token in caption})
                if isinstance(each, list):
                    counts.of_word.update({word for text in each for word in words_of(text)})
                known.update(hash(tuple(caption)) for caption in captions)
            counts.pairs += len(texts)
            bar.update(min(AT_ONCE, len(rows) - start))
    counts.captions = len(known)
    return counts


def _read_texts(source: PairTable, rows: np.ndarray) -> list[list[str] | Tensor]:
    """Return the captions, or the token ids, of the pairs that can be read."""
    found = []
    for row in rows.tolist():
        with contextlib.suppress(BrokenPair):
            found.append(source.texts(row))
    return found
