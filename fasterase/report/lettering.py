"""Text of any script on pictures and plots, in fonts of this machine that have its characters.

The font that a library brings has few. What it lacks is written in fonts that matplotlib finds
installed, if there is matplotlib. Characters that no font has are spelled: `[U+4F60 U+597D]`, and
symbols by their names: `[red apple]`.

Right-to-left words need a library that orders and joins their letters: Pillow with FriBiDi, and
matplotlib from 3.11 on. Others are given the words turned round, with their letters unjoined. A
line for which no single font suffices is put together from left to right, whatever its language.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from PIL import ImageDraw, ImageFont

from fasterase.errors import InputError

_SIZE = 14  # at which fonts are examined
_ASCII = frozenset(map(chr, range(32, 127)))
_NEVER_A_CHARACTER = "\U0010ffff"
# Hebrew, Arabic and their neighbours, without the digits, which run from left to right.
_LEFTWARD = "\u0590-\u065f\u066a-\u06ef\u06fa-\u08ff\ufb1d-\ufdff\ufe70-\ufefc"
_LEFTWARD_WORDS = re.compile(rf"[{_LEFTWARD}](?:[{_LEFTWARD}\s]*[{_LEFTWARD}])?")


class Face(NamedTuple):
    """A font, as far as some texts need it."""

    family: str  # its name for matplotlib
    file: str | None  # None for the font that the library brings
    characters: frozenset[str]  # those that it has, of ASCII and of the texts


def find_faces(texts: Iterable[str], own: ImageFont.FreeTypeFont) -> list[Face]:
    """Return the library's `own` font, and fonts of this machine for what it lacks."""
    wanted = _ASCII.union(*texts)
    faces = [Face(str(own.getname()[0]), None, _characters_of(own, wanted))]
    missing = wanted - faces[0].characters
    for family, file in _installed() if missing else ():
        # Some hold bitmaps of other sizes alone, or are damaged.
        with contextlib.suppress(OSError, ValueError):
            font = ImageFont.truetype(file, _SIZE)
            if _characters_of(font, missing):
                faces.append(Face(family, file, _characters_of(font, wanted)))
                missing -= faces[-1].characters
    return faces


def _characters_of(font: ImageFont.FreeTypeFont, wanted: Iterable[str]) -> frozenset[str]:
    """Return those characters that the font draws, and not as it draws one that it lacks."""

    def draw(character: str) -> tuple[Any, bytes]:
        mask = font.getmask(character)
        return mask.size, bytes(mask)

    def has(character: str) -> bool:
        if character in " \n" or unicodedata.category(character) in ("Cc", "Cs"):
            return character in " \n"
        if _is_invisible(character):
            return _shapes(font)
        drawn = draw(character)
        return drawn != lacking and (any(drawn[1]) or character.isspace())

    lacking = draw(_NEVER_A_CHARACTER)
    return frozenset(filter(has, wanted))


def _is_invisible(character: str) -> bool:
    """Tell whether it only changes how its neighbours look."""
    return unicodedata.category(character) == "Cf" or character in "\ufe0e\ufe0f"


def _shapes(font: ImageFont.FreeTypeFont) -> bool:
    """Tell whether Pillow orders and joins the letters of this font."""
    return font.layout_engine == ImageFont.Layout.RAQM


@functools.cache
def _installed() -> list[tuple[str, str]]:
    """Return family and file of the fonts of this machine, sans-serif ones first."""
    try:
        manager: Any = importlib.import_module("matplotlib.font_manager")
    except ImportError:
        return []
    known = manager.fontManager
    # Its list may be older than a font.
    for file in {*manager.findSystemFonts()} - {entry.fname for entry in known.ttflist}:
        with contextlib.suppress(Exception):
            known.addfont(file)
    # Apart from DejaVu, matplotlib's own have glyphs for formulas, under numbers of others.
    formulas = importlib.import_module("matplotlib").get_data_path()
    plain = {
        entry.fname: entry.name
        for entry in known.ttflist
        if (entry.style, entry.weight) == ("normal", 400)
        and (entry.name == "DejaVu Sans" or not entry.fname.startswith(formulas))
        and "lastresort" not in entry.name.replace(" ", "").lower()
    }

    def rank(font: tuple[str, str]) -> tuple[bool, bool, bool, str]:
        family, file = font
        return family != "DejaVu Sans", "Sans" not in family, "Mono" in family, file

    return sorted(((family, file) for file, family in plain.items()), key=rank)


def spell(text: str, faces: list[Face]) -> str:
    """Replace the characters that no font has."""
    had = frozenset().union(*(face.characters for face in faces))
    lacking = "".join(map(re.escape, {*text} - had))
    return re.sub(f"[{lacking}]+", lambda found: _name(found[0]), text) if lacking else text


def _name(characters: str) -> str:
    """Name characters: symbols by their names, others by their numbers."""
    names = [
        unicodedata.name(each).lower()
        if unicodedata.category(each) == "So"
        else f"U+{ord(each):04X}"
        for each in characters
        if not _is_invisible(each)
    ]
    return f"[{' '.join(names)}]" if names else ""


def turn_round(text: str) -> str:
    """Write right-to-left words backwards, for a library that draws all from left to right."""
    return _LEFTWARD_WORDS.sub(lambda words: words[0][::-1], text)


def letter(figure: Any) -> None:
    """Give the texts of a matplotlib figure fonts that have their characters, before it is saved.

    Labels of ticks get the fonts, but are not spelled.
    """
    from matplotlib import __version_info__, font_manager
    from matplotlib.text import Text

    texts = figure.findobj(Text)
    own = ImageFont.truetype(font_manager.findfont(font_manager.FontProperties()), _SIZE)
    faces = find_faces([each.get_text() for each in texts], own)
    for each in texts:
        spelled = spell(each.get_text(), faces)
        each.set_text(spelled if __version_info__ >= (3, 11) else turn_round(spelled))
        each.set_fontfamily([*each.get_fontfamily(), *(face.family for face in faces[1:])])


class Pen:
    """Writes on a picture; `texts` is all that will be written, so that fonts are sought once."""

    def __init__(self, draw: ImageDraw.ImageDraw, texts: Iterable[str]) -> None:
        self._draw = draw
        self._faces = find_faces(texts, _font(None, _SIZE))

    def write(self, place: tuple[float, float], text: str, *, size: int, fill: str) -> None:
        """Write a line from its top left corner."""
        left, top = place
        # Letters of all fonts stand on the line of Pillow's own.
        baseline = top + _font(None, size).getmetrics()[0]
        for font, piece in self._pieces(text, size):
            self._draw.text((left, baseline), piece, fill=fill, font=font, anchor="ls")
            left += self._draw.textlength(piece, font=font)

    def length(self, text: str, size: int) -> float:
        """Return the pixels that a line takes."""
        return sum(self._draw.textlength(piece, font) for font, piece in self._pieces(text, size))

    def shorten(self, text: str, width: int, size: int) -> str:
        """Shorten `text` with dots to at most `width` pixels, on one line."""
        line = " ".join(text.split())
        # Nearly all characters are a pixel wide or more, and the length of long lines takes long.
        text = spell(line[:width], self._faces)
        if len(line) <= width and self.length(text, size) <= width:
            return text
        fitting = bisect_right(
            range(1, len(text) + 1),
            width,
            key=lambda count: math.ceil(self.length(text[:count] + "...", size)),
        )
        return text[:fitting].rstrip() + "..."

    def _pieces(self, text: str, size: int) -> Iterator[tuple[ImageFont.FreeTypeFont, str]]:
        """Yield parts of a line, each with a font that has all of it."""
        for face, piece in _split(spell(text, self._faces), self._faces):
            font = _font(face.file, size)
            yield font, piece if _shapes(font) else turn_round(piece)


def _split(text: str, faces: list[Face]) -> list[tuple[Face, str]]:
    """Return a whole line with the first font that has all of it, else parts in several."""
    for face in faces:
        if face.characters.issuperset(text):
            return [(face, text)]
    parts: list[tuple[Face, str]] = []
    for character in text:
        if not parts or character not in parts[-1][0].characters:
            parts.append((next(each for each in faces if character in each.characters), ""))
        face, part = parts[-1]
        parts[-1] = face, part + character
    return parts


@functools.cache
def _font(file: str | None, size: int) -> ImageFont.FreeTypeFont:
    """Open a font of this machine, or Pillow's own."""
    font = ImageFont.load_default(size=size) if file is None else ImageFont.truetype(file, size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise InputError("Pillow was built without FreeType and cannot draw text at a given size.")
    return font
