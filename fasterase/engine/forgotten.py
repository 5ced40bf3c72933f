"""How far the forget pairs' cosines still stand above the floor."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch
from tqdm.auto import tqdm

from fasterase.models.dual_encoder import DualEncoder
from fasterase.pairs.batches import sweep
from fasterase.pairs.prepare import Preparer
from fasterase.pairs.source import PairSource

# Mean excess below which the set counts as forgotten.
FORGOTTEN_EXCESS = 0.01
_ENCODED = 64


@torch.no_grad()
def forget_excess(
    tower: DualEncoder,
    forget: PairSource,
    prepare: Preparer,
    *,
    floor: float,
    autocast: Callable[[], AbstractContextManager[object]],
    num_workers: int,
    progress: bool,
) -> float:
    """Mean over the whole forget set of `max(cos - floor, 0)`; a pair's value is the mean over its
    captions. Images are taken as they are, not augmented.

    NaN where no pair can be read.
    """
    device = tower.device
    excesses: list[float] = []
    text_of: dict[str, torch.Tensor] = {}
    # Removed when full: it comes once an epoch, below the bar of the steps.
    bar = tqdm(
        total=len(forget),
        desc="is it forgotten?",
        unit="pair",
        leave=False,
        disable=not progress,
    )
    batches = sweep(
        forget,
        np.arange(len(forget)),
        None,
        prepare,
        batch_size=_ENCODED,
        num_workers=num_workers,
    )
    with bar:
        for batch in batches:
            bar.update(len(batch.rows) + len(batch.skipped))
            if not len(batch.rows):
                continue
            with autocast():
                image = tower.encode_image(batch.pixels.to(device))
                if batch.new_keys:
                    texts = tower.encode_text(batch.tokens.to(device))
                    text_of.update(zip(batch.new_keys, texts, strict=True))
            position = {int(row): at for at, row in enumerate(batch.rows)}
            own: dict[int, list[torch.Tensor]] = {}
            for row, _, key in batch.captions:
                own.setdefault(position[row], []).append(text_of[key])
            for at, captions in own.items():
                cosines = torch.stack(captions) @ image[at]
                excesses.append(float((cosines - floor).clamp_min(0).mean()))
    return float(np.mean(excesses)) if excesses else float("nan")
