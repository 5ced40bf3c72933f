"""Run one command, print its errors and warnings in one line each, and return its exit code."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from fasterase.cli.commands import run_command
from fasterase.cli.parser import parse
from fasterase.errors import FaseraseError, InputError, NonFiniteError, PreemptedError

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_WRONG_INPUT = 2
EXIT_NON_FINITE = 3
EXIT_REMEMBERED = 4
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; an error prints one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            parsed = parse(argv)
            verdict = run_command(parsed.command, parsed.values)
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in argv:
            traceback.print_exc()
        print(f"fasterase: error: {_format_error(error)}", file=sys.stderr)
        return _exit_code_of(error)
    return EXIT_REMEMBERED if verdict == "remembered" else EXIT_DONE


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def _format_error(error: BaseException) -> str:
    if isinstance(error, FaseraseError | KeyboardInterrupt):
        return " ".join(str(error).split()) or "interrupted."
    found = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{found} (unexpected; --debug shows the traceback)"


def _exit_code_of(error: BaseException) -> int:
    if isinstance(error, InputError):
        return EXIT_WRONG_INPUT
    if isinstance(error, NonFiniteError):
        return EXIT_NON_FINITE
    if isinstance(error, PreemptedError):
        return EXIT_PREEMPTED
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    return EXIT_FAILED
