"""The oracle's hand-written gradients against central differences of its own values."""

from __future__ import annotations

import numpy as np
import pytest

from tests.oracle import clip_like, contrastive, erase_loss


def _difference(value, array, index, step=1e-6):
    kept = array[index]
    array[index] = kept + step
    high = value()
    array[index] = kept - step
    low = value()
    array[index] = kept
    return (high - low) / (2 * step)


def test_contrastive_gradient_is_the_slope_of_its_values():
    batch = clip_like(7, 5, 6.0, ref_width=3, num_labels=4)
    upstream = np.random.default_rng(1).normal(size=(4, 7))
    groups = (3, 0, 4)
    gradient = contrastive(batch, upstream, groups)[1]

    def value():
        return (upstream * contrastive(batch, upstream, groups)[0]).sum()

    for index in ((0, 0), (2, 4), (6, 1)):
        assert gradient.image[index] == pytest.approx(_difference(value, batch.image, index), 1e-6)
        assert gradient.text[index] == pytest.approx(_difference(value, batch.text, index), 1e-6)
    holder = np.array([batch.scale])

    def value_of_scale():
        batch.scale = float(holder[0])
        return value()

    assert gradient.scale == pytest.approx(_difference(value_of_scale, holder, 0), 1e-6)


@pytest.mark.parametrize("negatives", ["own", "joint"])
@pytest.mark.parametrize("forget_loss", ["similarity", "contrastive"])
def test_erase_loss_gradient_is_the_slope_of_its_total(negatives, forget_loss):
    batch = clip_like(8, 5, 4.0, num_labels=5)
    options = {
        "n_forget": 3,
        "forget_loss": forget_loss,
        "floor": 0.2 if forget_loss == "similarity" else None,
        "anchor_weight": 2.0,
        "negatives": negatives,
    }
    gradient = erase_loss(batch, **options)[1]

    def value():
        return erase_loss(batch, **options)[0]["total"]

    for index in ((0, 0), (2, 1), (7, 3)):
        assert gradient.image[index] == pytest.approx(_difference(value, batch.image, index), 1e-6)
        assert gradient.text[index] == pytest.approx(_difference(value, batch.text, index), 1e-6)
