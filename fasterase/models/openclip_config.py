"""Find the name and `model_cfg` of an open_clip instance among open_clip's own configurations.

A configuration, even one read off the module, is trusted only if the library builds a module with
the same state dict from it. The build is on the meta device: no memory and little time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from fasterase.errors import InputError
from fasterase.models.preprocessing import read_size
from fasterase.models.wrapped import plain_state, uncompiled

# A `model_cfg`: what open_clip keeps in its json files and builds models from.
Config = dict[str, Any]

# Weight -> its shape.
Shapes = dict[str, torch.Size]

# Keys that change no feature once weights are loaded, or that cannot be read off a module.
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


def get_named_config(module: nn.Module, model_name: str) -> Config:
    """Return open_clip's configuration named `model_name`, adjusted to the module's sizes.

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
    config = adjust_config(config, module)
    if not builds_same(config, module):
        raise InputError(
            f"model_name: the weights of this {type(module).__name__} do not have the shapes of "
            f"{model_name!r}; name its real architecture or leave model_name out"
        )
    return config


def find_config(module: nn.Module) -> tuple[Config | None, list[str]]:
    """Return the module's `model_cfg`, None if unknown, and the names open_clip has for it."""
    import open_clip

    read = read_config(module)
    if read is not None and not builds_same(read, module):
        read = None
    own = None if read is None else comparable(read)
    names = []
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        if own is not None:
            same = comparable(config) == own
        else:
            same = _may_match(config, module) and builds_same(adjust_config(config, module), module)
        if same:
            names.append(name)
    if names:
        return adjust_config(open_clip.get_model_config(names[0]), module), names
    return read, names


def adjust_config(config: Config, module: nn.Module) -> Config:
    """Copy `config`, taking from the module all that open_clip lets a caller override."""
    config = deepcopy(config)
    found = read_image_size(module)
    if found != read_size(config["vision_cfg"].get("image_size", 224)):
        config["vision_cfg"]["image_size"] = _side(found)
    if not config["text_cfg"].get("hf_model_name"):
        config["text_cfg"]["context_length"] = int(text_tower(module).context_length)
    if _uses_quick_gelu(module):
        config["quick_gelu"] = True
    # The module decides whether there is a logit_bias; both scalars are written 0-d.
    config.pop("nonscalar_logit_scale", None)
    bias = getattr(module, "logit_bias", None)
    if bias is None:
        config.pop("init_logit_bias", None)
    else:
        config.setdefault("init_logit_bias", float(bias.detach().reshape(())))
    return config


def read_config(module: Any) -> Config | None:
    """Read `model_cfg` off the module; None if a tower is not one of open_clip's own."""
    vision, text = _read_vision(uncompiled(module.visual)), _read_text(module)
    if vision is None or text is None:
        return None
    config: Config = {"embed_dim": read_embed_dim(module), "vision_cfg": vision, "text_cfg": text}
    if _uses_quick_gelu(module):
        config["quick_gelu"] = True
    if kind_of(module) != "CLIP":
        config["custom_text"] = True
    if kind_of(module) == "CoCa":
        config["multimodal_cfg"] = _read_decoder(module, text)
    if module.logit_bias is not None:
        config["init_logit_bias"] = float(module.logit_bias.detach().reshape(()))
    return config


def builds_same(config: Config, module: nn.Module) -> bool:
    """Whether the library builds a module with the same state dict from `config`."""
    return shapes_of_config(config, kind_of(module)) == shapes_of_state(plain_state(module))


def shapes_of_config(config: Config, kind: str | None = None) -> Shapes | None:
    """Return the shapes of the state dict that the library builds from `config`.

    Args:
        config: a `model_cfg`.
        kind: the class, as `kind_of` names it; None: the one that the library would choose.

    None: the configuration is for another class, or a transformers tower's own configuration is not
    on this machine.
    """
    try:
        built = build_from_config(config, kind)
    except Exception:
        return None
    return shapes_of_state(built.state_dict())


def build_from_config(config: Config, kind: str | None = None) -> nn.Module:
    """Build a module from a `model_cfg` on the meta device, without weights.

    Raises:
        Exception: whatever the library raises; see `shapes_of_config`.
    """
    from open_clip.coca_model import CoCa
    from open_clip.model import CLIP, CustomTextCLIP

    arguments = deepcopy(config)
    custom = arguments.pop("custom_text", False) or "hf_model_name" in arguments["text_cfg"]
    if kind is None:
        kind = "CoCa" if "multimodal_cfg" in config else "CustomTextCLIP" if custom else "CLIP"
    if arguments["text_cfg"].get("hf_model_name"):
        arguments["text_cfg"]["hf_model_pretrained"] = False
    with torch.device("meta"):
        return {"CLIP": CLIP, "CustomTextCLIP": CustomTextCLIP, "CoCa": CoCa}[kind](**arguments)


def shapes_of_state(state: Mapping[str, Tensor]) -> Shapes:
    """Return the shape of every weight that tells architectures apart."""
    # The temperature is written 0-d whatever shape it has in memory; a locked ResNet's BatchNorm
    # counts no batches.
    return {
        name: torch.Size() if name in ("logit_scale", "logit_bias") else tensor.shape
        for name, tensor in state.items()
        if not name.endswith("num_batches_tracked")
    }


def kind_of(module: nn.Module) -> str | None:
    """`"CLIP"`, `"CustomTextCLIP"` or `"CoCa"` for an instance of that class, else None."""
    for ancestor in type(module).__mro__:
        if ancestor.__module__.partition(".")[0] == "open_clip" and ancestor.__name__ in (
            "CLIP",
            "CustomTextCLIP",
            "CoCa",
        ):
            return ancestor.__name__
    return None


def text_tower(module: Any) -> Any:
    """Return the text transformer; for `CLIP`, the model itself, which holds its parts."""
    return module if kind_of(module) == "CLIP" else module.text


def is_hf_text(text: nn.Module) -> bool:
    """Whether a text tower is a transformers model inside open_clip."""
    return type(text).__name__ == "HFTextEncoder"


def read_embed_dim(module: Any) -> int:
    """Return D, the width of the shared embedding; every kind states it in the text tower."""
    text = text_tower(module)
    if kind_of(module) != "CLIP":
        return int(text.output_dim)
    projection = text.text_projection
    if projection is None:
        return int(text.ln_final.normalized_shape[0])
    return int(
        projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]
    )


def read_image_size(module: Any) -> tuple[int, int]:
    """Return (height, width) in pixels that the image tower takes."""
    return read_size(module.visual.image_size)


def _uses_quick_gelu(module: Any) -> bool:
    """Whether OpenAI's activation is in use; no weight shows it."""
    return any(type(part).__name__ == "QuickGELU" for part in module.modules())


def comparable(config: Config) -> dict[str, Any]:
    """Fill in every default and drop everything that changes no feature."""
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
        "image_size": read_size(size),
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


def _may_match(config: Config, module: nn.Module) -> bool:
    """Compare cheaply, so that only a few candidates need to be built."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    trunk = getattr(module.visual, "trunk", None)
    timm_settings = getattr(trunk, "pretrained_cfg", None) or getattr(trunk, "default_cfg", {})
    timm_name = vision.get("timm_model_name")
    tower = text_tower(module)
    hf_name = getattr(getattr(tower, "config", None), "_name_or_path", None)
    return (
        config["embed_dim"] == read_embed_dim(module)
        and bool(timm_name) == (trunk is not None)
        and (not timm_name or timm_name.partition(".")[0] == timm_settings.get("architecture"))
        and read_image_size(module) == read_size(vision.get("image_size", 224))
        and text.get("hf_model_name") == hf_name
        and (hf_name is not None or text.get("vocab_size", 49408) == tower.vocab_size)
    )


def _read_vision(visual: Any) -> Config | None:
    if type(visual).__name__ == "ModifiedResNet":
        width = visual.conv3.out_channels
        return {
            "image_size": _side(visual.image_size),
            "layers": [len(getattr(visual, f"layer{i}")) for i in (1, 2, 3, 4)],
            "width": width,
            "head_width": width * 32 // visual.attnpool.num_heads,
        }
    if type(visual).__name__ != "VisionTransformer":
        return None
    blocks = _read_blocks(visual.transformer)
    if blocks is None:
        return None
    heads = blocks.pop("heads")
    config: Config = {
        "image_size": _side(visual.image_size),
        "patch_size": _side(visual.patch_size),
        **blocks,
        "head_width": blocks["width"] // heads,
        **_read_norm(visual.ln_post),
    }
    if isinstance(visual.ln_pre, nn.Identity):
        config["no_ln_pre"] = True
    if visual.final_ln_after_pool:
        config["final_ln_after_pool"] = True
    if visual.output_tokens:
        config["output_tokens"] = True
    if visual.attn_pool is not None:
        config["attentional_pool"] = visual.attn_pool_type or True
        config["attn_pooler_queries"] = visual.attn_pool.query.shape[0]
        config["attn_pooler_heads"] = visual.attn_pool.attn.num_heads
    elif visual.pool_type != "tok":
        config["pool_type"] = visual.pool_type
    return config


def _read_text(module: Any) -> Config | None:
    text = uncompiled(text_tower(module))
    if text is not module and type(text).__name__ != "TextTransformer":
        return None
    blocks = _read_blocks(text.transformer)
    if blocks is None:
        return None
    config: Config = {
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        **blocks,
        **_read_norm(text.ln_final),
    }
    if text.attn_mask is None:
        config["no_causal_mask"] = True
    pool_type, eos_id = (
        (text.text_pool_type, text.text_eos_id) if text is module else (text.pool_type, text.eos_id)
    )
    if pool_type != "argmax":
        config |= {"pool_type": pool_type, "eos_id": eos_id}
    if text is not module:
        if text.pad_id != 0:
            config["pad_id"] = text.pad_id
        if text.cls_emb is not None:
            config["embed_cls"] = True
        if text.output_tokens:
            config["output_tokens"] = True
    if text.text_projection is None:
        config["proj_type"] = "none"
    elif isinstance(text.text_projection, nn.Linear):
        config["proj_bias"] = text.text_projection.bias is not None
    return config


def _read_decoder(module: Any, text: Config) -> Config:
    decoder = module.text_decoder
    return {
        "context_length": decoder.context_length,
        "vocab_size": text["vocab_size"],
        "width": decoder.width,
        "heads": decoder.resblocks[0].attn.num_heads,
        "layers": len(decoder.resblocks),
        **_read_layer_scale(decoder.resblocks[0]),
    }


def _read_blocks(transformer: Any) -> Config | None:
    """Read sizes and options of a stack of open_clip's standard blocks; None for custom ones."""
    block = uncompiled(transformer.resblocks[0])
    if type(block).__name__ != "ResidualAttentionBlock":
        return None
    width, hidden = transformer.width, block.mlp.c_fc.out_features
    ratio = hidden / width
    config: Config = {
        "width": width,
        "heads": block.attn.num_heads,
        "layers": len(transformer.resblocks),
        **_read_layer_scale(block),
    }
    if hidden != 4 * width:
        # The library takes int(width * ratio); half a unit more survives rounding down.
        config["mlp_ratio"] = ratio if int(width * ratio) == hidden else (hidden + 0.5) / width
    if getattr(block.mlp.gelu, "approximate", "none") != "none":
        config["act_kwargs"] = {"approximate": block.mlp.gelu.approximate}
    return config


def _read_layer_scale(block: Any) -> Config:
    # The initial value is unknown and irrelevant to loaded weights; that a scale exists is not.
    return {} if isinstance(block.ls_1, nn.Identity) else {"ls_init_value": 1e-5}


def _read_norm(norm: Any) -> Config:
    return {} if norm.eps == 1e-5 else {"norm_kwargs": {"eps": norm.eps}}


def _side(size: int | Sequence[int]) -> int | list[int]:
    height, width = read_size(size)
    return height if height == width else [height, width]
