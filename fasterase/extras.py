"""Optional dependencies: imported where used, with an error that names the extra to install."""

from __future__ import annotations

import importlib
from types import ModuleType

from fasterase.errors import MissingExtraError


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import `module`, or raise `MissingExtraError` naming what needs it and the extra it is in."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{purpose} needs `{module.partition('.')[0]}`, which cannot be imported ({error}). "
            f"Install it with: pip install 'fasterase[{extra}]'"
        ) from error
