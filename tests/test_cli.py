"""The command line: spelling of flags, recipes, YAML, exit codes, and what reaches the API."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import fasterase
from fasterase.cli import main
from fasterase.cli.flags import flags_of
from fasterase.cli.parser import COMMANDS, EXAMPLES, parse
from fasterase.config import UnlearnConfig, field_names
from fasterase.demo.run import BATCHES, FASTERASE
from tests import small_models

REQUIRED = ["--model", "m", "--forget", "f.csv", "--retain", "r.csv", "--output_dir", "out"]


class FakeApi:
    """Stands in for the library: keeps the call, returns or raises what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple, dict]] = []
        self.error: BaseException | None = None

    def __call__(self, *args: object, **kwargs: object) -> SimpleNamespace:
        self.calls.append((args, kwargs))
        if self.error is not None:
            raise self.error
        table = SimpleNamespace(table=lambda: "THE TABLE", report=lambda path: path)
        return SimpleNamespace(
            evaluation=table, forgotten=True, seconds=1.0, table=table.table, report=table.report
        )

    @property
    def config(self) -> UnlearnConfig:
        return self.calls[-1][1]["config"]


@pytest.fixture
def unlearn(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    api = FakeApi()
    monkeypatch.setitem(vars(fasterase), "unlearn", api)
    return api


def test_flags_reach_unlearn(unlearn, capsys):
    flags = ["--holdout", "h.csv", "--text_key", "caption", "--lr", "3e-6", "--betas", "0.8,0.9"]
    assert main(["unlearn", *REQUIRED, *flags]) == 0
    args, kwargs = unlearn.calls[0]
    assert args == ("m", "f.csv", "r.csv")
    assert kwargs["holdout"] == "h.csv"
    assert kwargs["text_key"] == "caption"
    assert kwargs["image_key"] is None
    assert unlearn.config == UnlearnConfig(lr=3e-6, betas=(0.8, 0.9), output_dir="out")
    assert "THE TABLE" in capsys.readouterr().out


def test_every_field_is_a_flag_with_help_in_a_group():
    flags = {flag.name: flag for flag in flags_of("unlearn")}
    assert set(field_names()) < set(flags)
    for command in COMMANDS:
        for flag in flags_of(command):
            assert flag.help, flag.name
            assert flag.group not in ("", "Settings"), flag.name
    assert flags["lr"].group == "Optimiser"
    assert flags["lr"].default == UnlearnConfig().lr


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
        (["--floor=None"], "floor", None),
        (["--floor", "0.2"], "floor", 0.2),
        (["--floor", "-0.2"], "floor", -0.2),
        (["--floor", "auto"], "floor", "auto"),
        (["--floor", "0"], "floor", 0.0),
        (["--evaluation", "none"], "evaluation", None),
        (["--progress", "false"], "progress", False),
        (["--progress"], "progress", True),
        (["--betas", "[0.1, 0.2]"], "betas", (0.1, 0.2)),
        (["--deepspeed", "zero3.json"], "deepspeed", "zero3.json"),
        (["--deepspeed", '{"a": {"b": 1}}'], "deepspeed", {"a": {"b": 1}}),
        (["--tune", "last:4"], "tune", "last:4"),
        (["--lr", "1e-8"], "lr", 1e-8),
    ],
)
def test_values(flags, field, value):
    assert parse(["unlearn", *flags]).values == {field: value}


def test_yaml_and_flags_win_in_this_order(unlearn, tmp_path):
    file = tmp_path / "erase.yaml"
    file.write_text(
        "model: m\nforget: f\nretain: r\noutput_dir: out\nlr: 1e-4\nrecipe: cliperase\n"
        "batch_size: 32\nfloor: 0.1\n"
    )
    assert main(["unlearn", "--config", str(file), "--lr", "2e-4"]) == 0
    expected = UnlearnConfig.cliperase(lr=2e-4, batch_size=32, floor=0.1, output_dir="out")
    assert unlearn.config == expected
    assert unlearn.calls[0][0] == ("m", "f", "r")


def test_recipe_supplies_only_what_is_left_open(unlearn):
    flags = ["--recipe", "cliperase", "--floor", "auto", "--optimizer", "adamw"]
    assert main(["unlearn", *REQUIRED, *flags]) == 0
    expected = UnlearnConfig.cliperase(floor="auto", optimizer="adamw", output_dir="out")
    assert unlearn.config == expected


@pytest.mark.parametrize("recipe", ["fasterase", "cliperase"])
def test_print_config_gives_a_file_that_repeats_the_run(recipe, unlearn, tmp_path, capsys):
    flags = [*REQUIRED, "--recipe", recipe, "--seed", "5"]
    assert main(["unlearn", *flags, "--print_config"]) == 0
    assert not unlearn.calls
    printed = capsys.readouterr().out
    assert set(field_names()) < set(yaml.safe_load(printed))
    file = tmp_path / "printed.yaml"
    file.write_text(printed)
    assert main(["unlearn", *flags]) == 0
    assert main(["unlearn", "--config", str(file)]) == 0
    assert unlearn.calls[0] == unlearn.calls[1]


def _unit(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False)


FIELD_VALUES = {
    "forget_weight": _unit(0, 1e6),
    "anchor_weight": _unit(0, 1e6),
    "retain_weight": _unit(1e-3, 10),
    "floor": st.one_of(st.none(), st.just("auto"), _unit(-1, 1)),
    "forget_augment": st.booleans(),
    "negatives": st.sampled_from(["own", "joint"]),
    "epochs": st.integers(1, 10**9),
    "max_steps": st.none() | st.integers(1, 10**9),
    "micro_batch_size": st.none() | st.integers(1, 4096),
    "lr": st.floats(1e-300, 1e300, allow_nan=False),
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
@given(values=st.fixed_dictionaries({}, optional=FIELD_VALUES))
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


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["unlearn", "--learning-rat", "3"], "--learning_rat"),
        (["unlearn", "--epoch", "3"], "Did you mean --epochs"),
        (["unlearn", "--lr"], "--lr"),
        (["unlearn", "--lr", "fast"], "lr='fast'"),
        (["unlearn", "--lr", "nan"], "lr='nan'"),
        (["unlearn", "--lr", "="], "lr='='"),
        (["unlearn", "--floor", "high"], "'auto'"),
        (["unlearn", "--epochs", "1.5"], "whole number"),
        (["unlearn", "--betas", "0.9"], "2 numbers"),
        (["unlearn", "--recipe", "paper"], "'cliperase'"),
        (["unlearn", "--config", "missing.yaml"], "missing.yaml"),
        (["unlearn", "--epochs", "0", *REQUIRED], "epochs=0"),
        (["unlearn", "--model", "m"], "--forget, --retain, --output_dir"),
        (["unlearn", *REQUIRED[:-2]], "--output_dir"),
        (["unlearn", "stray", *REQUIRED], "stray"),
        (["erase"], "erase"),
        ([], "command"),
        (["--versio"], "--version"),
        (["evaluate", "--model", "m"], "--forget, --retain"),
        (["evaluate", *REQUIRED[:-2], "--sets", "near.csv"], "NAME=WHERE"),
        (["evaluate", *REQUIRED[:-2], "--sets", "retain=x.csv"], "taken"),
        (["evaluate", "--lr", "3"], "--lr"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(flags, named, unlearn, capsys):
    assert main(flags) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("fasterase: error: ")
    assert printed.err.count("\n") == 1
    assert named in printed.err
    assert not unlearn.calls


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("learning_rat: 3\n", "`learning_rat`"),
        ("max_step: 3\n", "max_steps"),
        ("lr: [a\n", "config"),
        ("- lr\n", "mapping"),
        ("lr: fast\n", "lr='fast'"),
        ("output_dir: 3\n", "output_dir=3"),
        ("floor: none\n", "null in YAML"),
        ("forget: \ud83c".encode("utf-8", "surrogatepass"), "utf-8"),
    ],
)
def test_wrong_yaml(text, named, tmp_path, capsys):
    file = tmp_path / "erase.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(["unlearn", "--config", str(file), *REQUIRED]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (fasterase.InputError("forget: empty.\nGive pairs."), 2),
        (fasterase.MissingExtraError("needs transformers"), 2),
        (fasterase.ResumeError("changed config"), 2),
        (fasterase.NonFiniteError("nan", term="forget", step=3, pair_ids=["a"]), 3),
        (fasterase.PreemptedError("run again"), 75),
        (fasterase.FaseraseError("other"), 1),
        (ZeroDivisionError("division by zero"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(error, code, unlearn, capsys):
    unlearn.error = error
    assert main(["unlearn", *REQUIRED]) == code
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "Traceback" not in printed
    assert main(["unlearn", *REQUIRED, "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_evaluate(monkeypatch, tmp_path, capsys):
    for name in ("forget", "retain", "near"):
        (tmp_path / f"{name}.csv").write_text("filepath,title\na.png,apple\n")
    (tmp_path / "classes.txt").write_text("apple\n\n pear \n")
    api = FakeApi()
    monkeypatch.setitem(vars(fasterase), "evaluate", api)
    flags = ["--model", "m", "--forget", str(tmp_path / "forget.csv")]
    flags += ["--retain", str(tmp_path / "retain.csv"), "--sets", f"near={tmp_path / 'near.csv'}"]
    flags += ["--references", "retrained=other", "--original", "m0", "--max-pairs", "9"]
    flags += ["--class_names", str(tmp_path / "classes.txt"), "--output", "report.md"]
    assert main(["evaluate", *flags]) == 0
    (model, forget, retain), kwargs = api.calls[0]
    assert (model, forget.name, retain.name) == ("m", "forget", "retain")
    assert kwargs["sets"]["near"].name == "near"
    assert kwargs["holdout"] is None
    assert kwargs["original"] == "m0"
    assert kwargs["references"] == {"retrained": "other"}
    assert kwargs["class_names"] == ["apple", "pear"]
    assert kwargs["max_pairs"] == 9
    assert "THE TABLE" in capsys.readouterr().out


@pytest.mark.parametrize("output", ["report.pdf", ".", "file/report.md"])
def test_evaluate_refuses_a_report_that_could_not_be_written(output, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    api = FakeApi()
    monkeypatch.setitem(vars(fasterase), "evaluate", api)
    assert main(["evaluate", *REQUIRED[:-2], "--output", output]) == 2
    assert f"--output={output!r}" in capsys.readouterr().err
    assert not api.calls


def test_demo_help_gives_no_default_that_the_demo_does_not_use():
    shown = {flag.name: flag for flag in flags_of("demo")}
    assert "epochs" not in shown
    for name in FASTERASE | BATCHES:
        if name in shown:
            assert shown[name].default is None
            assert "as tuned" in shown[name].help


def test_demo_passes_only_what_was_given(monkeypatch):
    api = FakeApi()
    module = SimpleNamespace(run_demo=api)
    monkeypatch.setitem(sys.modules, "fasterase.demo.run", module)
    assert main(["demo", "--forget", "animal-bird", "--seed", "3"]) == 0
    kwargs = api.calls[0][1]
    assert kwargs == {
        "forget": "animal-bird",
        "model": None,
        "recipe": "fasterase",
        "output_dir": None,
        "seed": 3,
    }


def test_module_runs_as_a_command_without_torch():
    check = (
        "import sys, runpy; sys.argv = ['fasterase', 'unlearn', '--epoch', '3']\n"
        "try: runpy.run_module('fasterase', run_name='__main__')\n"
        "except SystemExit as stop: print(stop.code, 'torch' in sys.modules)\n"
    )
    root = os.path.dirname(os.path.dirname(fasterase.__file__))
    done = subprocess.run(
        [sys.executable, "-c", check],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert done.stdout.split() == ["2", "False"]
    assert "Did you mean --epochs?" in done.stderr


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"] if command else ["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for flag in flags_of(command) if command else []:
        assert f"--{flag.name}" in shown
    assert "%%" not in shown


def _examples() -> list[str]:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", readme, flags=re.DOTALL)
    text = "\n".join([*blocks, *EXAMPLES.values()]).replace("\\\n", " ")
    lines = [line.strip().partition(" > ")[0] for line in text.splitlines()]
    return [line for line in lines if line.startswith("fasterase ")]


def test_every_example_parses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "erase.yaml").write_text("lr: 1e-6\n")
    examples = _examples()
    assert len(examples) >= 8
    for example in examples:
        assert parse(shlex.split(example)[1:]).command in COMMANDS


def test_unlearn_and_evaluate_on_a_saved_model(tmp_path, capsys):
    from fasterase.models.load import load_tower

    model = small_models.open_clip_vit()
    load_tower(model, tokenizer=small_models.simple_tokenizer()).save(tmp_path / "original")
    for name, colours in {"forget": ["red", "pink"], "retain": ["blue", "green", "black"]}.items():
        for colour in colours:
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("RGB", (40, 32), colour).save(tmp_path / name / f"{colour}.png")
            (tmp_path / name / f"{colour}.txt").write_text(f"a {colour} square")
    pairs = ["--forget", str(tmp_path / "forget"), "--retain", str(tmp_path / "retain")]
    folder = tmp_path / "out"
    flags = ["--output_dir", str(folder), "--max_steps", "2", "--progress", "false"]
    assert main(["unlearn", "--model", str(tmp_path / "original"), *pairs, *flags]) == 0
    assert str(folder) in capsys.readouterr().out
    assert len((folder / "history.jsonl").read_text().splitlines()) == 2
    assert (folder / "evaluation.json").is_file()

    report = tmp_path / "report.json"
    flags = ["--original", str(tmp_path / "original"), "--sets", f"near={tmp_path / 'forget'}"]
    flags += ["--output", str(report)]
    assert main(["evaluate", "--model", str(folder / "model"), *pairs, *flags]) == 0
    assert set(json.loads(report.read_text())["scores"]) == {"forget", "retain", "near"}

    missing = ["--forget", "missing.csv", "--retain", str(tmp_path / "retain")]
    missing += ["--output_dir", str(tmp_path / "refused")]
    assert main(["unlearn", "--model", str(folder / "model"), *missing]) == 2
    assert "missing.csv" in capsys.readouterr().err
