"""Texts that are held where the original has them, beside the pairs of a step.

Texts alone: they cost no picture. A few pairs to keep say little of what lies between them, so that
all else drifts; common words hold it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fasterase.config import UnlearnConfig
from fasterase.encode import PairEncoder
from fasterase.evaluation.hurt import TEMPLATE
from fasterase.models.preprocessing import Tokens
from fasterase.parallel.engine import Engine
from fasterase.parallel.ranks import Ranks
from fasterase.seeds import Stream, generator
from fasterase.transfers import to_device
from fasterase.vocabulary import UNREADABLE, common_words, words_of

# How many each step holds.
HELD_A_STEP = 128
# So many retain pairs hold the rest of the world by themselves.
ENOUGH_PAIRS = 1000


@dataclass(frozen=True)
class HeldTexts:
    """Texts, and what the original makes of them."""

    tokens: Tokens  # [m, L]
    text: Tensor  # [m, D], the original's features
    config: UnlearnConfig

    @property
    def weight(self) -> float:
        """The weight of their mean squared distance from the original, in the loss."""
        return self.config.anchor_weight

    @classmethod
    def of_words(
        cls, encoder: PairEncoder, captions: Iterable[str], config: UnlearnConfig
    ) -> HeldTexts | None:
        """Return common English words that none of the captions to forget has.

        They are none of those that damage is looked for in (`evaluation.hurt`). None where the
        tokenizer cannot read them.
        """
        if encoder.model.text_tokenizer is None or not common_words():
            return None
        own = {word for caption in captions for word in words_of(caption.lower())}
        words = [word for word in common_words() if word not in own]
        texts = [*words, *map(TEMPLATE.format, words)]
        try:
            return cls(encoder.model.tokenize(texts), encoder.texts(texts), config)
        except UNREADABLE:
            return None

    def hold(self, engine: Engine, ranks: Ranks, step: int) -> Tensor:
        """Add the gradient of a step's share of them; return [] their mean squared distance."""
        count = min(HELD_A_STEP, len(self.text))
        random = generator(self.config.seed, Stream.MADE_UP, step)
        drawn = random.permutation(len(self.text))[:count]
        own = drawn[ranks.rank :: ranks.world_size]
        # All ranks call the towers equally often: what one has less than others weighs nothing.
        most = -(-count // ranks.world_size)
        rows = np.append(own, np.repeat(drawn[:1], most - len(own)))
        counts = torch.arange(most, device=engine.device) < len(own)
        size, share = self.config.micro_batch_size or count, ranks.world_size / count
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
