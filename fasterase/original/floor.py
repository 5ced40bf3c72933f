"""The floor: the cosine of unrelated images and captions under the frozen original."""

from __future__ import annotations

import numpy as np
import torch

from fasterase.encode import PairFeatures
from fasterase.errors import InputError
from fasterase.seeds import Stream, generator

# Pairs of each set behind the floor: 2 x 1024^2 cosines give the mean of unrelated pairs to 1e-3.
FLOOR_PAIRS = 1024


def floor_rows(count: int) -> np.ndarray:
    """Return the rows (sorted) of a set of `count` that the floor is measured on.

    They depend on nothing else, so that runs with other steps, batches or seeds have one floor.
    """
    if count <= FLOOR_PAIRS:
        return np.arange(count)
    return np.sort(generator(0, Stream.FLOOR).choice(count, size=FLOOR_PAIRS, replace=False))


def unmatched_cosine(forget: PairFeatures, retain: PairFeatures) -> float:
    """Return the mean cosine of forget images with retain captions and the reverse: the floor.

    Never taken inside the forget set, whose pairs may all share one caption: every "unmatched" pair
    there would be a matched one. Pairs with equal captions are left out.

    Returns:
        The mean; 0 if no two captions of the sets differ.

    Raises:
        InputError: the model's features are not finite, so no run can start from them.
    """
    for pairs in (forget, retain):
        if not (torch.isfinite(pairs.image).all() and torch.isfinite(pairs.first_text).all()):
            raise InputError(
                "model: its features are NaN or infinite before the first step. Give a model with "
                "finite weights, and precision='fp32' if it overflows in fp16."
            )
    captions = [np.array(pairs.first_captions, dtype=object) for pairs in (forget, retain)]
    differ = torch.from_numpy(captions[0][:, None] != captions[1][None, :])
    cosines = forget.image @ retain.first_text.T + forget.first_text @ retain.image.T
    count = 2 * int(differ.sum())
    return float(cosines[differ].double().sum()) / count if count else 0.0
