"""The cosine of unrelated pairs under the original model: where forgetting should stop."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasterase.errors import InputError


class PairFeatures(NamedTuple):
    """Pairs of one set under the original."""

    image: Tensor  # [n, D] unit rows
    text: Tensor  # [n, D] unit rows
    keys: np.ndarray  # [n] caption identities


def unmatched_cosine(forget: PairFeatures, retain: PairFeatures) -> float:
    """Mean cosine of forget images with retain captions and of retain images with forget captions.

    Never taken inside the forget set, whose pairs may all share one caption, so that every
    "unmatched" pair there would be a matched one. Pairs whose captions are equal are left out.

    Returns:
        The mean; 0 where every caption of one set equals one of the other.

    Raises:
        InputError: the model's features are not finite, so that no run can start from them.
    """
    for pairs in (forget, retain):
        if not (torch.isfinite(pairs.image).all() and torch.isfinite(pairs.text).all()):
            raise InputError(
                "model: its features are NaN or infinite before the first step. Give a model with "
                "finite weights, and precision='fp32' if it overflows in fp16."
            )
    differ = torch.from_numpy(forget.keys[:, None] != retain.keys[None, :])
    cosines = forget.image @ retain.text.T + forget.text @ retain.image.T
    count = 2 * int(differ.sum())
    return float(cosines[differ].double().sum()) / count if count else 0.0
