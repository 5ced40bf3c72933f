"""Run one command, print its errors and warnings in one line each, and return its exit code."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
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
    LostRankError,
    NonFiniteError,
    PreemptedError,
    hide_secrets,
)
from fasterase.files import write_text
from fasterase.signals import INTERRUPTED, PREEMPTED, Stopped, handling_signals

EXIT_DONE, EXIT_FAILED, EXIT_WRONG, EXIT_REMEMBERED = 0, 1, 2, 4
EXIT_CODES = (
    (InputError, EXIT_WRONG),
    (NonFiniteError, 3),
    (PreemptedError, PREEMPTED),
    (KeyboardInterrupt, INTERRUPTED),
)

# Commands that all processes take part in; the first one alone runs the others.
SHARED = ("unlearn", "demo", "find")
STATUS_FILE = "status.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code, which an erasure also leaves in `status.json`.

    An error prints one line on stderr. Under a launcher all ranks run it, and the first one prints.
    """
    is_process, is_lost = argv is None, False
    if argv is None:
        argv = sys.argv[1:]
        # Libraries take a second to leave the interpreter: what is done is not undone.
        atexit.register(signal.signal, signal.SIGTERM, signal.SIG_IGN)
    status = _Status()
    with handling_signals(status.write) as stop:
        try:
            verdict = _run(argv, status)
            stop.finish()
            code = EXIT_REMEMBERED if verdict == "remembered" else EXIT_DONE
        except (Exception, KeyboardInterrupt) as error:
            stop.finish()
            code, is_lost = exit_code_of(error), isinstance(error, LostRankError)
            # What is wrong with the command is wrong on every rank; what happens to one is its own.
            if _rank() == 0 or code == EXIT_FAILED:
                if "--debug" in argv:
                    traceback.print_exc()
                print(f"fasterase: error: {format_error(error)}", file=sys.stderr)
        status.write(code)
    if is_process and is_lost:
        # Leaving the interpreter would wait for the lost rank.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(argv: Sequence[str], status: _Status) -> str | None:
    """Run a command on all ranks; return the verdict, if it comes to one."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        parsed = parse(argv)
        if parsed.command in SHARED and not parsed.values.get("print_config"):
            status.begin(parsed.values.get("output_dir"))
        from fasterase.parallel.ranks import join_ranks  # imports torch

        with join_ranks() as ranks, _first_prints():
            verdict = None
            if ranks.is_first or parsed.command in SHARED:
                verdict = run_command(parsed.command, parsed.values)
            # The others wait for what the first one does alone.
            return ranks.broadcast(verdict)


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


class _Status:
    """Leaves the exit code of an erasure in its folder: launchers have codes of their own."""

    _file: Path | None = None

    def begin(self, output_dir: str | None) -> None:
        """Remove what an earlier run has left in the folder, and write there from now on."""
        if output_dir is not None and _rank() == 0:
            self._file = Path(output_dir) / STATUS_FILE
            with contextlib.suppress(OSError):
                self._file.unlink(missing_ok=True)

    def write(self, code: int) -> None:
        """Write the exit code; wrong input makes no folder, unless a launcher hides the code."""
        if self._file is None:
            return
        if code == EXIT_WRONG and "WORLD_SIZE" not in os.environ and not self._file.parent.is_dir():
            return
        with contextlib.suppress(OSError, FaseraseError):
            write_text(self._file, json.dumps({"exit_code": code}) + "\n")


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
    if isinstance(error, Stopped) and error.number != signal.SIGINT:
        return PREEMPTED
    return next((code for kind, code in EXIT_CODES if isinstance(error, kind)), EXIT_FAILED)
