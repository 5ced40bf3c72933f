"""Adapters of the peft library: in a model around which it put a `PeftModel`, or injected by hand.

Nothing here imports peft unless the caller has, for without it no model holds an adapter.
"""

from __future__ import annotations

import copy
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fasterase.errors import InputError, import_extra

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# peft's own prefix: the path from a `PeftModel` to the model inside.
PREFIX = "base_model.model."


def base_of(module: nn.Module) -> nn.Module | None:
    """Return the model inside a `PeftModel`, adapters included; None for any other module.

    Raises:
        InputError: the adapter is a prompt, which acts outside the towers.
    """
    peft: Any = sys.modules.get("peft")
    if peft is None or not isinstance(module, peft.PeftModel):
        return None
    if module.active_peft_config.is_prompt_learning:
        raise InputError(
            "model: this PeftModel learns a prompt, which the towers of a CLIP model never see. "
            "Use adapters inside the towers, such as peft.LoraConfig"
        )
    return module.get_base_model()


def has_adapters(module: nn.Module) -> bool:
    """Whether any layer carries an adapter."""
    return next(_layers(module), None) is not None


def original_attribute(part: nn.Module) -> str | None:
    """Return the attribute where an adapted layer keeps the original one; None for other layers."""
    if sys.modules.get("peft") is None:
        return None
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(part, BaseTunerLayer):
        return "base_layer"
    return "original_module" if isinstance(part, AuxiliaryTrainingWrapper) else None


def check_active(module: nn.Module) -> None:
    """Refuse adapters that are merged into the weights or switched off: training changes nothing.

    Raises:
        InputError: some are.
    """
    for layer in _layers(module):
        if layer.merged:
            raise InputError(
                "model: its adapters are merged into the weights, so training them would change "
                "nothing. Call unmerge_adapter() first; or, to train all weights, pass "
                "merge_and_unload()"
            )
        if layer.disable_adapters:
            raise InputError(
                "model: its adapters are disabled, so training them would change nothing. Enable "
                "them (enable_adapter_layers() or enable_adapters()) first"
            )


def save_adapters(module: nn.Module, folder: Path, *, home: Path) -> None:
    """Write what `PeftModel.from_pretrained(base, folder)` and `load_adapter(folder)` read.

    The active adapter is written to `folder` itself and any other to a folder of its name in it,
    as peft does. Trained weights that belong to no adapter are not written, with a warning. `home`
    is where `folder` will be.
    """
    from peft import get_peft_model_state_dict

    configs: Any = module.peft_config
    active = next(_layers(module)).active_adapters[0]
    saved: set[int] = set()
    for name, config in configs.items():
        inside = "" if name == active else name
        # The base's own embeddings are never trained: no need to look up whether they changed.
        state = get_peft_model_state_dict(module, adapter_name=name, save_embedding_layers=False)
        saved |= {tensor.data_ptr() for tensor in state.values()}
        write_adapter(config, state, module, folder / inside, home=home / inside)
    (folder / "README.md").write_text(_README, encoding="utf-8")
    left_out = [
        name
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and parameter.data_ptr() not in saved
    ]
    if left_out:
        warnings.warn(
            f"{len(left_out)} trained weights belong to no adapter and are not saved with them: "
            f"{', '.join(left_out[:3])}{', ...' if len(left_out) > 3 else ''}. Name them in the "
            "adapter's modules_to_save, or save the state dict of result.model yourself",
            stacklevel=4,
        )


def write_adapter(
    config: Any, state: Mapping[str, Tensor], module: nn.Module, folder: Path, *, home: Path
) -> None:
    """Write one adapter as peft reads it.

    Args:
        config: its configuration, of peft.
        state: its weights, named as `peft.get_peft_model_state_dict` does.
        module: the model that it belongs to.
        folder: made if it is missing.
        home: where it will be.
    """
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    written = {
        f"{PREFIX}{key.removeprefix(PREFIX)}": tensor.detach().cpu().contiguous().clone()
        for key, tensor in state.items()
    }
    save_file(written, folder / WEIGHTS_FILE, {"format": "pt"})
    _describe(config, module, home).save_pretrained(str(folder))


_README = """# Adapters, after unlearning with fasterase

Load the base model as before, then put them on it:

```python
import peft

model = peft.PeftModel.from_pretrained(base_model, "this folder")
```
"""


def load_adapters(base: nn.Module, folder: Path) -> nn.Module:
    """Put the adapters that `folder` holds around `base`, ready to train.

    Raises:
        InputError: they do not fit.
        MissingExtraError: peft is not installed.
    """
    peft: Any = import_extra("peft", "peft", f"Loading the adapter in {folder}")
    try:
        return peft.PeftModel.from_pretrained(base, str(folder), is_trainable=True).eval()
    except Exception as error:
        raise InputError(
            f"model: peft could not put the adapter in {folder} on its base model: {error}"
        ) from error


def _layers(module: nn.Module) -> Iterator[Any]:
    """Yield the layers that carry an adapter."""
    return (part for part in module.modules() if original_attribute(part) == "base_layer")


def find_base(name: str, home: Path) -> str:
    """Return the folder or hub id of the base that the adapter in `home` names."""
    beside = home / name
    return str(beside) if beside.is_dir() else name


def _name_base(base: str | None, home: Path) -> str | None:
    """Return how the adapter in `home` names its base: a folder by its path from there.

    Where that would lead through the root, and so tell all of it, only the name is given.
    """
    if base is None or not os.path.isdir(base):
        return base
    base, here = os.path.realpath(base), os.path.realpath(home)
    shared = os.path.commonpath([base, here])
    return os.path.basename(base) if shared == os.sep else os.path.relpath(base, here)


def _describe(config: Any, module: nn.Module, home: Path) -> Any:
    """Copy an adapter's configuration, with all that peft needs to load it again."""
    written = copy.copy(config)
    written.inference_mode = True
    base = written.base_model_name_or_path or getattr(module, "name_or_path", None) or None
    written.base_model_name_or_path = _name_base(base, home)
    if written.auto_mapping is None and written.task_type is None:
        written.auto_mapping = {
            "base_model_class": type(module).__name__,
            "parent_library": type(module).__module__,
        }
    return written
