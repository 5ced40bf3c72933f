"""Parsing the command line and YAML: flags, spelling, round trips, help, the examples shown."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import fasterase
from fasterase.cli import main
from fasterase.cli.commands import COMMANDS
from fasterase.cli.parser import flags_of, parse
from fasterase.config import UnlearnConfig, field_names
from fasterase.demo.run import BATCHES
from tests.cli.fake_api import REQUIRED


@pytest.mark.parametrize("launcher", [["--local_rank=3"], ["--local-rank", "3"], []])
def test_dashes_and_launcher_flags(launcher, unlearn):
    flags = ["--max-grad-norm=none", "--train-mode", "--max_steps", "7"]
    assert main([*launcher, "unlearn", *REQUIRED, *flags]) == 0
    assert unlearn.config.max_grad_norm is None
    assert unlearn.config.train_mode is True
    assert unlearn.config.max_steps == 7


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        (["--floor", "none"], "floor", None),
        (["--floor", "null"], "floor", None),
        (["--floor", "-0.2"], "floor", -0.2),
        (["--floor", "0"], "floor", 0.0),
        (["--evaluation", "none"], "evaluation", None),
        (["--progress", "false"], "progress", False),
        (["--progress"], "progress", True),
        (["--forget_words"], "forget_words", True),
        (["--forget_words", "false"], "forget_words", False),
        (["--forget_words", "octopus"], "forget_words", ["octopus"]),
        (["--forget_words", "none"], "forget_words", False),
        (["--forget_words", "crane (bird)"], "forget_words", ["crane (bird)"]),
        (["--forget_words", "owl,crane (bird)"], "forget_words", ["owl", "crane (bird)"]),
        (["--forget_words", "octopus,octopi"], "forget_words", ["octopus", "octopi"]),
        (["--deepspeed", "zero3.json"], "deepspeed", "zero3.json"),
        (["--lr", "1e-8"], "lr", 1e-8),
        (["--lr", "auto"], "lr", "auto"),
        (["--epochs", "auto"], "epochs", "auto"),
        (["--betas", "(0.1, 0.2)"], "betas", (0.1, 0.2)),
        (["--betas", "[1e-1,.2]"], "betas", (0.1, 0.2)),
        # A path that reads as a number or None stays text.
        (["--output_dir", "3"], "output_dir", "3"),
        (["--tune", "none"], "tune", "none"),
        (["--deepspeed", "7"], "deepspeed", "7"),
        (["--device", "NONE"], "device", None),
    ],
)
def test_values(flags, field, value):
    assert parse(["unlearn", *flags]).values == {field: value}


def test_flags_win_over_the_file_wherever_they_stand_and_later_files_over_earlier(tmp_path):
    for name, text in {"a": "lr: 1e-4\nseed: 1\nepochs: 7\n", "b": "seed: 2\n"}.items():
        (tmp_path / name).write_text(text)
    files = ["--config", str(tmp_path / "a"), "--config", str(tmp_path / "b")]
    assert parse(["unlearn", "--lr", "2e-4", *files]).values == {"lr": 2e-4, "seed": 2, "epochs": 7}


def _unit(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False)


# Numbers, since the automatic recipe excludes some values of other fields.
NUMBERS = {"epochs": st.integers(1, 10**9), "lr": st.floats(1e-300, 1e300, allow_nan=False)}
FIELD_VALUES = {
    "forget_weight": _unit(0, 1e6),
    "anchor_weight": _unit(0, 1e6),
    "retain_weight": _unit(1e-3, 10),
    "floor": st.one_of(st.none(), st.just("auto"), _unit(-1, 1)),
    "forget_augment": st.booleans(),
    "negatives": st.sampled_from(["own", "joint"]),
    "max_steps": st.none() | st.integers(1, 10**9),
    "micro_batch_size": st.none() | st.integers(1, 4096),
    "betas": st.tuples(_unit(0, 0.999), _unit(0, 0.999)),
    "schedule": st.sampled_from(["constant", "cosine"]),
    "max_grad_norm": st.none() | st.floats(1e-30, 1e30),
    "tune": st.sampled_from(["all", "image", "projections", "last:12"]),
    "train_mode": st.booleans(),
    "deepspeed": st.none()
    | st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), st.integers() | st.booleans()),
    "output_dir": st.none() | st.from_regex(r"[A-Za-z][A-Za-z0-9 _./-]{0,20}", fullmatch=True),
    "seed": st.integers(0, 2**63 - 1),
    "evaluation": st.sampled_from([None, "quick", "full"]),
    "max_skipped": _unit(0, 1),
}


@settings(max_examples=40, deadline=None)
@given(values=st.fixed_dictionaries(NUMBERS, optional=FIELD_VALUES))
def test_config_round_trips_through_yaml_and_flags(values, tmp_path_factory):
    config = UnlearnConfig(**values)
    file = tmp_path_factory.mktemp("config") / "erase.yaml"
    file.write_text(yaml.safe_dump(config.to_dict()))
    assert UnlearnConfig(**parse(["unlearn", "--config", str(file)]).values) == config
    assert UnlearnConfig.from_yaml(file) == config

    flags = [f"--{name}={_spelled(value)}" for name, value in values.items()]
    assert UnlearnConfig(**parse(["unlearn", *flags]).values) == config


def _spelled(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return json.dumps(value) if isinstance(value, dict) else str(value)


TOKENS = st.text(max_size=12) | st.sampled_from(
    [*COMMANDS, "--lr", "--floor", "--sets", "=", "\x0f"]
)


@settings(max_examples=60, deadline=None)
@given(argv=st.lists(TOKENS, max_size=5))
def test_any_command_line_is_parsed_or_refused_as_wrong_input(argv):
    # --help or --version among the tokens ends with SystemExit(0)
    with contextlib.suppress(fasterase.InputError, SystemExit):
        parse(argv)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_the_basics_first_and_all_flags_if_asked(command, capsys):
    flags = {flag.name: flag for flag in flags_of(command)}
    basics = {name for name in flags if COMMANDS[command].shows(name)}
    is_long = command in ("unlearn", "evaluate", "plan")
    assert (basics < flags.keys()) == is_long
    assert {*COMMANDS[command].needs} <= basics
    if command == "unlearn":
        assert {"concept", "lr", "output_dir"} <= basics
        assert not basics & {"request", "betas", "save_every"}
    for flag, expected in {"--help": basics, "--help-all": flags.keys()}.items():
        if flag == "--help" or is_long:
            with pytest.raises(SystemExit) as stop:
                main([command, flag])
            assert stop.value.code == 0
            shown = capsys.readouterr().out
            found = set(re.findall(r"^  --(\w+)", shown, flags=re.MULTILINE))
            assert flags.keys() & found == expected
            assert "%%" not in shown


@pytest.mark.parametrize("argv", [[], ["--help"], ["--debug"], ["--local_rank", "0"]])
def test_without_a_command_the_commands_are_listed(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for command, cls in COMMANDS.items():
        assert f"  {command:<12}{cls.purpose()}\n" in shown
    assert "%%" not in shown


@pytest.mark.parametrize("flag", ["-V", "--version"])
def test_version(flag, capsys):
    with pytest.raises(SystemExit):
        main([flag])
    assert capsys.readouterr().out == f"fasterase {fasterase.__version__}\n"


def test_completion_knows_commands_flags_and_values(capsys, tmp_path):
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    lines = [
        f"source {tmp_path / 'script'}",
        *('complete_() { COMP_WORDS=(fasterase "$@") COMP_CWORD=$#', "COMPREPLY=()"),
        *('_shtab_fasterase fasterase "${@: -1}" "${@: -2:1}"', 'echo "${COMPREPLY[@]}"; }'),
        *("complete_ unl", "complete_ unlearn --max_st", "complete_ unlearn --optimizer pag"),
    ]
    shell = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True)
    assert shell.stdout.split() == ["unlearn", "--max_steps", "paged_adamw8bit"]
    assert main(["completion", "fish"]) == 0
    assert "--tune" in capsys.readouterr().out


def test_completion_without_shtab_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "zsh"]) == 2
    assert "pip install 'fasterase[completion]'" in capsys.readouterr().err


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
    for name in BATCHES:
        if name in shown:
            assert shown[name].default is None
            assert "chosen for the shipped model" in shown[name].help


def _examples() -> list[str]:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", readme, flags=re.DOTALL)
    text = "\n".join([*blocks, *(cls.__doc__ for cls in COMMANDS.values())]).replace("\\\n", " ")
    lines = [line.strip().partition(" > ")[0] for line in text.splitlines()]
    return [line for line in lines if line.startswith("fasterase ")]


def test_every_example_parses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "erase.yaml").write_text("lr: 1e-6\n")
    examples = _examples()
    assert len(examples) >= 14
    for example in examples:
        assert parse(shlex.split(example)[1:]).command in COMMANDS
