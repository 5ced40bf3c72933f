"""open_clip weights in a single file: a checkpoint of its training, or a bare state dict."""

from __future__ import annotations

import math
import pickle
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import Tensor

from fasterase.errors import InputError
from fasterase.models.openclip import OpenClipEncoder
from fasterase.models.openclip_config import (
    Config,
    Shapes,
    adjust_config,
    comparable,
    shapes_of_config,
    shapes_of_state,
)
from fasterase.models.preprocessing import read_size

_RESNET_STRIDE = 32  # pixels per cell of the last feature map


def from_checkpoint(
    file: Path, *, model_name: str | None, tokenizer: Any, preprocess: Any
) -> OpenClipEncoder:
    """Load a weights file; only tensors are unpickled, and none may be missing.

    Options of the training that the weights show are followed (see `_as_trained`). A file says
    nothing of preprocessing: without `preprocess` it is open_clip's standard one.

    Args:
        file: a checkpoint that open_clip's training wrote, or a state dict, also as safetensors.
        model_name: open_clip's name of the architecture; None: the one with weights of these
            shapes, with a warning where several differ in what weights do not show.
        tokenizer, preprocess: the caller's, which take precedence.

    Raises:
        InputError: the file holds no readable open_clip weights; `model_name` does not fit them;
            or without it no known architecture does.
    """
    import open_clip

    state = _read(file)
    if model_name is None:
        model_name = _recognise(state, file)
    config = open_clip.get_model_config(model_name)
    if config is None:
        raise InputError(
            f"model_name: open_clip knows no {model_name!r}; see open_clip.list_models(), or "
            "register a configuration with open_clip.add_model_config(path)"
        )
    trained = _as_trained(state, config)
    bias = {name: trained[name] for name in ("init_logit_bias",) if name in trained}
    try:
        module = open_clip.create_model(
            model_name,
            load_weights=False,
            pretrained_text=False,
            force_custom_text=trained.get("custom_text", False),
            force_image_size=trained["vision_cfg"].get("image_size"),
            force_context_length=trained["text_cfg"].get("context_length"),
            **bias,
        ).eval()
        open_clip.load_checkpoint(module, str(file), strict=True, weights_only=True)
    except Exception as error:
        raise InputError(
            f"model_name: the weights in {file} do not fit {model_name!r}: {error}. Name the "
            "architecture that they were trained with"
        ) from error
    return OpenClipEncoder(
        module,
        name=f"{model_name} ({file.name})",
        config=adjust_config(trained, module),
        source=model_name,
        tokenizer=tokenizer,
        preprocess=preprocess,
    )


def _read(file: Path) -> dict[str, Tensor]:
    """Read the state dict, without the prefix that data-parallel training gives it."""
    from open_clip.factory import load_state_dict
    from safetensors import SafetensorError

    try:
        state = load_state_dict(str(file), weights_only=True)
    # torch raises RuntimeError for damaged archives and TorchScript, EOFError for empty files; the
    # library AttributeError and StopIteration for objects that are no state dict.
    except (
        OSError,
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
        SafetensorError,
        AttributeError,
        TypeError,
        ValueError,
        StopIteration,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"model: {file} cannot be read as weights: {reason} Only tensors are loaded "
            "(weights_only=True). Give a checkpoint of open_clip's training or the state dict of a "
            "model; weights that OpenAI published load by name, as in 'ViT-B-32/openai'"
        ) from error
    if not any(name.startswith("visual.") for name in state):
        found = ", ".join(list(state)[:3])
        raise InputError(
            f"model: {file} holds no weights of an open_clip model (it begins with {found}). Give "
            "a file with open_clip's state dict, or the folder of a transformers model"
        )
    return state


def _recognise(state: dict[str, Tensor], file: Path) -> str:
    """Find the name of the architecture that has weights of these shapes."""
    import open_clip

    shapes = shapes_of_state(state)
    found: dict[str, Config] = {}
    for name in open_clip.list_models():
        config = _as_trained(state, open_clip.get_model_config(name))
        if _may_match(config, shapes) and shapes_of_config(config) == shapes:
            found[name] = config
    if not found:
        raise InputError(
            f"model: the weights in {file} have the shapes of no architecture that open_clip "
            "knows. Give model_name=, its name after open_clip.add_model_config(path), or build "
            "the module, load the weights and pass the module"
        )
    first, *others = found
    different = [name for name in others if comparable(found[name]) != comparable(found[first])]
    if different:
        warnings.warn(
            f"model: {file} is taken for {first}, but its weights have the shapes of "
            f"{', '.join(different)} too, and weights do not show the difference (an activation, "
            "as a rule). Give model_name= to be sure",
            stacklevel=4,
        )
    return first


def _may_match(config: Config, shapes: Shapes) -> bool:
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


def _as_trained(state: dict[str, Tensor], config: Config) -> Config:
    """Copy `config` with the options of open_clip's training that the weights show.

    These are the image size, the context length, a logit_bias (`--siglip`) and a text tower of its
    own (`--force-custom-text`).
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
