"""The commands of the documentation, on two processes and on one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.parallel.launched import run, torchrun, unlearn_command, weights

pytestmark = pytest.mark.slow

pytest.importorskip("deepspeed")

SHORT = {"max_steps": 5, "micro_batch_size": 3, "weight_decay": 0.0}


@pytest.fixture(scope="module")
def alone(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights that one process comes to."""
    output = tmp_path_factory.mktemp("alone")
    run([sys.executable, "-m", *unlearn_command(inputs, output, **SHORT)])
    return weights(output)


@pytest.mark.scale
@pytest.mark.parametrize("stage", [None, "zero1", "zero3"])
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_launched_command_equals_one_process(inputs, tmp_path, alone, launcher, stage):
    more = {} if stage is None else {"deepspeed": f"{stage}.json"}
    command = unlearn_command(inputs, tmp_path / "run", **SHORT, **more)
    deepspeed = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus=2", "--module"]
    run(torchrun(*command) if launcher == "torchrun" else [*deepspeed, *command])
    original = weights(inputs)
    moved = max(float((weight - original[name]).abs().max()) for name, weight in alone.items())
    assert moved > 1e-3
    found = weights(tmp_path / "run")
    apart = torch.cat([(found[name] - weight).abs().flatten() for name, weight in alone.items()])
    # Adam scales up gradients that are rounding, as those of a key's bias.
    assert float((apart > 0.01 * moved).float().mean()) < 0.005
