"""What every command is: flags as fields, help as docstring, and a `run`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Command(ABC):
    """A command without flags of its own.

    Attributes:
        needs: flags without which it does not run.
        config_fields: fields of `UnlearnConfig` that are flags too; `run` gets those given.
        positional: the flag whose values may stand first, without it.
        basics: the flags that `--help` shows; all others need `--help-all`. Empty: it shows all.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    config_fields: ClassVar[tuple[str, ...]] = ()
    positional: ClassVar[str | None] = None
    basics: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def purpose(cls) -> str:
        """Return the first line of its help."""
        return (cls.__doc__ or "").partition("\n")[0]

    @abstractmethod
    def run(self, **fields: Any) -> str | None:
        """Run the command; return the verdict, if it comes to one."""
