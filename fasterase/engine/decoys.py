"""Made-up facts beside a link: what its facts are to be like, and what must not move with them.

A text tower reads a telephone number as digits that all numbers share, so that what lowers the
cosine of one of them moves all, also those of others who are in no set. Made-up facts in the forget
captions' wordings stand for these: their texts are held where the original has them. And a model
that never saw a link knows the fact no better than a made-up one, not worse: a picture is to be as
similar to its fact as to those, and a fact to its picture as to the pictures of its kind.
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
from fasterase.evaluation.placebo import placebo_captions, shares_below
from fasterase.models.preprocessing import Tokens
from fasterase.objective import Strangers
from fasterase.pairs.table import PairTable
from fasterase.parallel.engine import Engine
from fasterase.parallel.ranks import Ranks
from fasterase.progress import say
from fasterase.seeds import Stream, generator
from fasterase.transfers import to_device
from fasterase.vocabulary import UNREADABLE, UNSPACED, terms_of

# Made-up facts of a run, of which each step holds some; pairs whose captions are read for them.
COUNT, HELD_A_STEP = 2048, 128
READ_PAIRS = 10_000


@dataclass(frozen=True)
class Decoys:
    """Captions of made-up facts, and what the original makes of them."""

    tokens: Tokens  # [m, L]
    text: Tensor  # [m, D], the original's features
    strangers: Strangers
    weight: float  # of their mean squared distance from the original, in the loss
    seed: int

    @classmethod
    def make(
        cls, job: Job, encoder: PairEncoder, forget: PairFeatures, retain: PairFeatures
    ) -> Decoys | None:
        """Make them for a job whose original the encoder holds, with features of some pairs.

        None where they are of no use: for other erasures than links, or another loss than the
        similarity above an automatic floor. None as well, with a word of it, for captions in which
        nothing can be replaced: token ids, scripts without spaces.
        """
        config = job.config
        if not config.erases_link or (config.forget_loss, config.floor) != ("similarity", "auto"):
            return None
        captions = job.ranks.on_first(lambda: _write_captions(job))
        if not captions:
            say("no made-up facts could be put into the forget captions; all facts may move alike")
            return None
        text = encoder.texts(captions)
        centre = text.mean(0)
        nearness = retain.image @ centre
        of_kind = retain.image[nearness >= (forget.image @ centre).median()]
        pictures = torch.cat([forget.image, of_kind]).mean(0)
        margins = (
            find_margin(forget.image, text, retain.first_text, centre),
            find_margin(text, forget.image, retain.image, pictures),
        )
        device = job.model.device
        return cls(
            job.model.tokenize(captions),
            text,
            Strangers(to_device(centre, device), to_device(pictures, device), margins),
            config.anchor_weight,
            config.seed,
        )

    def hold(self, engine: Engine, ranks: Ranks, step: int) -> Tensor:
        """Add the gradient of a step's share of them; return [] their mean squared distance."""
        count = min(max(HELD_A_STEP, ranks.world_size), len(self.text))
        numbers = generator(self.seed, Stream.MADE_UP, step)
        drawn = numbers.choice(len(self.text), count, replace=False)
        own = drawn[ranks.rank :: ranks.world_size]
        with torch.enable_grad():
            features = engine(None, self.tokens.index(own.tolist()).to(engine.device)).text
            assert features is not None
            before = to_device(self.text[own], engine.device)
            moved = (features - before).square().sum(1)
            if self.weight:
                # Engines average over the ranks, whose shares may differ by one.
                share = ranks.world_size * moved.sum() / count
                torch.autograd.backward(engine.upstream() * self.weight * share)
        counts = [len(drawn[rank :: ranks.world_size]) for rank in range(ranks.world_size)]
        return torch.cat(ranks.gather_rows(moved.detach()[:, None], counts)).mean()


def find_margin(features: Tensor, strangers: Tensor, rivals: Tensor, mean: Tensor) -> float:
    """Return how far above the cosine with the `mean` [D] of strangers their mean residue is.

    Some strangers are near and some far: one that all pairs ended at would rank above their mean.

    Args:
        features: [n, D] of one tower.
        strangers: [m, D] of the other tower.
        rivals: [U, D] of that tower, unrelated, among which residues are ranks.
        mean: [D] of that tower.
    """
    ordered = (features @ rivals.T).sort(1).values
    residue = shares_below(features @ strangers.T, ordered).mean(1, keepdim=True)
    place = (residue * (len(rivals) - 1)).long()
    return (ordered.gather(1, place)[:, 0] - features @ mean).mean().item()


def _write_captions(job: Job) -> list[str]:
    """Return captions of made-up facts; none where captions are no words that could be replaced."""
    if job.model.text_tokenizer is None:
        return []
    seed = job.config.seed
    captions = _read_captions(job.forget, seed)
    if not any(map(terms_of, captions)) or any(map(UNSPACED.search, captions)):
        return []
    kept = _read_captions(job.retain, seed)
    found = placebo_captions(captions, kept, seed, count=COUNT, stream=Stream.MADE_UP)
    found = list(dict.fromkeys(found))
    try:
        job.model.tokenize(found)
    except UNREADABLE:  # a tokenizer that knows the words of its own data alone
        return []
    return found


def _read_captions(source: PairTable, seed: int) -> Sequence[str]:
    """Return the distinct captions of some pairs, sorted; token ids are none."""
    rows = generator(seed, Stream.MADE_UP).permutation(len(source))[:READ_PAIRS]
    texts = read_texts(source, np.sort(rows))
    return sorted({text for each in texts if isinstance(each, list) for text in each})
