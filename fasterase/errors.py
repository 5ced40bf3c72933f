"""What fasterase raises. Everything is a `FaseraseError`, so one `except` catches all of it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType


class FaseraseError(Exception):
    """Base of all errors raised by fasterase."""


class InputError(FaseraseError, ValueError):
    """An argument, option or file is unusable. The message names it, what was found, the mend."""


class MissingExtraError(InputError, ImportError):
    """An optional dependency is not installed. The message names the extra that brings it."""


class ResumeError(InputError):
    """A checkpoint exists but belongs to another run (changed config, data or model)."""


class NonFiniteError(FaseraseError):
    """Loss or gradient stayed non-finite for several steps; none of those steps was applied.

    Attributes:
        term: the first term found non-finite (`"forget"`, `"retain"`, ..., or `"gradient"`).
        step: the step, counted from 1, at which the run stopped.
        pair_ids: ids of the pairs in that step's batch.
    """

    def __init__(self, message: str, *, term: str, step: int, pair_ids: Sequence[str]) -> None:
        super().__init__(message)
        self.term = term
        self.step = step
        self.pair_ids = tuple(pair_ids)


class PreemptedError(FaseraseError):
    """The run was asked to stop (SIGTERM) and did so after a checkpoint; run it again to go on."""


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import `module`, or raise `MissingExtraError` naming what needs it and the extra it is in."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{purpose} needs `{module.partition('.')[0]}`, which cannot be imported ({error}). "
            f"Install it with: pip install 'fasterase[{extra}]'"
        ) from error
