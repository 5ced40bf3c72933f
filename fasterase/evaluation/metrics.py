"""The metrics: names, units, wanted directions, and the 95 % intervals of their values."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

DIRECTIONS = {"image_to_text": "image->text", "text_to_image": "text->image"}  # keys, titles
RECALL_DEPTHS = (1, 5, 10)
CONCEPT_DEPTHS = (1, 5)
# Recall of the model's captions among the original's image features: of an image index that was
# not rebuilt. Of the original itself it is its text->image recall.
OLD_INDEX = "text_to_original_image_recall@1"
# Recall of images among images of the same thing: what the image tower alone keeps together.
IMAGE_TO_IMAGE = "image_to_image_recall@1"
RESIDUES = tuple(f"{direction}_residue" for direction in DIRECTIONS)
# Share of images that a tower wins beside the original's other one.
TOWER_HITS = {"image": "image_tower_hit@1", "text": "text_tower_hit@1"}
# Places of the verdict's contest that are reported beside the first: means hide pairs close to it.
NEAR = 5
CONTEST_HIT, CONTEST_NEAR = "contest_hit@1", f"contest_hit@{NEAR}"
# Elements of one chunk of resampling counts: 32 MB as fp64.
RESAMPLE_ELEMENTS = 4_000_000
LEVEL, WILSON_Z = 0.95, 1.959964  # of all intervals


@dataclass(frozen=True)
class Metric:
    """One number per set."""

    key: str  # name in dictionaries and JSON
    title: str  # name in tables
    unit: Literal["share", "rank", "cosine"]  # 0 to 1, printed in percent; 1 is best; -1 to 1
    # Wanted directions on sets to forget, and on all others if the metric exists there. Values
    # beyond chance are a trace too, so ranks and cosines aim at the chance level and not past it.
    forget: str
    keep: str

    @property
    def is_rate(self) -> bool:
        """Whether it is the share of pairs that fulfil something, not a mean of their shares."""
        return self.unit == "share" and not self.key.endswith("_residue")

    def average_of(self, values: np.ndarray) -> float:
        """Return the mean of per-pair `values` [n], the median of ranks; NaN does not count."""
        return float(np.nanmedian(values) if self.unit == "rank" else np.nanmean(values))


def format_value(unit: str, value: float) -> str:
    """Format a value of a unit of `Finding` that is a number: a `"share"` in percent."""
    if unit == "share":
        return f"{100 * value:.1f}"
    if unit == "cosine":
        return f"{value:+.2f}".replace("-0.00", "+0.00")
    return f"{value:.0f}" if unit == "rank" and value >= 1000 else f"{value:.1f}"


def _share(key: str, title: str, *, forget: str = "↓", keep: str = "↑") -> Metric:
    return Metric(key, f"{title}, %", "share", forget, keep)


METRICS: tuple[Metric, ...] = (
    _share("zero_shot_accuracy", "zero-shot accuracy"),
    *(
        _share(f"{direction}_recall@{k}", f"{title} R@{k}")
        for direction, title in DIRECTIONS.items()
        for k in RECALL_DEPTHS
    ),
    _share(OLD_INDEX, "text->old image R@1"),
    _share(IMAGE_TO_IMAGE, "image->image R@1"),
    *(_share(f"concept_hit@{k}", f"concept hit@{k}", keep="↓") for k in CONCEPT_DEPTHS),
    Metric("median_rank", "median caption rank", "rank", "↑ chance", "↓"),
    Metric("matched_cosine", "mean matched cosine", "cosine", "↓ chance", "↑"),
    *(
        _share(key, f"{title} residue", forget="↓ chance", keep="")
        for key, title in zip(RESIDUES, DIRECTIONS.values(), strict=True)
    ),
    *(_share(f"contest_hit@{k}", f"hit@{k} in the verdict", keep="") for k in (1, NEAR)),
    *(_share(key, f"hit@1, its {tower} tower alone", keep="") for tower, key in TOWER_HITS.items()),
)


def metrics_among(keys: Container[str]) -> list[Metric]:
    """Return the metrics with these keys, in the order of tables."""
    return [metric for metric in METRICS if metric.key in keys]


def metric_intervals(
    values: Mapping[str, np.ndarray], *, resamples: int, seed: int
) -> dict[str, tuple[float, float]]:
    """Return metric -> 95 % interval of its average over pairs, from values [n] of each pair.

    Wilson's for shares of pairs, which are no certainty where few pairs agree; bootstrapped for
    the others.
    """
    metrics = metrics_among(values)
    rates = {each.key: wilson_of(values[each.key]) for each in metrics if each.is_rate}
    medians = [each.key for each in metrics if each.unit == "rank"]
    others = {key: those for key, those in values.items() if key not in rates}
    found = bootstrap_intervals(others, medians=medians, resamples=resamples, seed=seed)
    return rates | found


def bootstrap_intervals(
    values: Mapping[str, np.ndarray],
    *,
    resamples: int,
    seed: int,
    medians: Container[str] = (),
) -> dict[str, tuple[float, float]]:
    """Return name -> 95 % percentile interval of the mean of per-pair values [n].

    NaN marks pairs that do not count. All metrics share the resampled pairs, n of them drawn with
    replacement by `seed`. Time is O(resamples x n), memory O(1) in both. Of `medians`, whose values
    hold no NaN, the median is wanted instead.
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
    tail = 50 * (1 - LEVEL)
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


def wilson_of(values: np.ndarray) -> tuple[float, float]:
    """Return `wilson_interval` of the mean of values [n]; NaN marks trials that do not count."""
    counted = values[~np.isnan(values)]
    return wilson_interval(float(counted.mean()), len(counted))


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
