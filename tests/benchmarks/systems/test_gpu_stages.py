"""`make gpu`: its stages skip, end in time, resume and fail as they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.loss.gpu_model import __main__ as gpu_model
from benchmarks.loss.gpu_model.__main__ import compare, summarise
from benchmarks.loss.rows import Row, write_rows
from benchmarks.systems import gpu_checks, gpu_stages
from benchmarks.systems.gpu_stages import STAGES, Stage
from fasterase.errors import InputError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the stages given as name -> Python code, or -> Stage; returns (exit code, output)."""

    def call(stages: dict, *arguments: str) -> tuple[int, str]:
        made = {
            name: each
            if isinstance(each, Stage)
            else Stage(name, lambda r, log, c=each: [[sys.executable, "-c", c]], needs_gpu=False)
            for name, each in stages.items()
        }
        monkeypatch.setattr(gpu_stages, "STAGES", made)
        folders = ["--work", str(tmp_path / "work"), "--results", str(tmp_path)]
        code = gpu_stages.main([*folders, *arguments])
        return code, capsys.readouterr().out

    return call


def test_what_is_done_is_not_done_again_unless_named(run, tmp_path):
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x'); print('here')"
    code, output = run({"one": count})
    assert (code, (tmp_path / "count").read_text()) == (0, "x")
    assert "here" in output
    assert "here" in (tmp_path / "work/one.log").read_text()
    code, output = run({"one": count})
    assert "done before" in output
    run({"one": count}, "--stage", "one")
    assert (tmp_path / "count").read_text() == "xx"


def test_a_failed_stage_does_not_stop_the_others(run):
    code, output = run({"bad": "raise SystemExit(3)", "good": "print('fine')"})
    assert code == 1
    assert "fine" in output
    assert output.splitlines()[-2:] == ["bad          failed", "good         done"]


def test_a_stage_ends_in_time_with_all_its_children(run, tmp_path):
    """The child of the command would otherwise write later."""
    late = f"import time; time.sleep(3); open({str(tmp_path / 'late')!r}, 'w')"
    slow = "import subprocess, sys, time; print('began', flush=True); "
    slow += f"subprocess.Popen([sys.executable, '-c', {late!r}]); time.sleep(60)"
    code, output = run({"slow": slow}, "--seconds", "1.5")
    assert code == gpu_stages.UNFINISHED
    assert "began" in output
    assert "run it again to continue" in output
    assert json.loads((tmp_path / "work/slow.json").read_text())["state"] == "unfinished"
    subprocess.run([sys.executable, "-c", "import time; time.sleep(3)"], check=True)
    assert not (tmp_path / "late").exists()


def test_tests_that_passed_before_the_time_ran_out_are_left_out(tmp_path):
    log = tmp_path / "tests.log"
    log.write_text(
        "tests/ops/a.py::test_one[fp16-None] PASSED [ 10%]\n"
        "tests/ops/a.py::test_two FAILED [ 20%]\n"
        "tests/ops/a.py::test_three "
    )
    (command,) = STAGES["tests"].commands(tmp_path, log)
    assert command[-1] == "--deselect=tests/ops/a.py::test_one[fp16-None]"
    assert sum(word.startswith("--deselect") for word in command) == 1
    assert all((ROOT / word).is_file() for word in command if word.startswith("tests/"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_every_stage_says_what_it_lacks(run, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code, output = run(dict(STAGES))
    assert code == 0
    assert output.count("skipped: it needs a CUDA GPU") == len(STAGES) - 1
    assert "skipped: no measurements" in output
    assert "no CUDA GPU" in output.splitlines()[0]


def test_sanitizer_stages(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_stages.shutil, "which", lambda name: None)
    assert "not on PATH" in STAGES["memcheck"].commands(tmp_path, tmp_path)
    monkeypatch.setattr(gpu_stages.shutil, "which", lambda name: f"/cuda/{name}")
    ((program, *options),) = STAGES["racecheck"].commands(tmp_path, tmp_path)
    assert program == "/cuda/compute-sanitizer"
    assert options[:4] == ["--tool", "racecheck", "--error-exitcode", "9"]


def test_commands_of_every_stage_are_accepted(tmp_path, monkeypatch):
    """Nobody would notice a mistyped option before there is a GPU."""
    from benchmarks.loss import sweep
    from benchmarks.systems import end_to_end

    parsers = {
        "benchmarks.loss": sweep._parser(),
        "benchmarks.systems.end_to_end": end_to_end._parser(),
    }
    seen = set()
    for stage in STAGES.values():
        commands = stage.commands(tmp_path, tmp_path / "log")
        for command in commands if isinstance(commands, list) else []:
            if command[2] in parsers:
                args = parsers[command[2]].parse_args(command[3:])
                assert args.output.parent == tmp_path
                seen.add(command[2])
    assert seen == set(parsers)


def test_a_python_without_torch_is_told_what_to_install():
    without = "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['gpu_stages']; "
    command = without + "runpy.run_module('benchmarks.systems.gpu_stages', run_name='__main__')"
    found = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 2
    assert found.stdout == ""
    assert found.stderr.count("\n") == 1
    assert f"{sys.executable} cannot import torch" in found.stderr
    assert "pip install" in found.stderr
    assert "make gpu PYTHON=" in found.stderr


def test_repeats_that_differ_are_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_checks.Call, "run", lambda self, device: [torch.ones(3)])
    arguments = ["repeats", "--output", str(tmp_path / "repeats.csv")]
    assert gpu_checks.main(arguments) == 0
    monkeypatch.setattr(gpu_checks.Call, "run", lambda self, device: [torch.rand(3)])
    assert gpu_checks.main(arguments) == 1
    assert "DIFFERENT" in capsys.readouterr().out


@pytest.mark.slow
def test_a_call_of_each_kind_under_the_interpreter():
    pytest.importorskip("triton", minversion="3.5")
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.systems.gpu_checks", "small"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.count("finite") == 8


def step(n: int, milliseconds: float | None, *, gpu="NVIDIA H100 80GB HBM3", **extra) -> Row:
    settings = {"D": 768, "dtype": "bfloat16", "scale": 100.0, "kl": True, "threads": None}
    head = ("contrastive", "fasterase-triton", "full", "speed", "ms", "N", "pairs", n)
    return Row(*head, *[milliseconds] * 3, {**settings, "labels": False, **extra}, gpu)


def test_the_model_is_held_against_measured_steps(tmp_path, monkeypatch, capsys):
    path = tmp_path / "contrastive_cuda.csv"
    rows = [step(32768, 30.0), step(1024, 0.5), step(2048, 1.0, kl=False)]
    rows += [step(32768, 99.0, dtype="float32"), step(4096, 99.0, labels=True), step(8192, None)]
    write_rows(path, rows)
    asked = []

    def predict(gpu, n, width, has_ref):
        asked.append((gpu.name, n, width, has_ref))
        return n / 1024

    found = compare(path, predict)
    assert [(row["n"], row["kl"]) for row in found] == [(2048, False), (1024, True), (32768, True)]
    assert ("H100 SXM", 32768, 768, True) in asked
    assert found[-1]["ratio"] == pytest.approx(30 / 32)
    assert found[-1]["of_peak"] == pytest.approx(12 * 32768**2 * 768 / 0.03 / 989e12, rel=0.01)
    assert "N >= 8,192: 0.94 times as long" in summarise(found)

    monkeypatch.setattr(gpu_model, "predict_step", predict)
    gpu_model.main(["--against", str(path)])
    assert path.with_name("contrastive_cuda_model.csv").read_text().count("\n") == 4
    assert "32,768" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], "has no times"), ([step(1024, 1.0, gpu="NVIDIA L4")], "knows H100 and A100; .* L4")],
)
def test_measurements_that_the_model_cannot_use(tmp_path, rows, message):
    path = tmp_path / "contrastive_cuda.csv"
    write_rows(path, rows)
    with pytest.raises(InputError, match=message):
        gpu_model.main(["--against", str(path)])
