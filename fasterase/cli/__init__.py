"""The command line: `fasterase unlearn | evaluate | plan | ...`."""

from __future__ import annotations

from fasterase.cli.main import main

__all__ = ["main"]
