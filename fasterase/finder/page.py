"""The review page: one HTML file with pictures, captions and scores, which asks no server."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fasterase.files import write_text
from fasterase.pairs.images import to_rgb
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.table import PairTable
from fasterase.progress import Progress
from fasterase.report.pictures import as_picture, make_thumbnail
from fasterase.report.templating import jpeg_uri

THUMBNAIL = 112  # pixels
CAPTION = 300  # characters
_TITLES = {
    "unsure": "Unsure: in neither set",
    "forget": "Forget",
    "retain": "Retain: the nearest pairs that are kept",
}


class PageRow(NamedTuple):
    """A pair on the page."""

    row: int  # of the source
    is_named: bool  # whether a caption names the concept
    place: int  # of the picture by nearness to the concept, from 1


def write_page(
    path: Path,
    concept: str,
    source: PairTable,
    rows: Mapping[str, Sequence[PageRow]],
    rest: Mapping[str, Sequence[str]],
    *,
    pictures: int,
) -> Path:
    """Write the page atomically, and return its path.

    Args:
        rows: decision -> pairs to show, in order.
        rest: decision -> ids of further pairs, which are saved but not shown.
        pictures: how many have a place.
    """
    template = (files("fasterase.finder") / "review.html").read_text(encoding="utf-8")
    script = template.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    every = [(name, row) for name in _TITLES for row in rows[name]]
    articles: dict[str, list[str]] = {name: [] for name in _TITLES}
    for name, row in Progress("review page", items=every, unit="pair", delay=2):
        articles[name].append(_article(source, row, pictures))
    hidden = {name: list(filter(_is_text, ids)) for name, ids in rest.items()}
    values = {
        "digest": f"'sha256-{digest}'",
        "concept": _escape(concept),
        "sections": "\n".join(
            _section(name, articles[name], len(rest.get(name, ()))) for name in _TITLES
        ),
        # Inside a script, "<" alone could end it.
        "rest": json.dumps(hidden).replace("<", "\\u003c"),
    }
    # At once, so that a caption with a place holder in it stays a caption.
    return write_text(path, re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], template))


def example_pairs(source: PairTable, rows: Sequence[int]) -> list[dict[str, Any]]:
    """Return those of the pairs that can be read, for `notebook.html`."""
    found = []
    for row in rows:
        with suppress(BrokenPair):
            image = jpeg_uri(make_thumbnail(as_picture(source[row].image)))
            texts = {"image": image, "caption": _caption(source, row), "before": (), "after": ()}
            found.append({**texts, "is_wrong": False})
    return found


def _caption(source: PairTable, row: int) -> str:
    captions = source.texts(row)
    text = " / ".join(captions) if not isinstance(captions, Tensor) else "token ids"
    return text[:CAPTION] + ("..." if len(text) > CAPTION else "")


def _section(name: str, articles: Sequence[str], more: int) -> str:
    note = f"<p>{more:,} more are not shown; they stay as they are.</p>" if more else ""
    heading = f"<h2>{_TITLES[name]} (<output></output>)</h2>{note}"
    return "\n".join([f'<section id="{name}">{heading}', *articles, "</section>"])


def _article(source: PairTable, shown: PageRow, pictures: int) -> str:
    id, text = source.id(shown.row), _caption(source, shown.row)
    named = f' data-id="{_escape(id)}"' if _is_text(id) else ""
    says = "names it" if shown.is_named else "does not name it"
    return (
        f'<article tabindex="0"{named}>{_picture(source, shown.row)}'
        f"<div><p>{_escape(text)}</p><small>{_escape(id)}</small><small>caption {says}; picture "
        f"{shown.place:,} of {pictures:,} by nearness</small></div></article>"
    )


def _escape(text: str) -> str:
    """Escape for text and attributes; halves of characters, which no file may hold, are marks."""
    return html.escape(text.encode("utf-8", "replace").decode()).replace("\r", "&#13;")


def _is_text(id: str) -> bool:
    """Whether a file can hold the id: names of files may be no text."""
    return id.encode("utf-8", "replace").decode() == id


def _picture(source: PairTable, row: int) -> str:
    try:
        image = source[row].image
        image = to_rgb(as_picture(image), id=source.id(row))
    except BrokenPair as error:
        return f"<i>{_escape(error.reason)}</i>"
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return f'<img loading="lazy" decoding="async" alt="" src="{jpeg_uri(image)}">'
