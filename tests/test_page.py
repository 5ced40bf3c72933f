"""The page of a run: its order, its sentences, what strangers wrote in it, and what it asks for."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image

from fasterase.config import UnlearnConfig
from fasterase.errors import InputError
from fasterase.evaluation.findings import Finding, Series
from fasterase.evaluation.hurt import Hurt, Remaining
from fasterase.evaluation.verdict import Trace
from fasterase.facts import Picture, RunFacts
from fasterase.page import read_run, render_markdown, render_page, state, write_page, write_rest
from fasterase.report.evaluation import Evaluation
from fasterase.report.pictures import SheetRow

HOSTILE = (
    "</bdi></title><script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7 * 7 }}{% raw %}"
    "\u202eאבג\u0000\x1b\ud800&amp;<!--"
)
VOID = {"meta", "img", "br", "line", "polyline", "link"}


class Outline(HTMLParser):
    """Tags of a page with the names of their attributes; ids, links; refuses wrong nesting."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[tuple[str, ...]] = Counter()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.headings: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags[(tag, *(name for name, _ in attrs))] += 1
        known = dict(attrs)
        self.ids += [known["id"]] if "id" in known else []
        self.links += [known[name] for name in ("href", "src") if name in known]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h2", "h3"):
            self.headings.append(data)


def facts(name: str = "fruit", **fields) -> RunFacts:
    """What a run has left, with `name` wherever somebody else's words may stand."""
    recall = {"image_to_text_recall@1": 0.9, "text_to_image_recall@1": 0.8}
    trace = {"image_to_text_residue": 0.6, "text_to_image_residue": 0.4, "contest_hit@1": 0.05}
    scores = {"forget": trace, "retain": recall, f"near {name}": recall}
    attack = Finding("a", f"forget {name}", name, "text", "", name, original=name)
    evaluation = Evaluation(
        scores=scores,
        intervals={each: dict.fromkeys(values, (0.01, 0.2)) for each, values in scores.items()},
        chance={each: dict.fromkeys(values, 0.03) for each, values in scores.items()},
        pairs=dict.fromkeys(scores, 40),
        settings={"model": name, "candidates": 9},
        verdicts={"model": "forgotten"},
        set_verdicts={"model": {"forget": "forgotten"}, name: {"forget": "remembered"}},
        original={each: dict.fromkeys(values, 0.97) for each, values in scores.items()},
        attacks={"prompt": {"a": attack}},
        series={"prompt": [Series(name, name, "hit, %", [0, 1, 2], [0.0, 50.0, 9.0], line=name)]},
        audit=[name],
        hurt=[Hurt(name, "caption", 1.0, 0.25, 4), Hurt("ant", "word", 1.0, 0.4, 10)],
        remaining=[Remaining(name, 0.5, 2)],
        outside={"things": 500, "neighbours": 0.97, "hurt": 0.01},
    )
    row = SheetRow("To forget", Image.new("RGB", (40, 20)), name, [name, "b"], [name, "b"], True)
    terms = dict.fromkeys(("total", "forget", "retain", "consistency", "anchor"), 0.25)
    record = {
        "concept": name,
        "request": name,
        "erased_at": "2026-01-02T03:04:05+00:00",
        "fingerprint": "f" * 64,
        "outcome": {"verdict": "forgotten", "residue": {}, "steps": 2, "seconds": 3.0},
        "words": [{"word": name, "forget": 7, "retain": 0}],
        "data": {
            "forget": {"pairs": 40, "digest": "d"},
            f"near {name}": {"pairs": 9, "digest": "e"},
        },
        "config": {**UnlearnConfig(lr=1e-5).recipe(), "forget_words": [name]},
        "libraries": {"fasterase": "0.1.0"},
        "parent": {"name": name, "fingerprint": "0" * 64, "record": None},
    }
    values = {
        "name": name,
        "record": record,
        "history": [{"step": i, "lr": 1e-5, **terms} for i in (1, 2, 3)],
        "evaluation": evaluation,
        "traces": {"forget": Trace(0.6, 0.4, 0.05, 0.01, 0.2, 0.03, 40)},
        "pictures": [Picture.of(row, {name})],
        "neighbours": [name],
        "skipped": [(name, name)],
    }
    return RunFacts(**{**values, **fields})


def test_a_reader_finds_the_verdict_the_cost_the_words_and_how_sure_it_is():
    page = render_page([facts()])
    outline = Outline(page)
    wanted = ["What this does not say", "Before and after", "What was damaged, by name"]
    wanted += ["Close to what was erased: captions and classes", "Which words lost their meaning"]
    wanted += ["Curves", "Tasks and attacks", "All numbers", "Record", "Settings", "Provenance"]
    assert [each for each in outline.headings if each in wanted] == wanted
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page.partition("<body>")[2]))
    assert "The model has forgotten fruit." in text
    assert "named it in 5 % of them (guessing gives 3 %; with these pictures the true share" in text
    assert "between 1 % and 20 %). Before, it named 97 %." in text
    assert "These attacks were tried: prompt." in text
    assert "fruit 100 % 25 % 4.6 % to 69.9 % 4" in text, "what was hurt, its interval and count"
    assert "fruit 50 % 9.5 % to 90.5 % 2" in text, "what is still found"
    assert "fruit 7 0" in text, "the word and how often it stood in either set"
    assert "lr 1e-05" in text
    for link in outline.links:
        assert link.startswith("data:image/jpeg") or link[1:] in outline.ids
    assert len(outline.ids) == len(set(outline.ids))
    assert not re.search(r"https?:|url\(|@import|<script", page)
    assert "default-src 'none'" in page
    assert len(page) < 60_000


def test_the_record_says_what_was_asked_done_found_and_not_claimed():
    share = Finding("b", "forget", "pairs", "share", "", 0.25, low=0.1, high=0.4, original=1.0)
    run = facts()
    attacks = {"relearn": {"b": share}}
    run = replace(run, evaluation=replace(run.evaluation, attacks=attacks), has_folder=True)
    record = {title: " ".join(lines) for title, lines in state(run).items()}
    assert record["Request"] == "fruit"
    assert "forget: 40 pairs, to forget, training draws from it; digest d" in record["Scope"]
    assert "near fruit: 9 pairs, to keep, measured only; digest e" in record["Scope"]
    assert f"weights {'0' * 64}) to weights {'f' * 64}" in record["What was done"]
    assert "1 word lost its meaning: fruit." in record["What was done"]
    assert "tune='all'" in record["What was done"]
    assert "forgotten. Still named (before: 97 %): 5 % of 40 pictures" in record["Verdict"]
    assert record["By wording"].startswith("still finds its pictures: fruit")
    assert "retain: own caption first for 97 % before, 90 % after" in record["Damage"]
    assert record["Attacks"] == "relearn: forget, pairs: 25 % (10 % to 40 %); original 100 %"
    assert "--config RUN/config.yaml" in record["To repeat it"]
    assert "measured, 40 of a set at most" in record["What is not claimed"]
    assert "These attacks were tried: relearn." in record["What is not claimed"]
    assert record["What is not claimed"].endswith(
        "and in everyday words alone. What is in neither may have changed unseen."
    )

    plain = {**run.record, "request": None, "concept": None, "words": []}
    record = state(facts(record=plain, evaluation=None))
    assert record["Request"] == ["not stated"]
    assert record["Damage"] == ["Not measured."]
    assert record["Attacks"] == ["None was tried."]
    assert "By wording" not in record, "wordings were not measured"
    measured = replace(run.evaluation, outside={})
    record = state(replace(run, evaluation=measured, record=run.record | {"concept": "a\nb\x85c"}))
    assert record["Damage"][-1] == "2 names of captions and classes lost something."
    assert record["What is not claimed"][-1].endswith(
        "alone. What is in none of them may have changed unseen."
    )
    assert record["What was to be forgotten"] == ["a b c"]


def test_it_says_until_when_pairs_were_withheld():
    trace = Trace(0.6, 0.4, 0.0, 0.0, 0.3, 0.03, 8, by_hits=True)
    run = facts(evaluation=None, traces={"forget": trace, "withheld": trace})
    assert "“withheld” are pictures that the run was not trained on." in render_page([run])
    outcome = {**run.record["outcome"], "withheld_until": 75}
    run = replace(run, record={**run.record, "outcome": outcome})
    assert "was not trained on until step 75, when they alone were not" in render_page([run])
    assert "drawn after step 75" in " ".join(state(run)["What was done"])


def test_what_strangers_wrote_adds_no_heading_and_closes_no_block_of_markdown():
    hostile = "dog\n\n## Verdict: never known\n```\n<h1>x</h1>"
    plain, text = (render_markdown(facts(name), {}) for name in ("dog", hostile))
    headings = [line for line in plain.splitlines() if line.startswith("#")]
    outside = "".join(re.split(r"^(`{3,})[a-z]*\n.*?^\1$", text, flags=re.S | re.M)[::2])
    assert [line for line in outside.splitlines() if line.startswith("#")] == headings
    assert "<h1>" not in outside.replace(r"\<h1\>", "")


def test_what_strangers_wrote_adds_no_element(tmp_path):
    harmless, hostile = (
        write_page([facts(name)], tmp_path / "page.html").read_text(encoding="utf-8")
        for name in ("fruit", HOSTILE)
    )
    assert Outline(harmless).tags == Outline(hostile).tags
    assert "<script" not in hostile
    assert "{{ 7 * 7 }}" in hostile
    assert not set("\0\x1b\ud800") & set(hostile)
    assert "\u202eאבג" in hostile
    sides = [render_page([facts(name), facts(name)]) for name in ("fruit", HOSTILE)]
    assert Outline(sides[0]).tags == Outline(sides[1]).tags


@pytest.mark.parametrize(
    ("verdict", "sentence"),
    [
        ("remembered", "The model still knows fruit."),
        ("undecided", "There are too few pictures to tell whether"),
        ("over-erased", "The model avoids fruit so strongly"),
        ("never known", "The model never knew fruit"),
        (None, "There is no verdict"),
    ],
)
def test_every_verdict_has_a_sentence_without_an_evaluation_too(verdict, sentence):
    run = facts(evaluation=None, pictures=[], history=[])
    record = {**run.record, "outcome": {**run.record["outcome"], "verdict": verdict}}
    page = render_page([replace(run, record=record)])
    Outline(page)
    assert sentence in page
    assert "Damage was not measured" in page
    assert "No steps were taken" in page


def test_runs_of_other_pairs_are_not_compared_silently():
    one, two = facts(name="one"), facts(name="two")
    page = render_page([one, replace(one, name="one")])
    assert "cannot be compared" not in page
    assert "one (1)" in page
    assert "Settings that differ" in page
    assert "<p>None.</p>" in page
    page = render_page([one, two])
    assert "cannot be compared" in page
    assert "97 % → 90 % (1 % to 20 %; 3 %)" in page


def test_what_no_other_file_holds_comes_back(tmp_path):
    run = facts(called="apples")
    run = replace(run, name=tmp_path.name, record={**run.record, "concept": None}, has_folder=True)
    assert "The model has forgotten apples." in render_page([run])
    write_rest(run, tmp_path)
    run.evaluation.to_json(tmp_path / "evaluation.json")
    (tmp_path / "history.jsonl").write_text("\n".join(map(json.dumps, run.history)) + "\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "provenance.json").write_text(json.dumps(run.record))
    assert render_page([read_run(tmp_path)]) == render_page([run])
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(InputError, match=r"report\.json is damaged"):
        read_run(tmp_path)


@pytest.mark.slow
def test_a_browser_shows_it_without_request_dialog_or_overflow(browser, tmp_path):
    page = write_page([facts(HOSTILE)], tmp_path / "page.html")
    for width in (1200, 360):
        browser.send("/window/rect", {"width": width, "height": 800})
        browser.send("/url", {"url": page.as_uri()})
        assert browser.run("return document.scripts.length") == 0
        assert browser.run("return document.images.length") == 1
        assert browser.run("return document.images[0].naturalWidth") == 96
        assert browser.run(
            "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        )
        unnamed = "return [...document.querySelectorAll('img, svg, [role=region]')].filter("
        unnamed += "(one) => !one.alt && !one.getAttribute('aria-label')).length"
        assert browser.run(unnamed) == 0
    browser.press("\ue004")  # Tab
    assert browser.run("return document.activeElement.className") == "skip"
    entries = browser.send("/se/log", {"type": "performance"})
    events = [json.loads(entry["message"])["message"] for entry in entries]
    sent = [each for each in events if each["method"] == "Network.requestWillBeSent"]
    urls = [each["params"]["request"]["url"] for each in sent]
    assert urls
    assert all(url.startswith(("file:", "data:")) for url in urls), urls
    assert not [each for each in events if "javascriptDialog" in each["method"]]
    assert browser.send("/se/log", {"type": "browser"}) == []


def test_long_histories_make_no_long_pages():
    first = facts().history[0]
    steps = [{**first, "step": i, "total": float(i)} for i in range(1, 5001)]
    assert len(render_page([facts(history=steps)])) < 100_000
