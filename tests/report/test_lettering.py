"""Text of any script: in a font that has it, else spelled; right-to-left words in their order."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import pytest
from PIL import Image, ImageChops, ImageDraw, ImageFont

from fasterase.evaluation.findings import Finding, Series
from fasterase.report import lettering
from fasterase.report.lettering import Pen, find_faces, spell, turn_round
from fasterase.report.plots import plot_charts, plot_findings, series_charts

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
DEJAVU = ("DejaVu Sans", str(FONTS / "DejaVuSans.ttf"))
STIX = ("STIXGeneral", str(FONTS / "STIXGeneral.ttf"))
OWN = ImageFont.load_default(size=14).getname()[0]  # of Pillow


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """The fonts that matplotlib brings, whatever this machine has."""

    def install(*fonts: tuple[str, str]) -> None:
        monkeypatch.setattr(lettering, "_installed", lambda: list(fonts))

    install(DEJAVU, STIX)
    return install


def drawn(text: str) -> Image.Image:
    canvas = Image.new("L", (300, 30), 255)
    Pen(ImageDraw.Draw(canvas), [text]).write((5, 5), text, size=14, fill="black")
    return canvas


def same(one: Image.Image, other: Image.Image) -> bool:
    return ImageChops.difference(one, other).getbbox() is None


@pytest.mark.parametrize(
    ("one", "other"), [("é", "ü"), ("мир", "кот"), ("سلام", "كلب"), ("😀", "😂")]
)
def test_characters_that_pillows_font_lacks_are_drawn(one, other):
    assert not same(drawn(one), drawn(other))
    assert "U+" not in spell(one, find_faces([one], ImageFont.load_default(size=14)))


def test_what_no_font_has_is_spelled(installed):
    installed()
    text = "猫 sees 你好, 👩‍🍳 and 🍎\ufe0f\ud83c"
    faces = find_faces([text], ImageFont.load_default(size=14))
    told = "[U+732B] sees [U+4F60 U+597D], [woman cooking] and [red apple U+D83C]"
    assert spell(text, faces) == told
    assert same(drawn(text), drawn(told))


def test_right_to_left_words_keep_their_order(monkeypatch):
    """The first letter stands on the right, also where Pillow orders nothing by itself."""
    word = "שלום"  # in Hebrew, whose letters do not join
    expected = Image.new("L", (300, 30), 255)
    plain = ImageFont.truetype(DEJAVU[1], 14, layout_engine=ImageFont.Layout.BASIC)
    baseline = 5 + ImageFont.load_default(size=14).getmetrics()[0]
    ImageDraw.Draw(expected).text((5, baseline), word[::-1], fill="black", font=plain, anchor="ls")
    assert same(drawn(word), expected)
    monkeypatch.setattr(ImageFont.core, "HAVE_RAQM", False)
    lettering._font.cache_clear()
    assert same(drawn(word), expected)
    lettering._font.cache_clear()
    assert turn_round("dog ١٢ سلام عليكم, 3 שלום") == "dog ١٢ مكيلع مالس, 3 םולש"


def test_a_line_is_split_only_if_no_font_has_all_of_it():
    text = "a watch ⌚ and é"
    faces = find_faces([text, "é"], ImageFont.load_default(size=14))
    assert [face.family for face in faces] == [OWN, "DejaVu Sans", "STIXGeneral"]

    def parts(text: str) -> list[tuple[str, str]]:
        return [(face.family, part) for face, part in lettering._split(text, faces)]

    assert parts("and é") == [("DejaVu Sans", "and é")]
    assert parts("a ⌚ and é") == [("STIXGeneral", "a ⌚ and é")]
    few = [face._replace(characters=face.characters - {"é"}) for face in faces[2:]]
    faces[2:] = few
    assert parts("a ⌚ and é") == [(OWN, "a "), ("STIXGeneral", "⌚ and "), ("DejaVu Sans", "é")]
    assert parts("") == [(OWN, "")]


def test_plots_use_the_same_fonts_and_warn_of_no_glyph(tmp_path):
    """matplotlib writes each text as a comment into an SVG."""
    lines = [
        Series("⌚ 你好: hit", "x", "y", [0, 1], [1, 2], model="猫", point_labels=["犬", "b"]),
        Series("⌚ 你好: hit", "x", "y", [0, 1], [2, 1], model="مرحبا"),
    ]
    path = plot_charts(series_charts(lines), tmp_path / "lines.svg", title="of 模型")
    plot = path.read_text(encoding="utf-8")
    for text in ("⌚ [U+4F60 U+597D]: hit", "[U+732B]", "[U+72AC]", "of [U+6A21 U+578B]"):
        assert f"<!-- {text} -->" in plot
    assert "STIXGeneral" in plot
    found = Finding("auc", "组", "AUC", "share", "", 0.5, 0.4, 0.6, 0.5, references={"模型": 0.6})
    plot = plot_findings([found], tmp_path / "dots.svg", title="⌚").read_text(encoding="utf-8")
    for text in ("[U+7EC4]", "[U+6A21 U+578B]"):
        assert f"<!-- {text} -->" in plot


def test_fonts_of_this_machine(monkeypatch):
    monkeypatch.undo()
    fonts = lettering._installed.__wrapped__()
    assert fonts[0][0] == "DejaVu Sans"
    assert not any("cmr10" in file or "LastResort" in file for _, file in fonts)
    monkeypatch.setitem(sys.modules, "matplotlib.font_manager", None)
    assert lettering._installed.__wrapped__() == []


def test_long_captions_are_cut_where_they_no_longer_fit():
    text = "a photo of grapes, 赤いりんご and pears " * 500
    pen = Pen(ImageDraw.Draw(Image.new("L", (10, 10))), [text])
    short = pen.shorten(text, 200, 14)
    assert short.endswith("...")
    assert pen.length(short, 14) <= 200 < pen.length(text[: len(short)] + "...", 14)
    assert pen.shorten("a pear", 200, 14) == "a pear"
