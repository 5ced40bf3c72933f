"""`make gpu`: its stages skip, end in time, resume and fail as they say."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.loss.case import Case, exact_losses, in_fp64, make_inputs, tiled_losses
from benchmarks.loss.gpu_model import __main__ as gpu_model
from benchmarks.loss.gpu_model.__main__ import compare, summarise
from benchmarks.loss.rows import Row, write_rows
from benchmarks.result_files import read_csv
from benchmarks.systems import gpu_checks, gpu_erasures, gpu_stages
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
            else Stage(name, 60, lambda _, c=each: [sys.executable, "-c", c], needs_gpu=False)
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
    _, output = run({"one": count, "two": "", "three": ""}, "--stage", "three", "one")
    assert output.splitlines()[-2:] == ["three        done", "one          done"]
    assert (tmp_path / "count").read_text() == "xxx"


def test_only_a_stage_that_was_done_is_measured_again_from_the_start(run):
    given = []

    def command(context):
        given.append(context.is_fresh)
        return [sys.executable, "-c", f"raise SystemExit({len(given) == 1})"]

    for _ in range(3):
        run({"one": Stage("", 60, command, needs_gpu=False)}, "--stage", "one")
    assert given == [False, False, True]


def test_a_failed_stage_does_not_stop_the_others_and_waits_to_be_named(run, tmp_path):
    fail = f"open({str(tmp_path / 'count')!r}, 'a').write('x'); raise SystemExit(3)"
    stages = {"bad": fail, "good": "print('fine')"}
    code, output = run(stages)
    assert code == 1
    assert "fine" in output
    assert output.splitlines()[-2:] == ["bad          failed", "good         done"]
    code, output = run(stages)
    assert code == 1
    assert "failed before; name the stage" in output
    assert (tmp_path / "count").read_text() == "x"
    assert run(stages, "--stage", "bad")[0] == 1
    assert (tmp_path / "count").read_text() == "xx"


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_a_stage_ends_with_the_command_and_counts_as_unfinished(error, run, tmp_path, monkeypatch):
    began = tmp_path / "began"
    code = f"import os, time; open({str(began)!r}, 'w').write(str(os.getpid())); time.sleep(60)"

    def sleep(seconds: float) -> None:
        time.sleep(seconds)
        if began.is_file() and began.read_text():
            if error is KeyboardInterrupt:
                raise error
            os.kill(os.getpid(), signal.SIGTERM)

    clock = SimpleNamespace(monotonic=time.monotonic, sleep=sleep)
    monkeypatch.setattr(gpu_stages, "time", clock)
    leftover = tmp_path / ".gpu_checks.csv.abc.partial"
    leftover.mkdir()
    with pytest.raises(error):
        run({"slow": code})
    with pytest.raises(ProcessLookupError):
        os.kill(int(began.read_text()), 0)
    notes = json.loads((tmp_path / "gpu_stages.json").read_text())
    assert notes["slow"]["state"] == "unfinished"
    assert not leftover.exists()


def test_no_stage_starts_in_the_last_seconds_of_the_total(run):
    stages = {"one": "print('here')", "two": ""}
    code, output = run(stages, "--total", "20")
    assert code == gpu_stages.UNFINISHED
    assert output.count("not started: ") == 2
    assert "here" not in output
    code, output = run(stages, "--total", "50")
    assert code == 0
    assert re.search(r" s of 4\d\.", output)
    assert run(stages, "--total", "0")[0] == 0


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


def test_tests_that_passed_before_the_time_ran_out_or_beside_others_are_left_out(run, tmp_path):
    """By pytest alone, or by a worker of xdist."""
    said = [
        "tests/ops/a.py::test_one[fp16-None] PASSED [ 10%]",
        "[gw1] [ 20%] PASSED tests/ops/a.py::test_two[a b] ",
        "tests/ops/a.py::test_three FAILED [ 30%]",
        "tests/ops/a.py::test_four ",
    ]
    given = []

    (tmp_path / "said").write_text("\n".join(said))

    def command(context):
        given.append(context.passed)
        return ["sh", "-c", f"cat '{tmp_path / 'said'}'; {end}"]

    end = "exec sleep 60"
    run({"tests": Stage("", 60, command, needs_gpu=False)}, "--seconds", "1")
    end = "exit 1"
    for _ in range(2):
        run({"tests": Stage("", 60, command, needs_gpu=False)}, "--stage", "tests")
    names = ("tests/ops/a.py::test_one[fp16-None]", "tests/ops/a.py::test_two[a b]")
    assert given == [(), names, 2 * names]
    command = STAGES["tests"].command(Context(tmp_path, tmp_path, passed=names))
    assert "no:benchmark" in command  # it warns beside xdist, and warnings are errors
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


def test_stages_fit_commands_of_ten_minutes(tmp_path):
    """40 minutes in all; eight files back, one of which a killed command may have left."""
    assert all(stage.seconds <= LONGEST_SECONDS for stage in STAGES.values())
    usual = {name: stage for name, stage in STAGES.items() if not stage.is_extra}
    assert sum(stage.seconds for stage in usual.values()) <= 40 * 60
    files = {"gpu_stages.json", "gpu_log.txt", "contrastive_cuda_model.csv"}
    for stage in usual.values():
        command = stage.command(Context(tmp_path, tmp_path / "work"))
        if isinstance(command, list):
            files |= {Path(word).name for word in command if word.startswith(f"{tmp_path}/")}
    assert len(files) == 7, files
    order = ["warm", "tests", "errors", "speed", "kernels", "tiles", "graphs", "erasures", "ranks"]
    assert [name for name in usual if name in order] == order
    assert list(usual)[-2:] == ["memcheck", "racecheck"]


def test_sanitizer_stages(tmp_path, monkeypatch):
    context = Context(tmp_path, tmp_path)
    monkeypatch.setattr(gpu_stages.shutil, "which", lambda name: None)
    assert "not on PATH" in STAGES["memcheck"].command(context)
    monkeypatch.setattr(gpu_stages.shutil, "which", lambda name: f"/cuda/{name}")
    program, *options = STAGES["racecheck"].command(context)
    assert program == "/cuda/compute-sanitizer"
    assert options[:4] == ["--tool", "racecheck", "--error-exitcode", "9"]


def test_commands_of_every_stage_are_accepted(tmp_path):
    """Nobody would notice a mistyped option before there is a GPU."""
    from benchmarks.loss import __main__ as sweep
    from benchmarks.systems import end_to_end

    parsers = {
        "benchmarks.loss": sweep._parser(),
        "benchmarks.systems.end_to_end": end_to_end._parser(),
    }
    seen = set()
    for stage in STAGES.values():
        command = stage.command(Context(tmp_path, tmp_path / "work", is_fresh=True))
        if isinstance(command, list) and command[2] in parsers:
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
        assert found.stdout.count("done before") == times_done * 11
    states = json.loads((results / "gpu_stages.json").read_text())
    assert {note["state"] for note in states.values()} == {"done"}
    skipped = {"model", "memcheck", "racecheck"}
    assert set(states) == {n for n, stage in STAGES.items() if not stage.is_extra} - skipped
    assert len(list(results.iterdir())) <= 8
    rows = read_csv(results / "contrastive_cuda.csv")
    assert {row["kernel_provider"] for row in rows} >= {"fasterase-triton", "torch-dense"}
    assert any(row["metric_name"] == "loss_error" and row["y_value_50"] for row in rows)
    checks = read_csv(results / "gpu_checks.csv")
    assert {row["check"] for row in checks} == {"repeats", "graphs", "kernels"}
    kernels = [row["kernel"] for row in checks if row["check"] == "kernels"]
    assert kernels[-1] == "host, to launch a step"
    erasures = read_csv(results / "gpu_erasures.csv")
    assert [row["kind"] for row in erasures] == ["plain", "plain", "nccl", "zero2"]
    assert float(erasures[0]["planned_mb"]) > 0


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


def test_a_tile_that_runs_as_another_or_computes_something_else_does_not_count(monkeypatch):
    pytest.importorskip("triton")
    from benchmarks.systems import gpu_tiles

    monkeypatch.setattr(gpu_tiles, "architecture", lambda: "sm_90")
    planned, *tiles = [tile for kernel, tile in gpu_tiles.candidates(False) if kernel == "sums"]
    wrong, nan, large, good = tiles[:4]
    used = [None]
    gradients = {wrong: 1.1, nan: torch.nan}

    def step():
        if used[-1] in (planned, large):
            place = ("triton_launch.py", 1, "fasterase.ops.contrastive.triton_launch")
            warnings.warn_explicit("runs slower with 2 stages.", UserWarning, *place)
        return (torch.full((3, 2), gradients.get(used[-1], 1.0)),)

    monkeypatch.setattr(gpu_tiles, "use", lambda kernel, tile: used.append(tile))
    monkeypatch.setattr(gpu_tiles, "make_step", lambda case, inputs: step)
    gpu_tiles.planned_gradient.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = {
            tile: gpu_tiles.measure(("sums", tile), [Case(8, 4)], 1)
            for tile in (planned, wrong, nan, large, good)
        }
    gpu_tiles.planned_gradient.cache_clear()
    assert "why" not in rows[planned]
    assert "8" in rows[good]
    assert "10.0% off" in rows[wrong]["why"]
    assert "nan% off" in rows[nan]["why"]
    assert "runs slower with 2 stages" in rows[large]["why"]


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
    assert gpu_checks.main(arguments) == 0  # they are known
    assert gpu_checks.main([*arguments, "--fresh"]) == 1
    assert "equal=False" in capsys.readouterr().out
    monkeypatch.setattr(gpu_checks.Call, "run", lambda self, device: [torch.ones(3)])
    assert gpu_checks.main(arguments) == 0  # what differed is no result to keep


def test_rows_are_kept_one_by_one_for_their_version(tmp_path, monkeypatch):
    path, asked = tmp_path / "checks.csv", []

    def profile(case, steps):
        asked.append(case.kl)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return [{"kernel": "a", "us": 1.0}, {"kernel": "host", "us": 2.0}]

    monkeypatch.setattr(gpu_checks, "profile_step", profile)
    monkeypatch.setattr(gpu_checks.torch.cuda, "is_available", lambda: False)
    with pytest.raises(KeyboardInterrupt):
        gpu_checks.main(["kernels", "--output", str(path)])
    for _ in range(2):
        gpu_checks.main(["kernels", "--output", str(path)])
    assert asked == [False, True, True]
    assert [row["kl"] for row in read_csv(path)] == ["False"] * 2 + ["True"] * 2
    monkeypatch.setattr("benchmarks.result_files.code_version", lambda: "another")
    gpu_checks.main(["kernels", "--output", str(path)])
    assert asked == [False, True, True, False, True]
    assert [row["version"] for row in read_csv(path)] == ["another"] * 4


def test_an_erasure_that_failed_is_run_again(tmp_path, monkeypatch):
    losses = iter([1.0, 2.0, 1.0, 1.0])
    monkeypatch.setattr(gpu_erasures, "call_in_process", lambda *_, **__: {"loss": next(losses)})
    monkeypatch.setattr(gpu_erasures.torch.cuda, "is_available", lambda: False)
    arguments = ["ranks", "--output", str(tmp_path / "erasures.csv")]
    assert gpu_erasures.main(arguments) == 1  # "nccl" ends elsewhere than "plain"
    (far,) = [row for row in read_csv(tmp_path / "erasures.csv") if row["why"]]
    assert (far["kind"], far["why"]) == ("nccl", "its last loss, 2, is not the plain run's, 1")
    assert gpu_erasures.main(arguments) == 0
    assert next(losses, None) is None


def test_kernels_are_compiled_once_and_products_are_those_that_are_named(monkeypatch):
    calls = list(gpu_checks.warm_calls("cuda"))
    assert len(calls) <= 32
    given = []

    def weighted(*_, products, **__):
        given.append(products)
        raise ZeroDivisionError

    monkeypatch.setattr(gpu_checks, "weighted_contrastive", weighted)
    for call in calls:
        if call.weighted:
            with pytest.raises(ZeroDivisionError):
                call._replace(num_pairs=4, dtype=torch.float32).run("cpu")
    assert set(given) == {"auto", "fp16"}


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
    assert isinstance(STAGES["model"].command(Context(tmp_path, tmp_path)), str)
    write_rows(path, [*rows, step(2048, 1.0)])
    assert "--against" in STAGES["model"].command(Context(tmp_path, tmp_path))
