"""Pages of the site that are made when it is built, and files beside docs/ that its pages link to.

A hook of mkdocs (`mkdocs.yml`). API, settings and command line are read from the code. A link such
as `../benchmarks/results/find.csv`, right in the repository, leads to a copy under files/.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import posixpath
import re
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import fasterase
from fasterase.cli.commands import COMMANDS
from fasterase.cli.parser import command_parser, flags_of, general_parser
from fasterase.config import (
    BOOKKEEPING,
    DEMO,
    EVALUATE,
    FIND,
    FREE,
    PLAN,
    UnlearnConfig,
    field_names,
)
from fasterase.option_values import describe_type

ROOT = Path(__file__).resolve().parents[1]
COPIES = "files"
LINK_BESIDE = re.compile(r"\]\((?:\.\./)+([^)#]+)")

# Page -> what it is about, and the names on it; a name in a module is a class that users are given.
API = {
    "erase": (
        "Erase",
        "Make a model forget, and what comes of it.",
        *("unlearn", "UnlearnConfig", "UnlearnResult", "apply_delta"),
        *("engine.history.StepRecord", "engine.words.Word", "pairs.skips.Skip"),
    ),
    "pairs": (
        "Pairs",
        "Choose what to forget and what to keep.",
        *("split", "find", "Found", "pairs.table.PairTable", "pairs.items.Record"),
    ),
    "measure": (
        "Measure",
        "What a model still knows, and what else it lost.",
        *("evaluate", "Evaluation", "evaluation.verdict.Trace", "evaluation.hurt.Hurt"),
        *("evaluation.hurt.Remaining", "evaluation.findings.Finding"),
        "evaluation.findings.Series",
    ),
    "losses": (
        "Losses",
        "The objective and the operator below it, without the rest of the library.",
        *("erase_loss", "EraseLoss", "contrastive", "Contrastive", "ClipLoss", "DistillClipLoss"),
        *("available_backends", "explain_backend", "ops.contrastive.api.BackendChoice"),
    ),
    "plan": ("Plan", "What a run will cost.", "plan", "Plan", "planner.plan.Setup"),
    "errors": (
        "Errors",
        "All are `FaseraseError`s.",
        *("FaseraseError", "InputError", "MissingExtraError", "ResumeError", "NonFiniteError"),
        *("PreemptedError", "errors.LostRankError", "DiskFullError", "__version__"),
    ),
}
TAGS = {
    FREE: "a resumed run may change it",
    BOOKKEEPING: "no part of the recipe",
    **{tag: f"also of `fasterase {tag}`" for tag in (PLAN, DEMO, EVALUATE, FIND)},
}


def on_config(config: MkDocsConfig) -> None:
    """Make MathML, which browsers draw without a script, of fences that GitHub draws too."""
    fence = {"name": "math", "class": "math", "format": _render_math}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}


def _render_math(source: str, *_: Any, **__: Any) -> str:
    lines = (convert(line, display="block") for line in source.split(r"\\") if line.strip())
    return f'<div class="math">{"".join(lines)}</div>'


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made, and copies of files that pages link to."""
    for name, page in made_pages():
        files.append(File.generated(config, name, content=page))
    pages = [Path(file.abs_src_path or "") for file in files.documentation_pages()]
    texts = [page.read_text(encoding="utf-8") for page in pages if page.is_file()]
    beside = {link for text in texts for link in LINK_BESIDE.findall(text)}
    while beside:
        link = beside.pop()
        if not (ROOT / link).is_file():
            continue  # mkdocs says so
        files.append(File.generated(config, f"{COPIES}/{link}", abs_src_path=str(ROOT / link)))
        if link.endswith(".md"):
            text = (ROOT / link).read_text(encoding="utf-8")
            further = re.findall(r"\]\((?!\w+:|#)([^)#]+)", text)
            at = posixpath.dirname(link)
            new = {posixpath.normpath(posixpath.join(at, each)) for each in further}
            beside |= {each for each in new if f"{COPIES}/{each}" not in files.src_uris}
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Lead links to files beside docs/ to their copies."""
    if page.file.src_uri.startswith(f"{COPIES}/"):
        return markdown
    return LINK_BESIDE.sub(rf"]({COPIES}/\1", markdown)


def on_page_content(html: str, page: Page, files: Files, **_: Any) -> str:
    """Lead public names to their place in the API, and `docs/x.md` in docstrings to that page."""
    names = "|".join(fasterase.__all__)
    html = re.sub(
        rf"(?<!>)<code>(fasterase\.({names}))</code>",
        r'<autoref identifier="\1"><code>\1</code></autoref>',
        html,
    )

    def link(found: re.Match[str]) -> str:
        target = files.get_file_from_path(found[1])
        if target is None or target.page is None:
            return found[0]
        return f'<a href="{target.url_relative_to(page.file)}">{target.page.title}</a>'

    return re.sub(r"\bdocs/(\w+\.md)\b", link, html)


def made_pages() -> Iterator[tuple[str, str]]:
    """Yield the place and the Markdown of each page that is made."""
    for name, (title, purpose, *members) in API.items():
        body = "".join(map(_describe, members))
        yield f"api/{name}.md", f"# {title}\n\n{purpose}\n{body}"
    yield "settings.md", _settings_page()
    yield "command_line.md", _command_page()


def _describe(member: str) -> str:
    """Describe a name by its docstring, and field by field where that does not list the fields."""
    docstring = inspect.getdoc(resolve_name(f"fasterase.{member}")) or ""
    listed = any(section in docstring for section in ("Args:", "Attributes:"))
    return f"""
::: fasterase.{member}
    options:
      show_if_no_docstring: {str(not listed).lower()}
"""


def _settings_page() -> str:
    fields = {field.name: field for field in dataclasses.fields(UnlearnConfig)}
    text = (
        "# Settings\n\nThe fields of `fasterase.UnlearnConfig`: keyword arguments of "
        "`fasterase.unlearn`, flags of `fasterase unlearn`, keys of its YAML files. "
        "[Set up a run](runs.md) says which matter.\n"
    )
    group = ""
    for flag in (flag for flag in flags_of("unlearn") if flag.name in fields):
        if flag.group != group:
            group = flag.group
            text += f"\n## {group}\n"
        default = json.dumps(flag.default) if isinstance(flag.default, str) else flag.default
        facts = [describe_type(flag.hint).replace("'", '"'), f"default `{default}`"]
        facts += [said for tag, said in TAGS.items() if tag in fields[flag.name].metadata]
        text += _definition(
            f"`{flag.name}`{{ #{flag.name} }} <small>{'; '.join(facts)}</small>", flag.help
        )
    return text


def _command_page() -> str:
    general = general_parser()
    shared = {option for action in general._actions for option in action.option_strings}
    text = f"# Command line\n\n{general.description} [Exit codes](exit_codes.md).\n"
    text += _usage(general, without=set())
    for name, cls in COMMANDS.items():
        flags = flags_of(name)
        settings = [flag.name for flag in flags if flag.name in cls.config_fields]
        parser = command_parser(name, flags)
        text += f"\n## `fasterase {name}` {{ #{name} }}\n\n{_escape(parser.description)}\n"
        text += _usage(parser, without={*shared, *(f"--{each}" for each in settings)}, place=name)
        if settings:
            links = [f"[`--{each}`](settings.md#{each})" for each in settings]
            are = "all" if len(settings) == len(field_names()) else ", ".join(links)
            text += f"\n### Settings {{ #{name}-settings }}\n\n[Settings](settings.md): {are}.\n"
        examples, _, notes = (parser.epilog or "").partition("\n\n")
        shown = inspect.cleandoc(examples.removeprefix("examples:"))
        text += f"\n### Examples {{ #{name}-examples }}\n\n```sh\n{shown}\n```\n\n{notes}\n"
    return text


def _usage(parser: ArgumentParser, *, without: set[str], place: str = "") -> str:
    """Describe the usage and the options of a parser, in its groups."""
    text = f"\n```text\n{parser.usage}\n```\n"
    for group in parser._action_groups:
        actions = [each for each in group._group_actions if not without & {*each.option_strings}]
        if actions and group.title not in ("options", "optional arguments"):
            text += f"\n### {group.title}\n"
        for action in actions:
            names = ", ".join(f"`{option}`" for option in action.option_strings)
            at = f"{{ #{place}-{action.dest} }}" if place else ""
            text += _definition(names + at, (action.help or "").replace("%%", "%"))
    return text


def _definition(term: str, description: str) -> str:
    return f"\n{term}\n:   {_escape(description)}\n"


def _escape(text: str | None) -> str:
    """Escape what Markdown would take for markup, outside code."""
    parts = re.split(r"(`[^`]*`)", text or "")
    return "".join(p if p.startswith("`") else re.sub(r"([*_<\[])", r"\\\1", p) for p in parts)
