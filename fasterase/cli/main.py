"""Run one command, print its errors and warnings in one line each, and return its exit code."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fasterase.cli.commands import run_command
from fasterase.cli.parser import parse
from fasterase.errors import (
    FaseraseError,
    InputError,
    NonFiniteError,
    PreemptedError,
    hide_secrets,
)
from fasterase.files import write_text

EXIT_DONE, EXIT_FAILED, EXIT_REMEMBERED = 0, 1, 4
EXIT_CODES = ((InputError, 2), (NonFiniteError, 3), (PreemptedError, 75), (KeyboardInterrupt, 130))

# Commands that all processes take part in; the first one alone runs the others.
SHARED = ("unlearn", "demo", "find")
# Where the first of several processes leaves the exit code: launchers have codes of their own.
STATUS_FILE = "status.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; an error prints one line on stderr.

    Under a launcher all ranks run it, the first one prints, and its exit code is also in
    `status.json` of the `output_dir`.
    """
    argv = sys.argv[1:] if argv is None else argv
    output_dir: str | None = None
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            parsed = parse(argv)
            output_dir = parsed.values.get("output_dir")
            from fasterase.parallel.ranks import join_ranks  # imports torch

            with join_ranks() as ranks, _first_prints():
                _write_status(output_dir, None)
                verdict = None
                if ranks.is_first or parsed.command in SHARED:
                    verdict = run_command(parsed.command, parsed.values)
                # The others wait for what the first one does alone.
                verdict = ranks.broadcast(verdict)
        code = EXIT_REMEMBERED if verdict == "remembered" else EXIT_DONE
        _write_status(output_dir, code)
    except (Exception, KeyboardInterrupt) as error:
        code = exit_code_of(error)
        _write_status(output_dir, code)
        # What is wrong with the command is wrong on every rank; what happens to one is its own.
        if _rank() == 0 or code == EXIT_FAILED:
            if "--debug" in argv:
                traceback.print_exc()
            print(f"fasterase: error: {format_error(error)}", file=sys.stderr)
    return code


@contextlib.contextmanager
def _first_prints() -> Iterator[None]:
    if _rank() == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _rank() -> int:
    """Return this process's number, which launchers set."""
    return int(os.environ.get("RANK") or 0)


def _write_status(output_dir: str | None, code: int | None) -> None:
    """Leave the exit code of a launched run in its folder; None removes that of an earlier run."""
    if "WORLD_SIZE" not in os.environ or _rank() != 0 or output_dir is None:
        return
    file = Path(output_dir) / STATUS_FILE
    with contextlib.suppress(OSError, FaseraseError):
        if code is None:
            file.unlink(missing_ok=True)
        else:
            write_text(file, json.dumps({"exit_code": code}) + "\n")


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {' '.join(hide_secrets(str(message)).split())}", file=sys.stderr)


def format_error(error: BaseException) -> str:
    """Describe an error in one line."""
    if isinstance(error, FaseraseError | KeyboardInterrupt):
        return " ".join(str(error).split()) or "interrupted."
    found = " ".join(hide_secrets(f"{type(error).__name__}: {error}").split())
    return f"{found} (unexpected; --debug shows the traceback)"


def exit_code_of(error: BaseException) -> int:
    """Return the exit code of a command that ends with `error`."""
    return next((code for kind, code in EXIT_CODES if isinstance(error, kind)), EXIT_FAILED)
