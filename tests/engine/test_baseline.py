"""The original: the retain captions that a run warns of, what it withholds, and what it costs."""

from __future__ import annotations

import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fasterase.encode import PairFeatures
from fasterase.engine import baseline
from fasterase.engine.damage import Damage, DamageMeter, closeness, find_neighbours
from fasterase.engine.job import RetainPool


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


def named(captions: list[str], directions: list[int]) -> PairFeatures:
    """Pairs of one caption each; captions of one direction are alike to the model."""
    found = features(torch.eye(40)[directions], torch.eye(40)[directions])
    return dataclasses.replace(found, captions=captions)


FORGET = named(["apple", "Granny Smith"], [0, 1])


def said_by(warn, *given) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn(*given)
    return "".join(str(each.message) for each in caught)


def warning(retain: PairFeatures, *further: PairFeatures) -> str:
    """What is said of retain captions that name what `FORGET` or further sets hold."""
    return said_by(baseline._warn_of_naming_captions, [FORGET, *further], retain)


@pytest.mark.parametrize(
    "caption",
    ["a red apple", "Apple!", "an (apple)", "a granny smith, peeled", "boats and apple"],
)
def test_captions_that_hold_one_of_the_concept_s_are_named(caption):
    said = warning(named([caption, "a boat"], [20, 21]))
    assert said.startswith("retain: 1 of 2 captions seem to name")
    assert f"{caption!r} (0.00)" in said


def test_captions_that_mean_the_same_are_named_nearest_first_and_few():
    said = warning(named([f"pomme {i}" for i in range(6)] + ["an apple"], [0] * 6 + [20]))
    assert said.startswith("retain: 7 of 7 captions")
    assert said.count("(1.00)") == 5
    assert "an apple" not in said
    assert ", ...." in said


def test_other_captions_are_no_reason_to_warn():
    assert not warning(named(["pineapple", "granny", "a boat"], [20, 21, 22]))


def test_equal_captions_and_those_of_further_sets_are_named():
    """The verdict leaves them out, but training on them teaches them again."""
    said = warning(named(["apple", "pear", "x"], [0, 5, 9]), named(["pear"], [5]))
    assert said.startswith("retain: 2 of 3 captions")
    assert "'apple' (1.00), 'pear'" in said


class Ids:
    """Stands in for the retain set."""

    def id(self, row: int) -> str:
        return f"kept {row}"


def warning_of_pictures(forget: PairFeatures, retain: PairFeatures) -> str:
    return said_by(baseline._warn_of_pictures, forget, retain, Ids())


def test_kept_pictures_of_the_concept_are_named_whatever_their_captions_say():
    """Pictures of a concept are alike, nearer to its name than to a caption that leaves it out."""
    concept, other, third = torch.eye(8)[:3]
    apples = torch.stack([concept + 0.1 * torch.eye(8)[i] for i in (3, 4, 5)])
    forget = features(apples, concept[None], captions=[0, 0, 0])
    kept = torch.stack([concept + 0.1 * torch.eye(8)[6], concept + other, other, third])
    said = warning_of_pictures(forget, features(kept, torch.stack([third, other, other, third])))
    assert said.startswith("retain: 1 of 4 pictures look like those to be forgotten")
    assert "brackets): kept 0 (0.99). " in said
    assert "`fasterase.split(retain, forget=file)[1]`" in said
    own_name_is_nearer = features(kept, torch.stack([kept[0], other, other, third]))
    assert not warning_of_pictures(forget, own_name_is_nearer)
    strange = features(kept, torch.stack([third, third, third, concept]))
    assert not warning_of_pictures(forget, strange), "to this model, half of all are the concept"
    alone = features(apples[:1], concept[None])
    assert not warning_of_pictures(alone, own_name_is_nearer), "nothing to tell by how near is near"


def test_a_share_of_the_retain_pool_is_withheld():
    pool = RetainPool.choose(1000, batch_size=8, seed=3)
    assert len(pool.withheld) == 40
    assert len(pool.drawn) == 760
    assert not set(pool.drawn) & set(pool.withheld)
    for rows in pool.drawn, pool.withheld:
        assert np.array_equal(rows, np.unique(rows))
    again, other = (RetainPool.choose(1000, batch_size=8, seed=seed) for seed in (3, 4))
    assert np.array_equal(pool.withheld, again.withheld)
    assert not np.array_equal(pool.withheld, other.withheld)
    assert len(RetainPool.choose(10**6, batch_size=300, seed=0).withheld) == 1000
    small = RetainPool.choose(99, batch_size=256, seed=0)
    assert (len(small.drawn), len(small.withheld)) == (99, 0), "needed whole"


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
    unread = dataclasses.replace(unread, captions=[f"caption {i}" for i in range(1, 8)])
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
    assert list(find_neighbours(forget, retain, 2, most=0.95)) == [20, 40], "not what means it"
    two = torch.eye(5)[[0, 4]]
    assert closeness(two, retain.first_text).tolist() == pytest.approx(
        [1.0, 0.5 / math.hypot(0.5, 0.9), 0.0, 0.9 / math.hypot(0.9, 0.4), 1.0]
    )
