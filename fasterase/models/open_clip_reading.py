"""What an open_clip module tells about its own architecture: kind, sizes, and its `model_cfg`.

An instance carries neither its name nor its configuration. Native towers (ViT, ResNet, text
transformer, CoCa's decoder) are read off the module here; timm and transformers towers cannot be.
"""

from __future__ import annotations

from typing import Any

from torch import nn

# Modules are `Any` below: their attributes are the library's, which torch's types do not know.
Config = dict[str, Any]


def kind_of(module: nn.Module) -> str | None:
    """`"CLIP"`, `"CustomTextCLIP"` or `"CoCa"` for open_clip's classes and heirs, else None."""
    for ancestor in type(module).__mro__:
        if ancestor.__module__.partition(".")[0] == "open_clip" and ancestor.__name__ in (
            "CLIP",
            "CustomTextCLIP",
            "CoCa",
        ):
            return ancestor.__name__
    return None


def text_tower(module: Any) -> Any:
    """The text transformer; for `CLIP`, the model itself, which holds the text tower's parts."""
    return module if kind_of(module) == "CLIP" else module.text


def is_hf_text(text: nn.Module) -> bool:
    """Whether a text tower is one of transformers inside open_clip."""
    return type(text).__name__ == "HFTextEncoder"


def embed_dim(module: Any) -> int:
    """D, the width of the shared embedding, told by the text tower (every kind states it there)."""
    text = text_tower(module)
    if kind_of(module) != "CLIP":
        return int(text.output_dim)
    projection = text.text_projection
    if projection is None:
        return int(text.ln_final.normalized_shape[0])
    return int(
        projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]
    )


def image_size(module: Any) -> tuple[int, int]:
    """(height, width) in pixels that the image tower takes."""
    size = module.visual.image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return int(height), int(width)


def uses_quick_gelu(module: Any) -> bool:
    """Whether OpenAI's activation is in use, which no weight shows."""
    return any(type(part).__name__ == "QuickGELU" for part in module.modules())


def read_config(module: Any) -> Config | None:
    """The `model_cfg` read off the module, or None where a tower is not one of the native ones."""
    vision, text = _read_vision(module.visual), _read_text(module)
    if vision is None or text is None:
        return None
    config: Config = {"embed_dim": embed_dim(module), "vision_cfg": vision, "text_cfg": text}
    if uses_quick_gelu(module):
        config["quick_gelu"] = True
    if kind_of(module) != "CLIP":
        config["custom_text"] = True
    if kind_of(module) == "CoCa":
        config["multimodal_cfg"] = _read_decoder(module, text)
    if module.logit_bias is not None:
        config["init_logit_bias"] = float(module.logit_bias.detach().reshape(()))
    return config


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
    text = text_tower(module)
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
    """Sizes and options of a stack of open_clip's standard blocks; None for custom ones."""
    block = transformer.resblocks[0]
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
        # The library takes int(width * ratio); half a unit more survives a quotient rounded down.
        config["mlp_ratio"] = ratio if int(width * ratio) == hidden else (hidden + 0.5) / width
    if getattr(block.mlp.gelu, "approximate", "none") != "none":
        config["act_kwargs"] = {"approximate": block.mlp.gelu.approximate}
    return config


def _read_layer_scale(block: Any) -> Config:
    # The initial value is gone and does not matter to loaded weights; that there is a scale does.
    return {} if isinstance(block.ls_1, nn.Identity) else {"ls_init_value": 1e-5}


def _read_norm(norm: Any) -> Config:
    return {} if norm.eps == 1e-5 else {"norm_kwargs": {"eps": norm.eps}}


def _side(size: int | tuple[int, int] | list[int]) -> int | list[int]:
    if isinstance(size, int):
        return size
    return int(size[0]) if size[0] == size[1] else [int(size[0]), int(size[1])]
