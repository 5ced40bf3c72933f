"""Which parameters `tune=` names in each kind of model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fasterase.errors import InputError
from fasterase.models import DualEncoder, load_model
from tests import small_models
from tests.models.conftest import batch_for, build_tower


def names(tower: DualEncoder, tune: str) -> set[str]:
    return {name for name, _ in tower.trainable(tune)}


def test_all_is_both_towers_and_never_the_temperature(tower: DualEncoder) -> None:
    image, text = names(tower, "image"), names(tower, "text")
    assert image
    assert text
    assert not image & text
    assert names(tower, "all") == image | text
    left = {name for name, _ in tower.module.named_parameters()} - image - text
    assert {name.partition(".")[0] for name in left} <= {
        "logit_scale",
        "logit_bias",
        "text_decoder",
    }
    assert "logit_scale" in left


def test_parameters_come_in_the_module_s_order(tower: DualEncoder) -> None:
    order = [name for name, _ in tower.module.named_parameters()]
    chosen = [name for name, _ in tower.trainable("all")]
    assert chosen == [name for name in order if name in set(chosen)]
    assert all(p is dict(tower.module.named_parameters())[n] for n, p in tower.trainable("all"))


def test_projections_are_within_last_within_all(tower: DualEncoder) -> None:
    projections = names(tower, "projections")
    last, both = names(tower, "last:1"), names(tower, "last:2")
    assert projections < last < both < names(tower, "all")
    assert projections & names(tower, "image")
    assert projections & names(tower, "text")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("open_clip_vit", {"visual.proj", "text_projection"}),
        (
            "open_clip_resnet",
            {"visual.attnpool.c_proj.weight", "visual.attnpool.c_proj.bias", "text_projection"},
        ),
        ("open_clip_coca", {"visual.proj", "text.text_projection"}),
        ("hf_clip", {"visual_projection.weight", "text_projection.weight"}),
    ],
)
def test_projections_by_name(kind: str, expected: set[str]) -> None:
    assert names(build_tower(kind), "projections") == expected


def test_last_one_by_name() -> None:
    modules = {name.rpartition(".")[0] for name in names(build_tower("hf_clip"), "last:1")}
    for part in ("vision_model.encoder.layers.1", "text_model.encoder.layers.1"):
        assert any(name.startswith(part) for name in modules)
    assert not any(".layers.0" in name or "embedding" in name for name in modules)
    assert {"vision_model.post_layernorm", "text_model.final_layer_norm"} <= modules
    resnet = names(build_tower("open_clip_resnet"), "last:1")
    assert any(name.startswith("visual.layer4.") for name in resnet)
    assert not any(name.startswith("visual.layer3.") for name in resnet)
    assert any(name.startswith("visual.attnpool.") for name in resnet)


@pytest.mark.parametrize("tune", ["", "none", "last", "last:", "last:0", "last:-1", "last:x", None])
def test_unknown_tune_is_named(tune: str) -> None:
    with pytest.raises(InputError, match="tune"):
        build_tower("hf_clip").trainable(tune)


def test_more_blocks_than_there_are(tower: DualEncoder) -> None:
    with pytest.raises(InputError, match=r"tune: .*has 2 blocks"):
        tower.trainable("last:3")


def custom_text(**config: object) -> nn.Module:
    from open_clip.model import CustomTextCLIP

    torch.manual_seed(0)
    return CustomTextCLIP(**{**small_models.open_clip_config(), **config}).eval()


def test_timm_tower() -> None:
    vision = {"timm_model_name": "test_vit", "image_size": 160, "timm_proj": "linear"}
    tower = load_model(custom_text(vision_cfg=vision))
    assert tower.image_size == (160, 160)
    assert names(tower, "projections") == {"visual.head.proj.weight", "text.text_projection"}
    last = names(tower, "last:1")
    depth = len(tower.module.visual.trunk.blocks)
    assert any(name.startswith(f"visual.trunk.blocks.{depth - 1}.") for name in last)
    assert not any(name.startswith(f"visual.trunk.blocks.{depth - 2}.") for name in last)
    assert {"visual.trunk.norm.weight", "visual.head.proj.weight"} <= last
    assert not any("pos_embed" in name or "patch_embed" in name for name in last)
    assert tower.encode_image(torch.randn(1, 3, 160, 160)).shape == (1, tower.embed_dim)


def test_transformers_text_tower_inside_open_clip(tmp_path) -> None:
    from transformers import RobertaConfig

    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    RobertaConfig(
        vocab_size=90, num_hidden_layers=2, max_position_embeddings=40, **size
    ).save_pretrained(tmp_path)
    text = {
        "hf_model_name": str(tmp_path),
        "hf_model_pretrained": False,
        "hf_proj_type": "linear",
    }
    tower = load_model(custom_text(text_cfg=text))
    assert tower.embed_dim == small_models.EMBED_DIM
    assert "text.proj.weight" in names(tower, "projections")
    last = names(tower, "last:1")
    assert any(".encoder.layer.1." in name for name in last)
    assert not any(".encoder.layer.0." in name or "embeddings" in name for name in last)
    _, tokens = batch_for(load_model(small_models.hf_clip()))
    assert tower.encode_text(tokens).shape == (4, tower.embed_dim)
