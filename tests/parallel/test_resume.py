"""Checkpoints of several processes, read by another number of them or another engine."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fasterase.engine.optim import Trained
from fasterase.models.load import load_model
from tests.parallel.job import STAGES, make_big_model, make_model, run_case
from tests.parallel.launched import assert_near_in_fp32, outcome, run_cases
from tests.tiny_model import same_weights

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.filterwarnings("ignore:verdict")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave after three steps, with every engine."""
    folder = tmp_path_factory.mktemp("saved")
    names = itertools.product(("save", "save8", "whole8"), STAGES)
    run_cases(["save", *(f"{name}-zero{stage}" for name, stage in names)], folder, timeout=1800)
    return folder


def resumed(saved: Path, tmp_path: Path, case: str, *, ranks: int) -> dict[str, Any]:
    """Return the outcome of a case that goes on from a copy of what was saved."""
    shutil.copytree(saved, tmp_path / "copy")
    run_cases([case], tmp_path / "copy", ranks=ranks)
    return outcome(tmp_path / "copy", case)


def assert_near_one_process(found: dict[str, Any]) -> None:
    assert [record["step"] for record in found["history"]] == [1, 2, 3, 4, 5]
    assert_near_in_fp32(found, run_case("adam-cached"))


@pytest.mark.scale
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("case", ["resume", *(f"resume-zero{stage}" for stage in STAGES)])
def test_any_number_of_processes_goes_on(saved, tmp_path, case, ranks):
    assert_near_one_process(resumed(saved, tmp_path, case, ranks=ranks))


@pytest.mark.scale
def test_a_checkpoint_of_zero_goes_on_without_it(saved, tmp_path):
    shutil.copytree(saved / "states3", tmp_path / "states")
    assert_near_one_process(run_case("resume", tmp_path))


@pytest.mark.scale
@pytest.mark.parametrize("stage", STAGES)
def test_states_are_quantised_under_each_stage(saved, stage):
    model = load_model(make_model())
    trained = Trained.choose(model, "all", logit_scale=False)
    sizes = {name: value.numel() for name, value in trained.parameters(model.module).items()}
    in_8_bits = sum(sizes[name] for name in trained.quantisable)
    counts = Counter[torch.dtype]()
    for path in (saved / f"eight{stage}").rglob("*.safetensors"):
        for name, value in load_file(path).items():
            if name.startswith("state1 of shard "):
                counts[value.dtype] += value.numel()
    assert set(counts) == {torch.uint8, torch.float32}
    padding = 2 * 2 * len(sizes)  # so that two ranks divide what they share
    assert 0 <= counts[torch.uint8] - in_8_bits <= padding
    assert 0 <= counts[torch.float32] - (sum(sizes.values()) - in_8_bits) <= padding


@pytest.mark.scale
@pytest.mark.parametrize("stage", STAGES)
def test_quantised_states_go_on_bit_for_bit(saved, tmp_path, stage):
    whole = outcome(saved, f"whole8-zero{stage}")
    found = resumed(saved, tmp_path, f"resume8-zero{stage}", ranks=2)
    assert found["history"][-1]["total"] == whole["history"][-1]["total"]
    assert same_weights(found["weights"], whole["weights"])


@pytest.mark.scale
def test_a_model_as_deep_as_bigg_with_everything_on(tmp_path):
    """ZeRO-3, paged 8-bit states, GradCache, activation checkpointing, checkpoint and resume."""
    cases = [f"big-{name}-zero3" for name in ("whole", "save", "resume")]
    run_cases(cases, tmp_path, timeout=1800)
    whole, _, found = (outcome(tmp_path, case) for case in cases)
    assert [record["step"] for record in found["history"]] == [1, 2, 3]
    assert all(record["applied"] for record in found["history"])
    start = make_big_model().state_dict()
    # Sums of so deep a model may round differently from one process to the next.
    for mine, theirs in zip(whole["history"], found["history"], strict=True):
        assert theirs["total"] == pytest.approx(mine["total"], rel=1e-3)
    apart = sum(float((found["weights"][k] - v).abs().sum()) for k, v in whole["weights"].items())
    moved = sum(float((v - start[k]).abs().sum()) for k, v in whole["weights"].items())
    assert apart < 0.05 * moved
    blocks = {name.partition(".mlp")[0] for name in start if ".mlp" in name}
    assert len(blocks) == 48 + 32


@pytest.mark.scale
def test_quantised_states_of_another_layout_are_refused(saved, tmp_path):
    found = resumed(saved, tmp_path, "resume8-zero1", ranks=1)
    assert "shards of ZeRO stage 1, number of ranks 2" in found["error"]
    assert "resume='never'" in found["error"]


AGAIN = """
import sys
import warnings
from unittest.mock import patch

import torch

import fasterase
from fasterase.engine.pacing import AutomaticPacing
from tests.tiny_concepts import AUTOMATIC, FORGET, RETAIN, knowing_model

warnings.simplefilter("ignore")
options = {**AUTOMATIC, "deepspeed": f"zero{sys.argv[2]}", "output_dir": sys.argv[1]}
# The best weights are those of the start, not those of the last step.
with patch.object(AutomaticPacing, "_consider", lambda self, found, faded: None):
    found = [fasterase.unlearn(knowing_model(), FORGET, RETAIN, **options) for _ in range(2)]
one, two = (result.encoder.module.state_dict() for result in found)
assert [len(result.history) for result in found] == [len(found[0].history)] * 2
assert all(torch.equal(one[name], two[name]) for name in one)
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["1", "3"])
def test_a_finished_run_made_again_in_the_same_process_has_the_same_weights(tmp_path, stage):
    command = [sys.executable, "-c", AGAIN, str(tmp_path / "run"), stage]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
