"""Percentile bootstrap over pairs, vectorised over resamples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

# Elements of one chunk of resampling counts: 32 MB as fp64.
CHUNK_ELEMENTS = 4_000_000


def intervals(
    means: Mapping[str, np.ndarray],
    medians: Mapping[str, np.ndarray],
    *,
    resamples: int,
    seed: int,
    level: float = 0.95,
) -> dict[str, tuple[float, float]]:
    """Percentile intervals of the mean or the median of per-pair values.

    All metrics share the resampled pairs. Time is O(resamples x n), memory O(1) in both.

    Args:
        means: name -> [n] values whose mean is wanted; NaN marks pairs that do not count.
        medians: name -> [n] values whose median is wanted.
        resamples: how many resamples of n pairs, drawn with replacement.
        seed: of the drawing.
        level: share of the resampled statistics inside the interval.

    Returns:
        name -> (low, high).
    """
    lengths = {len(values) for values in (*means.values(), *medians.values())}
    if not lengths:
        return {}
    (n,) = lengths
    found: dict[str, list[np.ndarray]] = {name: [] for name in (*means, *medians)}
    for counts in _resample_counts(n, resamples, seed):
        for name, values in means.items():
            counted = ~np.isnan(values)
            with np.errstate(invalid="ignore"):  # a resample without any counted pair is NaN
                found[name].append(counts @ np.where(counted, values, 0) / (counts @ counted))
        for name, values in medians.items():
            found[name].append(_weighted_median(values, counts))
    tail = 50 * (1 - level)
    result = {}
    for name, parts in found.items():
        low, high = np.nanpercentile(np.concatenate(parts), [tail, 100 - tail])
        result[name] = (float(low), float(high))
    return result


def _resample_counts(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """[r, n] how often each pair was drawn in each of `r` resamples."""
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK_ELEMENTS // n)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = rng.integers(0, n, size=(rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def _weighted_median(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[r] median of `values` [n], each taken `counts` [r, n] times."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    reached = np.cumsum(counts[:, order], axis=1)
    n = len(values)
    lower = ordered[(reached > (n - 1) // 2).argmax(axis=1)]
    upper = ordered[(reached > n // 2).argmax(axis=1)]
    return (lower + upper) / 2
