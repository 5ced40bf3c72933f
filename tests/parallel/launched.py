"""Launches processes as users do, and compares what `tests.parallel.job` leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from fasterase.parallel.ranks import is_running
from tests.parallel.job import STEPS as CASE_STEPS
from tests.parallel.job import make_model

# More than a test waits for: it stops the command before.
STEPS = 400
ROOT = Path(__file__).parents[2]


def torchrun(*arguments: str, ranks: int = 2) -> list[str]:
    """Return the command that starts `ranks` processes of a module."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc-per-node", str(ranks), "-m", *arguments]


def start(command: list[str]) -> subprocess.Popen[str]:
    """Start a command in a session of its own: one thread each, and no GPU for DeepSpeed."""
    variables = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    where = {"cwd": ROOT, "env": os.environ | variables, "start_new_session": True}
    return subprocess.Popen(command, **where, **streams)


def finish(job: subprocess.Popen[str], timeout: float = 400) -> str:
    """Return the output of a command once it has ended; end it if it takes longer."""
    try:
        return job.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        raise


def ranks_of(job: subprocess.Popen[str]) -> list[int]:
    """Return the processes of the ranks, in their order."""
    children = psutil.Process(job.pid).children()
    found = {int(each.environ()["RANK"]): each.pid for each in children if "RANK" in each.environ()}
    return [found[rank] for rank in sorted(found)]


def family(job: subprocess.Popen[str]) -> list[int]:
    """Return the processes of a job: a launcher, ranks and their workers."""
    process = psutil.Process(job.pid)
    return [job.pid, *(each.pid for each in process.children(recursive=True))]


def assert_end(pids: list[int], seconds: float) -> None:
    """Check that processes end in time, whether or not their parent has collected them."""
    until = time.monotonic() + seconds
    while (alive := list(filter(is_running, pids))) and time.monotonic() < until:
        time.sleep(0.05)
    for each in alive:
        os.kill(each, signal.SIGKILL)
    assert not alive


def status(output: Path) -> int:
    return json.loads((output / "status.json").read_text())["exit_code"]


def await_steps(job: subprocess.Popen[str], output: Path, count: int) -> None:
    """Wait until the job has taken `count` steps."""
    until = time.monotonic() + 120
    while steps_taken(output) < count:
        assert job.poll() is None, job.communicate()[0][-4000:]
        assert time.monotonic() < until
        time.sleep(0.02)


def steps_taken(output: Path) -> int:
    history = output / "history.jsonl"
    return len(history.read_text().splitlines()) if history.is_file() else 0


def run(command: list[str], timeout: float = 400) -> None:
    job = start(command)
    said = finish(job, timeout)
    assert job.returncode == 0, said[-8000:]


def run_cases(cases: list[str], folder: Path, *, ranks: int = 2, timeout: float = 400) -> None:
    """Run cases of `tests.parallel.job` on `ranks` processes."""
    run(torchrun("tests.parallel.job", ",".join(cases), str(folder), ranks=ranks), timeout)


def outcome(folder: Path, case: str, *, rank: int = 0) -> dict[str, Any]:
    return torch.load(folder / f"{case}-{rank}.pt", weights_only=False)


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model" / "open_clip_model.safetensors")


def unlearn_command(inputs: Path, output: Path, **fields: Any) -> list[str]:
    """Return module and arguments of an erasure of the model and pairs in `inputs`."""
    settings = {
        "model": inputs / "model",
        "forget": inputs / "forget.csv",
        "retain": inputs / "retain.csv",
        "output_dir": output,
        "lr": 1e-3,
        "max_steps": STEPS,
        "batch_size": 8,
        "forget_batch_size": 4,
        "save_every": 5,
        "evaluation": "null",
        **fields,
    }
    return ["fasterase", "unlearn", *(f"--{name}={value}" for name, value in settings.items())]


TERMS = ("total", "forget", "retain", "consistency", "anchor")


def assert_equal_in_fp64(found: dict[str, Any], exact: dict[str, Any]) -> None:
    """Check a run in fp64: the order of sums shows from the 13th digit of the weights on."""
    for mine, theirs in zip(exact["history"], found["history"], strict=True):
        for term in (*TERMS, "grad_norm"):
            assert theirs[term] == pytest.approx(mine[term], rel=1e-9, abs=1e-9), term
    for name, weight in exact["weights"].items():
        assert float((found["weights"][name] - weight).abs().max()) <= 1e-10, name


def assert_near_in_fp32(found: dict[str, Any], exact: dict[str, Any]) -> None:
    """Check a run in fp32, which may be ten times as far off as one process is by rounding alone.

    That was measured with micro-batches of 1 to 21 pairs, with AVX2 and without. Of a tensor the
    norm counts: where Adam divides one small gradient by another, single weights move by chance.
    """
    for mine, theirs in zip(exact["history"], found["history"], strict=True):
        for term in TERMS:
            assert theirs[term] == pytest.approx(mine[term], abs=3e-5 * mine["total"]), term
        assert theirs["grad_norm"] == pytest.approx(mine["grad_norm"], rel=1e-4)
    start = make_model().state_dict()
    for name, weight in exact["weights"].items():
        apart = found["weights"][name] - weight
        if name.endswith("in_proj_bias"):
            # A key's bias shifts all of a query's scores alike: its gradient is rounding, which
            # Adam scales up.
            apart.chunk(3)[1].zero_()
        moved = weight - start[name]
        rounded = CASE_STEPS * torch.finfo(torch.float32).eps * weight  # once a step
        assert float(apart.norm()) <= float(0.01 * moved.norm() + rounded.norm()), name
