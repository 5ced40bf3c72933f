"""Adversarial prompts: does any wording still find the images that the captions no longer do?"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from fasterase.encode import PairFeatures
from fasterase.evaluation.findings import (
    FALSE_POSITIVES,
    Examined,
    Finding,
    Series,
    Target,
    UnsuitableModelError,
)
from fasterase.evaluation.scores import are_copies, first_copies, share_below
from fasterase.models.dual_encoder import DualEncoder
from fasterase.numerals import counted
from fasterase.pairs.skips import BrokenPair
from fasterase.seeds import Stream, generator

WORDS = 1024  # single words and tokens that are tried first
PIECES = 64  # of them, the best, that prompts are then built from
BEAM = 4  # prompts that are built on
ROUNDS = 4  # of adding a word or replacing one


def prompt(target: Target) -> Examined:
    """Search for words that separate images to forget from unrelated ones, under the text tower.

    The search (`PromptSearch`) sees half of the images of each kind. Its best prompt, and for
    comparison the best caption of the data, are then asked for the images that it did not see, nor
    copies of them, of all sets to forget. Costs at most `WORDS + 2 ROUNDS BEAM PIECES` texts
    through the text tower, 3,072 of them, and no image.

    Raises:
        InputError: the model has no tokenizer, or there are fewer than two pairs of a kind.
    """
    evaluator, model = target.evaluator, target.encoder.model
    if model.text_tokenizer is None:
        raise UnsuitableModelError(
            f"attacks: 'prompt' writes captions, and {model.name} came without a tokenizer. Pass "
            "tokenizer=, or leave 'prompt' out."
        )
    judged = target.two_of_each("prompt")
    halves = {name: _halves(judged[name], evaluator.seed) for name in ("forget", "retain")}
    search = PromptSearch(target, halves["forget"][0], halves["retain"][0])
    captions = list(dict.fromkeys(c for those in judged.values() for c in those.first_captions))
    search.try_prompts(captions)
    search.note()
    natural = search.best()[0]
    search.run(words_to_try(target))
    seen, _ = halves["forget"]
    unseen = {name: those.image[~are_copies(those.image, seen)] for name, those in judged.items()}
    unseen |= {name: others for name, (_, others) in halves.items()}
    unrelated = unseen.pop("retain")
    findings: list[Finding] = []
    for key, title, text in (
        ("caption", "best caption of the data", natural),
        ("prompt", f"best of {counted(len(search.scores), 'prompt')}", search.best()[0]),
    ):
        feature = target.encoder.texts([text])[0]
        findings.append(Finding(f"{key}/text", title, "text", "text", "", text))
        others = (unrelated @ feature).double()
        for name, images in unseen.items():
            if not len(images):
                continue
            findings += target.separation(
                share_below((images @ feature).double(), others),
                key=f"{name}/{key}",
                group=title,
                chance=FALSE_POSITIVES,
                prefix=f"{name}: ",
            )
    places, scores = map(list, zip(*search.history, strict=True))
    axis = "gap of mean cosines, deviations"
    return Examined(findings, [Series("best prompt so far", "prompts tried", axis, places, scores)])


class PromptSearch:
    """The prompts tried so far, compared by how they separate images [n, D] from others [m, D].

    A score is `(mean cosine with the images - that with the others) / deviation of the latter`.
    """

    def __init__(self, target: Target, images: Tensor, others: Tensor) -> None:
        self._target = target
        self._images, self._others = images, others
        self.scores: dict[str, float] = {}
        # How many prompts had been tried, and the best score, after each round.
        self.history: list[tuple[float, float]] = []

    def best(self) -> list[str]:
        """Return the `BEAM` best prompts, the best first."""
        return sorted(self.scores, key=lambda text: -self.scores[text])[:BEAM]

    def try_prompts(self, texts: Iterable[str]) -> None:
        """Score those of `texts` that are new."""
        fresh = [text for text in dict.fromkeys(texts) if text not in self.scores]
        if fresh:
            features = self._target.encoder.texts(fresh)
            wanted, unwanted = (features @ images.T for images in (self._images, self._others))
            spread = unwanted.std(dim=1, correction=0).clamp_min(1e-6)
            scores = (wanted.mean(1) - unwanted.mean(1)) / spread
            self.scores |= dict(zip(fresh, scores.tolist(), strict=True))

    def note(self) -> None:
        """End a round."""
        self.history.append((float(len(self.scores)), self.scores[self.best()[0]]))

    def run(self, words: Sequence[str]) -> None:
        """Try `words`, then build prompts from the best of them.

        In each of `ROUNDS` rounds each of the `PIECES` best words is appended to each of the `BEAM`
        best prompts, and put in the place of one of their words.
        """
        numbers = generator(self._target.evaluator.seed, Stream.PROMPT, 1)
        total = len(words) + 2 * ROUNDS * BEAM * PIECES
        with self._target.encoder.progress("searching prompts", total, unit="prompt") as bar:
            self.try_prompts(words)
            self.note()
            bar.update(len(words))
            pieces = sorted(words, key=lambda word: -self.scores[word])[:PIECES]
            for _ in range(ROUNDS):
                self.try_prompts([f"{start} {piece}" for start in self.best() for piece in pieces])
                replaced = []
                for start, piece in itertools.product(self.best(), pieces):
                    parts = start.split()
                    parts[int(numbers.integers(len(parts)))] = piece
                    replaced.append(" ".join(parts))
                self.try_prompts(replaced)
                self.note()
                bar.update(2 * BEAM * PIECES)


def words_to_try(target: Target) -> list[str]:
    """Return at most `WORDS` words: of captions to forget, of others, and tokens at random."""
    judge, sources = target.evaluator.judge, target.evaluator.sources
    numbers = generator(target.evaluator.seed, Stream.PROMPT)
    found: dict[str, None] = {}
    for name in sorted(judge.rows, key=lambda name: name == "retain"):
        words: dict[str, None] = {}
        for row in judge.rows[name].tolist():
            try:
                texts = sources[name].texts(row)
            except BrokenPair:  # counted and named when the pair was encoded
                continue
            if not isinstance(texts, Tensor):
                words |= dict.fromkeys(w for text in texts for w in re.findall(r"\w+", text))
        found |= dict.fromkeys(np.array(list(words), dtype=object)[numbers.permutation(len(words))])
    few = list(found)[: WORDS // 2]
    tokens = random_tokens(target.encoder.model, numbers, count=WORDS)
    return list(dict.fromkeys([*few, *tokens]))[:WORDS]


def random_tokens(model: DualEncoder, numbers: np.random.Generator, *, count: int) -> list[str]:
    """Return tokens of the vocabulary as text; none if the tokenizer cannot decode."""
    source = model.companions.tokenizer
    wrapped = getattr(source, "tokenizer", None)
    decode = getattr(source, "decode", None) or getattr(wrapped, "decode", None)
    if decode is None:
        return []
    ids = numbers.permutation(model.vocab_size)[:count].tolist()
    texts = [decode([number]).strip() for number in ids]
    return [text for text in texts if text.isprintable() and text]


def _halves(pairs: PairFeatures, seed: int) -> tuple[Tensor, Tensor]:
    """Return image features [n, D] that the search sees, and the others: no copies of them."""
    first = first_copies(pairs.image)
    pictures = generator(seed, Stream.PROMPT, 2).permutation(np.unique(first))
    is_seen = np.isin(first, np.array_split(pictures, 2)[0])
    return pairs.image[torch.from_numpy(is_seen)], pairs.image[torch.from_numpy(~is_seen)]
