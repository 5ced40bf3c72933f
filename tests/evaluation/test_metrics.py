from __future__ import annotations

import numpy as np
import pytest

from fasterase.evaluation import metrics
from fasterase.evaluation.metrics import bootstrap_intervals, wilson_interval


def brute_force(values: np.ndarray, statistic, resamples: int, seed: int) -> tuple[float, float]:
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(values), size=(resamples, len(values)))
    found = [statistic(values[rows]) for rows in drawn]
    low, high = np.percentile(found, [2.5, 97.5])
    return low, high


@pytest.mark.parametrize("n", [1, 2, 6, 17, 30])
def test_equals_resampling_in_a_loop(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "RESAMPLE_ELEMENTS", 7 * n)  # in several chunks
    values = np.random.default_rng(1).normal(size=n).round(1)  # rounded: with repetitions
    some = np.where(np.arange(n) % 3 == 1, np.nan, values)  # pairs without a value do not count
    given = {"mean": values, "some": some, "median": values}
    found = bootstrap_intervals(given, medians=["median"], resamples=300, seed=5)
    assert found["mean"] == pytest.approx(brute_force(values, np.mean, 300, 5))
    assert found["median"] == pytest.approx(brute_force(values, np.median, 300, 5))
    if n > 10:  # else some resamples have no pair that counts
        assert found["some"] == pytest.approx(brute_force(some, np.nanmean, 300, 5))


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
