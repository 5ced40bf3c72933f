"""From features to one value per pair and metric, for all sets at once.

Candidate pools:
- image->text: the distinct first captions of all sets together, so that sets compare.
- text->image for a set: its own images and the retain set's as distractors.
- image->image for a set: the same, without the image itself.

Ties count as a random order would break them: a collapsed model, to which all candidates are alike,
scores exactly chance, neither 0 nor 100 %.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasterase.encode import PairFeatures
from fasterase.errors import InputError
from fasterase.evaluation.metrics import CONCEPT_DEPTHS, RECALL_DEPTHS
from fasterase.pairs.prepare import caption_key
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.table import PairTable

# Two cosines this close are a tie: fp32 dot products of equal unit vectors differ by about 1e-7.
TIE = 1e-6
# Pictures whose cosine is nearer to 1 than this are copies of each other.
SAME_PICTURE = 1e-5
# Elements of a similarity chunk; with its masks about 20 bytes each, so 80 MB.
CHUNK_ELEMENTS = 4_000_000


class SetFeatures(NamedTuple):
    """Image features of n pairs with their names.

    The first caption represents a pair; further ones only count as right answers.
    """

    image: Tensor  # [n, D]
    captions: list[list[str]]  # [n] all of each pair, the first one first; token ids spelled out
    ids: list[str]  # [n] as the source gives them

    @classmethod
    def of(cls, source: PairTable, features: PairFeatures) -> SetFeatures:
        """Read the names; `InputError` if a first caption is not that which was encoded."""
        rows = features.rows.tolist()
        captions = [captions_of(source, row) for row in rows]
        ids = [source.id(row) for row in rows]
        for name, now, before in zip(ids, captions, features.first_captions, strict=True):
            if now[0] != before:
                raise InputError(
                    f"{name}: its caption was {before!r}, and is {now[0]!r} on a second read. "
                    "Return all captions of a pair as a list, always the same one: training draws "
                    "one of them each time."
                )
        return cls(features.image, captions, ids)


def distinct_firsts(pairs: PairFeatures) -> tuple[list[int], list[int]]:
    """Return the rows in `pairs.text` of distinct first captions, and each pair's among them."""
    place: dict[int, int] = {}
    own = [place.setdefault(captions[0], len(place)) for captions in pairs.pair_text]
    return list(place), own


def captions_of(source: PairTable, row: int) -> list[str]:
    """Return the identities of all captions of a pair, the first one first."""
    texts = source.texts(row)
    return [caption_key(texts)] if isinstance(texts, Tensor) else list(map(caption_key, texts))


def all_captions(source: PairTable) -> set[str]:
    """Return every caption of every readable pair of a set."""
    found: set[str] = set()
    for row in range(len(source)):
        with suppress(BrokenPair):  # counted and named when the pair is encoded
            found.update(captions_of(source, row))
    return found


def check_finite(features: Tensor, names: Sequence[str], model: str) -> None:
    """Raise `InputError` if features [n, D] under `model` of the inputs `names` are not finite."""
    broken = (~features.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if broken:
        raise InputError(
            f"model: {model} gives features that are not finite for {len(broken)} of "
            f"{len(names)} inputs, the first {names[broken[0]]!r}. Its weights may hold NaN."
        )


@dataclass(frozen=True)
class SetScores:
    """Per-pair values of one set, by the key of the metric."""

    ids: list[str]  # [n] of the pairs
    # [n] each; NaN for pairs without a value, such as those of no known class.
    values: dict[str, np.ndarray]
    # Of a random order of the candidates; for the cosine the mean over unmatched candidates.
    chance: dict[str, float]

    def add(self, key: str, values: np.ndarray, chance: float) -> None:
        self.values[key], self.chance[key] = values, chance

    def add_hits(self, key: str, depths: Sequence[int], found: Position) -> None:
        for k in depths:
            self.add(f"{key}@{k}", *found.at(k))


class CaptionPool(NamedTuple):
    """Distinct first captions of all sets, the candidates of image->text."""

    text: Tensor  # [M, D]
    row: dict[str, int]  # caption -> its row

    @classmethod
    def of(cls, features: Iterable[PairFeatures]) -> CaptionPool:
        vectors: dict[str, Tensor] = {}
        for pairs in features:
            for row in distinct_firsts(pairs)[0]:
                vectors.setdefault(pairs.captions[row], pairs.text[row])
        places = {caption: i for i, caption in enumerate(vectors)}
        return cls(torch.stack(list(vectors.values())), places)


def retrieval_scores(
    features: SetFeatures,
    pool: CaptionPool,
    concept: Tensor,  # [M] bool, which captions of the pool belong to the erased concept
    distractors: SetFeatures | None,
) -> SetScores:
    """Return all retrieval metrics of one set; memory is bounded by `CHUNK_ELEMENTS`."""
    size = len(pool.row)
    own = [[pool.row[c] for c in texts if c in pool.row] for texts in features.captions]
    first = torch.tensor([pool.row[texts[0]] for texts in features.captions])
    parts = []
    for rows, similarity in similarity_chunks(features.image, pool.text):
        right = _column_mask(own[rows], size)
        is_first = torch.zeros_like(right).scatter_(1, first[rows, None], True)
        found = [find_position(similarity, each) for each in (right, is_first, concept[None])]
        matched = similarity[is_first].double().numpy()
        wrong = similarity.masked_fill(right, 0).sum(dim=1).double().numpy()
        parts.append((*found, matched, wrong / np.maximum(size - found[0].answers, 1)))
    of_own, of_first, of_concept, cosines, unmatched = zip(*parts, strict=True)

    scores = SetScores(features.ids, {}, {})
    scores.add_hits("image_to_text_recall", RECALL_DEPTHS, join_positions(of_own))
    found_images = text_to_image(features, pool, distractors)
    scores.add_hits("text_to_image_recall", RECALL_DEPTHS, found_images)
    scores.add_hits("concept_hit", CONCEPT_DEPTHS, join_positions(of_concept))
    scores.add("median_rank", join_positions(of_first).rank(), (size + 1) / 2)
    expected = float(np.concatenate(unmatched).mean())
    scores.add("matched_cosine", np.concatenate(cosines), expected)
    return scores


def text_to_image(
    features: SetFeatures, pool: CaptionPool, distractors: SetFeatures | None
) -> Position:
    """Return where each pair's first caption finds its image, [n]."""
    sets = [features] if distractors is None else [features, distractors]
    image = torch.cat([each.image for each in sets])
    images_of: dict[str, list[int]] = {captions[0]: [] for captions in features.captions}
    for row, captions in enumerate(chain.from_iterable(each.captions for each in sets)):
        for caption in filter(images_of.__contains__, captions):
            images_of[caption].append(row)
    text = pool.text[[pool.row[caption] for caption in images_of]]
    by_caption = search_candidates(text, image, list(images_of.values()))
    # Every pair queries with its first caption: a caption counts as often as it has pairs.
    place = {caption: i for i, caption in enumerate(images_of)}
    pairs = [place[captions[0]] for captions in features.captions]
    return Position(*(field[pairs] for field in by_caption))


def image_labels(
    sets: Mapping[str, PairFeatures], classes: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return set -> [n] number of each pair's class (`label_pairs`), or else of its caption."""
    start = 1 + max((int(those.max(initial=-1)) for those in classes.values()), default=-1)
    captions: dict[str, int] = {}
    found = {}
    for name, pairs in sets.items():
        firsts = [captions.setdefault(each, start + len(captions)) for each in pairs.first_captions]
        known = classes.get(name, np.full(len(firsts), -1))
        found[name] = np.where(known >= 0, known, np.array(firsts, dtype=np.int64))
    return found


def search_images(
    sets: Mapping[str, PairFeatures], labels: Mapping[str, np.ndarray]
) -> dict[str, tuple[np.ndarray, Position]]:
    """Return set -> which images [n] have another one of their label (`image_labels`), and where.

    Candidates are the other pictures of the set and those of the retain set; a copy, such as the
    same picture with another caption, is no other one. Sets without two pictures of a label are
    left out. Memory as `similarity_chunks`.
    """
    searched = {}
    for name in labels:
        names = [name] if name == "retain" or "retain" not in labels else [name, "retain"]
        gallery = torch.cat([sets[each].image for each in names])
        shown = torch.from_numpy(np.concatenate([labels[each] for each in names]))
        queries, parts = [], []
        for rows, similarity in similarity_chunks(sets[name].image, gallery):
            right = shown[rows, None] == shown
            itself = torch.arange(rows.start, rows.stop)
            same = similarity > 1 - SAME_PICTURE
            same[itself - rows.start, itself] = True
            right &= ~same
            similarity.masked_fill_(same, -torch.inf)
            has_other = right.any(1)
            queries.append(has_other.numpy())
            parts.append(find_position(similarity[has_other], right[has_other]))
        found = join_positions(parts)
        if len(found.above):
            others = found.candidates - 1  # without the image itself
            searched[name] = np.concatenate(queries), found._replace(candidates=others)
    return searched


class Position(NamedTuple):
    """The best right candidate of each query among all candidates."""

    above: np.ndarray  # [n] candidates ranked before it, all of them wrong
    tied: np.ndarray  # [n] candidates that tie with it, itself included
    right: np.ndarray  # [n] right ones among the tied
    answers: np.ndarray  # [n] right ones among all
    candidates: np.ndarray  # [n] all

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

    def at(self, k: int) -> tuple[np.ndarray, float]:
        """Return `hit(k)`, [n], and its mean in a random order."""
        return self.hit(k), chance_hit(k, self.candidates, self.answers)

    def rank(self) -> np.ndarray:
        """Return [n], the rank from 1, averaged over the tied places."""
        return 1.0 + self.above + (self.tied - 1) / 2


def chance_hit(k: int, candidates: np.ndarray, right: np.ndarray) -> float:
    """Return the mean `hit(k)` of queries [n] in a random order, in which all candidates tie."""
    in_random_order = Position(np.zeros(len(right)), candidates, right, right, candidates)
    return float(in_random_order.hit(k).mean())


def search_candidates(
    queries: Tensor,  # [n, D]
    candidates: Tensor,  # [m, D]
    right: Sequence[list[int]],  # [n] candidates that are right, one or more for each query
) -> Position:
    """Return where each query finds its best right candidate; memory as `similarity_chunks`."""
    return join_positions(
        find_position(similarity, _column_mask(right[rows], len(candidates)))
        for rows, similarity in similarity_chunks(queries, candidates)
    )


def find_position(similarity: Tensor, right: Tensor) -> Position:
    """Return each query's position by cosines [n, m]; `right` [n or 1, m] has a True per row."""

    def count(mask: Tensor) -> np.ndarray:
        # Summing bytes is ten times faster than summing bool on a CPU.
        return mask.view(torch.uint8).sum(dim=1, dtype=torch.int32).numpy()

    best = similarity.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    above = similarity > best + TIE
    tied = (similarity >= best - TIE) & ~above
    rows = len(similarity)
    answers = np.broadcast_to(count(right), rows)
    candidates = np.full(rows, similarity.shape[1])
    return Position(count(above), count(tied), count(tied & right), answers, candidates)


def join_positions(parts: Iterable[Position]) -> Position:
    """Concatenate the positions of consecutive chunks of queries."""
    return Position(*(np.concatenate(field) for field in zip(*parts, strict=True)))


def similarity_chunks(queries: Tensor, candidates: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield `queries @ candidates.T` in slices of rows of at most `CHUNK_ELEMENTS` elements."""
    step = max(1, CHUNK_ELEMENTS // max(1, len(candidates)))
    for start in range(0, len(queries), step):
        rows = slice(start, min(start + step, len(queries)))
        yield rows, queries[rows] @ candidates.T


def are_copies(images: Tensor, others: Tensor) -> np.ndarray:
    """Return [n] bool, whether an image is a copy of one of the others."""
    chunks = similarity_chunks(images, others)
    found = [(similarity > 1 - SAME_PICTURE).any(1).numpy() for _, similarity in chunks]
    return np.concatenate([np.zeros(0, bool), *found])


def first_copies(images: Tensor) -> np.ndarray:
    """Return [n] int64, the first row whose image is the same as that of each row."""
    first = np.arange(len(images))
    for rows, similarity in similarity_chunks(images, images):
        same = similarity > 1 - SAME_PICTURE
        earliest = same.view(torch.uint8).argmax(1).numpy()
        first[rows] = np.minimum(first[rows], np.where(same.any(1).numpy(), earliest, first[rows]))
    return first


def spread_values(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Return [n], the `values` where the mask `where` [n] is True, and NaN elsewhere."""
    spread = np.full(len(where), np.nan)
    spread[where] = values
    return spread


def share_below(scores: Tensor, others: Tensor) -> np.ndarray:
    """Return [n], the share of `others` [m] or [n, m] below each of `scores` [n]; ties count half.

    With the scores of all others in every row, its mean is the AUC.
    """
    score = scores[:, None]
    below = (others < score - TIE).double() + (others <= score + TIE).double()
    return (below.mean(1) / 2).numpy()


def _column_mask(columns: Sequence[list[int]], width: int) -> Tensor:
    """Return [len(columns), width] bool, True at each row's columns."""
    mask = torch.zeros(len(columns), width, dtype=torch.bool)
    rows = [row for row, those in enumerate(columns) for _ in those]
    mask[rows, [column for those in columns for column in those]] = True
    return mask
