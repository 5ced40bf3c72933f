"""What is counted: published FLOPs and parameters, short rows of blocks, checkpointing."""

from __future__ import annotations

import pytest
import torch

from fasterase.planner import trace
from fasterase.planner.architecture import build_architecture
from fasterase.planner.trace import Tracer
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


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_flops_are_the_published_ones(name):
    parameters, image, text = PUBLISHED[name]
    model = build_architecture(name)
    counted = sum(each.numel() for each in model.module.parameters())
    assert counted == pytest.approx(1e6 * parameters, rel=0.001)
    tracer = Tracer(model, precision="fp32", on_gpu=False)
    assert tracer.forward("image").flops == pytest.approx(1e9 * image, rel=0.02)
    assert tracer.forward("text").flops == pytest.approx(1e9 * text, rel=0.02)


@pytest.mark.parametrize(("checkpointing", "with_gradients"), [(False, True), (True, False)])
def test_a_block_in_the_middle_stands_for_those_left_out(
    monkeypatch, checkpointing, with_gradients
):
    model = build_architecture(small_models.open_clip_vit(layers=6))
    # As last:N does: below a row of equal blocks, one that is not trained.
    model.image_parts().blocks[0].requires_grad_(False)
    del model.module.transformer.resblocks[1:]

    def costs():
        tracer = Tracer(
            model, precision="bf16", on_gpu=True, activation_checkpointing=checkpointing
        )
        return tracer.backpropagate(3, with_gradients=with_gradients)

    short = costs()
    monkeypatch.setattr(trace, "KEPT", 100)
    assert short == costs()


def test_live_bytes_are_those_of_the_graph():
    """Of one linear map: its input, its output and its gradient, counted by hand."""
    counter = trace._Counter()
    weight = torch.nn.Parameter(torch.zeros(10, 20))
    with counter.counting([weight]):
        rows = torch.zeros(5, 10)
        for _ in range(2):
            rows @ weight  # freed at once
    assert counter.costs().peak_bytes == 4 * (5 * 10 + 5 * 20)
    assert counter.costs().flops == 2 * (2 * 5 * 10 * 20)


@pytest.mark.parametrize("build", [small_models.hf_clip, small_models.hf_siglip])
def test_transformers_models_from_their_configuration(build):
    module = build()
    model = build_architecture(module.config)
    assert sum(p.numel() for p in model.module.parameters()) == sum(
        p.numel() for p in module.parameters()
    )
    both = Tracer(model, precision="fp32", on_gpu=False).backpropagate(2, with_gradients=True)
    tracer = Tracer(model, precision="fp32", on_gpu=False)
    forward = tracer.forward("image").flops + tracer.forward("text").flops
    # Back-propagating costs twice a forward pass, but for the image's own gradient.
    assert 2.5 < both.flops / 2 / forward < 3.2
