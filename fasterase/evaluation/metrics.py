"""The metrics: names, units, and the direction wanted on sets to forget and on sets to keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

RECALL_DEPTHS = (1, 5, 10)
CONCEPT_DEPTHS = (1, 5)


@dataclass(frozen=True)
class Metric:
    """One number a set.

    Attributes:
        key: name in dictionaries and JSON.
        title: name in tables.
        unit: `"share"` (0 to 1, printed in percent), `"rank"` (1 is best) or `"cosine"`.
        average: how the per-pair values become the set's value.
        forget: wanted on sets to forget. Beyond chance is a trace too, so ranks and cosines aim at
            the chance level and not past it.
        keep: wanted on all other sets.
    """

    key: str
    title: str
    unit: Literal["share", "rank", "cosine"]
    average: Literal["mean", "median"]
    forget: str
    keep: str

    def averaged(self, values: np.ndarray) -> float:
        """The set's value of per-pair `values` [n]; NaN marks pairs that do not count."""
        return float(np.nanmean(values) if self.average == "mean" else np.nanmedian(values))

    def spelled(self, value: float) -> str:
        """`value` as tables print it: shares in percent, without the sign."""
        if self.unit == "share":
            return f"{100 * value:.1f}"
        if self.unit == "rank":
            return f"{value:.1f}" if value < 1000 else f"{value:.0f}"
        return f"{value:+.2f}".replace("-0.00", "+0.00")


def _share(key: str, title: str, keep: str = "↑") -> Metric:
    return Metric(key, f"{title}, %", "share", "mean", "↓", keep)


METRICS: tuple[Metric, ...] = (
    _share("zero_shot_accuracy", "zero-shot accuracy"),
    *(_share(f"image_to_text_recall@{k}", f"image->text R@{k}") for k in RECALL_DEPTHS),
    *(_share(f"text_to_image_recall@{k}", f"text->image R@{k}") for k in RECALL_DEPTHS),
    *(_share(f"concept_hit@{k}", f"concept hit@{k}", keep="↓") for k in CONCEPT_DEPTHS),
    Metric("median_rank", "median caption rank", "rank", "median", "↑ chance", "↓"),
    Metric("matched_cosine", "mean matched cosine", "cosine", "mean", "↓ chance", "↑"),
)


def is_forget_set(name: str) -> bool:
    """Sets whose name starts with `forget` ("forget", "forget-unseen") should be forgotten."""
    return name.startswith("forget")


def wanted(metric: Metric, set_name: str) -> str:
    """The arrow of `metric` on the set of that name."""
    return metric.forget if is_forget_set(set_name) else metric.keep
