"""From features to one value per pair and metric, for all sets at once.

Candidate pools:
- image->text: the distinct first captions of all sets together, so that sets compare.
- text->image for a set: its own images and the retain set's as distractors.

Ties count as a random order would break them: a collapsed model, to which all candidates are alike,
scores exactly chance, neither 0 nor 100 %.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasterase.evaluation.features import SetFeatures
from fasterase.evaluation.metrics import CONCEPT_DEPTHS, RECALL_DEPTHS

# Two cosines this close are a tie: fp32 dot products of equal unit vectors differ by about 1e-7.
TIE = 1e-6
# Elements of a similarity chunk; with its masks about 20 bytes each, so 80 MB.
CHUNK_ELEMENTS = 4_000_000


@dataclass(frozen=True)
class SetScores:
    """Per-pair values of one set.

    Attributes:
        ids: [n] ids of the pairs.
        values: metric key -> [n]; NaN for pairs without a value (no known class).
        chance: metric key -> the value of a random order of the candidates; for the cosine the
            mean over unmatched candidates.
    """

    ids: list[str]
    values: dict[str, np.ndarray]
    chance: dict[str, float]

    def add(self, key: str, values: np.ndarray, chance: float) -> None:
        """Add a metric: per-pair `values` [n] and chance level."""
        self.values[key], self.chance[key] = values, chance


@dataclass(frozen=True)
class CaptionPool:
    """Distinct captions of all sets, the candidates of image->text."""

    text: Tensor  # [M, D]
    captions: list[str]  # [M]
    row: dict[str, int]  # caption -> its row

    @classmethod
    def of(cls, sets: Mapping[str, SetFeatures]) -> CaptionPool:
        captions: list[str] = []
        row: dict[str, int] = {}
        rows: list[Tensor] = []
        for features in sets.values():
            for caption, vector in zip(features.captions, features.text, strict=True):
                if caption not in row:
                    row[caption] = len(captions)
                    captions.append(caption)
                    rows.append(vector)
        return cls(torch.stack(rows), captions, row)


def retrieval_scores(
    features: SetFeatures,
    pool: CaptionPool,
    concept: Tensor,  # [M] bool, which captions of the pool belong to the erased concept
    distractors: SetFeatures | None,
) -> SetScores:
    """Return all retrieval metrics of one set; memory is bounded by `CHUNK_ELEMENTS`."""
    n, size = len(features.ids), len(pool.captions)
    own = [[pool.row[c] for c in texts if c in pool.row] for texts in features.pair_captions]
    first = torch.tensor([pool.row[features.captions[i]] for i in features.pair_text])
    own_count = np.array([len(rows) for rows in own])

    own_parts, first_parts, concept_parts, matched, unmatched = [], [], [], [], []
    for rows, similarity in similarity_chunks(features.image, pool.text):
        right = column_mask(own[rows], size)
        own_parts.append(find_position(similarity, right))
        canonical = torch.zeros_like(right).scatter_(1, first[rows, None], True)
        first_parts.append(find_position(similarity, canonical))
        concept_parts.append(find_position(similarity, concept[None]))
        matched.append(similarity[canonical].double().numpy())
        wrong = similarity.masked_fill(right, 0).sum(dim=1).double().numpy()
        unmatched.append(wrong / np.maximum(size - own_count[rows], 1))

    image_side, text_side, images = _text_to_image(features, distractors)
    concept_count = np.full(n, int(concept.sum()))
    values, expected = {}, {}
    for key, depths, found, by_chance in (
        (
            "image_to_text_recall",
            RECALL_DEPTHS,
            join_positions(own_parts),
            chance_position(size, own_count),
        ),
        ("text_to_image_recall", RECALL_DEPTHS, image_side, chance_position(images, text_side)),
        (
            "concept_hit",
            CONCEPT_DEPTHS,
            join_positions(concept_parts),
            chance_position(size, concept_count),
        ),
    ):
        for k in depths:
            values[f"{key}@{k}"] = found.hit(k)
            expected[f"{key}@{k}"] = float(by_chance.hit(k).mean())
    values["median_rank"] = join_positions(first_parts).rank()
    expected["median_rank"] = (size + 1) / 2
    values["matched_cosine"] = np.concatenate(matched)
    expected["matched_cosine"] = float(np.concatenate(unmatched).mean())
    return SetScores(features.ids, values, expected)


def old_index_scores(
    features: SetFeatures, distractors: SetFeatures | None
) -> tuple[np.ndarray, float]:
    """Return [n] text->image hit@1 and its chance level; `image` of both sets is the original's."""
    found, right, count = _text_to_image(features, distractors)
    return found.hit(1), float(chance_position(count, right).hit(1).mean())


def _text_to_image(
    features: SetFeatures, distractors: SetFeatures | None
) -> tuple[Position, np.ndarray, int]:
    """Return positions [n], right images per caption [n], and the number of candidates."""
    image, pair_captions = features.image, features.pair_captions
    if distractors is not None:
        image = torch.cat([image, distractors.image])
        pair_captions = pair_captions + distractors.pair_captions
    images_of: dict[str, list[int]] = {caption: [] for caption in features.captions}
    for row, captions in enumerate(pair_captions):
        for caption in captions:
            if caption in images_of:
                images_of[caption].append(row)
    right = [images_of[caption] for caption in features.captions]
    # Every pair queries with its first caption: a caption counts as often as it has pairs.
    by_caption = search_candidates(features.text, image, right)
    found = Position(*(field[features.pair_text] for field in by_caption))
    counts = np.array([len(rows) for rows in right])
    return found, counts[features.pair_text], len(image)


def column_mask(columns: Sequence[list[int]], width: int) -> Tensor:
    """Return [len(columns), width] bool, True at each row's columns."""
    mask = torch.zeros(len(columns), width, dtype=torch.bool)
    rows = [row for row, those in enumerate(columns) for _ in those]
    mask[rows, [column for those in columns for column in those]] = True
    return mask


class Position(NamedTuple):
    """The best right candidate of each query among all candidates."""

    above: np.ndarray  # [n] candidates ranked before it, all of them wrong
    tied: np.ndarray  # [n] candidates that tie with it, itself included
    right: np.ndarray  # [n] right ones among the tied

    def hit(self, k: int) -> np.ndarray:
        """Return [n], the probability that a right candidate is among the first `k`.

        Ties are in random order: `1 - C(tied - right, d) / C(tied, d)`, with `d = k - above` draws
        from the tied ones.
        """
        miss = np.ones(len(self.above))
        for draw in range(k):
            drawn = (draw < k - self.above) & (draw < self.tied)
            wrong_left = np.maximum(self.tied - self.right - draw, 0)
            left = np.maximum(self.tied - draw, 1)
            miss = np.where(drawn, miss * wrong_left / left, miss)
        return 1.0 - miss

    def rank(self) -> np.ndarray:
        """Return [n], the rank from 1, averaged over the tied places."""
        return 1.0 + self.above + (self.tied - 1) / 2


def search_candidates(
    queries: Tensor,  # [n, D]
    candidates: Tensor,  # [m, D]
    right: Sequence[list[int]],  # [n] candidates that are right, one or more for each query
    *,
    without: Sequence[int] | None = None,  # [n] a candidate that does not count: the query itself
) -> Position:
    """Return where each query finds its best right candidate; memory as `similarity_chunks`."""
    parts = []
    for rows, similarity in similarity_chunks(queries, candidates):
        if without is not None:
            similarity[torch.arange(len(similarity)), list(without[rows])] = -torch.inf
        parts.append(find_position(similarity, column_mask(right[rows], len(candidates))))
    return join_positions(parts)


def find_position(similarity: Tensor, right: Tensor) -> Position:
    """Return the position of each row's best right candidate.

    Args:
        similarity: [n, m] cosines of queries with candidates.
        right: [n, m] or [1, m] bool, at least one True in each row.
    """
    best = similarity.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    above = similarity > best + TIE
    tied = (similarity >= best - TIE) & ~above
    return Position(_count(above), _count(tied), _count(tied & right))


def _count(mask: Tensor) -> np.ndarray:
    """Count each row's True. Summing bytes is ten times faster than summing bool on a CPU."""
    return mask.view(torch.uint8).sum(dim=1, dtype=torch.int32).numpy()


def chance_position(candidates: int, right: np.ndarray) -> Position:
    """Return the position in a random order: all candidates tied, `right` [n] of them right."""
    return Position(np.zeros(len(right)), np.full(len(right), candidates), right)


def join_positions(parts: list[Position]) -> Position:
    """Concatenate the positions of consecutive chunks of queries."""
    return Position(*(np.concatenate(field) for field in zip(*parts, strict=True)))


def similarity_chunks(queries: Tensor, candidates: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield `queries @ candidates.T` in slices of rows of at most `CHUNK_ELEMENTS` elements."""
    step = max(1, CHUNK_ELEMENTS // max(1, len(candidates)))
    for start in range(0, len(queries), step):
        rows = slice(start, min(start + step, len(queries)))
        yield rows, queries[rows] @ candidates.T
