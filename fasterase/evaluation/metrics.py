"""The metrics: names, units, wanted directions, and the 95 % intervals of their values."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

RECALL_DEPTHS = (1, 5, 10)
CONCEPT_DEPTHS = (1, 5)
# Recall of the model's captions among the original's image features: of an image index that was
# not rebuilt. Of the original itself it is its text->image recall.
OLD_INDEX = "text_to_original_image_recall@1"
# Recall of images among images of the same thing: what the image tower alone keeps together.
IMAGE_TO_IMAGE = "image_to_image_recall@1"
# Share of images that a tower wins beside the original's other one.
TOWER_HITS = {"image": "image_tower_hit@1", "text": "text_tower_hit@1"}
# Places of the verdict's contest that are reported beside the first: means hide pairs close to it.
NEAR = 5
# Elements of one chunk of resampling counts: 32 MB as fp64.
RESAMPLE_ELEMENTS = 4_000_000
WILSON_Z = 1.959964  # 95 %


@dataclass(frozen=True)
class Metric:
    """One number per set."""

    key: str  # name in dictionaries and JSON
    title: str  # name in tables
    unit: Literal["share", "rank", "cosine"]  # 0 to 1, printed in percent; 1 is best; -1 to 1
    average: Literal["mean", "median"]  # how per-pair values become the set's value
    # Wanted directions on sets to forget, and on all others if the metric exists there. Values
    # beyond chance are a trace too, so ranks and cosines aim at the chance level and not past it.
    forget: str
    keep: str

    @property
    def is_rate(self) -> bool:
        """Whether it is the share of pairs that fulfil something, not a mean of their shares."""
        return self.unit == "share" and not self.key.endswith("_residue")

    def average_of(self, values: np.ndarray) -> float:
        """Return the set's value from per-pair `values` [n]; NaN marks pairs that do not count."""
        return float(np.nanmean(values) if self.average == "mean" else np.nanmedian(values))


def format_value(unit: str, value: float) -> str:
    """Format a value of a unit of `Finding` that is a number: a `"share"` in percent."""
    if unit == "share":
        return f"{100 * value:.1f}"
    if unit == "cosine":
        return f"{value:+.2f}".replace("-0.00", "+0.00")
    return f"{value:.0f}" if unit == "rank" and value >= 1000 else f"{value:.1f}"


def _share(key: str, title: str, keep: str = "↑") -> Metric:
    return Metric(key, f"{title}, %", "share", "mean", "↓", keep)


METRICS: tuple[Metric, ...] = (
    _share("zero_shot_accuracy", "zero-shot accuracy"),
    *(_share(f"image_to_text_recall@{k}", f"image->text R@{k}") for k in RECALL_DEPTHS),
    *(_share(f"text_to_image_recall@{k}", f"text->image R@{k}") for k in RECALL_DEPTHS),
    _share(OLD_INDEX, "text->old image R@1"),
    _share(IMAGE_TO_IMAGE, "image->image R@1"),
    *(_share(f"concept_hit@{k}", f"concept hit@{k}", keep="↓") for k in CONCEPT_DEPTHS),
    Metric("median_rank", "median caption rank", "rank", "median", "↑ chance", "↓"),
    Metric("matched_cosine", "mean matched cosine", "cosine", "mean", "↓ chance", "↑"),
    *(
        Metric(f"{key}_residue", f"{title} residue, %", "share", "mean", "↓ chance", "")
        for key, title in (("image_to_text", "image->text"), ("text_to_image", "text->image"))
    ),
    *(
        Metric(f"contest_hit@{k}", f"hit@{k} in the verdict, %", "share", "mean", "↓", "")
        for k in (1, NEAR)
    ),
    *(
        Metric(key, f"hit@1, its {tower} tower alone, %", "share", "mean", "↓", "")
        for tower, key in TOWER_HITS.items()
    ),
)


def bootstrap_intervals(
    values: Mapping[str, np.ndarray],
    *,
    resamples: int,
    seed: int,
    medians: Collection[str] = (),
    level: float = 0.95,
) -> dict[str, tuple[float, float]]:
    """Return name -> percentile interval of the mean of per-pair values [n].

    All metrics share the resampled pairs. Time is O(resamples x n), memory O(1) in both.

    Args:
        values: name -> [n] values; NaN marks pairs that do not count.
        resamples: number of resamples of n pairs, drawn with replacement by `seed`.
        medians: names whose median is wanted instead; their values hold no NaN.
        level: share of the resampled statistics inside the interval.
    """
    if not values:
        return {}
    (n,) = {len(each) for each in values.values()}
    found: dict[str, list[np.ndarray]] = {name: [] for name in values}
    for counts in _resample_counts(n, resamples, seed):
        for name, each in values.items():
            if name in medians:
                found[name].append(_weighted_median(each, counts))
                continue
            counted = ~np.isnan(each)
            with np.errstate(invalid="ignore"):  # a resample without any counted pair is NaN
                found[name].append(counts @ np.where(counted, each, 0) / (counts @ counted))
    tail = 50 * (1 - level)
    ends = {
        name: np.nanpercentile(np.concatenate(parts), [tail, 100 - tail])
        for name, parts in found.items()
    }
    return {name: (float(low), float(high)) for name, (low, high) in ends.items()}


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share of `count` trials."""
    square = WILSON_Z**2 / count
    centre = (share + square / 2) / (1 + square)
    spread = math.sqrt(share * (1 - share) * square + square**2 / 4) / (1 + square)
    return max(0.0, centre - spread), min(1.0, centre + spread)


def _resample_counts(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield [r, n]: how often each pair was drawn in each of `r` resamples."""
    rng = np.random.default_rng(seed)
    step = max(1, RESAMPLE_ELEMENTS // n)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = rng.integers(0, n, size=(rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def _weighted_median(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return [r]: the median of `values` [n], each taken `counts` [r, n] times."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    reached = np.cumsum(counts[:, order], axis=1)
    n = len(values)
    lower = ordered[(reached > (n - 1) // 2).argmax(axis=1)]
    upper = ordered[(reached > n // 2).argmax(axis=1)]
    return (lower + upper) / 2
