"""What erasing costs kept pairs: recall lost pair by pair, beyond chance, and where to look."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fasterase.encode import PairFeatures
from fasterase.engine.baseline import Damage, DamageMeter, closeness, find_neighbours


def features(
    image: Tensor,  # [n, D]
    text: Tensor,  # [m, D]
    captions: list[int] | None = None,  # [n] row in `text` of each pair's caption
    rows: list[int] | None = None,  # [n]
) -> PairFeatures:
    own = list(range(len(image))) if captions is None else captions
    return PairFeatures(
        np.arange(len(image)) if rows is None else np.array(rows),
        normalize(image, dim=1),
        normalize(text, dim=1),
        [f"caption {i}" for i in range(len(text))],
        [[each] for each in own],
        [],
    )


def moved(image: Tensor, pairs: list[int]) -> Tensor:
    """Images of which some are like the next one's caption."""
    image = image.clone()
    image[pairs] = image[[(pair + 1) % len(image) for pair in pairs]]
    return image


def test_loss_is_paired():
    """What was wrong before and is wrong now costs nothing; what is right again counts back."""
    eye = torch.eye(20)
    before = features(moved(eye, [0, 1, 2]), eye)
    meter = DamageMeter(before)
    assert meter.measure(before) == Damage(0.0, 0.0)
    lost = np.zeros(20)
    lost[[5, 6, 7]] = 1
    found = meter.measure(features(moved(eye, [0, 1, 2, 5, 6, 7]), eye))
    assert found.mean == pytest.approx(3 / 20)
    near_end = 3 / 20 - 1.645 * lost.std(ddof=1) / math.sqrt(20)
    assert found.low == pytest.approx(near_end, abs=1e-6)
    assert meter.measure(features(moved(eye, [0, 5]), eye)).mean == pytest.approx(-1 / 20)


def test_few_pairs_lost_are_chance_and_many_are_not():
    eye = torch.eye(100)
    meter = DamageMeter(features(eye, eye))
    few, many = (meter.measure(features(moved(eye, [*range(n)]), eye)) for n in (2, 12))
    assert few.low < 0 < few.mean
    assert 0.05 < many.low < many.mean == pytest.approx(0.12)


def test_captions_that_mean_the_same_are_both_right():
    """By the original's features: a model that has moved may not vouch for itself."""
    eye = torch.eye(6)
    alike = eye.clone()
    alike[1] = torch.tensor([1.0, 0.3, 0, 0, 0, 0])  # cosine .958 with the first
    alike[3] = torch.tensor([0, 0, 1.0, 0.35, 0, 0])  # .944 with the third
    meter = DamageMeter(features(alike, alike))
    swapped = features(alike[[1, 0, 3, 2, 4, 5]], alike)
    assert meter.measure(swapped).mean == pytest.approx(2 / 6)
    collapsed = torch.ones(6, 6)
    assert meter.measure(features(collapsed, collapsed)).mean == pytest.approx(
        1 - (2 / 6 * 2 + 4 / 6) / 6
    )


def test_pairs_of_one_caption_are_one_candidate():
    text = torch.eye(3)
    image = text[[0, 0, 0, 1, 2]]
    meter = DamageMeter(features(image, text, [0, 0, 0, 1, 2]))
    assert meter.measure(features(image, text, [0, 0, 0, 1, 2])).mean == 0.0
    gone = text[[1, 0, 0, 1, 2]]
    assert meter.measure(features(gone, text, [0, 0, 0, 1, 2])).mean == pytest.approx(1 / 5)


def test_pairs_that_only_one_model_could_read_are_left_out():
    eye = torch.eye(8)
    unread = features(eye[1:], eye[1:], rows=list(range(1, 8)))
    object.__setattr__(unread, "captions", [f"caption {i}" for i in range(1, 8)])
    now = features(moved(eye, [2]), eye)
    assert DamageMeter(unread).measure(now).mean == pytest.approx(1 / 7)
    # The caption of the pair that cannot be read now is no candidate, and no right answer.
    assert DamageMeter(now).measure(unread).mean == pytest.approx(-1 / 7)
    other = features(eye, eye, rows=list(range(20, 28)))
    assert DamageMeter(unread).measure(other) == Damage(0.0, 0.0)


def test_neighbours_are_nearest_by_their_captions():
    text = torch.eye(5)
    text[3] = torch.tensor([0.9, 0, 0, 0.4, 0])
    text[1] = torch.tensor([0.5, 0.9, 0, 0, 0])
    retain = features(torch.randn(5, 5), text, rows=[10, 20, 30, 40, 50])
    forget = torch.eye(5)[:1]
    assert list(find_neighbours(forget, retain, 1)) == [10]
    assert list(find_neighbours(forget, retain, 3)) == [10, 20, 40]
    assert list(find_neighbours(forget, retain, 99)) == [10, 20, 30, 40, 50]
    two = torch.eye(5)[[0, 4]]
    assert closeness(two, retain.first_text).tolist() == pytest.approx(
        [1.0, 0.5 / math.hypot(0.5, 0.9), 0.0, 0.9 / math.hypot(0.9, 0.4), 1.0]
    )
