"""A model's architecture without its weights, built from its configuration.

Its tensors are on the meta device; for a trace they become torch's fake ones, which have no storage
either but say that they are on a CPU: these run under autocast, and with fused attention.
"""

from __future__ import annotations

import copy
import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fasterase.errors import InputError
from fasterase.models import huggingface, openclip
from fasterase.models.dual_encoder import DualEncoder
from fasterase.models.load import load_model
from fasterase.models.openclip_config import Config, build_from_config
from fasterase.models.prefix import SplitTower
from fasterase.option_values import suggest_names

_FORMS = (
    'an open_clip name ("ViT-B-32", with or without "/tag"), "hf-hub:org/name" (open_clip), '
    '"hf:org/name" (transformers), a folder with open_clip_config.json or config.json, a '
    "transformers CLIPConfig, SiglipConfig or Siglip2Config, or a model"
)


def build_architecture(
    model: nn.Module | DualEncoder | str | os.PathLike[str] | Any,
) -> DualEncoder:
    """Return the model with plain meta tensors in place of its weights.

    Weights are neither read nor downloaded. Only the configuration of a name on a hub needs the
    network, unless the hub's cache has it.

    Raises:
        InputError: no configuration, or none of a supported model.
    """
    if isinstance(model, nn.Module | DualEncoder):
        encoder = load_model(model)
        shell = copy.copy(encoder)
        shell.wrapper = None
        shell.module = copy_with(encoder.module, functools.partial(_like, device="meta"))
        return shell
    if not isinstance(model, str | os.PathLike):
        if not hasattr(model, "model_type"):
            raise InputError(f"model: {type(model).__name__} is not a model. Give {_FORMS}")
        return huggingface.from_config(model, name=type(model).__name__)
    name = os.fspath(model)
    folder = Path(name.removeprefix("local-dir:")).expanduser()
    if folder.is_dir():
        return _from_folder(folder)
    if name.startswith("hf-hub:"):
        return _from_open_clip(_hub_config(name), name)
    if name.startswith("hf:"):
        config = huggingface.read_config(name.removeprefix("hf:"), name=name, online=True)
        return huggingface.from_config(config, name=name)
    return _from_name(name)


def fake_device() -> FakeTensorMode:
    """Return a mode in which new tensors have a shape, a dtype and a CPU, but no storage."""
    # Small constants that libraries keep outside of parameters and buffers stay real.
    return FakeTensorMode(allow_non_fake_inputs=True)


def copy_to_fake_device(model: DualEncoder) -> DualEncoder:
    """Copy a model of meta tensors; call it inside a `fake_device`."""
    fake = copy.copy(model)
    fake.module = copy_with(model.module, functools.partial(_like, device="cpu"))
    return fake


def frozen_widths(model: DualEncoder, tune: str) -> dict[str, int]:
    """Return tower -> how many numbers the blocks that `tune` freezes put out for a pair.

    Raises:
        InputError: see `SplitTower`.
    """
    with fake_device():
        fake = copy_to_fake_device(model)
        return {tower: SplitTower(fake, tower, tune).width for tower in ("image", "text")}


def copy_with(module: nn.Module, replace: Any) -> nn.Module:
    """Copy a module, with `replace(tensor)` instead of every tensor it holds.

    Shared tensors stay shared, and none is copied.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        for value in [*part._parameters.values(), *part._buffers.values(), *vars(part).values()]:
            if isinstance(value, Tensor) and id(value) not in memo:
                memo[id(value)] = replace(value)
    return copy.deepcopy(module, memo)


def _like(tensor: Tensor, *, device: str) -> Tensor:
    new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(new, requires_grad=tensor.requires_grad)
    return new


def _from_folder(folder: Path) -> DualEncoder:
    if (folder / openclip.CONFIG_FILE).is_file():
        import open_clip

        return _from_open_clip(open_clip.get_model_config(f"local-dir:{folder}"), str(folder))
    if (folder / "config.json").is_file():
        config = huggingface.read_config(str(folder), name=str(folder), online=False)
        return huggingface.from_config(config, name=str(folder))
    raise InputError(
        f"model: {folder} holds neither {openclip.CONFIG_FILE} (open_clip) nor config.json "
        "(transformers), so its architecture is unknown"
    )


def _from_name(name: str) -> DualEncoder:
    import open_clip

    architecture, _, tag = name.partition("/")
    config = open_clip.get_model_config(architecture)
    if config is None:
        hint = suggest_names(architecture, open_clip.list_models(), otherwise="")
        raise InputError(
            f"model: {name!r} is neither an open_clip model nor a folder here.{hint} Give {_FORMS}"
        )
    if tag and open_clip.get_pretrained_cfg(architecture, tag).get("quick_gelu"):
        config["quick_gelu"] = True
    return _from_open_clip(config, name)


def _hub_config(name: str) -> Config:
    import open_clip

    try:
        return open_clip.get_model_config(name)
    except Exception as error:
        raise _no_configuration(name, error) from error


def _from_open_clip(config: Config, name: str) -> DualEncoder:
    try:
        module = build_from_config(config)
    except Exception as error:
        raise _no_configuration(name, error) from error
    return openclip.OpenClipEncoder(module.eval(), name=name, config=config, source=None)


def _no_configuration(name: str, error: Exception) -> InputError:
    return InputError(
        f"model: the configuration of {name} could not be used: {error}. A plan needs no weights, "
        "but the configuration must be on this machine or reachable over the network (see "
        "HF_HUB_OFFLINE and the hub's cache); a folder that holds it works without network"
    )
