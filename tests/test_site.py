"""The site: what its pages list is all there is, it builds strictly, and asks no other host."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import fasterase
from fasterase.cli.commands import COMMANDS
from fasterase.cli.main import EXIT_CODES, EXIT_DONE, EXIT_FAILED, EXIT_REMEMBERED
from fasterase.cli.parser import flags_of
from fasterase.config import field_names
from tests.test_docs import PAGES
from tools.site_pages import API

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PARTS = ["Start", "Guides", "Reference", "Evidence", "How it works"]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
# Of what a page loads by itself; links are followed by readers.
LOADED = (
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?([^\"\s>]+)|<link\b[^>]*\bhref=\"?([^\"\s>]+)"
)


def test_every_exit_code_is_on_its_page():
    text = (ROOT / "docs/exit_codes.md").read_text(encoding="utf-8")
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.M)}
    assert listed == {code for _, code in EXIT_CODES} | {EXIT_DONE, EXIT_FAILED, EXIT_REMEMBERED}


def test_every_page_is_in_the_navigation_and_its_blocks_are_tested():
    parts = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert [name for part in parts for name in part] == PARTS
    listed = [*places(parts)]
    written = {str(file.relative_to(DOCS)) for file in DOCS.rglob("*.md")}
    made = {f"api/{name}.md" for name in API} | {"settings.md", "command_line.md"}
    copied = {*listed} - written - made
    assert len(listed) == len({*listed} | written | made)  # each page once
    assert {str(file.relative_to(DOCS)) for file in PAGES[1:]} == written
    for name in copied:
        text = (ROOT / name.removeprefix("files/")).read_text(encoding="utf-8")
        assert "```" not in text, name


def places(parts: list[dict[str, Any]]) -> Iterator[str]:
    for _, place in (pair for part in parts for pair in part.items()):
        yield from [place] if isinstance(place, str) else places(place)


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_workflows_run_what_there_is(file):
    workflow = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert workflow["name"] == file.stem
    assert workflow[True]  # what YAML 1.1 makes of "on"
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for job in workflow["jobs"].values():
        needs = job.get("needs", [])
        assert {needs} if isinstance(needs, str) else {*needs} <= set(workflow["jobs"])
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            called = set(re.findall(r"\bmake ([a-z-]+)", step.get("run", "")))
            assert called <= targets


def test_workflows_test_every_python_and_both_systems():
    names = [file.name for file in WORKFLOWS]
    assert names == ["docs.yml", "tests.yml", "wheels.yml"]
    matrix = yaml.safe_load(WORKFLOWS[1].read_text())["jobs"]["test"]["strategy"]["matrix"]
    assert matrix["python"] == ["3.10", "3.11", "3.12", "3.13"]
    assert {each.partition("-")[0] for each in matrix["os"]} == {"ubuntu", "macos"}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


def page(site: Path, name: str) -> str:
    return (site / name / "index.html").read_text(encoding="utf-8")


def anchors(text: str) -> set[str]:
    return set(re.findall(r'\bid="([^"]+)"', text))


@pytest.mark.slow
def test_every_public_name_is_on_an_api_page_with_its_docstring(site):
    pages = [file.read_text(encoding="utf-8") for file in site.glob("api/*/index.html")]
    for name in fasterase.__all__:
        (shown,) = (page for page in pages if f"fasterase.{name}" in anchors(page))
        words = re.findall(r"\w+", (getattr(fasterase, name).__doc__ or "").partition("\n")[0])
        # Not a module of the same name, such as fasterase.planner.plan.
        heading = (
            rf'id="fasterase.{name}" class="doc doc-heading">\s*<code class="[^"]*symbol-(\w+)"'
        )
        assert re.search(heading, shown)[1] in ("function", "class", "attribute"), name
        if name != "__version__":
            text = html.unescape(re.sub(r"<[^>]*>", " ", shown))
            assert " ".join(words) in " ".join(re.findall(r"\w+", text)), name


@pytest.mark.slow
def test_every_setting_and_flag_has_a_place(site):
    assert {*field_names()} <= anchors(page(site, "settings"))
    places = anchors(page(site, "command_line"))
    for name, command in COMMANDS.items():
        own = {flag.name for flag in flags_of(name)} - {*command.config_fields}
        assert {name, *(f"{name}-{flag}" for flag in own)} <= places


@pytest.mark.slow
def test_site_asks_no_other_host_and_links_to_what_it_holds(site):
    for file in site.rglob("*.html"):
        text = file.read_text(encoding="utf-8")
        loaded = [a or b for a, b in re.findall(LOADED, text)]
        assert loaded
        assert not [each for each in loaded if "//" in each], file
        if file.name == "404.html":
            continue
        for link in re.findall(r'<a\b[^>]*\bhref="(?!\w+:)([^"#]+)', text):
            assert (file.parent / link).resolve().exists(), f"{file}: {link}"


@pytest.mark.slow
def test_formulas_are_drawn_without_a_script(site):
    drawn = page(site, "method")
    assert drawn.count("<math ") == (ROOT / "docs/method.md").read_text().count("```math")
    assert "\\frac" not in drawn
