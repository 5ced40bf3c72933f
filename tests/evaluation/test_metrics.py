from __future__ import annotations

import numpy as np
import pytest

from fasterase.evaluation import metrics
from fasterase.evaluation.metrics import bootstrap_intervals, wilson_interval


def brute_force(
    values: np.ndarray, statistic, resamples: int, seed: int, level: float = 0.95
) -> tuple[float, float]:
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(values), size=(resamples, len(values)))
    found = [statistic(values[rows]) for rows in drawn]
    low, high = np.percentile(found, [50 - 50 * level, 50 + 50 * level])
    return low, high


@pytest.mark.parametrize("n", [1, 2, 17, 30])
def test_equals_resampling_in_a_loop(n: int) -> None:
    values = np.random.default_rng(1).normal(size=n).round(1)  # rounded: with repetitions
    found = bootstrap_intervals({"mean": values}, {"median": values}, resamples=300, seed=5)
    assert found["mean"] == pytest.approx(brute_force(values, np.mean, 300, 5))
    assert found["median"] == pytest.approx(brute_force(values, np.median, 300, 5))


def test_the_median_of_an_even_number_lies_between_the_middle_two() -> None:
    values = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    for level in (0.2, 0.5, 0.8):
        found = bootstrap_intervals({}, {"m": values}, resamples=300, seed=5, level=level)["m"]
        assert found == pytest.approx(brute_force(values, np.median, 300, 5, level))


def test_pairs_without_a_value_do_not_count() -> None:
    values = np.array([1.0, 0.0, np.nan, 1.0, np.nan, 0.0, 1.0])
    found = bootstrap_intervals({"accuracy": values}, {}, resamples=300, seed=2)
    assert found["accuracy"] == pytest.approx(brute_force(values, np.nanmean, 300, 2))


def test_contains_the_value_and_shrinks_with_the_number_of_pairs() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for n in (50, 5000):
        values = (rng.random(n) < 0.3).astype(float)
        low, high = bootstrap_intervals({"hit": values}, {}, resamples=1000, seed=0)["hit"]
        assert low < values.mean() < high
        # Normal approximation of the binomial.
        half = 1.96 * np.sqrt(values.mean() * (1 - values.mean()) / n)
        assert high - low == pytest.approx(2 * half, rel=0.15)
        widths.append(high - low)
    assert widths[1] < widths[0] / 5


def test_chunks_of_resamples_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random(20)
    whole = bootstrap_intervals({"a": values}, {"b": values}, resamples=100, seed=0)
    monkeypatch.setattr(metrics, "RESAMPLE_ELEMENTS", 20 * 7)
    assert bootstrap_intervals({"a": values}, {"b": values}, resamples=100, seed=0) == whole


@pytest.mark.parametrize(
    ("share", "count", "low", "high"),
    [  # from R: prop.test(share * count, count, correct = FALSE)
        (0.5, 10, 0.2366, 0.7634),
        (0.0, 20, 0.0, 0.1611),
        (1.0, 10, 0.7225, 1.0),
        (0.1, 100, 0.0552, 0.1744),
        (0.0, 1, 0.0, 0.7935),
    ],
)
def test_wilson_intervals(share: float, count: int, low: float, high: float) -> None:
    assert wilson_interval(share, count) == pytest.approx((low, high), abs=1e-4)
