"""The review page: what strangers wrote stays text, nothing is fetched, and a browser uses it."""

from __future__ import annotations

import csv
import json
import re
import time

import numpy as np
import pytest
import torch
from markupsafe import escape

import fasterase
from fasterase.finder.decisions import Decision
from fasterase.finder.found import CHOICES, Found
from fasterase.pairs.open import open_pairs
from tests.finder.conftest import HOSTILE, NAMES
from tests.test_page import Outline


def unsure_and_forget(source, count):
    """`count` unsure pairs of a source, in order, and all others to forget."""
    codes = np.full(len(source), Decision.FORGET, np.uint8)
    codes[:count] = Decision.UNSURE
    scores = np.linspace(1, 0, len(source), dtype=np.float32)
    return Found(source, codes, scores, np.zeros(len(source), bool), {"concept": ["<i>"]})


def test_a_page_holds_its_pictures_and_what_strangers_wrote_as_text(found, tmp_path):
    found.named[:] = True  # whatever it says
    page = found.review(tmp_path / "review.html").read_text(encoding="utf-8")
    shown = page.count("<article")
    counts = found.counts
    assert shown == counts["forget"] + counts["unseen"] + counts["unsure"] + counts["retain"]
    assert page.count('loading="lazy"') == page.count('src="data:image/jpeg') == shown
    assert HOSTILE not in page
    assert escape(HOSTILE) in page
    assert not re.search(r"(src|href)=.?https?:|url\(|@import", page)
    assert "default-src 'none'" in page
    unsure = page.partition('id="unsure"')[2].partition("</section>")[0]
    assert unsure.count("<article") == counts["unsure"]


def test_a_notebook_shows_counts_and_pictures(found, tmp_path):
    found.codes[:] = Decision.RETAIN
    rows = [row for row in range(len(found.source)) if found.source.texts(row) == [HOSTILE]]
    found.codes[[*rows, *range(9)]] = Decision.UNSURE
    shown = found._repr_html_()
    assert f"Found {', '.join(NAMES)}" in shown
    assert f"{found.counts['retain']:,}</td>" in shown
    assert shown.count('<img src="data:image/jpeg') == 6 + 6
    assert Outline(shown).tags.total() < 100
    found.codes[:] = Decision.RETAIN
    found.codes[rows] = Decision.UNSURE
    shown = found._repr_html_()
    assert HOSTILE not in shown
    assert "onerror=alert(1)&gt;, &#34;{{rest}}&#34;" in shown


def test_hostile_ids_and_hidden_ones(tmp_path, monkeypatch):
    monkeypatch.setitem(CHOICES, "forget", CHOICES["forget"]._replace(shown=0))
    pixels = torch.linspace(-1, 1, 3 * 8 * 8).reshape(3, 8, 8)
    pairs = [(pixels, "a"), (pixels.mul(255).byte(), "b"), (pixels, "c"), (pixels, "d")]
    source = open_pairs(pairs, name="x")
    ids = ["</script>&\"'[0]", "</script>&\"'[1]", "</script><b>", "half \udcff"]
    source.id = ids.__getitem__
    path = unsure_and_forget(source, 2).review(tmp_path / "p.html")
    page = path.read_text(encoding="utf-8")
    assert page.count("</script>") == 2, "those of the page itself"
    assert "<title>Review: &lt;i&gt;" in page
    assert page.count('data-id="&lt;/script&gt;&amp;&#34;&#39;[') == 2
    assert page.count("data:image/jpeg") == 2
    hidden = page.partition('id="rest">')[2].partition("</script>")[0]
    assert json.loads(hidden) == {"forget": ["</script><b>"], "unsure": []}, (
        "what no file can hold is left out"
    )
    assert "2 more are not shown" in page


@pytest.mark.slow
def test_a_person_moves_three_pairs_saves_and_applies(browser, found, corpus, tmp_path):
    page, saved = found.review(tmp_path / "review.html"), tmp_path / "decisions.csv"
    first, second = (found.unsure.id(i) for i in range(2))
    browser.send("/url", {"url": page.as_uri()})
    assert browser.run("return [...document.images].every((one) => one.loading == 'lazy')")
    assert browser.run("return document.querySelector('#unsure output').value") == str(
        len(found.unsure)
    )
    browser.press("j", "f")  # the first unsure pair
    browser.press("r")  # and the next one, which has the focus
    # The nearest of those to keep, after the one that has just come there.
    kept = browser.run("return document.querySelectorAll('#retain article')[1].dataset.id")
    browser.click("#retain article:nth-of-type(2) button[value=unsure]")
    browser.press("s")
    deadline = time.monotonic() + 30
    while not saved.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    with saved.open(encoding="utf-8", newline="") as file:
        decided = dict(csv.reader(file))
    assert (decided[first], decided[second], decided[kept]) == ("forget", "retain", "unsure")
    found.apply(saved)
    assert kept in found.unsure.every_id()
    assert first in found.forget.every_id()
    forget, _ = fasterase.split(corpus, forget=saved)
    assert len(forget) == found.counts["forget"] + found.counts["unseen"]

    entries = browser.send("/se/log", {"type": "performance"})
    events = [json.loads(entry["message"])["message"] for entry in entries]
    sent = [each for each in events if each["method"] == "Network.requestWillBeSent"]
    urls = [each["params"]["request"]["url"] for each in sent]
    assert urls
    assert all(url.startswith(("file:", "data:", "blob:")) for url in urls), urls
    assert browser.send("/se/log", {"type": "browser"}) == [], "no error, nothing refused"


@pytest.mark.slow
def test_thousands_of_rows_move_without_a_pause(browser, tmp_path, monkeypatch):
    monkeypatch.setitem(CHOICES, "unsure", CHOICES["unsure"]._replace(shown=5000))
    pictures = torch.rand(50, 3, 64, 64)
    source = open_pairs([(pictures[i % 50], f"caption {i}") for i in range(5000)], name="x")
    page = unsure_and_forget(source, 5000).review(tmp_path / "many.html")
    browser.send("/url", {"url": page.as_uri()})
    browser.press("j")
    seconds = browser.run(
        "const start = performance.now();"
        "for (let i = 0; i < 20; i++) {"
        "  const key = new KeyboardEvent('keydown', { key: i % 2 ? 'f' : 'j', bubbles: true });"
        "  document.activeElement.dispatchEvent(key);"
        "  document.body.getBoundingClientRect();"
        "}"
        "return (performance.now() - start) / 20000;"
    )
    assert browser.run("return document.querySelectorAll('#forget article').length") == 10
    assert seconds < 0.25, "of a slow machine; a tenth of it is usual"
