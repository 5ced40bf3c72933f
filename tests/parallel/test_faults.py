"""Signals, killed ranks and relaunches, on real processes started as users start them."""

from __future__ import annotations

import os
import signal

import pytest

from tests.parallel.launched import (
    STEPS,
    await_steps,
    finish,
    ranks_of,
    run,
    start,
    status,
    steps_taken,
    torchrun,
    unlearn_command,
    weights,
)
from tests.tiny_model import same_weights

pytestmark = pytest.mark.slow

PROMPT_SECONDS = 60.0


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        pytest.param("SIGTERM", 1, marks=pytest.mark.scale),
        pytest.param("SIGTERM", None, id="SIGTERM to the launcher"),
        pytest.param("SIGUSR1", 0, marks=pytest.mark.scale),
    ],
)
def test_a_signal_saves_on_all(inputs, tmp_path, name, rank):
    output = tmp_path / "run"
    job = start(torchrun(*unlearn_command(inputs, output)))
    await_steps(job, output, 3)
    os.kill(job.pid if rank is None else ranks_of(job)[rank], getattr(signal, name))
    said = finish(job, PROMPT_SECONDS)
    assert status(output) == 75, said
    assert steps_taken(output) < STEPS
    newest = max((output / "checkpoints").iterdir())
    assert newest.name == f"step-{steps_taken(output):09d}"
    assert len(list(newest.glob("shard-*-of-00002.safetensors"))) == 2
    assert f"stopped by {name}" in said or rank is None


def test_a_killed_rank_is_named_and_the_relaunch_ends_as_if_nothing_had_happened(inputs, tmp_path):
    output, whole = tmp_path / "run", tmp_path / "whole"
    short = {"max_steps": 30}
    job = start(torchrun(*unlearn_command(inputs, output, **short)))
    await_steps(job, output, 7)
    victim = ranks_of(job)[1]
    os.kill(victim, signal.SIGKILL)
    said = finish(job, PROMPT_SECONDS)
    assert f"rank 1 (process {victim}" in said
    assert job.returncode == 1
    assert status(output) == 1
    for folder in (output, whole):
        run(torchrun(*unlearn_command(inputs, folder, **short)))
    assert steps_taken(output) == 30
    assert same_weights(weights(whole), weights(output))


@pytest.mark.scale
def test_wrong_input_ends_all_ranks_with_one_message(inputs, tmp_path):
    output = tmp_path / "run"
    job = start(torchrun(*unlearn_command(inputs, output, tune="last:9")))
    said = finish(job, PROMPT_SECONDS)
    assert status(output) == 2
    assert said.count("fasterase: error:") == 1
    assert "last:9" in said
