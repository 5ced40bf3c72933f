"""Picture sheets, and which pictures and captions a report shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasterase.encode import PairEncoder
from fasterase.errors import InputError
from fasterase.models.load import load_model
from fasterase.pairs.open import open_pairs
from fasterase.report.pictures import (
    PICTURES,
    CaptionRanking,
    SheetRow,
    example_rows,
    neighbours_among,
    picture_sheet,
    spread,
)
from tests import small_models

RED, GREEN = (0xC8, 0x10, 0x2E), (0x1A, 0x7F, 0x37)


def row(section: str, caption: str, before: list[str], after: list[str]) -> SheetRow:
    return SheetRow(section, Image.new("RGBA", (40, 20), (0, 0, 255, 255)), caption, before, after)


def test_erased_captions_are_red_and_own_captions_green(tmp_path: Path) -> None:
    def drawn(before: list[str], *erased: str) -> set:
        rows = [row("retain", "dog", before, ["hen", "cat"])]
        with Image.open(picture_sheet(rows, tmp_path / "sheet.png", erased=erased)) as image:
            below_legend = image.convert("RGB").crop((0, 60, *image.size))
        return {colour for _, colour in below_legend.getcolors(1 << 20) or []}

    plain = drawn(["cat", "hen"])
    assert not {RED, GREEN} & plain
    assert (0, 0, 255) in plain
    assert RED in drawn(["cat", "hen"], "cat")
    assert GREEN in drawn(["cat", "dog"])


def test_the_sheet_grows_by_rows_and_sections(tmp_path: Path) -> None:
    def height(sections: list[str]) -> int:
        rows = [row(section, "dog", ["a", "b", "c"], ["a" * 200, "b", "c"]) for section in sections]
        with Image.open(picture_sheet(rows, tmp_path / "sheet.png")) as image:
            return image.height

    assert height(["forget"]) == height(["forget"] * 2) < height(["forget"] * 3)
    assert height(["forget"] * 3) < height(["forget", "retain", "holdout"])


def test_captions_of_several_lines_are_drawn_on_one(tmp_path: Path) -> None:
    for caption in ("a dog\non a hill", "a dog on a hill"):
        path = picture_sheet([row("retain", caption, [caption], [caption])], tmp_path / "new.png")
        path.rename(tmp_path / f"{caption.count(chr(10))}.png")
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()


def test_no_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="rows is empty"):
        picture_sheet([], tmp_path / "sheet.png")


def encoder(seed: int) -> PairEncoder:
    tokenizer = small_models.simple_tokenizer()
    return PairEncoder(load_model(small_models.open_clip_vit(seed=seed), tokenizer=tokenizer))


def pairs_of(name: str, captions: list[str]):
    """Pictures whose red value is their row."""
    items = [(Image.new("RGB", (40, 30), (i, 9, 9)), text) for i, text in enumerate(captions)]
    return open_pairs(items, name=name)


@pytest.fixture(scope="module")
def encoders() -> tuple[PairEncoder, PairEncoder]:
    return encoder(0), encoder(1)


def test_rows_rank_captions_by_each_model(encoders):
    source = pairs_of("retain", ["a dog", "a cat", "a house"])
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
    forget = pairs_of("forget", ["a red apple"] * 3 + ["a green apple"])
    kept = [f"{word} number {i}" for i, word in enumerate(["boat", "tree", "lamp"] * 10)]
    retain = pairs_of("retain", [*kept, "a red apple"])
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
    (row, *_), _ = example_rows(named, pairs_of("retain", ["a", "b"]), *encoders, seed=0)
    assert row.image.getextrema() != ((0, 0), (0, 0), (0, 0))
    unnamed = open_pairs(list(zip(pixels, ids, strict=True)), name="forget")
    assert example_rows(unnamed, named, *encoders, seed=0).rows == []


def test_further_sets_are_shown_and_what_went_wrong_first(encoders):
    forget = pairs_of("forget", ["a red apple", "a green apple"])
    retain = pairs_of("retain", [f"boat number {i}" for i in range(9)])
    others = {"unseen": pairs_of("unseen", ["a tart"]), "holdout": pairs_of("holdout", ["a cat"])}
    rows, erased = example_rows(
        forget, retain, *encoders, seed=0, others=others, forget_sets=["unseen"]
    )
    sections = dict.fromkeys(row.section for row in rows)
    assert [*sections][1::3] == ["To forget: unseen", "To keep: holdout"]
    assert erased == ["a red apple", "a green apple", "a tart"]
    assert {row.section for row in rows if row.is_to_forget} == {"To forget", "To forget: unseen"}
    for section in sections:
        wrong = [row.is_wrong(erased) for row in rows if row.section == section]
        assert wrong == sorted(wrong, reverse=True)


@pytest.mark.parametrize(
    ("is_to_forget", "before", "after", "is_wrong"),
    [
        (True, "dog", "hen", True),  # still named, if by another one
        (True, "dog", "cat", False),
        (False, "dog", "cat", True),
        (False, "cat", "hen", False),  # never known
        (False, "dog", "dog", False),
    ],
)
def test_what_went_wrong(is_to_forget, before, after, is_wrong):
    shown = row("x", "dog", [before], [after])
    assert replace(shown, is_to_forget=is_to_forget).is_wrong({"dog", "hen"}) is is_wrong


def test_neighbours_are_as_close_as_the_nearest_tenth_of_retain(encoders):
    forget = pairs_of("forget", ["a red apple", "a green apple"])
    kept = [f"{word} number {i}" for i, word in enumerate(["boat", "tree", "lamp"] * 10)]
    retain = pairs_of("retain", kept)
    near = neighbours_among(["a red apple", *kept], forget, retain, encoders[0], seed=0)
    assert near[0] == "a red apple"
    assert len(near) == 1 + 3
    assert neighbours_among([], forget, retain, encoders[0], seed=0) == []


def test_spread_keeps_both_ends():
    assert spread(list(range(10)), 4) == [0, 3, 6, 9]
    assert spread([5], 4) == [5]
    assert spread([], 4) == []
