"""The text tower of a CLIP as transformers' `CLIPTextModel`, the text encoder of Stable Diffusion.

Such a pipeline reads the hidden states of all tokens, after the last block that it has and the
final norm. It never sees the projection into the space that texts share with images.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from fasterase.errors import InputError, import_extra
from fasterase.models.dual_encoder import DualEncoder, hash_tensors
from fasterase.models.huggingface import load_weights, read_config
from fasterase.models.load import load_model
from fasterase.models.openclip_config import is_hf_text, kind_of, text_tower
from fasterase.models.preprocessing import Tokens
from fasterase.models.wrapped import plain_state

# Field of `CLIPTextConfig` that two towers must share -> its name in messages.
_SHARED = {
    "hidden_size": "width",
    "intermediate_size": "MLP width",
    "num_attention_heads": "heads",
    "hidden_act": "activation",
    "vocab_size": "vocabulary",
    "max_position_embeddings": "positions",
    "layer_norm_eps": "epsilon of the norms",
}
# open_clip's names, from their start, -> transformers'.
_BLOCK = r"transformer\.resblocks\.(\d+)\."
_RENAMED = {
    r"token_embedding\.": "embeddings.token_embedding.",
    r"positional_embedding$": "embeddings.position_embedding.weight",
    r"ln_final\.": "final_layer_norm.",
    rf"{_BLOCK}ln_([12])\.": r"encoder.layers.\1.layer_norm\2.",
    rf"{_BLOCK}attn\.([qkv]|out)_proj\.": r"encoder.layers.\1.self_attn.\2_proj.",
    rf"{_BLOCK}mlp\.c_fc\.": r"encoder.layers.\1.mlp.fc1.",
    rf"{_BLOCK}mlp\.c_proj\.": r"encoder.layers.\1.mlp.fc2.",
}
# What an open_clip `CLIP` holds beside the hidden states' weights.
_NO_TOWER = ("visual.", "logit_", "text_projection")


class TextTower(NamedTuple):
    """The part of a CLIP that turns tokens into hidden states."""

    name: str  # of the model, for messages
    config: dict[str, Any]  # fields of `CLIPTextConfig`: those of `_SHARED`
    num_layers: int  # number of blocks
    state: dict[str, Tensor]  # the weights, under the names inside `CLIPTextModel`
    # list of str -> [B, L] ids; None if the model came without a tokenizer
    tokenize: Callable[[Sequence[str]], Tokens] | None

    def fingerprint(self) -> str:
        """Return a SHA-256 of the weights."""
        digest = hashlib.sha256()
        hash_tensors(digest, self.state)
        return digest.hexdigest()


def load_text_tower(source: str) -> TextTower:
    """Load a CLIP as `load_model` does, or transformers' `CLIPTextModel`, and read its tower.

    `"hf:org/name"` or a folder may also hold a `CLIPTextModelWithProjection`. Adapters are merged.
    """
    location, online = source.removeprefix("hf:"), source.startswith("hf:")
    if online or (Path(location).expanduser() / "config.json").is_file():
        config = read_config(location, name=source, online=online)
        if config.model_type == "clip_text_model":
            kind = import_extra("transformers", "hf", f"Loading {source}").CLIPTextModel
            module = load_weights(kind, location, config, name=source, online=online)
            return _read_transformers(module, config, source, None)
    return read_text_tower(load_model(source))


def read_text_tower(encoder: DualEncoder) -> TextTower:
    """Read the text tower of an open_clip `CLIP` or `CustomTextCLIP`, or of a `CLIPModel`.

    The weights are the model's own, not copies, unless adapters have to be merged.
    """
    module: Any = encoder.module
    if hasattr(encoder.wrapper, "merge_and_unload"):
        module = copy.deepcopy(encoder.wrapper).merge_and_unload()  # type: ignore[union-attr, operator]
    if kind_of(module) is not None:
        return _read_open_clip(module, encoder.name, encoder.text_tokenizer)
    if module.config.model_type != "clip":
        raise _not_clip(encoder.name, f"it is a {type(module).__name__}")
    config = module.config.text_config
    return _read_transformers(module.text_model, config, encoder.name, encoder.text_tokenizer)


def build_text_encoder(tower: TextTower, like: Any, *, argument: str) -> Any:
    """Return a copy of the `CLIPTextModel` `like` with the weights of `tower`.

    If `like` has fewer blocks, the first ones of the tower are taken: Stable Diffusion 2 leaves out
    the last one. Its configuration, device and dtype stay. Errors name the `argument` of the tower.
    """
    differences = [
        f"{title} {tower.config[field]} instead of {getattr(like.config, field)}"
        for field, title in _SHARED.items()
        if tower.config[field] != getattr(like.config, field)
    ]
    num_layers = like.config.num_hidden_layers
    if tower.num_layers < num_layers:
        differences.append(f"{tower.num_layers} blocks instead of {num_layers} or more")
    if differences:
        raise InputError(
            f"{argument}: the text tower of {tower.name} does not fit the pipeline's text encoder: "
            f"{', '.join(differences)}. Erase from the CLIP whose text tower the pipeline was "
            "trained with: for Stable Diffusion 1 'ViT-L-14/openai' or "
            "'hf:openai/clip-vit-large-patch14', for 2 'ViT-H-14/laion2b_s32b_b79k'."
        )
    left_out = tuple(f"encoder.layers.{i}." for i in range(num_layers, tower.num_layers))
    built = copy.deepcopy(like)
    _inner(built).load_state_dict(
        {name: tensor for name, tensor in tower.state.items() if not name.startswith(left_out)}
    )
    return built


def _inner(text_model: Any) -> Any:
    # A module of its own inside `CLIPTextModel`, until transformers 5 did away with it.
    return getattr(text_model, "text_model", text_model)


def _read_transformers(
    module: nn.Module, config: Any, name: str, tokenize: Callable[[Sequence[str]], Tokens] | None
) -> TextTower:
    return TextTower(
        name,
        {field: getattr(config, field) for field in _SHARED},
        config.num_hidden_layers,
        plain_state(_inner(module)),
        tokenize,
    )


def _read_open_clip(
    module: Any, name: str, tokenize: Callable[[Sequence[str]], Tokens] | None
) -> TextTower:
    text = text_tower(module)
    if is_hf_text(text):
        raise _not_clip(name, "it is a transformers model inside open_clip")
    if text.attn_mask is None:
        raise _not_clip(name, "its tokens also attend to later ones")
    state = {}
    for key, tensor in plain_state(text).items():
        if key.startswith(_NO_TOWER):
            continue
        parts = {key: tensor}
        if ".attn.in_proj_" in key:  # queries, keys and values, one below the other
            thirds = zip("qkv", tensor.chunk(3), strict=True)
            parts = {key.replace("in_proj_", f"{letter}_proj."): part for letter, part in thirds}
        for old, part in parts.items():
            new = [re.sub(p, renamed, old) for p, renamed in _RENAMED.items() if re.match(p, old)]
            if not new:
                raise _not_clip(name, f"it has weights named {key}")
            state[new[0]] = part
    blocks = text.transformer.resblocks
    config = {
        "hidden_size": blocks[0].attn.embed_dim,
        "intermediate_size": blocks[0].mlp.c_fc.out_features,
        "num_attention_heads": blocks[0].attn.num_heads,
        "hidden_act": _activation(blocks[0].mlp.gelu),
        "vocab_size": len(text.token_embedding.weight),
        "max_position_embeddings": len(text.positional_embedding),
        "layer_norm_eps": text.ln_final.eps,
    }
    return TextTower(name, config, len(blocks), state, tokenize)


def _activation(module: Any) -> str:
    """Name an activation of open_clip as transformers does."""
    if type(module).__name__ == "QuickGELU":
        return "quick_gelu"
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_pytorch_tanh"
    return type(module).__name__


def _not_clip(name: str, reason: str) -> InputError:
    return InputError(
        f"model: the text tower of {name} is not CLIP's ({reason}), so it cannot be the text "
        "encoder of Stable Diffusion. Give a CLIP with a text tower of its own."
    )
