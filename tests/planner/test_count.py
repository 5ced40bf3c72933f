"""What is counted: published FLOPs and parameters, live bytes, memory by part."""

from __future__ import annotations

import pytest
import torch

from fasterase.models.load import load_architecture
from fasterase.planner import count
from fasterase.planner.count import Counter, ParameterCounts, StepMemory, Tracer
from tests import small_models

# docs/model_profile.csv of open_clip: 10^6 parameters; 10^9 FLOPs of an image and of a text.
PUBLISHED = {
    "ViT-S-32": (63.09, 2.29, 3.38),
    "ViT-B-32": (151.28, 8.82, 5.96),
    "ViT-B-16": (149.62, 35.13, 5.96),
    "RN50": (102.01, 12.22, 5.96),
    "RN50x4": (178.3, 42.56, 9.27),
    "ViT-L-14": (427.62, 162.03, 13.3),
    "convnext_base": (151.52, 30.71, 5.96),
    "ViT-SO400M-14-SigLIP": (877.36, 220.35, 13.19),
    "ViT-H-14": (986.11, 334.59, 47.09),
    "ViT-bigG-14": (2539.57, 967.5, 97.86),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("ViT-S-32", "RN50") else pytest.mark.slow)
        for name in PUBLISHED
    ],
)
def test_parameters_and_flops_are_the_published_ones(name):
    parameters, image, text = PUBLISHED[name]
    model = load_architecture(name)
    counted = sum(each.numel() for each in model.module.parameters())
    assert counted == pytest.approx(1e6 * parameters, rel=0.001)
    tracer = Tracer(model, precision="fp32", on_gpu=False)
    assert tracer.forward("image").flops == pytest.approx(1e9 * image, rel=0.02)
    assert tracer.forward("text").flops == pytest.approx(1e9 * text, rel=0.02)


def test_live_bytes_are_those_of_the_graph():
    """Of one linear map: its input, its output and its gradient, counted by hand."""
    weight = torch.nn.Parameter(torch.zeros(10, 20))
    with Counter([weight]) as counter:
        rows = torch.zeros(5, 10)
        for _ in range(2):
            rows @ weight  # freed at once
    assert counter.peak_bytes == 4 * (5 * 10 + 5 * 20)
    assert counter.flops == 2 * (2 * 5 * 10 * 20)


@pytest.mark.parametrize("build", [small_models.hf_clip, small_models.hf_siglip])
def test_transformers_models_from_their_configuration(build):
    module = build()
    model = load_architecture(module.config)
    assert sum(p.numel() for p in model.module.parameters()) == sum(
        p.numel() for p in module.parameters()
    )
    tracer = Tracer(model, precision="fp32", on_gpu=False)
    both = tracer.backpropagate(2)
    forward = tracer.forward("image").flops + tracer.forward("text").flops
    # Back-propagating costs twice a forward pass, but for the image's own gradient.
    assert 2.5 < both.flops / 2 / forward < 3.2


@pytest.mark.slow
def test_activation_checkpointing_runs_the_blocks_again_in_less_memory():
    model = load_architecture(small_models.open_clip_vit(layers=6))
    tracer = Tracer(model, precision="bf16", on_gpu=True)
    forward = sum(tracer.forward(tower).flops for tower in ("image", "text"))
    whole, again = (
        tracer.backpropagate(256, with_gradients=True, checkpointing=flag) for flag in (False, True)
    )
    # All of a block but its last product, the MLP's, of which the backward pass needs no output.
    assert 0.6 < (again.flops - whole.flops) / (256 * forward) < 0.7
    assert again.peak_bytes < 0.7 * whole.peak_bytes


@pytest.mark.slow
def test_the_line_between_one_pair_and_the_share_lies_on_the_counted_memory_or_above():
    model = load_architecture(small_models.open_clip_vit(layers=2))
    tracer = Tracer(model, precision="fp32", on_gpu=False)
    for pairs in (1, 2, 7, 15):
        counted = tracer.backpropagate(pairs, with_gradients=True).peak_bytes
        assert counted <= tracer.activation_bytes(pairs, share=16) <= 1.1 * counted


def step_memory(counts, *, gpus):
    return StepMemory(counts, gpus=gpus, on_gpu=True, pairs=8, compared=8, width=4, backend="auto")


def test_eight_bit_states_count_small_tensors_and_embeddings_in_fp32():
    counts = ParameterCounts(1000_000, 0, 1000_000, 256_000, 1, 1)
    of = step_memory(counts, gpus=1).parts("plain", "lion8bit", 0)
    assert of["optimizer_states"] == 744_000 * 4 + 256_000 + 1000 * 4


def test_zero_shares_what_it_shares():
    memory = step_memory(ParameterCounts(800, 0, 800, 0, 1, 10), gpus=8)
    stages = ("plain", "zero1", "zero2", "zero3")
    parts = {stage: memory.parts(stage, "adamw", 10_000) for stage in stages}
    lasting = ("weights", "gradients", "optimizer_states", "partitions")
    assert [parts["plain"][name] for name in lasting] == [3200, 3200, 6400, 0]
    assert [parts["zero1"][name] for name in lasting] == [3200, 3200, 800, 800]
    assert parts["zero1"] == parts["zero2"]
    assert parts["zero3"]["partitions"] == 400


def test_the_workspace_of_the_loss_is_that_of_the_backends():
    from fasterase.ops.contrastive import cpu, triton_plan

    assert triton_plan.WORKSPACE_BYTES <= count.LOSS_WORKSPACE_BYTES
    assert cpu._KEPT_BYTES <= count.LOSS_WORKSPACE_BYTES
