"""Templates: HTML in which all values are escaped, Markdown and text; pictures inside a file."""

from __future__ import annotations

import base64
import io
import re
from functools import cache
from typing import Any

from PIL import Image

from fasterase.evaluation.metrics import wilson_interval
from fasterase.numerals import counted
from fasterase.report.plots import place

# What no HTML file may hold: control characters, halves of characters, noncharacters.
_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def render(template: str, **values: Any) -> str:
    """Fill in a file of `templates/`.

    Values are escaped in those that end in `.html`, and on one line each in `.lines`.
    """
    return _environment().get_template(template).render(**values)


def jpeg_uri(image: Image.Image) -> str:
    """Return an RGB picture as a `data:` URI."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=75)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


@cache
def _environment() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fasterase.report"),
        autoescape=jinja2.select_autoescape(("html",)),
        undefined=jinja2.StrictUndefined,
        finalize=jinja2.pass_context(_fit),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for each in (percent, interval, inline, counted, place):
        environment.filters[each.__name__] = each
    return environment


def _fit(context: Any, value: object) -> object:
    if type(value) is not str:
        return value
    if context.name is not None and context.name.endswith(".lines"):
        value = " ".join(value.splitlines())
    return _UNFIT.sub("\N{REPLACEMENT CHARACTER}", value)


def percent(share: float | None) -> str:
    """Return `4.2 %`, and 100 % or 0 % only where it is that."""
    if share is None:
        return "-"
    text = f"{100 * share:.1f}".removesuffix(".0")
    if share != round(share) and text in ("0", "100"):
        text = "> 99.9" if share > 0.5 else "< 0.1"
    return f"{text} %"


def interval(share: float, count: int) -> str:
    """Return the 95 % interval of a share of `count` things."""
    low, high = wilson_interval(share, count)
    return f"{percent(low)} to {percent(high)}"


def inline(text: str) -> str:
    """Return text as one line of Markdown, without a meaning of its own there."""
    return re.sub(r"([\\`*_\[\]<>|#~&])", r"\\\1", " ".join(text.split()))
