"""Processes of a run killed at random, in any of its phases: it ends in the same bits."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from tests.parallel.launched import (
    assert_end,
    family,
    finish,
    start,
    steps_taken,
    torchrun,
    unlearn_command,
    weights,
)
from tests.tiny_model import same_weights

KILLS = 10
SEED = 0
STEPS = 150
# Of the launcher's patience with a rank that does not end, and of importing torch.
MOST_SECONDS = 180.0


@pytest.mark.scale
def test_ten_random_kills_end_in_the_same_bits(inputs, shards, tmp_path):
    """Launcher, ranks, workers that index tars or load pairs: whichever is there."""
    numbers = random.Random(SEED)

    def launch(output):
        fields = {"max_steps": STEPS, "save_every": 10, "evaluation": "quick", "num_workers": 1}
        _, *arguments = unlearn_command(inputs, output, **fields, **shards)
        return start(torchrun("tests.parallel.stalled", "nowhere", "-", *arguments))

    def clear_index():
        for index in inputs.rglob("*.arrow"):
            index.unlink()

    began, whole = time.monotonic(), tmp_path / "whole"
    job = launch(whole)
    said = finish(job, MOST_SECONDS)
    assert job.returncode in (0, 4), said
    seconds, runs, kills = time.monotonic() - began, 0, 0
    killed: list[str] = []
    while True:
        output = tmp_path / f"run-{runs}"
        job = launch(output)
        everyone: list[int] = []
        if kills < KILLS:
            time.sleep(numbers.uniform(0.1, 1.0) * seconds)
            everyone = family(job) if job.poll() is None else []
        if everyone:
            victim = numbers.choice(sorted(everyone))
            killed.append(
                f"{everyone.index(victim)} of {len(everyone)}, step {steps_taken(output)}"
            )
            os.kill(victim, signal.SIGKILL)
            kills += 1
        said = finish(job, MOST_SECONDS)
        assert_end(everyone, 5.0)
        if job.returncode == 0:
            assert steps_taken(output) == STEPS, killed
            assert same_weights(weights(whole), weights(output)), killed
            runs += 1
            clear_index()
            if kills == KILLS:
                break
    print(f"{kills} kills in {runs} runs: {'; '.join(killed)}")
