"""`fasterase completion`: what a shell needs to complete commands, flags and their values."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fasterase.cli.command import Command
from fasterase.errors import import_extra


@dataclass(frozen=True)
class Completion(Command):
    """Print a script with which a shell completes commands, flags and their values.

    > Shell

    Args:
        shell: the shell; it may stand first, without this flag.

    Examples:
      fasterase completion bash > ~/.local/share/bash-completion/completions/fasterase
      fasterase completion zsh > ~/.zfunc/_fasterase
      fasterase completion fish > ~/.config/fish/completions/fasterase.fish

    zsh reads the folder if `fpath+=~/.zfunc` stands before `compinit` in ~/.zshrc. Needs shtab: pip
    install 'fasterase[completion]'.
    """

    needs = ("shell",)
    positional = "shell"
    shell: Literal["bash", "zsh", "fish", "tcsh"] | None = None

    def run(self, **fields: Any) -> None:
        # The parser is made of the commands, this one among them.
        from fasterase.cli.commands import COMMANDS
        from fasterase.cli.parser import command_parser, flags_of, general_parser

        shtab = import_extra("shtab", "completion", "fasterase completion")
        whole = argparse.ArgumentParser(
            prog="fasterase", parents=[general_parser()], add_help=False
        )
        commands = whole.add_subparsers()
        for name, cls in COMMANDS.items():
            flags = {f"--{flag.name}": flag for flag in flags_of(name)}
            parser = command_parser(name, flags.values())
            for action in parser._actions:
                flag = flags.get(action.option_strings[-1])
                if action.nargs == 0 or (flag is not None and isinstance(flag.default, bool)):
                    continue
                action.choices = _words(flag and flag.hint) or None
                if action.choices is None:
                    action.complete = shtab.FILE  # type: ignore[attr-defined]
            commands.add_parser(name, help=cls.purpose(), parents=[parser], add_help=False)
        print(shtab.complete(whole, self.shell))


def _words(hint: Any) -> list[str]:
    """List the words of a `Literal` in a type hint."""
    if isinstance(hint, str):
        return [hint]
    return [word for part in get_args(hint) for word in _words(part)]
