"""DeepSpeed's JSON: completed from the run's settings, contradictions refused."""

from __future__ import annotations

import json

import pytest

from fasterase.config import UnlearnConfig
from fasterase.errors import InputError
from fasterase.parallel.zero import complete, read_deepspeed, zero_stage

RUN = UnlearnConfig(batch_size=12, forget_batch_size=4, lr=1e-4, max_steps=3)


def completed(given, *, precision="fp32", run=RUN):
    return complete(run.replace(deepspeed=given), precision=precision, world_size=2)


@pytest.mark.parametrize(
    ("name", "stage"), [("zero1", 1), ("zero2.json", 2), ("zero3", 3), ("zero3_offload.json", 3)]
)
def test_shipped_configurations(name, stage):
    config = completed(name)
    assert zero_stage(config) == stage
    assert config["gradient_clipping"] == RUN.max_grad_norm
    assert not config["torch_autocast"]["enabled"]
    with pytest.raises(InputError, match="precision='fp16' does not go with deepspeed"):
        completed(name, precision="fp16")


def test_a_file_comes_before_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "zero1.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    assert zero_stage(read_deepspeed("zero1.json")) == 2
    for text in ("{", "[1]"):
        file.write_text(text)
        with pytest.raises(InputError, match=r"zero1\.json"):
            read_deepspeed(str(file))


def test_auto_and_absent_values_come_from_the_run():
    config = completed(
        {
            "train_batch_size": "auto",
            "gradient_clipping": "auto",
            "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.98]}},
            "zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"},
            "wall_clock_breakdown": True,
        },
        precision="bf16",
    )
    assert config["torch_autocast"]["enabled"]
    assert config["zero_optimization"] == {"stage": 1}
    assert "optimizer" not in config  # the run hands its own
    assert config["wall_clock_breakdown"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"train_batch_size": 64}, "train_batch_size is 64, but batch_size .* is 16"),
        ({"train_micro_batch_size_per_gpu": 3}, "is 3, but micro_batch_size is 8"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is 2, but .* is 1"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, but max_grad_norm is 1.0"),
        ({"optimizer": {"params": {"lr": 0.1}}}, r"optimizer.params.lr is 0.1, but lr is 0.0001"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type is 'lamb', but optimizer is 'adamw'"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler"),
        ({"bf16": {"enabled": True}}, "bf16.enabled would add up gradients"),
        ({"torch_autocast": {"enabled": True}}, "but bf16 by precision='fp32' is False"),
        ({"zero_optimization": 3}, "zero_optimization must be an object"),
        ({"zero_optimization": {"stage": 5}}, "stage is 5"),
    ],
)
def test_contradictions_name_both_values(given, said):
    with pytest.raises(InputError, match=f"deepspeed: .*{said}"):
        completed(given)
