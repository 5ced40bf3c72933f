"""How the original reads and encodes pairs before the first step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fasterase.models.dual_encoder import DualEncoder, Tokens
from fasterase.pairs.batches import sweep
from fasterase.pairs.prepare import Preparer
from fasterase.pairs.skips import SkipLedger
from fasterase.pairs.source import PairSource
from fasterase.reference.floor import PairFeatures

# Rows encoded at a time.
ENCODED = 64


@dataclass(frozen=True)
class Sweeper:
    """The original, and what it needs to read a set.

    Attributes:
        tower: the original, in eval mode.
        prepare: records to pixels and tokens.
        ledger: counts unreadable pairs.
        autocast: makes the context of a tower's forward.
        num_workers: processes that decode.
        progress: whether to show a bar.
    """

    tower: DualEncoder
    prepare: Preparer
    ledger: SkipLedger
    autocast: Callable[[], AbstractContextManager[object]]
    num_workers: int
    progress: bool

    @torch.no_grad()
    def image(self, pixels: Tensor) -> np.ndarray:
        """Unit features (n, D0) float32 of pixels (n, 3, H, W)."""
        with self.autocast():
            features = self.tower.encode_image(pixels.to(self.tower.device))
        return features.float().cpu().numpy()

    @torch.no_grad()
    def text(self, tokens: Tokens) -> np.ndarray:
        """Unit features (n, D0) float32 of the tokens of n > 0 captions."""
        parts = []
        for start in range(0, len(tokens.ids), 4 * ENCODED):
            part = tokens.index(slice(start, start + 4 * ENCODED)).to(self.tower.device)
            with self.autocast():
                parts.append(self.tower.encode_text(part).float().cpu().numpy())
        return np.concatenate(parts)

    def pairs(self, source: PairSource, rows: np.ndarray) -> PairFeatures:
        """Features of `rows` with their first captions, kept nowhere; unreadable ones left out.

        Raises:
            InputError: too many pairs cannot be read.
        """
        width = self.tower.embed_dim
        images, keys = [np.empty((0, width), np.float32)], []
        text_of: dict[str, np.ndarray] = {}
        first_captions = np.stack([rows, np.zeros_like(rows)], axis=1)
        for batch in sweep(
            source,
            rows,
            first_captions,
            self.prepare,
            batch_size=ENCODED,
            num_workers=self.num_workers,
        ):
            self.ledger.add(batch.ids, batch.skipped)
            if batch.new_keys:
                text_of.update(zip(batch.new_keys, self.text(batch.tokens), strict=True))
            if batch.ids:
                images.append(self.image(batch.pixels))
            keys += [key for _, _, key in batch.captions]
        self.ledger.warn()
        texts = [np.empty((0, width), np.float32), *(text_of[key][None] for key in keys)]
        return PairFeatures(
            torch.from_numpy(np.concatenate(images)),
            torch.from_numpy(np.concatenate(texts)),
            np.array(keys, dtype=object),
        )
