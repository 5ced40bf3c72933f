"""What callers put around a CLIP model or do to it: what is inside, and what cannot be trained."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fasterase.errors import InputError
from fasterase.models import adapters


def unwrap(module: nn.Module) -> nn.Module:
    """Return the model inside data-parallel wrappers, `torch.compile` and `PeftModel`, or itself.

    Raises:
        InputError: a `PeftModel` whose adapter is a prompt; it acts outside the towers.
    """
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
    return adapters.base_of(module)


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict under the names it has without adapters and compiled parts.

    The weights of adapters are left out, and what is no tensor (packed, quantised weights).
    """
    originals = {  # path of a part -> its attribute that holds the original part
        path: adapters.original_attribute(part) if uncompiled(part) is part else "_orig_mod"
        for path, part in module.named_modules()
    }
    inner = {path: attribute for path, attribute in originals.items() if attribute is not None}
    state = {k: v for k, v in module.state_dict().items() if isinstance(v, Tensor)}
    if not inner:
        return state
    named = ((_plain_name(name, inner), tensor) for name, tensor in state.items())
    return {name: tensor for name, tensor in named if name is not None}


def _plain_name(name: str, inner: dict[str, str]) -> str | None:
    """Leave `inner` attributes out of a dotted name; None for what only the wrapper holds."""
    path, kept = "", []
    for part in name.split("."):
        if path in inner:
            if part != inner[path]:
                return None
        else:
            kept.append(part)
        path = f"{path}.{part}" if path else part
    return ".".join(kept)


def uncompiled(module: Any) -> Any:
    """Return the module inside what `torch.compile` made of it, or itself."""
    # Importing torch._dynamo takes a second, and without it nothing is compiled.
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is None or not isinstance(module, dynamo.OptimizedModule):
        return module
    return module._orig_mod


def check_trainable(module: nn.Module, name: str) -> None:
    """Refuse weights that no optimiser could change, or that would change without effect.

    Raises:
        InputError: weights made in inference mode; sharded weights; quantised weights without
            adapters; adapters that are merged or disabled.
    """
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
    adapters.check_active(module)
    quantised = next(_quantised(module), None)
    if quantised is not None and not adapters.has_adapters(module):
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
