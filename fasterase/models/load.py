"""Load a model given as an instance, a name, a hub id or a folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fasterase.errors import InputError
from fasterase.files import MARKER
from fasterase.models import huggingface, openclip
from fasterase.models.dual_encoder import DualEncoder, copy_with
from fasterase.models.openclip import CONFIG_FILE
from fasterase.models.openclip_config import kind_of
from fasterase.models.preprocessing import Companions, remember, remembered
from fasterase.models.wrapped import PEFT_CONFIG, load_adapters, unwrap
from fasterase.option_values import suggest_names

_FORMS = (
    'an open_clip or transformers CLIP model, "ViT-B-32/laion2b_s34b_b79k" (open_clip name/tag), '
    '"hf-hub:org/name" (open_clip), "hf:org/name" (transformers), a folder that either library '
    'or fasterase wrote, or "weights.pt" (open_clip checkpoint)'
)
# What an erasure changed, written by fasterase/models/delta.py: no model by itself.
DELTA_FILE = "delta.safetensors"
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")

_Given = nn.Module | DualEncoder | str | os.PathLike[str]


def load_model(
    model: _Given,
    *,
    tokenizer: Any = None,
    preprocess: Any = None,
    model_name: str | None = None,
) -> DualEncoder:
    """Adapt or load a CLIP model; what a string names is loaded in fp32, never with random weights.

    Args:
        model: one of `_FORMS`; an instance may be in a `PeftModel`, a `DataParallel` or compiled.
        tokenizer: open_clip tokenizer, transformers tokenizer or processor, or any callable list of
            str -> [B, L] ids; by default the one an earlier call knew, or the model's own.
        preprocess: callable PIL image -> [3, H, W] float tensor, or a transformers image processor
            or processor; by default likewise. A processor gives both where the other is None.
        model_name: open_clip's architecture name, for an open_clip instance or checkpoint whose
            architecture cannot be inferred.

    Raises:
        InputError: names the unusable argument.
        MissingExtraError: the library that reads the model is not installed.
    """
    if isinstance(model, DualEncoder):
        return model
    given = Companions.from_arguments(tokenizer, preprocess)
    if isinstance(model, nn.Module):
        return _adapt(model, given, model_name)
    if not isinstance(model, (str, os.PathLike)):
        raise InputError(f"model: {type(model).__name__} is not a model. Give {_FORMS}")
    encoder = _load(model, given, model_name)
    remember(encoder.module, encoder.companions)
    return encoder


def load_architecture(model: _Given | Any) -> DualEncoder:
    """Return a model in any form that `load_model` takes with meta tensors in place of its weights.

    An open_clip name needs no tag, and a transformers configuration will do. Only the weights of a
    checkpoint file are read, and only the configuration of a name on a hub needs the network.

    Raises:
        InputError: no configuration, or none of a supported model.
    """
    if isinstance(model, (str, os.PathLike)):
        encoder = _load(model, Companions(), None, empty=True)
    elif hasattr(model, "model_type") and not isinstance(model, nn.Module):
        return huggingface.from_config(model, name=type(model).__name__)
    else:
        encoder = load_model(model)
    return copy_with(encoder, lambda tensor: torch.empty_like(tensor, device="meta"))


def load_compared(
    name: str,
    model: _Given,
    *,
    tokenizer: Any = None,
    preprocess: Any = None,
    model_name: str | None = None,
) -> DualEncoder:
    """Load one of several models that are compared; an error names the argument it came from.

    `name` is `"model"`, `"original"` or the name of a reference. `model_name` is not used where the
    model says its architecture itself.
    """
    try:
        used_name = model_name if _takes_model_name(model) else None
        return load_model(model, tokenizer=tokenizer, preprocess=preprocess, model_name=used_name)
    except InputError as error:
        if name == "model":
            raise
        argument = name if name == "original" else f"references[{name!r}]"
        raise type(error)(f"{argument}: {error}") from error


def check_model_name(model_name: str | None, models: Iterable[object]) -> None:
    """Raise `InputError` for a name that none of the compared models has a use for."""
    if model_name is not None and not any(map(_takes_model_name, models)):
        raise InputError(
            f"model_name: {model_name!r} is for open_clip instances and checkpoint files; none of "
            "the models is one. Leave it out."
        )


def _takes_model_name(model: object) -> bool:
    if isinstance(model, nn.Module):
        return kind_of(unwrap(model)) is not None
    return isinstance(model, (str, os.PathLike)) and _is_weights_file(Path(model).expanduser())


def _is_weights_file(file: Path) -> bool:
    return file.suffix in _WEIGHT_FILES and file.is_file()


def _adapt(given: nn.Module, companions: Companions, model_name: str | None) -> DualEncoder:
    module = unwrap(given)
    companions = companions.or_else(remembered(module))
    encoder: DualEncoder
    if kind_of(module) is not None:
        encoder = openclip.from_instance(module, companions, model_name)
    elif huggingface.is_transformers(module):
        if model_name is not None:
            raise InputError(
                f"model_name: {model_name!r} names an open_clip architecture, but the model is a "
                f"{type(module).__name__} of transformers; leave model_name out"
            )
        encoder = huggingface.from_instance(module, companions)
    else:
        inner = getattr(module, "module", None)
        raise InputError(
            f"model: {type(module).__name__} wraps a {type(inner).__name__}; pass the model inside"
            if isinstance(inner, nn.Module)
            else f"model: {type(module).__name__} is not a supported CLIP model. Give {_FORMS}"
        )
    encoder.wrapper = None if module is given else given
    return encoder


def _load(
    model: str | os.PathLike[str],
    given: Companions,
    model_name: str | None,
    *,
    empty: bool = False,  # on the meta device, without weights, where a configuration will do
) -> DualEncoder:
    name = os.fspath(model)
    file = Path(name).expanduser()
    if _is_weights_file(file):
        return openclip.from_checkpoint(file, given, model_name)
    if model_name is not None:
        raise InputError(
            f"model_name: {model_name!r} is for open_clip instances and checkpoint files; "
            f"{name!r} already says what to load"
        )
    folder = Path(name.removeprefix("local-dir:")).expanduser()
    is_folder = isinstance(model, os.PathLike) or name.startswith("local-dir:")
    if is_folder or (name and folder.is_dir()):
        return _load_folder(folder, given, empty)
    if name.startswith("hf-hub:"):
        return openclip.from_source(name, given, name=name, empty=empty)
    if name.startswith("hf:"):
        source = os.path.expanduser(name.removeprefix("hf:"))
        is_here = os.path.isdir(source)
        name = source if is_here else name
        return huggingface.from_source(source, given, name=name, online=not is_here, empty=empty)
    return _load_named(name, given, empty)


def _load_folder(folder: Path, given: Companions, empty: bool) -> DualEncoder:
    def holds(name: str) -> bool:
        return (folder / name).is_file()

    if not folder.is_dir():
        raise _no_folder(folder)
    if holds(DELTA_FILE):
        raise InputError(
            f"model: {folder} holds only what an erasure changed; load the original model and put "
            "it on with fasterase.apply_delta(model, folder)"
        )
    if holds(PEFT_CONFIG) and not empty:
        return _load_adapter(folder, given)
    name = str(folder)
    if holds(CONFIG_FILE):
        return openclip.from_source(f"local-dir:{folder}", given, name=name, empty=empty)
    if holds("config.json"):
        return huggingface.from_source(name, given, name=name, online=False, empty=empty)
    if holds(MARKER):
        raise InputError(
            f"model: {folder} holds weights of an architecture that open_clip does not describe; "
            "build the module yourself, load the weights as its README.md says, and pass the module"
        )
    raise InputError(
        f"model: {folder} holds neither {CONFIG_FILE} (open_clip) nor config.json "
        "(transformers), so it is not a model folder"
    )


def _load_adapter(folder: Path, given: Companions) -> DualEncoder:
    config = json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not base:
        raise InputError(
            f"model: {folder} holds an adapter and does not say for which model. Load that model, "
            f"put the adapter on it with peft.PeftModel.from_pretrained(model, {str(folder)!r}), "
            "and pass the result"
        )
    beside = folder / base  # `save_adapters` names a base by its path from there
    base = str(beside) if beside.is_dir() else base
    encoder = huggingface.from_source(base, given, name=str(folder), online=True)
    encoder.wrapper = load_adapters(encoder.module, folder)
    return encoder


def _load_named(name: str, given: Companions, empty: bool) -> DualEncoder:
    import open_clip as library

    architecture, _, tag = name.partition("/")
    if architecture in library.list_models():
        return openclip.from_name(architecture, tag, given, empty=empty)
    if name.startswith((".", "~", "/")) or os.sep * 2 in name or Path(name).suffix in _WEIGHT_FILES:
        raise _no_folder(Path(name).expanduser())
    hint = suggest_names(architecture, library.list_models(), otherwise="").rstrip()
    if not hint and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        hint = f" Did you mean hf:{name} (transformers), or hf-hub:{name} (open_clip)?"
    raise InputError(
        f"model: {name!r} is neither an open_clip model nor a folder here.{hint} Give {_FORMS}"
    )


def _no_folder(path: Path) -> InputError:
    found = "is a file" if path.exists() else "does not exist"
    return InputError(f"model: {path} {found}; a folder with a saved model is needed")
