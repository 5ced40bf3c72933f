"""Picture sheets."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from fasterase.errors import InputError
from fasterase.report.pictures import (
    GAP,
    MARGIN,
    PICTURE,
    SheetRow,
    Strip,
    contact_sheet,
    picture_sheet,
)

RED, GREEN = (0xC8, 0x10, 0x2E), (0x1A, 0x7F, 0x37)


def row(section: str, caption: str, before: list[str], after: list[str]) -> SheetRow:
    return SheetRow(section, Image.new("RGBA", (40, 20), (0, 0, 255, 255)), caption, before, after)


def colours(path: Path, box: tuple[int, int, int, int] | None = None) -> set:
    with Image.open(path) as image:
        part = image.convert("RGB").crop(box) if box else image.convert("RGB")
        return {colour for _, colour in part.getcolors(1 << 20) or []}


def test_erased_captions_are_red_and_own_captions_green(tmp_path: Path) -> None:
    rows = [row("retain", "dog", ["cat", "hen"], ["hen", "cat"])]
    below_legend = (0, 60, 100_000, 100_000)

    def drawn(rows: list[SheetRow], erased: set[str]) -> set:
        path = picture_sheet(rows, tmp_path / "sheet.png", erased=erased)
        with Image.open(path) as image:
            box = (0, below_legend[1], image.width, image.height)
        return colours(path, box)

    plain = drawn(rows, set())
    assert RED not in plain
    assert GREEN not in plain
    assert (0, 0, 255) in plain
    assert RED in drawn(rows, {"cat"})
    assert GREEN in drawn([row("retain", "dog", ["cat", "dog"], ["hen", "cat"])], set())


def test_the_sheet_grows_by_rows_and_sections(tmp_path: Path) -> None:
    def height(sections: list[str]) -> int:
        rows = [row(section, "dog", ["a", "b", "c"], ["a" * 200, "b", "c"]) for section in sections]
        with Image.open(picture_sheet(rows, tmp_path / "sheet.png")) as image:
            return image.height

    assert height(["forget"]) == height(["forget"] * 2) < height(["forget"] * 3)
    assert height(["forget"] * 3) < height(["forget", "retain", "holdout"])


def test_marked_pictures_of_a_strip_are_framed(tmp_path: Path) -> None:
    blue = Image.new("RGB", (40, 40), (0, 0, 255))
    strips = [
        Strip("apple", [blue, blue], [False, True], "#c8102e"),
        Strip("dog", [blue], [True], "#1a7f37"),
    ]
    path = contact_sheet(strips, tmp_path / "sheet.png")
    middle = MARGIN + PICTURE + GAP // 2
    with Image.open(path) as image:
        assert image.size[0] == 2 * MARGIN + 2 * PICTURE + GAP
        half = image.height // 2
    assert {GREEN, RED} & colours(path, (0, 0, middle, half)) == set()
    assert {GREEN, RED} & colours(path, (middle, 0, image.width, half)) == {RED}
    assert {GREEN, RED} & colours(path, (0, half, middle, image.height)) == {GREEN}


def test_captions_of_several_lines_are_drawn_on_one(tmp_path: Path) -> None:
    for caption in ("a dog\non a hill", "a dog on a hill"):
        path = picture_sheet([row("retain", caption, [caption], [caption])], tmp_path / "new.png")
        path.rename(tmp_path / f"{caption.count(chr(10))}.png")
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()


def test_no_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="rows is empty"):
        picture_sheet([], tmp_path / "sheet.png")
