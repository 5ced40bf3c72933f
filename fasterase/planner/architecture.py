"""A model's architecture without its weights, built from its configuration, on the meta device."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, empty_like, nn

from fasterase.errors import InputError
from fasterase.models import huggingface, openclip
from fasterase.models.dual_encoder import DualEncoder
from fasterase.models.load import load_model
from fasterase.models.openclip_config import build_from_config
from fasterase.option_values import suggest_names

_FORMS = (
    'an open_clip name ("ViT-B-32", with or without "/tag"), "hf-hub:org/name" (open_clip), '
    '"hf:org/name" (transformers), a folder with open_clip_config.json or config.json, a '
    "transformers CLIPConfig, SiglipConfig or Siglip2Config, or a model"
)


def build_architecture(
    model: nn.Module | DualEncoder | str | os.PathLike[str] | Any,
) -> DualEncoder:
    """Return the model with meta tensors in place of its weights.

    Weights are neither read nor downloaded. Only the configuration of a name on a hub needs the
    network, unless the hub's cache has it.

    Raises:
        InputError: no configuration, or none of a supported model.
    """
    if isinstance(model, nn.Module | DualEncoder):
        return copy_with(load_model(model), lambda tensor: empty_like(tensor, device="meta"))
    if not isinstance(model, str | os.PathLike):
        if not hasattr(model, "model_type"):
            raise InputError(f"model: {type(model).__name__} is not a model. Give {_FORMS}")
        return huggingface.from_config(model, name=type(model).__name__)
    name = os.fspath(model)
    folder = Path(name.removeprefix("local-dir:")).expanduser()
    if (folder / openclip.CONFIG_FILE).is_file():
        return _from_open_clip(f"local-dir:{folder}", name=str(folder))
    if name.startswith("hf:") or (folder / "config.json").is_file():
        online = name.startswith("hf:")
        source = name.removeprefix("hf:") if online else str(folder)
        config = huggingface.read_config(source, name=name, online=online)
        return huggingface.from_config(config, name=name)
    if folder.is_dir():
        raise InputError(
            f"model: {folder} holds neither {openclip.CONFIG_FILE} (open_clip) nor config.json "
            "(transformers), so its architecture is unknown"
        )
    return _from_open_clip(name, name=name)


def copy_with(model: DualEncoder, make: Callable[[Tensor], Tensor]) -> DualEncoder:
    """Copy a model with `make(tensor)` in place of every tensor; shared tensors stay shared."""
    memo: dict[int, Any] = {}
    for part in model.module.modules():
        for value in [*part._parameters.values(), *part._buffers.values(), *vars(part).values()]:
            if isinstance(value, nn.Parameter):
                new = make(value.detach())
                memo[id(value)] = nn.Parameter(new, requires_grad=value.requires_grad)
            elif isinstance(value, Tensor):
                memo[id(value)] = make(value)
    copied = copy.copy(model)
    copied.wrapper = None
    copied.module = copy.deepcopy(model.module, memo)
    return copied


def _from_open_clip(source: str, *, name: str) -> DualEncoder:
    """Build what open_clip calls `source`: a name, with or without a tag, or one with a schema."""
    import open_clip

    architecture, _, tag = (source, "", "") if ":" in source else source.partition("/")
    try:
        config = open_clip.get_model_config(architecture)
        if config is not None:
            if tag and open_clip.get_pretrained_cfg(architecture, tag).get("quick_gelu"):
                config["quick_gelu"] = True
            module = build_from_config(config).eval()
            return openclip.OpenClipEncoder(module, name=name, config=config, source=None)
    except Exception as error:
        raise InputError(
            f"model: the configuration of {name} could not be used: {error}. A plan needs no "
            "weights, but the configuration must be on this machine or reachable over the network "
            "(see HF_HUB_OFFLINE and the hub's cache); a folder that holds it works without network"
        ) from error
    hint = suggest_names(architecture, open_clip.list_models(), otherwise="")
    raise InputError(
        f"model: {name!r} is neither an open_clip model nor a folder here.{hint} Give {_FORMS}"
    )
