"""The flags of each command: names, defaults, help, groups."""

from __future__ import annotations

from fasterase.cli.parser import COMMANDS, flags_of
from fasterase.config import UnlearnConfig, field_names
from fasterase.demo.run import BATCHES, FASTERASE


def test_every_field_is_a_flag_with_help_in_a_group():
    flags = {flag.name: flag for flag in flags_of("unlearn")}
    assert set(field_names()) < set(flags)
    for command in COMMANDS:
        for flag in flags_of(command):
            assert flag.help, flag.name
            assert flag.group not in ("", "Settings"), flag.name
    assert flags["lr"].group == "Optimiser"
    assert flags["lr"].default == UnlearnConfig().lr


def test_demo_help_gives_no_default_that_the_demo_does_not_use():
    shown = {flag.name: flag for flag in flags_of("demo")}
    assert "epochs" not in shown
    for name in FASTERASE | BATCHES:
        if name in shown:
            assert shown[name].default is None
            assert "tuned for the shipped model" in shown[name].help
