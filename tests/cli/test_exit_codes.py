"""Wrong input and every other failure: one line on stderr, and the exit code."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import fasterase
from fasterase.cli import main
from tests.cli.fake_api import REQUIRED


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
        (["erase"], "unknown command erase. The commands are unlearn, evaluate, plan, split"),
        (["unlean", "--model", "m"], "unknown command unlean. Did you mean unlearn"),
        (["--local_rank", "0", "evalute"], "Did you mean evaluate?"),
        (["--model", "m", "evaluate"], "Those of a command stand after it"),
        (["completion"], "--shell"),
        (["completion", "nu"], "shell='nu'"),
        (["--versio"], "--version"),
        (["evaluate", "--model", "m"], "--forget, --retain"),
        (["evaluate", *REQUIRED[:-2], "--sets", "near.csv"], "NAME=WHERE"),
        (["evaluate", *REQUIRED[:-2], "--sets", "a=x", "a=y"], "the name a is given twice"),
        (["evaluate", *REQUIRED[:-2], "--forget_sets", "=x.csv"], "NAME=WHERE"),
        (["evaluate", *REQUIRED[:-2], "--sets", "retain=x.csv"], "'retain' is an argument"),
        (["evaluate", *REQUIRED[:-2], "--num_workers", "many"], "num_workers='many'"),
        (["evaluate", "--lr", "3"], "--lr"),
        (["evaluate", *REQUIRED[:-2], "--plots", "."], "--plots: there is nothing to draw without"),
        (["split", "--output_dir", "new"], "split needs --data"),
        (["split", "--data", "d", "--forget_expression", "a"], "split needs --output_dir"),
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
        ("lr: fast\n", "lr='fast'"),
        ("output_dir: 3\n", "output_dir=3"),
        ("floor: nil\n", "null in YAML"),
        ("forget: \ud83c".encode("utf-8", "surrogatepass"), "utf-8"),
    ],
)
def test_wrong_yaml(text, named, tmp_path, capsys):
    file = tmp_path / "erase.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(["unlearn", "--config", str(file), *REQUIRED]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (fasterase.InputError("forget: empty.\nGive pairs."), 2, "forget: empty. Give pairs."),
        (fasterase.MissingExtraError("needs transformers"), 2, "needs transformers"),
        (fasterase.ResumeError("changed config"), 2, "changed config"),
        (fasterase.NonFiniteError("nan", term="forget", step=3, pair_ids=["a"]), 3, "nan"),
        (fasterase.PreemptedError("run again"), 75, "run again"),
        (fasterase.FaseraseError("other"), 1, "other"),
        (fasterase.DiskFullError("No space left on device: a."), 1, "No space left on device: a."),
        (ZeroDivisionError("by zero"), 1, "ZeroDivisionError: by zero (unexpected; --debug"),
        (KeyboardInterrupt("stopped. A checkpoint is in d."), 130, "A checkpoint is in d."),
        (KeyboardInterrupt(), 130, "interrupted."),
    ],
)
def test_exit_codes(error, code, said, unlearn, capsys):
    unlearn.error = error
    assert main(["unlearn", *REQUIRED]) == code
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1
    assert "Traceback" not in printed
    assert main(["unlearn", *REQUIRED, "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["unlearn", "evaluate"])
@pytest.mark.parametrize(
    ("verdict", "code"),
    [("remembered", 4), ("forgotten", 0), ("over-erased", 0), ("never known", 0), (None, 0)],
)
def test_a_verdict_of_remembered_has_an_exit_code(command, verdict, code, request, capsys):
    api = request.getfixturevalue(command)
    api.verdict = verdict
    flags = REQUIRED if command == "unlearn" else REQUIRED[:-2]
    assert main([command, *flags]) == code
    printed = capsys.readouterr()
    assert printed.err == ""
    if command == "unlearn":
        assert f"Done in 1 s: {verdict or 'no verdict'}." in printed.out


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
