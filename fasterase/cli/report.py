"""`fasterase report`: the page of a run from what it left, or of several runs side by side."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fasterase.cli.command import Command


@dataclass(frozen=True)
class Report(Command):
    """Write the page of a run again, or put several runs side by side.

    > Runs

    Args:
        runs: the output folders of finished runs; they may stand first, without this flag.
        output: the page to write. `none`: `report.html`, and `report.md`, in the folder of a single
            run, and `comparison.html` here for several.

    Examples:
      fasterase report runs/one
      fasterase report runs/one runs/two --output both.html

    The newest evaluation.json of each folder counts: what `fasterase evaluate --output
    runs/one/evaluation.json` writes, with tasks and attacks, comes into the page too.
    """

    needs = ("runs",)
    positional = "runs"
    runs: list[str] = field(default_factory=list)
    output: str | None = None

    def run(self, **fields: Any) -> None:
        from fasterase.page import MARKDOWN, PAGE, read_run, write_markdown, write_page

        found = [read_run(folder) for folder in self.runs]
        default = Path(self.runs[0]) / PAGE if len(found) == 1 else Path("comparison.html")
        page = write_page(found, Path(self.output or default))
        written = str(page)
        if self.output is None and len(found) == 1:
            written = f"{page}, {write_markdown(found[0], page.with_name(MARKDOWN))}"
        print(f"Written: {written}")
