"""A set's features as the evaluation uses them: one caption per pair, names instead of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fasterase.encode import PairFeatures
from fasterase.errors import InputError
from fasterase.pairs.prepare import caption_key
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.table import PairTable
from fasterase.seeds import Stream, generator


@dataclass(frozen=True)
class SetFeatures:
    """Features of n pairs with m distinct first captions, on the CPU, fp32, unit rows.

    A pair with several captions is represented by its first one; the others only count as right
    answers.

    Attributes:
        image: [n, D].
        text: [m, D], one row per distinct first caption.
        captions: [m] those captions; token ids are spelled out.
        pair_text: [n] row in `text` of each pair's first caption.
        pair_captions: [n] all captions of each pair, the first one first.
        ids: [n] of the pairs, as the source gives them.
    """

    image: Tensor
    text: Tensor
    captions: list[str]
    pair_text: np.ndarray
    pair_captions: list[list[str]]
    ids: list[str]

    @classmethod
    def of(cls, source: PairTable, features: PairFeatures, *, model: str) -> SetFeatures:
        """Add ids and captions from the source to `features`.

        Args:
            source: what was encoded.
            features: features of some of its rows.
            model: name of the model, for errors.

        Raises:
            InputError: features are not finite.
        """
        rows = features.rows.tolist()
        first_rows = [captions[0] for captions in features.pair_text]
        distinct = list(dict.fromkeys(first_rows))
        place = {row: i for i, row in enumerate(distinct)}
        found = cls(
            image=features.image,
            text=features.text[distinct],
            captions=[features.captions[row] for row in distinct],
            pair_text=np.array([place[row] for row in first_rows]),
            pair_captions=[captions_of(source, row) for row in rows],
            ids=[source.id(row) for row in rows],
        )
        _check_finite(found.image, found.ids, model)
        _check_finite(found.text, found.captions, model)
        return found


def sampled_rows(
    length: int, max_pairs: int | None, *, seed: int, preferred: np.ndarray | None = None
) -> np.ndarray:
    """Return ascending rows, at most `max_pairs`.

    Every set of one length gets the same rows, so that sets which list the same concepts in the
    same order stay comparable.

    Args:
        length: rows of the set.
        max_pairs: maximum number of rows; None for all.
        seed: seed of the draw.
        preferred: rows that make up half of a draw, or all that there are if they are fewer.
    """
    if max_pairs is None or length <= max_pairs:
        return np.arange(length)
    order = generator(seed, Stream.EVALUATION).permutation(length)
    if preferred is not None and len(preferred):
        first = order[np.isin(order, preferred)][: -(-max_pairs // 2)]
        order = np.concatenate([first, order[~np.isin(order, first)]])
    return np.sort(order[:max_pairs])


def captions_of(source: PairTable, row: int) -> list[str]:
    """Return the identities of all captions of a pair, the first one first."""
    texts = source.texts(row)
    return [caption_key(texts)] if isinstance(texts, Tensor) else list(map(caption_key, texts))


def all_captions(source: PairTable) -> set[str]:
    """Return every caption of every readable pair of a set."""
    found: set[str] = set()
    for row in range(len(source)):
        try:
            found.update(captions_of(source, row))
        except BrokenPair:  # counted and named when the pair is encoded
            continue
    return found


def _check_finite(features: Tensor, names: Sequence[str], model: str) -> None:
    broken = (~features.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if broken:
        raise InputError(
            f"model: {model} gives features that are not finite for {len(broken)} of "
            f"{len(names)} inputs, the first {names[broken[0]]!r}. Its weights may hold NaN."
        )
