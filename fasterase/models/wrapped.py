"""What callers put around or into a CLIP model: wrappers, compilation, adapters, quantisation.

Adapters are peft's: in a model around which it put a `PeftModel`, or injected by hand. Nothing here
imports peft unless the caller has, for without it no model holds an adapter.
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
from fasterase.numerals import counted

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
# peft's own prefix: the path from a `PeftModel` to the model inside.
PEFT_PREFIX = "base_model.model."


def unwrap(module: nn.Module) -> nn.Module:
    """Return the model inside `DataParallel`, `torch.compile` and `PeftModel`, or itself."""
    while (inner := _inside(module)) is not None:
        module = inner
    return module


def _inside(module: Any) -> nn.Module | None:
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return module.module
    if uncompiled(module) is not module:
        warnings.warn(
            "model: it is compiled, and fasterase runs the module inside without compilation. The "
            "compiled one shares its weights, so it has the erased ones too",
            stacklevel=2,
        )
        return uncompiled(module)
    peft: Any = sys.modules.get("peft")
    if peft is None or not isinstance(module, peft.PeftModel):
        return None
    if module.active_peft_config.is_prompt_learning:
        raise InputError(
            "model: this PeftModel learns a prompt, which the towers of a CLIP model never see. "
            "Use adapters inside the towers, such as peft.LoraConfig"
        )
    return module.get_base_model()


def uncompiled(module: Any) -> Any:
    """Return the module inside what `torch.compile` made of it, or itself."""
    # Importing torch._dynamo takes a second, and without it nothing is compiled.
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is None or not isinstance(module, dynamo.OptimizedModule):
        return module
    return module._orig_mod


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict under the names it has without adapters and compiled parts.

    The weights of adapters are left out, and what is no tensor (packed, quantised weights).
    """
    originals = {path: _original_attribute(part) for path, part in module.named_modules()}
    inner = {path: attribute for path, attribute in originals.items() if attribute is not None}
    named = ((_plain_name(name, inner), value) for name, value in module.state_dict().items())
    return {name: value for name, value in named if name is not None and isinstance(value, Tensor)}


def _original_attribute(part: nn.Module) -> str | None:
    """Return the attribute where a compiled or adapted part keeps the original one, else None."""
    if uncompiled(part) is not part:
        return "_orig_mod"
    if sys.modules.get("peft") is None:
        return None
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(part, BaseTunerLayer):
        return "base_layer"
    if not isinstance(part, AuxiliaryTrainingWrapper):
        return None
    return "token_adapter" if hasattr(part, "token_adapter") else "original_module"


def _plain_name(name: str, inner: dict[str, str]) -> str | None:
    """Leave `inner` attributes out of a dotted name; None for what only the wrapper holds."""
    path, plain = "", []
    for part in name.split("."):
        if path not in inner:
            plain.append(part)
        elif part != inner[path]:
            return None
        path = f"{path}.{part}" if path else part
    return ".".join(plain)


def check_trainable(module: nn.Module, name: str) -> None:
    """Refuse weights that no optimiser could change, or that would change without effect."""
    for parameter in module.parameters():
        if parameter.is_inference():
            raise InputError(
                f"model: the weights of {name} were made in torch.inference_mode(), and PyTorch "
                "refuses to train those. Load the model outside of it, or pass copy=True"
            )
        if type(parameter.data).__module__.startswith("torch.distributed.tensor"):
            raise InputError(
                f"model: {name} is sharded (FSDP or tensor parallelism). Pass it whole, before it "
                "is sharded: fasterase shards a model itself, with deepspeed='zero3'"
            )
    for layer in _adapted_layers(module):
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
    quantised = next(_quantised(module), None)
    if quantised is not None and not has_adapters(module):
        raise InputError(
            f"model: {quantised} of {name} is quantised, and quantised weights cannot be trained. "
            "Pass the model as it was before quantisation (without quantization_config) and "
            "quantise the result; or put adapters on it (peft.get_peft_model) and pass that"
        )


def _quantised(module: nn.Module) -> Iterator[str]:
    for name, part in module.named_modules():
        if "quantized" in type(part).__module__.split("."):  # torch.ao packs weights out of sight
            yield name
        for own, parameter in part.named_parameters(recurse=False):
            whole = not parameter.is_floating_point() or parameter.dtype.itemsize == 1
            if whole or type(parameter.data).__module__.startswith("torchao."):
                yield f"{name}.{own}"


def has_adapters(module: nn.Module) -> bool:
    """Whether any layer carries an adapter."""
    return next(_adapted_layers(module), None) is not None


def _adapted_layers(module: nn.Module) -> Iterator[Any]:
    return (part for part in module.modules() if _original_attribute(part) == "base_layer")


def save_adapters(module: nn.Module, folder: Path, *, home: Path) -> None:
    """Write what `PeftModel.from_pretrained(base, folder)` and `load_adapter(folder)` read.

    The active adapter is written to `folder` itself and any other to a folder of its name in it,
    as peft does. Trained weights that belong to no adapter are not written, with a warning. `home`
    is where `folder` will be.
    """
    from peft import get_peft_model_state_dict

    configs: Any = module.peft_config
    active = next(_adapted_layers(module)).active_adapters[0]
    saved: set[int] = set()
    for name, config in configs.items():
        inside = "" if name == active else name
        # The base's own embeddings are never trained: no need to look up whether they changed.
        state = get_peft_model_state_dict(module, adapter_name=name, save_embedding_layers=False)
        saved |= {tensor.data_ptr() for tensor in state.values()}
        write_adapter(config, state, module, folder / inside, home=home / inside)
    left_out = [
        name
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and parameter.data_ptr() not in saved
    ]
    if left_out:
        warnings.warn(
            f"{counted(len(left_out), 'trained weight')} outside the adapters will not be saved: "
            f"{', '.join(left_out[:3])}{', ...' if len(left_out) > 3 else ''}. Name such in the "
            "adapter's modules_to_save, or save the state dict of result.model yourself",
            stacklevel=4,
        )


def write_adapter(
    config: Any, state: Mapping[str, Tensor], module: nn.Module, folder: Path, *, home: Path
) -> None:
    """Write one adapter of `module` as peft reads it; `folder` will be in the place of `home`."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    written = {
        f"{PEFT_PREFIX}{key.removeprefix(PEFT_PREFIX)}": tensor.detach().cpu().contiguous().clone()
        for key, tensor in state.items()
    }
    save_file(written, folder / PEFT_WEIGHTS, {"format": "pt"})
    described = copy.copy(config)
    described.inference_mode = True
    base = described.base_model_name_or_path or getattr(module, "name_or_path", None) or None
    described.base_model_name_or_path = _name_base(base, home)
    if described.auto_mapping is None and described.task_type is None:
        described.auto_mapping = {
            "base_model_class": type(module).__name__,
            "parent_library": type(module).__module__,
        }
    described.save_pretrained(str(folder))


def _name_base(base: str | None, home: Path) -> str | None:
    """Return how the adapter in `home` names its base: a folder by its path from there.

    Where that would lead through the root, and so tell all of it, only the name is given.
    """
    if base is None or not os.path.isdir(base):
        return os.path.basename(base) if base and os.path.isabs(base) else base
    base, here = os.path.realpath(base), os.path.realpath(home)
    shared = os.path.commonpath([base, here])
    return os.path.basename(base) if shared == os.sep else os.path.relpath(base, here)


def load_adapters(base: nn.Module, folder: Path) -> nn.Module:
    """Put the adapters that `folder` holds around `base`, ready to train; `InputError` if not."""
    peft: Any = import_extra("peft", "peft", f"Loading the adapter in {folder}")
    try:
        return peft.PeftModel.from_pretrained(base, str(folder), is_trainable=True).eval()
    except Exception as error:
        raise InputError(
            f"model: peft could not put the adapter in {folder} on its base model: {error}"
        ) from error
