"""Whether the forget pairs are forgotten: how far their cosines are above the floor."""

from __future__ import annotations

import numpy as np
import torch

from fasterase.encode import PairFeatures

# Mean excess below which a set counts as forgotten.
FORGOTTEN_EXCESS = 0.01


def mean_excess(forget: PairFeatures, floor: float) -> float:
    """Return the mean over pairs of `max(cos - floor, 0)`; a pair's value is that of its captions.

    Args:
        forget: plain images with all their captions.
        floor: cosine of unrelated pairs.
    """
    excesses = [
        float((forget.text[captions] @ image - floor).clamp_min(0).mean())
        for image, captions in zip(forget.image, map(torch.tensor, forget.pair_text), strict=True)
    ]
    return float(np.mean(excesses))
