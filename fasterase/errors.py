"""The errors that fasterase raises. All are `FaseraseError`s, so one `except` catches them all."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from types import ModuleType

# In URLs: a user with a password, and a query, which may hold a signature. Anywhere: signatures.
_USER = re.compile(r"(?<=://)[^\s/?#'\"<>]*@")
_QUERY = re.compile(r"(://[^\s?'\"<>]*\?)[^\s'\"<>]+")
_SIGNATURE = re.compile(r"\b(x-(?:amz|goog)-[\w-]+|signature|sig)=[^\s&'\"<>]+", re.IGNORECASE)


def hide_secrets(text: str) -> str:
    """Return a message without the passwords and signatures of the URLs in it."""
    text = _QUERY.sub(r"\1***", _USER.sub("***@", text))
    return _SIGNATURE.sub(r"\1=***", text)


class FaseraseError(Exception):
    """Base class of all errors raised by fasterase. Messages hold no secrets of URLs."""

    def __init__(self, *told: object) -> None:
        super().__init__(*(hide_secrets(each) if isinstance(each, str) else each for each in told))


class InputError(FaseraseError, ValueError):
    """An argument, option or file cannot be used.

    The message names it and says what was found and how to fix it.
    """


class MissingExtraError(InputError, ImportError):
    """An optional dependency is not installed. The message names the extra that installs it."""


class ResumeError(InputError):
    """A run cannot be resumed: its checkpoint is missing, unreadable or belongs to another run."""


class NonFiniteError(FaseraseError):
    """Loss or gradient stayed non-finite for several steps; none of those steps was applied.

    Attributes:
        term: the first non-finite term (`"forget"`, `"retain"`, ..., or `"gradient"`).
        step: the step at which the run stopped, counted from 1.
        pair_ids: ids of the pairs in that step's batch.
    """

    def __init__(self, message: str, *, term: str, step: int, pair_ids: Sequence[str]) -> None:
        super().__init__(message)
        self.term = term
        self.step = step
        self.pair_ids = tuple(pair_ids)


class PreemptedError(FaseraseError):
    """The run was told to stop (SIGTERM, SIGUSR1).

    With an `output_dir`, a training step was saved; start it again to resume.
    """


class LostRankError(FaseraseError):
    """Another process of the run ended, hangs or cannot be reached; the message names it."""


class DiskFullError(FaseraseError, OSError):
    """The disk or the quota has no room for a file.

    What was there under its name before is unchanged, and nothing half written is left behind. The
    last checkpoint is kept.
    """


def import_extra(module: str, extra: str, purpose: str) -> ModuleType:
    """Import a module that the extra `extra` of fasterase installs.

    Raises:
        MissingExtraError: it cannot be imported; the message says that `purpose` needs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{purpose} needs `{module.partition('.')[0]}`, which cannot be imported ({error}). "
            f"Install it with: pip install 'fasterase[{extra}]'"
        ) from error
