"""Read an open_clip module's configuration off it, or find it among the named ones."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP

from fasterase.models.openclip_config import build_from_config, build_same, find_config, read_config
from tests import small_models

NAMES = (
    "ViT-B-32 ViT-B-32-quickgelu ViT-L-14-336 ViT-bigG-14 ViT-H-14-CLIPA RN50x4 coca_ViT-B-32 "
    "ViT-L-14-worldwide EVA02-B-16"
)


@pytest.mark.parametrize("name", NAMES.split())
def test_named_architectures_are_told_apart(name):
    config, names = find_config(build_from_config(open_clip.get_model_config(name)))
    assert names == [name]
    expected = open_clip.get_model_config(name)
    if name == "EVA02-B-16":  # states the default
        expected["text_cfg"].setdefault("context_length", 77)
    assert config == expected


OPTIONS: list[dict[str, Any]] = [
    {"quick_gelu": True},
    {"vision_cfg": {"pool_type": "avg", "no_ln_pre": True, "final_ln_after_pool": True}},
    {"vision_cfg": {"image_size": [32, 48], "ls_init_value": 0.1}},
    {"vision_cfg": {"mlp_ratio": 3.3, "act_kwargs": {"approximate": "tanh"}}},
    {"embed_dim": 32, "vision_cfg": {"attentional_pool": "parallel", "attn_pooler_heads": 2}},
    {"vision_cfg": {"norm_kwargs": {"eps": 1e-6}}},
    {"text_cfg": {"no_causal_mask": True, "pool_type": "eos", "eos_id": 7}},
    {"text_cfg": {"proj_type": "none", "width": 16}},
    {"text_cfg": {"mlp_ratio": 1.7, "ls_init_value": 0.1, "norm_kwargs": {"eps": 1e-6}}},
]


@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_are_read_and_rebuild_the_same_function(options, custom):
    config = small_models.open_clip_config()
    for key, value in options.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    kind = CustomTextCLIP if custom else CLIP
    torch.manual_seed(0)
    module = kind(**deepcopy(config)).eval()
    read = read_config(module)
    assert read is not None
    assert build_same(read, module) is not None
    assert read.pop("custom_text", False) is custom
    rebuilt = kind(**read).eval()
    rebuilt.load_state_dict(module.state_dict())
    size = (3, *module.visual.image_size)
    pixels, ids = torch.randn(2, *size), small_models.random_pairs(49408, count=2)[1]
    ids[:, 5] = 7
    assert torch.equal(rebuilt.encode_image(pixels), module.encode_image(pixels))
    assert torch.equal(rebuilt.encode_text(ids), module.encode_text(ids))


def test_custom_blocks_are_not_read_wrongly():
    config = small_models.open_clip_config()
    config["vision_cfg"]["qk_norm"] = True
    assert find_config(CLIP(**config)) == (None, [])
