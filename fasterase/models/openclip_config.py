"""Configurations (`model_cfg`) of open_clip: read off a module, or found for one or for weights.

A configuration, even one read off the module, is trusted only if the library builds a module with
the same state dict from it. The build is on the meta device: no memory and little time.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasterase.errors import InputError
from fasterase.models.preprocessing import read_size
from fasterase.models.wrapped import plain_state, uncompiled

CONFIG_FILE = "open_clip_config.json"
# A `model_cfg`: what open_clip keeps in its json files and builds models from.
Config = dict[str, Any]

_RESNET_STRIDE = 32  # pixels per cell of the last feature map


def get_named_config(model_name: str) -> Config:
    """Return open_clip's configuration named `model_name`; `InputError` if there is none."""
    import open_clip

    config = open_clip.get_model_config(model_name)
    if config is None:
        raise InputError(
            f"model_name: open_clip knows no {model_name!r}; see open_clip.list_models(), or "
            "register a configuration with open_clip.add_model_config(path)"
        )
    return config


def find_config(module: nn.Module) -> tuple[Config | None, list[str]]:
    """Return the module's `model_cfg`, None if unknown, and the names open_clip has for it."""
    import open_clip

    read = read_config(module)
    names = []
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        if not _may_fit_module(config, module, read):
            continue
        built = build_same(config if read else adjust_config(config, module), module)
        if built is not None and read_config(built) == read:
            names.append(name)
    if names:
        return adjust_config(open_clip.get_model_config(names[0]), module), names
    return (read if read and build_same(read, module) else None), names


def adjust_config(config: Config, module: nn.Module) -> Config:
    """Copy `config`, taking from the module all that open_clip lets a caller override."""
    config = deepcopy(config)
    found = read_image_size(module)
    if found != read_size(config["vision_cfg"].get("image_size", 224)):
        config["vision_cfg"]["image_size"] = _side(found)
    if not config["text_cfg"].get("hf_model_name"):
        config["text_cfg"]["context_length"] = int(text_tower(module).context_length)
    if kind_of(module) != "CLIP":
        config["custom_text"] = True
    if _uses_quick_gelu(module):
        config["quick_gelu"] = True
    # The module decides whether there is a logit_bias; both scalars are written 0-d.
    config.pop("nonscalar_logit_scale", None)
    if getattr(module, "logit_bias", None) is None:
        config.pop("init_logit_bias", None)
    else:
        config.setdefault("init_logit_bias", 0.0)
    return config


def build_from_config(config: Config) -> nn.Module:
    """Build a module from a `model_cfg` on the meta device; raises whatever the library does."""
    from open_clip.coca_model import CoCa
    from open_clip.model import CLIP, CustomTextCLIP

    arguments = deepcopy(config)
    custom = arguments.pop("custom_text", False)
    if arguments["text_cfg"].get("hf_model_name"):
        custom = True
        arguments["text_cfg"]["hf_model_pretrained"] = False
    kind = CoCa if "multimodal_cfg" in config else CustomTextCLIP if custom else CLIP
    with torch.device("meta"):
        return kind(**arguments)


def build_same(config: Config, given: nn.Module | Mapping[str, Tensor]) -> nn.Module | None:
    """Build from `config`; None unless the state dict is as that of `given`, a module or one."""
    try:
        built = build_from_config(config)
    except Exception:
        return None
    state = plain_state(given) if isinstance(given, nn.Module) else given
    return built if _shapes(built.state_dict()) == _shapes(state) else None


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Return the shape of every weight that tells architectures apart."""
    # The temperature is written 0-d whatever shape it has in memory; a locked ResNet's BatchNorm
    # counts no batches.
    return {
        name: torch.Size() if name in ("logit_scale", "logit_bias") else tensor.shape
        for name, tensor in state.items()
        if not name.endswith("num_batches_tracked")
    }


def _may_fit_module(config: Config, module: nn.Module, read: Config | None) -> bool:
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
        and (read is None or vision.get("layers", 12) == read["vision_cfg"]["layers"])
    )


def name_of_weights(state: dict[str, Tensor], file: Path) -> str:
    """Find the name of the architecture that has weights of these shapes; `InputError` if none has.

    Warns where several have that differ in what weights do not show.
    """
    import open_clip

    shapes = _shapes(state)
    found: dict[str, nn.Module] = {}
    for name in open_clip.list_models():
        config = as_trained(state, open_clip.get_model_config(name))
        if _may_fit_weights(config, shapes) and (built := build_same(config, state)) is not None:
            found[name] = built
    if not found:
        raise InputError(
            f"model: the weights in {file} have the shapes of no architecture that open_clip "
            "knows. Give model_name=, its name after open_clip.add_model_config(path), or build "
            "the module, load the weights and pass the module"
        )
    first = next(iter(found))

    def unseen(name: str) -> tuple[Any, ...]:
        built = found[name]
        return read_config(built), read_image_size(built), _uses_quick_gelu(built)

    different = [name for name in found if unseen(name) != unseen(first)]
    if different:
        warnings.warn(
            f"model: {file} is taken for {first}, but its weights have the shapes of "
            f"{', '.join(different)} too, and weights do not show the difference (an activation, "
            "as a rule). Give model_name= to be sure",
            stacklevel=4,
        )
    return first


def _may_fit_weights(config: Config, shapes: Mapping[str, torch.Size]) -> bool:
    """Compare cheaply, so that only a few candidates need to be built."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    table = shapes.get("token_embedding.weight") or shapes.get("text.token_embedding.weight")
    is_timm = any(name.startswith("visual.trunk.") for name in shapes)
    if bool(vision.get("timm_model_name")) != is_timm or table is None:
        return False
    if tuple(table) != (text.get("vocab_size", 49408), text.get("width", 512)):
        return False
    patches = shapes.get("visual.conv1.weight")
    patch_size = vision.get("patch_size")
    return patches is None or patch_size is None or patches[-1] == read_size(patch_size)[1]


def as_trained(state: Mapping[str, Tensor], config: Config) -> Config:
    """Copy `config` with the options of open_clip's training that the weights show.

    They are the image size, the context length, `--siglip` and `--force-custom-text`.
    """
    config = deepcopy(config)
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "logit_bias" in state:
        config.setdefault("init_logit_bias", 0.0)
    if any(name.startswith("text.") for name in state):
        config["custom_text"] = True
    cells, stride = state.get("visual.positional_embedding"), 0
    if cells is not None and "visual.conv1.weight" in state:
        stride = state["visual.conv1.weight"].shape[-1]
    elif "visual.attnpool.positional_embedding" in state:
        cells, stride = state["visual.attnpool.positional_embedding"], _RESNET_STRIDE
    if cells is not None and stride:
        side = math.isqrt(len(cells) - 1)
        size = read_size(vision.get("image_size", 224))
        if side**2 == len(cells) - 1 and (side, side) != (size[0] // stride, size[1] // stride):
            vision["image_size"] = side * stride
    positions = state.get("positional_embedding", state.get("text.positional_embedding"))
    if positions is not None:
        text["context_length"] = len(positions) - bool(text.get("embed_cls"))
    return config


def kind_of(module: nn.Module) -> str | None:
    """`"CLIP"`, `"CustomTextCLIP"` or `"CoCa"` for an instance of that class, else None."""
    for ancestor in type(module).__mro__:
        is_library = ancestor.__module__.partition(".")[0] == "open_clip"
        if is_library and ancestor.__name__ in ("CLIP", "CustomTextCLIP", "CoCa"):
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


def read_config(module: Any) -> Config | None:
    """Read `model_cfg` off the module; None if a tower is not one of open_clip's own."""
    vision, text = _read_vision(uncompiled(module.visual)), _read_text(module)
    if vision is None or text is None:
        return None
    config: Config = {"embed_dim": read_embed_dim(module), "vision_cfg": vision, "text_cfg": text}
    if kind_of(module) == "CoCa":
        decoder = module.text_decoder
        config["multimodal_cfg"] = {
            **_read(decoder, "context_length", "width"),
            "vocab_size": text["vocab_size"],
            "heads": decoder.resblocks[0].attn.num_heads,
            "layers": len(decoder.resblocks),
            "ls_init_value": _read_layer_scale(decoder.resblocks[0]),
        }
    return adjust_config(config, module)


def _read_vision(visual: Any) -> Config | None:
    if type(visual).__name__ == "ModifiedResNet":
        width = visual.conv3.out_channels
        return {
            "image_size": _side(visual.image_size),
            "layers": [len(getattr(visual, f"layer{i}")) for i in (1, 2, 3, 4)],
            "width": width,
            "head_width": width * 32 // visual.attnpool.num_heads,
        }
    blocks = _read_blocks(visual) if type(visual).__name__ == "VisionTransformer" else None
    if blocks is None:
        return None
    config: Config = {
        "image_size": _side(visual.image_size),
        "patch_size": _side(visual.patch_size),
        "head_width": blocks["width"] // blocks.pop("heads"),
        **blocks,
        "norm_kwargs": {"eps": visual.ln_post.eps},
        "no_ln_pre": isinstance(visual.ln_pre, nn.Identity),
        **_read(visual, "final_ln_after_pool", "output_tokens", "pool_type"),
    }
    if visual.attn_pool is not None:
        config["attentional_pool"] = visual.attn_pool_type or True
        config["attn_pooler_queries"] = visual.attn_pool.query.shape[0]
        config["attn_pooler_heads"] = visual.attn_pool.attn.num_heads
    return config


def _read_text(module: Any) -> Config | None:
    text = uncompiled(text_tower(module))
    is_own = text is module or type(text).__name__ == "TextTransformer"
    blocks = _read_blocks(text) if is_own else None
    if blocks is None:
        return None
    config: Config = {
        **_read(text, "context_length", "vocab_size"),
        **blocks,
        "norm_kwargs": {"eps": text.ln_final.eps},
        "no_causal_mask": text.attn_mask is None,
    }
    if text is module:
        config |= {"pool_type": text.text_pool_type, "eos_id": text.text_eos_id}
    else:
        config |= _read(text, "pool_type", "eos_id", "pad_id", "output_tokens")
        config["embed_cls"] = text.cls_emb is not None
    if text.text_projection is None:
        config["proj_type"] = "none"
    elif isinstance(text.text_projection, nn.Linear):
        config["proj_bias"] = text.text_projection.bias is not None
    return config


def _read_blocks(tower: Any) -> Config | None:
    """Read sizes and options of a stack of open_clip's standard blocks; None for custom ones."""
    transformer = tower.transformer
    block = uncompiled(transformer.resblocks[0])
    if type(block).__name__ != "ResidualAttentionBlock":
        return None
    width, hidden = transformer.width, block.mlp.c_fc.out_features
    ratio = hidden / width
    approximate = getattr(block.mlp.gelu, "approximate", "none")
    return {
        "width": width,
        "heads": block.attn.num_heads,
        "layers": len(transformer.resblocks),
        # The library takes int(width * ratio); half a unit more survives rounding down.
        "mlp_ratio": ratio if int(width * ratio) == hidden else (hidden + 0.5) / width,
        "ls_init_value": _read_layer_scale(block),
        "act_kwargs": None if approximate == "none" else {"approximate": approximate},
    }


def _read(part: Any, *options: str) -> Config:
    return {option: getattr(part, option) for option in options}


def _read_layer_scale(block: Any) -> float | None:
    # The initial value is unknown and irrelevant to loaded weights; that a scale exists is not.
    return None if isinstance(block.ls_1, nn.Identity) else 1e-5


def _side(size: int | Sequence[int]) -> int | list[int]:
    height, width = read_size(size)
    return height if height == width else [height, width]
