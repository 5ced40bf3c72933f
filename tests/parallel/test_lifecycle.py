"""Every phase of a run answers signals, and nothing of it outlives its parent."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.parallel.launched import (
    assert_end,
    await_steps,
    family,
    finish,
    ranks_of,
    run,
    start,
    status,
    torchrun,
    unlearn_command,
)

pytestmark = pytest.mark.slow

ANSWER_SECONDS = 10.0


def stalled(inputs: Path, output: Path, place: str, *, ranks: int = 1, **fields: object) -> list:
    """Return the command of a run that hangs at a place of `tests.parallel.stalled`."""
    _, *arguments = unlearn_command(inputs, output, **fields)
    given = ["tests.parallel.stalled", place, str(output.with_name("at")), *arguments]
    return torchrun(*given, ranks=ranks) if ranks > 1 else [sys.executable, "-m", *given]


def await_mark(job: subprocess.Popen[str], output: Path, *, rank: int = 0) -> None:
    """Wait until a rank hangs."""
    until = time.monotonic() + 120
    while not output.with_name(f"at-{rank}").exists():
        assert job.poll() is None, job.communicate()[0][-4000:]
        assert time.monotonic() < until
        time.sleep(0.02)
    time.sleep(0.3)


@pytest.mark.parametrize(
    ("place", "workers"),
    [
        pytest.param("opening", 0, marks=pytest.mark.scale),
        ("indexing", 0),
        pytest.param("encoding", 0, marks=pytest.mark.scale),
        pytest.param("loading", 1, marks=pytest.mark.scale),
        pytest.param("loading", 0, marks=pytest.mark.scale),
        ("loading a step", 2),
        pytest.param("a library", 0, marks=pytest.mark.scale),
        ("measuring", 0),
        ("saving", 0),
    ],
)
def test_sigterm_in_any_phase_of_a_process(inputs, shards, tmp_path, place, workers):
    output = tmp_path / "run"
    fields = {"max_steps": 12, "evaluation": "quick", "num_workers": workers}
    fields |= shards if place == "indexing" else {}
    job = start(stalled(inputs, output, place, **fields))
    await_mark(job, output)
    everyone, told = family(job), time.monotonic()
    os.kill(job.pid, signal.SIGTERM)
    said = finish(job, 60)
    assert time.monotonic() - told < ANSWER_SECONDS
    assert job.returncode == 75, said
    assert status(output) == 75
    assert said.count("stopped by SIGTERM") == 1
    assert "Traceback" not in said
    assert_end(everyone, 1.0)
    if place == "loading a step":
        assert list((output / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("place", "stalls", "told"),
    [
        pytest.param("opening", 1, 1, marks=pytest.mark.scale),
        pytest.param("encoding", 1, 0, marks=pytest.mark.scale),
        ("loading a step", 1, 0),
        pytest.param("a library", 1, None, marks=pytest.mark.scale),
        pytest.param("measuring", 0, None, marks=pytest.mark.scale),
        pytest.param("saving", 0, 1, marks=pytest.mark.scale),
    ],
)
def test_sigterm_in_any_phase_of_two_ranks(inputs, tmp_path, monkeypatch, place, stalls, told):
    """One rank hangs and the other waits for it; one of them is told, or the launcher (None)."""
    output = tmp_path / "run"
    monkeypatch.setenv("STALLED_RANK", str(stalls))
    job = start(stalled(inputs, output, place, ranks=2, max_steps=12, evaluation="quick"))
    await_mark(job, output, rank=stalls)
    ranks = ranks_of(job)
    os.kill(job.pid if told is None else ranks[told], signal.SIGTERM)
    try:
        assert_end(ranks, ANSWER_SECONDS)
    finally:
        said = finish(job, 60)
        print(said)
    assert status(output) == 75
    if place == "loading a step":
        assert list((output / "checkpoints").glob("step-*"))


def test_a_second_sigterm_does_not_wait_for_the_step(inputs, tmp_path):
    output = tmp_path / "run"
    job = start(stalled(inputs, output, "a step", max_steps=12))
    await_mark(job, output)
    os.kill(job.pid, signal.SIGTERM)
    time.sleep(1.5)
    assert job.poll() is None, "a step is finished"
    os.kill(job.pid, signal.SIGTERM)
    said = finish(job, 5)
    assert job.returncode == 75, said
    assert status(output) == 75


@pytest.mark.parametrize(
    ("place", "ranks"),
    [
        pytest.param("indexing", 1, marks=pytest.mark.scale),
        pytest.param("loading", 1, marks=pytest.mark.scale),
        ("loading", 2),
        pytest.param("a library", 2, marks=pytest.mark.scale),
    ],
)
def test_nothing_outlives_a_killed_parent(inputs, shards, tmp_path, place, ranks):
    """Neither workers a process of its own, nor ranks their launcher."""
    output = tmp_path / "run"
    fields = {"num_workers": 2 if place == "loading" else 0, "max_steps": 12}
    fields |= shards if place == "indexing" else {}
    job = start(stalled(inputs, output, place, ranks=ranks, **fields))
    await_mark(job, output, rank=ranks - 1)
    everyone = family(job)
    assert len(everyone) >= 3
    job.kill()
    assert_end(everyone, 5.0)
    finish(job, 5)  # nobody holds its output open


def stop_a_rank(inputs: Path, output: Path, rank: int, **fields: object) -> tuple[str, float]:
    """Return what a job says of a rank that is stopped, and the seconds until it does."""
    job = start(torchrun(*unlearn_command(inputs, output, **fields)))
    await_steps(job, output, 2)
    stopped = ranks_of(job)[rank]
    os.kill(stopped, signal.SIGSTOP)
    at, said = time.monotonic(), ""
    assert job.stdout is not None
    for line in job.stdout:
        said += line
        if "no sign of life" in line:
            break
    taken = time.monotonic() - at
    os.kill(stopped, signal.SIGKILL)
    finish(job, 60)
    assert f"rank {rank} (process {stopped}" in said, said
    return said, taken


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.scale)])
def test_a_stopped_rank_is_named(inputs, tmp_path, rank):
    said, taken = stop_a_rank(inputs, tmp_path / "run", rank, rank_timeout=3)
    assert "gave no sign of life for 3 s" in said
    assert taken < 10
    if rank == 1:
        assert status(tmp_path / "run") == 1


@pytest.mark.scale
def test_a_stopped_rank_is_named_within_90_seconds_by_default(inputs, tmp_path):
    said, taken = stop_a_rank(inputs, tmp_path / "run", 1)
    assert "gave no sign of life for 60 s" in said
    assert 55 < taken < 90


def test_calls_in_a_process_group_of_the_caller_leave_nothing(tmp_path):
    run(torchrun("tests.parallel.leaks"), 120)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a small /dev/shm of its own")
def test_small_shared_memory_and_a_read_only_folder(inputs, tmp_path):
    """Also of less than Docker gives a container."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("this machine gives no process a /dev/shm of its own")
    output, folder = tmp_path / "run", tmp_path / "read-only"
    folder.mkdir()
    command = [sys.executable, "-m", *unlearn_command(inputs, output, max_steps=3, num_workers=2)]
    mount = "mount -t tmpfs -o size={} tmpfs /dev/shm && exec {}"
    for size, warned in (("20k", True), ("64m", False)):
        job = start(["unshare", "--mount", "sh", "-c", mount.format(size, " ".join(command))])
        said = finish(job, 120)
        assert job.returncode in (0, 4), said
        assert ("num_workers=2: /dev/shm has" in said) == warned, said
        shutil.rmtree(output)
    ro = (
        f"mount -t tmpfs -o ro tmpfs {folder} && exec {' '.join(command)} --output_dir={folder}/run"
    )
    job = start(["unshare", "--mount", "sh", "-c", ro])
    said = finish(job, 120)
    assert job.returncode == 2
    assert said.splitlines() == [
        f"fasterase: error: output_dir: {folder} cannot be written to (Read-only file system). "
        "Give another path."
    ]
