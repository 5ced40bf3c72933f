"""The name and `model_cfg` of an open_clip instance, found among open_clip's own configurations.

A configuration, also one read off the module, is believed only when the library, given it, builds
a module with the same state dict (on the meta device, so in no memory and little time).
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn

from fasterase.errors import InputError
from fasterase.models.open_clip_reading import (
    Config,
    embed_dim,
    image_size,
    kind_of,
    read_config,
    text_tower,
    uses_quick_gelu,
)

# Keys that change no feature of a model whose weights are loaded, or that no module reveals.
_IGNORED_VISION = {
    "head_width",
    "mlp_ratio",
    "pos_embed_type",
    "ls_init_value",
    "patch_dropout",
    "timm_model_pretrained",
    "timm_drop",
    "timm_drop_path",
}
_IGNORED_TEXT = {
    "hf_tokenizer_name",
    "tokenizer_mode",
    "tokenizer_kwargs",
    "mlp_ratio",
    "ls_init_value",
    "final_ln_after_pool",
    "hf_model_pretrained",
}


def named_config(module: nn.Module, model_name: str) -> Config:
    """The configuration that open_clip keeps under `model_name`, adjusted to the module's sizes.

    Raises:
        InputError: no such configuration, or the module is of another architecture.
    """
    import open_clip

    config = open_clip.get_model_config(model_name)
    if config is None:
        raise InputError(
            f"model_name: open_clip knows no {model_name!r}; see open_clip.list_models(), or "
            "register a configuration with open_clip.add_model_config(path)"
        )
    config = adjusted(config, module)
    if not builds_same(config, module):
        raise InputError(
            f"model_name: the weights of this {type(module).__name__} do not have the shapes of "
            f"{model_name!r}; name its real architecture or leave model_name out"
        )
    return config


def recognised(module: nn.Module) -> tuple[Config | None, list[str]]:
    """The module's `model_cfg`, None where unknown, and the names open_clip has for it, if any."""
    import open_clip

    read = read_config(module)
    if read is not None and not builds_same(read, module):
        read = None
    own = None if read is None else _comparable(read)
    names = []
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        if own is not None:
            same = _comparable(config) == own
        else:
            same = _plausible(config, module) and builds_same(adjusted(config, module), module)
        if same:
            names.append(name)
    if names:
        return adjusted(open_clip.get_model_config(names[0]), module), names
    return read, names


def builds_same(config: Config, module: nn.Module) -> bool:
    """Whether the library builds from `config` a module with this one's state dict and settings."""
    from open_clip.coca_model import CoCa
    from open_clip.model import CLIP, CustomTextCLIP

    arguments = deepcopy(config)
    arguments.pop("custom_text", None)
    classes = {"CLIP": CLIP, "CustomTextCLIP": CustomTextCLIP, "CoCa": CoCa}
    if arguments["text_cfg"].get("hf_model_name"):
        arguments["text_cfg"]["hf_model_pretrained"] = False
    try:
        with torch.device("meta"):
            built = classes[kind_of(module) or ""](**arguments)
    except Exception:
        # A configuration of another class, or a transformers tower whose own configuration is
        # not on this machine: either way not known to be the same.
        return False

    def shapes(model: nn.Module) -> dict[str, torch.Size]:
        # The temperature is written 0-d whatever shape it has in memory.
        return {
            name: torch.Size() if name in ("logit_scale", "logit_bias") else tensor.shape
            for name, tensor in model.state_dict().items()
        }

    return shapes(built) == shapes(module)


def adjusted(config: Config, module: nn.Module) -> Config:
    """`config` with what open_clip lets a caller override at creation taken from the module."""
    config = deepcopy(config)
    size = config["vision_cfg"].get("image_size", 224)
    found = image_size(module)
    if found != (tuple(size) if isinstance(size, (list, tuple)) else (size, size)):
        config["vision_cfg"]["image_size"] = found[0] if found[0] == found[1] else list(found)
    if not config["text_cfg"].get("hf_model_name"):
        config["text_cfg"]["context_length"] = int(text_tower(module).context_length)
    if uses_quick_gelu(module):
        config["quick_gelu"] = True
    with_logit_bias(config, module)
    return config


def with_logit_bias(config: Config, module: nn.Module) -> None:
    """Make `config` ask for a logit_bias exactly where the module has one, written 0-d."""
    config.pop("nonscalar_logit_scale", None)
    bias = getattr(module, "logit_bias", None)
    if bias is None:
        config.pop("init_logit_bias", None)
    else:
        config.setdefault("init_logit_bias", float(bias.detach().reshape(())))


def _comparable(config: Config) -> dict[str, Any]:
    """A configuration with every default filled in and without what changes no feature."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    vision = vars(CLIPVisionCfg(**config["vision_cfg"])).copy()
    text = vars(CLIPTextCfg(**config["text_cfg"])).copy()
    heads = vision["width"] * (32 if _is_resnet(vision) else 1) // vision["head_width"]
    hidden = int(vision["width"] * vision["mlp_ratio"]), int(text["width"] * text["mlp_ratio"])
    size = vision.pop("image_size")
    if vision["attentional_pool"]:
        # With attentional pooling the module no longer knows the pool_type it was given.
        vision.pop("pool_type")
    else:
        vision.pop("attn_pooler_queries")
        vision.pop("attn_pooler_heads")
    if _is_resnet(vision):
        hidden = 0, hidden[1]
        vision.pop("patch_size")
    if text["pool_type"] != "eos":
        text.pop("eos_id")
    if not (text["embed_cls"] or text["no_causal_mask"]):
        text.pop("pad_id")
    return {
        "vision": {k: _plain(v) for k, v in vision.items() if k not in _IGNORED_VISION},
        "text": {k: _plain(v) for k, v in text.items() if k not in _IGNORED_TEXT},
        "heads": heads,
        "hidden": hidden,
        "image_size": list(size) if isinstance(size, (tuple, list)) else [size, size],
        "layer_scale": (vision["ls_init_value"] is None, text["ls_init_value"] is None),
        "embed_dim": config["embed_dim"],
        "quick_gelu": config.get("quick_gelu", False),
        "custom_text": config.get("custom_text", False) or bool(text["hf_model_name"]),
        "decoder": _plain(config.get("multimodal_cfg", {}).get("layers")),
        "logit_bias": config.get("init_logit_bias") is not None,
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _is_resnet(vision: Config) -> bool:
    return isinstance(vision["layers"], (list, tuple))


def _plausible(config: Config, module: nn.Module) -> bool:
    """A cheap comparison that leaves only a few candidates to build."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    trunk = getattr(module.visual, "trunk", None)
    timm_settings = getattr(trunk, "pretrained_cfg", None) or getattr(trunk, "default_cfg", {})
    timm_name = vision.get("timm_model_name")
    size = vision.get("image_size", 224)
    tower = text_tower(module)
    hf_name = getattr(getattr(tower, "config", None), "_name_or_path", None)
    return (
        config["embed_dim"] == embed_dim(module)
        and bool(timm_name) == (trunk is not None)
        and (not timm_name or timm_name.partition(".")[0] == timm_settings.get("architecture"))
        and image_size(module) == (tuple(size) if isinstance(size, list) else (size, size))
        and text.get("hf_model_name") == hf_name
        and (hf_name is not None or text.get("vocab_size", 49408) == tower.vocab_size)
    )
