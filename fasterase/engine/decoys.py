"""Made-up facts beside a link: what its facts are to be like, and what must not move with them.

A text tower reads a telephone number as digits that all numbers share, and an address as pieces of
words, so that what lowers the cosine of one of them moves all, also those of others who are in no
set. Made-up facts in the forget captions' wordings stand for these: their texts are held where the
original has them. And a model that never saw a link knows the fact no better than a made-up one,
not worse: a picture is to be as similar to its fact as to those, and a fact to its picture as to
the pictures of its kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fasterase.encode import PairEncoder, PairFeatures
from fasterase.engine.job import Job
from fasterase.engine.words import read_texts
from fasterase.evaluation.placebo import made_up_captions, shares_below
from fasterase.models.preprocessing import Tokens
from fasterase.objective import Strangers
from fasterase.pairs.table import PairTable
from fasterase.parallel.engine import Engine
from fasterase.parallel.ranks import Ranks
from fasterase.progress import say
from fasterase.seeds import Stream, generator
from fasterase.transfers import to_device
from fasterase.vocabulary import UNREADABLE, UNSPACED

# How far below their mean residue a pair is to end: the last steps leave it a little above, and on
# the mean itself chance would decide the verdict.
BELOW = 0.03
# Made-up facts of each concept, of which each step holds some; pairs whose captions are read.
COUNT, HELD_A_STEP = 2048, 128
READ_PAIRS = 1024


@dataclass(frozen=True)
class Decoys:
    """Captions of made-up facts, and what the original makes of them."""

    tokens: Tokens  # [m, L]
    text: Tensor  # [m, D], the original's features
    strangers: list[Strangers]  # of each concept
    weight: float  # of their mean squared distance from the original, in the loss
    micro_batch_size: int  # how many are encoded at a time
    seed: int

    @classmethod
    def make(
        cls,
        job: Job,
        encoder: PairEncoder,
        forget: Sequence[PairFeatures],  # some pairs of each concept
        retain: PairFeatures,  # some to keep
    ) -> Decoys | None:
        """Make them for a job of links whose original the encoder holds.

        None for another loss than the similarity above an automatic floor; also, which is said,
        where there is nothing to keep, and for captions in which nothing can be replaced: token
        ids, scripts without spaces.
        """
        config = job.config
        if (config.forget_loss, config.floor) != ("similarity", "auto"):
            return None
        captions = job.ranks.on_first(lambda: _write_captions(job)) if len(retain.rows) else []
        if not captions:
            say("no made-up facts could be put into the forget captions; all facts may move alike")
            return None
        texts = [encoder.texts(each) for each in captions]
        return cls(
            job.model.tokenize([caption for each in captions for caption in each]),
            torch.cat(texts),
            [
                _describe_strangers(of_concept, text, retain, job.model.device)
                for of_concept, text in zip(forget, texts, strict=True)
            ],
            config.anchor_weight,
            config.micro_batch_size or HELD_A_STEP,
            config.seed,
        )

    def hold(self, engine: Engine, ranks: Ranks, step: int) -> Tensor:
        """Add the gradient of a step's share of them; return [] their mean squared distance."""
        count = min(HELD_A_STEP, len(self.text))
        drawn = generator(self.seed, Stream.MADE_UP, step).permutation(len(self.text))[:count]
        own = drawn[ranks.rank :: ranks.world_size]
        # All ranks call the towers equally often: what one has less than others weighs nothing.
        most = -(-count // ranks.world_size)
        rows = np.append(own, np.repeat(drawn[:1], most - len(own)))
        counts = torch.arange(most, device=engine.device) < len(own)
        size, share = self.micro_batch_size, ranks.world_size / count
        places = [slice(start, start + size) for start in range(0, most, size)]
        moved = torch.cat([self._hold(engine, rows[p], counts[p], share) for p in places])
        parts = ranks.gather_rows((moved * counts)[:, None], [most] * ranks.world_size)
        return torch.cat(parts).sum() / count

    def _hold(self, engine: Engine, rows: np.ndarray, counts: Tensor, share: float) -> Tensor:
        """Add the gradient of some that count, each by a share; return [n] squared distances."""
        before = to_device(self.text[rows], engine.device)
        with torch.enable_grad():
            features = engine(None, self.tokens.index(rows.tolist()).to(engine.device)).text
            assert features is not None
            moved = (features - before).square().sum(1)
            # Engines average over the ranks.
            loss = self.weight * share * (moved * counts).sum()
            torch.autograd.backward(engine.upstream() * loss)
        return moved.detach()


def _describe_strangers(
    forget: PairFeatures, text: Tensor, retain: PairFeatures, device: torch.device
) -> Strangers:
    """Return what made-up facts [m, D] and the pictures of their kind are like."""
    centre = text.mean(0)
    of_kind = retain.image[retain.image @ centre >= (forget.image @ centre).median()]
    pictures = torch.cat([forget.image, of_kind]).mean(0)
    margins = (
        find_margin(forget.image, text, retain.first_text, centre),
        find_margin(text, forget.image, retain.image, pictures),
    )
    return Strangers(to_device(centre, device), to_device(pictures, device), margins)


def find_margin(
    features: Tensor,  # [n, D] of one tower
    strangers: Tensor,  # [m, D] of the other tower
    rivals: Tensor,  # [U, D] of that tower, unrelated, among which residues are ranks
    mean: Tensor,  # [D] of that tower
) -> float:
    """Return how far above the cosine with the mean of strangers a pair is to end.

    There its residue is `BELOW` theirs. Some strangers are near and some far: one that all pairs
    ended at would rank above their mean.
    """
    scores = features @ rivals.T
    residue = shares_below(features @ strangers.T, scores).mean(1, keepdim=True) - BELOW
    place = (residue.clamp_min(0) * (len(rivals) - 1)).long()
    return (scores.sort(1).values.gather(1, place)[:, 0] - features @ mean).mean().item()


def _write_captions(job: Job) -> list[list[str]]:
    """Return captions of made-up facts for each concept; none where one has none."""
    if job.model.text_tokenizer is None:
        return []
    seed = job.config.seed
    kept = _read_captions(job.retain, seed)
    found = []
    for name in job.concepts or ["forget"]:
        captions = _read_captions(job.sets[name], seed)
        if any(map(UNSPACED.search, captions)):
            return []
        found.append(made_up_captions(captions, kept, seed, COUNT))
    try:
        job.model.tokenize([caption for each in found for caption in each])
    except UNREADABLE:  # a tokenizer that knows the words of its own data alone
        return []
    return found if all(found) else []


def _read_captions(source: PairTable, seed: int) -> list[str]:
    """Return the distinct captions of some pairs, sorted; token ids are none."""
    rows = generator(seed, Stream.MADE_UP).permutation(len(source))[:READ_PAIRS]
    texts = read_texts(source, np.sort(rows))
    return sorted({text for each in texts if isinstance(each, list) for text in each})
