"""Which pictures and captions a report shows."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fasterase.encode import PairEncoder
from fasterase.models.load import load_model
from fasterase.pairs.open import open_pairs
from fasterase.report.pictures import PICTURES, CaptionRanking, example_rows, spread
from tests import small_models


def encoder(seed: int) -> PairEncoder:
    tokenizer = small_models.simple_tokenizer()
    return PairEncoder(load_model(small_models.open_clip_vit(seed=seed), tokenizer=tokenizer))


def pairs(name: str, captions: list[str]):
    """Pictures whose red value is their row."""
    items = [(Image.new("RGB", (40, 30), (i, 9, 9)), text) for i, text in enumerate(captions)]
    return open_pairs(items, name=name)


@pytest.fixture(scope="module")
def encoders() -> tuple[PairEncoder, PairEncoder]:
    return encoder(0), encoder(1)


def test_rows_rank_captions_by_each_model(encoders):
    source = pairs("retain", ["a dog", "a cat", "a house"])
    candidates = ["a dog", "a cat", "a house", "a boat"]
    rows = CaptionRanking(candidates, *encoders).rows("kept", source, [2, 0], count=2)
    assert [row.caption for row in rows] == ["a house", "a dog"]
    assert [row.image.getpixel((0, 0))[0] for row in rows] == [2, 0]
    for model, side in zip(encoders, ("before", "after"), strict=True):
        image = model.pairs(source, np.arange(3), description="").image
        expected = (image @ model.texts(candidates).T).argsort(dim=1, descending=True)[:, :2]
        for row, index in zip(rows, (2, 0), strict=True):
            assert getattr(row, side) == [candidates[i] for i in expected[index]]


def test_three_sections_of_distinct_captions_with_the_nearest_as_neighbours(encoders):
    forget = pairs("forget", ["a red apple"] * 3 + ["a green apple"])
    kept = [f"{word} number {i}" for i, word in enumerate(["boat", "tree", "lamp"] * 10)]
    retain = pairs("retain", [*kept, "a red apple"])
    rows, erased = example_rows(forget, retain, *encoders, seed=0)
    sections = {row.section: [r.caption for r in rows if r.section == row.section] for row in rows}
    to_forget, near, others = sections.values()
    assert sorted(to_forget) == sorted(erased) == ["a green apple", "a red apple"]
    assert len(near) == len(others) == PICTURES
    assert len({*near, *others}) == 2 * PICTURES
    model = encoders[0]
    closeness = (model.texts(kept) @ model.texts(erased).T).amax(dim=1)
    assert set(near) == {kept[i] for i in closeness.topk(PICTURES).indices}


def test_preprocessed_images_are_shown_and_token_ids_are_not(encoders):
    pixels, ids = small_models.random_pairs(count=4)
    named = open_pairs([(image, f"thing {i}") for i, image in enumerate(pixels)], name="retain")
    (row, *_), _ = example_rows(named, pairs("retain", ["a", "b"]), *encoders, seed=0)
    assert row.image.getextrema() != ((0, 0), (0, 0), (0, 0))
    unnamed = open_pairs(list(zip(pixels, ids, strict=True)), name="forget")
    assert example_rows(unnamed, named, *encoders, seed=0).rows == []


def test_spread_keeps_both_ends():
    assert spread(list(range(10)), 4) == [0, 3, 6, 9]
    assert spread([5], 4) == [5]
    assert spread([], 4) == []
