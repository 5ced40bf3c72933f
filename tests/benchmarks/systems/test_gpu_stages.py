"""`make gpu`: its stages skip, end in time, resume and fail as they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.loss.case import Case, exact_losses, in_fp64, make_inputs, tiled_losses
from benchmarks.loss.gpu_model import __main__ as gpu_model
from benchmarks.loss.gpu_model.__main__ import compare, summarise
from benchmarks.loss.rows import Row, write_rows
from benchmarks.result_files import code_version, read_csv
from benchmarks.systems import gpu_checks, gpu_stages, gpu_wheels
from benchmarks.systems.gpu_stages import LONGEST_SECONDS, STAGES, Context, Stage
from fasterase.errors import InputError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the stages given as name -> Python code, or -> Stage; returns (exit code, output)."""

    def call(stages: dict, *arguments: str) -> tuple[int, str]:
        made = {
            name: each
            if isinstance(each, Stage)
            else Stage(name, 60, lambda _, c=each: [[sys.executable, "-c", c]], needs_gpu=False)
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
    assert "here" in (tmp_path / "gpu_log.txt").read_text()
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
    notes = json.loads((tmp_path / "gpu_stages.json").read_text())
    assert (notes["slow"]["state"], notes["slow"]["planned"]) == ("unfinished", 60)
    subprocess.run([sys.executable, "-c", "import time; time.sleep(3)"], check=True)
    assert not (tmp_path / "late").exists()


def test_tests_that_passed_before_the_time_ran_out_are_left_out(run, tmp_path):
    """By pytest alone, or by a worker of xdist."""
    said = [
        "tests/ops/a.py::test_one[fp16-None] PASSED [ 10%]",
        "[gw1] [ 20%] PASSED tests/ops/a.py::test_two[a b] ",
        "tests/ops/a.py::test_three FAILED [ 30%]",
        "tests/ops/a.py::test_four ",
    ]
    given = []

    (tmp_path / "said").write_text("\n".join(said))

    def commands(context):
        given.append(context.passed)
        return [["sh", "-c", f"cat '{tmp_path / 'said'}'; exec sleep 60"]]

    for _ in range(2):
        run({"tests": Stage("", 60, commands, needs_gpu=False)}, "--seconds", "1")
    names = ("tests/ops/a.py::test_one[fp16-None]", "tests/ops/a.py::test_two[a b]")
    assert given == [(), names]
    (command,) = STAGES["tests"].commands(Context(tmp_path, tmp_path, passed=names))
    assert command[-2:] == [f"--deselect={name}" for name in names]
    assert all((ROOT / word).is_file() for word in command if word.startswith("tests/"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_every_stage_says_what_it_lacks(run):
    code, output = run(dict(STAGES))
    usual = [name for name, stage in STAGES.items() if not stage.is_extra]
    assert code == 0
    assert output.count("skipped: it needs a CUDA GPU") == len(usual) - 1
    assert "skipped: no measurements" in output
    assert "no CUDA GPU" in output.splitlines()[0]


def test_the_stages_fit_the_hour(tmp_path):
    """Commands of ten minutes, 40 minutes in all, eight files back."""
    assert all(stage.seconds <= LONGEST_SECONDS for stage in STAGES.values())
    usual = {name: stage for name, stage in STAGES.items() if not stage.is_extra}
    assert sum(stage.seconds for stage in usual.values()) <= 40 * 60
    files = {"gpu_stages.json", "gpu_log.txt", "contrastive_cuda_model.csv"}
    for stage in usual.values():
        commands = stage.commands(Context(tmp_path, tmp_path / "work"))
        for command in commands if isinstance(commands, list) else []:
            files |= {Path(word).name for word in command if word.startswith(f"{tmp_path}/")}
    assert len(files) == 8, files
    order = ["warm", "tests", "errors", "speed", "kernels", "tiles", "graphs", "erasures", "ranks"]
    assert [name for name in usual if name in order] == order
    assert list(usual)[-2:] == ["memcheck", "racecheck"]


def test_sanitizer_stages(tmp_path, monkeypatch):
    context = Context(tmp_path, tmp_path)
    monkeypatch.setattr(gpu_stages.shutil, "which", lambda name: None)
    assert "not on PATH" in STAGES["memcheck"].commands(context)
    monkeypatch.setattr(gpu_stages.shutil, "which", lambda name: f"/cuda/{name}")
    ((program, *options),) = STAGES["racecheck"].commands(context)
    assert program == "/cuda/compute-sanitizer"
    assert options[:4] == ["--tool", "racecheck", "--error-exitcode", "9"]


def test_commands_of_every_stage_are_accepted(tmp_path):
    """Nobody would notice a mistyped option before there is a GPU."""
    from benchmarks.loss import sweep
    from benchmarks.systems import end_to_end

    parsers = {
        "benchmarks.loss": sweep._parser(),
        "benchmarks.systems.end_to_end": end_to_end._parser(),
    }
    seen = set()
    for stage in STAGES.values():
        commands = stage.commands(Context(tmp_path, tmp_path / "work"))
        for command in commands if isinstance(commands, list) else []:
            if command[2] in parsers:
                args = parsers[command[2]].parse_args(command[3:])
                assert args.output.parent == tmp_path
                seen.add(command[2])
    assert seen == set(parsers)


@pytest.mark.slow
def test_a_dry_run_of_every_stage(tmp_path):
    """And a second one, which finds all of it done."""
    pytest.importorskip("triton", minversion="3.5")
    results, work = tmp_path / "results", tmp_path / "work"
    module = [sys.executable, "-W", "ignore", "-m", "benchmarks.systems.gpu_stages", "--dry-run"]
    command = [*module, "--results", str(results), "--work", str(work), "--seconds", "900"]
    for times_done in (0, 1):
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert found.returncode == 0, found.stdout[-3000:] + found.stderr
        assert found.stdout.count("done before") == times_done * 13
    states = json.loads((results / "gpu_stages.json").read_text())
    assert {note["state"] for note in states.values()} == {"done"}
    assert set(states) == {name for name, stage in STAGES.items() if not stage.is_extra} - {"model"}
    assert len(list(results.iterdir())) <= 8
    rows = read_csv(results / "contrastive_cuda.csv")
    assert {row["kernel_provider"] for row in rows} >= {"fasterase-triton", "torch-dense"}
    assert any(row["metric_name"] == "loss_error" and row["y_value_50"] for row in rows)
    assert {row["check"] for row in read_csv(results / "gpu_checks.csv")} == {"repeats", "graphs"}
    erasures = read_csv(results / "gpu_erasures.csv")
    assert [row["kind"] for row in erasures] == ["plain", "plain", "nccl", "zero2"]
    assert float(erasures[0]["planned_mb"]) > 0
    assert read_csv(results / "gpu_kernels.csv")[-1]["kernel"] == "host, to launch a step"


def test_a_dry_run_leaves_the_committed_results_alone(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(gpu_stages, "run_stage", lambda _, c, **__: seen.append(c) or "done")
    gpu_stages.main(["--dry-run", "--stage", "small", "--work", str(tmp_path)])
    assert (seen[0].results, seen[0].is_dry) == (tmp_path / "dry", True)


def test_wheels_go_to_the_stages_alone(run, tmp_path, monkeypatch):
    """Not into the machine's own Python, which may not be ours to change."""
    wheels, packages = tmp_path / "wheels", tmp_path / "work/packages"
    wheels.mkdir()
    with pytest.raises(InputError, match=r"no \*\.whl in .* `make gpu-wheels` fetches them"):
        run({}, "--wheels", str(wheels))
    (wheels / "one-1-py3-none-any.whl").touch()
    ran = []
    monkeypatch.setattr(
        gpu_stages.subprocess, "run", lambda c, **_: ran.append(c) or SimpleNamespace(returncode=0)
    )
    monkeypatch.setattr(gpu_stages, "code_version", lambda: "1")
    show = "import os; print(os.environ['PYTHONPATH'].split(os.pathsep)[0])"
    _, output = run({"show": show}, "--wheels", str(wheels))
    assert {"--no-index", "--no-deps", "--target", str(packages)} <= set(ran[0])
    assert str(packages) in output.splitlines()


def test_the_load_of_a_lent_machine_has_a_limit(tmp_path, monkeypatch):
    (tmp_path / "small-1-py3-none-any.whl").write_bytes(b"x" * 1000)
    assert gpu_wheels.check_sizes(tmp_path, 30_000_000).startswith("1 wheel of 0.0 MB")
    monkeypatch.setattr(gpu_wheels, "LIMIT_BYTES", 30_000_500)
    with pytest.raises(InputError, match=r"more than 30 MB in all. The largest: small-1"):
        gpu_wheels.check_sizes(tmp_path, 30_000_000)
    assert gpu_wheels.project_bytes() < 40_000_000  # the rest is for wheels


def test_the_commit_of_a_copy_without_git(monkeypatch):
    monkeypatch.setattr("benchmarks.result_files.shutil.which", lambda name: None)
    monkeypatch.setenv("FASTERASE_COMMIT", "abc1234")
    code_version.cache_clear()
    assert code_version().endswith(" abc1234")
    code_version.cache_clear()


def row_of(kernel, tile, *times):
    return {"kernel": kernel, "tile": tile, **dict(zip(("8192", "32768"), times, strict=False))}


def test_only_a_tile_that_gains_replaces_the_planned_one(tmp_path):
    pytest.importorskip("triton")
    from benchmarks.systems import gpu_tiles
    from fasterase.ops.contrastive import triton_plan

    rows = [
        row_of("sums", [128, 128, 64, 8, 3], 1.0, 10.0),
        row_of("sums", [256, 128, 64, 8, 3], 0.9, 10.5),
        row_of("sums", [64, 64, 64, 8, 3]) | {"why": "out of resource"},
        row_of("strip", [128, 128, 64, 8, 3], 1.0, 10.0),
        row_of("strip", [128, 256, 64, 8, 3], 0.995, 9.95),
        row_of("strip_with_reference", [128, 128, 64, 8, 3]) | {"why": "out of resource"},
        row_of("strip_with_reference", [64, 64, 64, 8, 3], 1.0, 10.0),
    ]
    assert gpu_tiles.fastest(rows) == {"sums": [256, 128, 64, 8, 3]}
    path = tmp_path / "tiles.json"
    assert triton_plan.read_tiles(path) == {}
    path.write_text(json.dumps({"tiles": {"sm_90": gpu_tiles.fastest(rows)}}))
    assert triton_plan.read_tiles(path) == {
        "sm_90": {("sums", True): triton_plan.Tile(256, 128, 64, 8, 3)}
    }


@pytest.mark.parametrize("labels", [False, True])
def test_losses_by_tiles_are_those_of_whole_matrices(labels):
    inputs = in_fp64(make_inputs(Case(40, 12, kl=True, labels=labels)))
    tiled, whole = tiled_losses(inputs), exact_losses(inputs)
    for name in ("clip", "reference_entropy"):
        assert getattr(tiled, name).item() == pytest.approx(getattr(whole, name).item(), rel=1e-12)


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
