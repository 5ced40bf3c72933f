"""Signals, killed ranks and relaunches, on real processes started as users start them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fasterase.models import load_model
from tests.parallel.launched import ROOT, environment, torchrun
from tests.small_models import open_clip_vit, simple_tokenizer

STEPS = 400
PROMPT_SECONDS = 60.0


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and two tables of pictures, in a folder."""
    folder = tmp_path_factory.mktemp("inputs")
    load_model(open_clip_vit(), tokenizer=simple_tokenizer()).save(folder / "model")
    numbers = torch.Generator().manual_seed(0)
    for name, count in (("forget", 6), ("retain", 24)):
        lines = ["filepath,title"]
        for i in range(count):
            pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=numbers)
            Image.fromarray(pixels.numpy()).save(folder / f"{name}{i}.png")
            lines.append(f"{name}{i}.png,a {name} thing number {i % 10}")
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    return folder


def command(inputs: Path, output: Path, **fields: Any) -> list[str]:
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
    flags = [f"--{name}={value}" for name, value in settings.items()]
    return torchrun("fasterase", "unlearn", *flags)


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def await_steps(job: subprocess.Popen[str], output: Path, count: int) -> None:
    """Wait until the job has taken `count` steps."""
    until = time.monotonic() + 120
    history = output / "history.jsonl"
    while not history.is_file() or len(history.read_text().splitlines()) < count:
        assert job.poll() is None, job.communicate()[0][-4000:]
        assert time.monotonic() < until
        time.sleep(0.02)


def ranks_of(job: subprocess.Popen[str]) -> list[int]:
    """Return the processes of the ranks, in their order."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (entry / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue
        rank = [each for each in variables if each.startswith(b"RANK=")]
        if parent == job.pid and rank:
            found[int(rank[0][5:])] = int(entry.name)
    return [found[rank] for rank in sorted(found)]


def finish(job: subprocess.Popen[str]) -> str:
    try:
        return job.communicate(timeout=PROMPT_SECONDS)[0]
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        raise


def status(output: Path) -> int:
    return json.loads((output / "status.json").read_text())["exit_code"]


def saved_steps(output: Path) -> list[int]:
    return sorted(int(folder.name[5:]) for folder in (output / "checkpoints").iterdir())


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model" / "open_clip_model.safetensors")


def test_sigterm_to_one_rank_saves_on_all(inputs, tmp_path):
    output = tmp_path / "run"
    job = start(command(inputs, output))
    await_steps(job, output, 3)
    os.kill(ranks_of(job)[1], signal.SIGTERM)
    said = finish(job)
    assert status(output) == 75, said
    steps = len((output / "history.jsonl").read_text().splitlines())
    assert steps < STEPS
    assert saved_steps(output)[-1] == steps
    assert "stopped by SIGTERM" in said
    shards = (output / "checkpoints" / f"step-{steps:09d}").glob("shard-*-of-00002.safetensors")
    assert len(list(shards)) == 2


def test_a_killed_rank_is_named_and_the_relaunch_ends_as_if_nothing_had_happened(inputs, tmp_path):
    output, whole = tmp_path / "run", tmp_path / "whole"
    short = {"max_steps": 30}
    job = start(command(inputs, output, **short))
    await_steps(job, output, 7)
    victim = ranks_of(job)[1]
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    said = finish(job)
    assert time.monotonic() - killed < PROMPT_SECONDS
    assert f"rank 1 (process {victim}" in said
    assert job.returncode == 1
    assert status(output) == 1
    for folder in (output, whole):
        again = start(command(inputs, folder, **short))
        said = finish(again)
        assert again.returncode == 0, said
    assert len((output / "history.jsonl").read_text().splitlines()) == 30
    expected, found = weights(whole), weights(output)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@pytest.mark.scale
def test_sigterm_to_the_launcher_saves_on_all(inputs, tmp_path):
    output = tmp_path / "run"
    job = start(command(inputs, output))
    await_steps(job, output, 3)
    job.send_signal(signal.SIGTERM)
    said = finish(job)
    assert status(output) == 75, said
    assert saved_steps(output)[-1] == len((output / "history.jsonl").read_text().splitlines())


@pytest.mark.scale
@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no SIGUSR1 here")
def test_sigusr1_to_one_rank_saves_on_all(inputs, tmp_path):
    output = tmp_path / "run"
    job = start(command(inputs, output))
    await_steps(job, output, 3)
    os.kill(ranks_of(job)[0], signal.SIGUSR1)
    said = finish(job)
    assert status(output) == 75, said


@pytest.mark.scale
def test_wrong_input_ends_all_ranks_with_one_message(inputs, tmp_path):
    output = tmp_path / "run"
    job = start(command(inputs, output, tune="last:9"))
    said = finish(job)
    assert status(output) == 2
    assert said.count("fasterase: error:") == 1
    assert "last:9" in said
