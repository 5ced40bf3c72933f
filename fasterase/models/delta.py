"""What an erasure changed in a model, as a file that can be put on and taken off again.

`delta.safetensors` holds, for every tensor that changed, `delta/<name>`: erased minus original, in
fp32 (fp64 for fp64 weights). Where adding or subtracting it rounds to a neighbour of the right
value, `erased/<name>` and `original/<name>` hold the right values and `.../<name>/at` their
positions, so that both directions are exact.

After `tune="lora:N"` the differences of the adapted weights are products of two thin matrices.
These are not stored twice: the folder is peft's own, and the metadata name each weight's layer.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasterase.errors import InputError
from fasterase.files import parse_path, replace_model_folder
from fasterase.models.adapters import PREFIX, WEIGHTS_FILE, write_adapter
from fasterase.models.dual_encoder import DualEncoder, frozen_copy
from fasterase.models.load import DELTA_FILE, load_model
from fasterase.models.lora import LoraAdapter, low_rank_product

# The second has adapters.
_FORMATS = ("fasterase-delta-1", "fasterase-delta-2")


def keep_original(
    model: DualEncoder, tune: str, *, logit_scale: bool, buffers: bool
) -> dict[str, Tensor]:
    """Copy to the CPU, in their own dtype, the tensors that a run may change.

    Args:
        model: the model before the run.
        tune: what is trained, as in `DualEncoder.trainable`.
        logit_scale: whether the temperature is trained.
        buffers: whether the run moves buffers (statistics of BatchNorm).

    Raises:
        InputError: see `DualEncoder.trainable`.
    """
    changing: dict[str, Tensor] = dict(model.trainable(tune))
    for name, parameter in model.module.named_parameters():
        if logit_scale and parameter is model.logit_scale:
            changing[name] = parameter
    if buffers:
        changing.update(model.module.named_buffers())
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in changing.items()
    }


def restored_original(model: DualEncoder, original: Mapping[str, Tensor]) -> DualEncoder:
    """Return a copy of the erased model with its weights as they were before the run.

    Args:
        model: the erased model.
        original: what `keep_original` returned.
    """
    restored = frozen_copy(model)
    tensors = _tensors(restored.module)
    with torch.no_grad():
        for name, before in original.items():
            tensors[name].copy_(before)
    return restored


def save_delta(
    model: DualEncoder,
    original: Mapping[str, Tensor],
    folder: str | os.PathLike[str],
    adapter: LoraAdapter | None = None,
) -> Path:
    """Write the folder that `apply_delta` reads: erased minus original of what changed.

    Args:
        model: the erased model.
        original: what `keep_original` returned before the run.
        folder: written atomically.
        adapter: what `tune="lora:N"` has added; peft loads the folder, too.

    Raises:
        InputError: `folder` holds files that fasterase did not write.
    """
    from safetensors.torch import save_file

    now = _tensors(model.module)
    stored: dict[str, Tensor] = {}
    dtypes: dict[str, str] = {}
    for name, before in original.items():
        after = now[name].detach().cpu()
        if adapter is not None and name in adapter.factors:
            delta = adapter.product(name)
        elif _same_bits(before, after).all():
            continue
        else:
            delta = _wide(after) - _wide(before)
            stored[f"delta/{name}"] = delta.contiguous()
        dtypes[name] = str(after.dtype).removeprefix("torch.")
        for side, start, goal, sign in (
            ("erased", before, after, 1),
            ("original", after, before, -1),
        ):
            wrong = ~_same_bits(_moved(start, delta, sign, goal.dtype), goal)
            if wrong.any():
                at = wrong.flatten().nonzero()[:, 0]
                stored[f"{side}/{name}/at"] = at
                stored[f"{side}/{name}"] = goal.flatten()[at]
    metadata = {
        "format": _FORMATS[adapter is not None],
        "model": model.name,
        "original": fingerprint_weights(model.module, original),
        "erased": fingerprint_weights(model.module),
        "dtypes": json.dumps(dtypes),
        "factors": json.dumps({} if adapter is None else adapter.factors),
    }
    with replace_model_folder(folder, library="fasterase.apply_delta") as new:
        save_file(stored, new / DELTA_FILE, metadata=metadata)
        readme = _README.format(name=model.name)
        if adapter is not None:
            write_adapter(adapter.config, adapter.state, model.module, new)
            readme += _PEFT_README
        (new / "README.md").write_text(readme, encoding="utf-8")
    return Path(folder)


def apply_delta(
    model: nn.Module | DualEncoder | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    sign: int = 1,
) -> nn.Module:
    """Put a delta that `result.save(folder, delta=True)` wrote on its original, or take it off.

    Both are exact: the original with the delta on has the erased model's weights bit for bit, and
    the other way round.

    Args:
        model: the original (`sign=1`) or the erased model (`sign=-1`), changed in place; anything
            that `fasterase.unlearn` takes.
        folder: the folder of the delta.
        sign: 1 puts the delta on, -1 takes it off.

    Returns:
        `model`, or the module that its name loaded.

    Raises:
        InputError: `sign` is neither 1 nor -1; `folder` holds no readable delta; the model has
            another architecture, or other weights than the delta was made for. The model is
            untouched.
    """
    if isinstance(sign, bool) or sign not in (1, -1):
        raise InputError(f"sign={sign!r} is neither 1 (put the delta on) nor -1 (take it off).")
    folder = parse_path(folder, argument="folder").expanduser()
    stored, metadata = _read(folder)
    deltas = _deltas(stored, json.loads(metadata.get("factors", "{}")), folder)
    encoder = load_model(model)
    module = encoder.module
    tensors = _tensors(module)
    for name, delta in deltas.items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found is None or tensors[name].numel() != delta.numel():
            raise InputError(
                f"model: {encoder.name} has another architecture than {metadata['model']}, for "
                f"which the delta in {folder} was made: its `{name}` is {_shape(delta.shape)}, "
                f"the model's {'is missing' if found is None else 'is ' + _shape(found)}. "
                "Give the model that was erased."
            )
    _check_weights(encoder, metadata, sign, folder)
    side = "erased" if sign == 1 else "original"
    dtypes = json.loads(metadata["dtypes"])
    with torch.no_grad():
        for name, delta in deltas.items():
            dtype = getattr(torch, dtypes[name])
            moved = _moved(tensors[name].detach().cpu().reshape(delta.shape), delta, sign, dtype)
            at = stored.get(f"{side}/{name}/at")
            if at is not None:
                moved.view(-1)[at] = stored[f"{side}/{name}"]
            tensors[name].copy_(moved.reshape(tensors[name].shape))
    return encoder.given


def fingerprint_weights(module: nn.Module, replaced: Mapping[str, Tensor] | None = None) -> str:
    """Return a SHA-256 of the weights alone, whatever their dtype, device, tokenizer or transform.

    Half-precision weights have the fingerprint of the same values in fp32, in which some libraries
    load them.

    Args:
        module: the library's own module.
        replaced: values to take instead of the module's own, by name.
    """
    own = _tensors(module)
    instead = {id(own[name]): tensor for name, tensor in (replaced or {}).items()}
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict(keep_vars=True).items()):
        values = _wide(instead.get(id(tensor), tensor).detach().cpu()).contiguous().reshape(-1)
        digest.update(f"{name} {values.dtype} {len(values)};".encode())
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_weights(
    encoder: DualEncoder, metadata: Mapping[str, str], sign: int, folder: str | os.PathLike[str]
) -> None:
    found = fingerprint_weights(encoder.module)
    wanted, other = ("original", "erased") if sign == 1 else ("erased", "original")
    if found == metadata[wanted]:
        return
    if found == metadata[other]:
        state = "already on" if sign == 1 else "not on"
        raise InputError(
            f"sign={sign}: the delta in {folder} is {state} {encoder.name}. "
            f"sign={-sign} {'takes it off' if sign == 1 else 'puts it on'}."
        )
    raise InputError(
        f"model: the weights of {encoder.name} are not those of the {wanted} model that the delta "
        f"in {folder} was made for ({metadata['model']}), so the result would be neither model. "
        f"Load that {wanted} model, unchanged and in the precision in which it was erased."
    )


def _read(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not (folder / DELTA_FILE).is_file():
        raise InputError(
            f"folder: {folder} holds no {DELTA_FILE}. Give a folder that "
            "result.save(folder, delta=True) wrote."
        )
    stored, metadata = _read_file(folder / DELTA_FILE)
    if metadata.get("format") not in _FORMATS:
        raise InputError(
            f"folder: {folder / DELTA_FILE} has the format {metadata.get('format')!r}, and this "
            f"version of fasterase reads {' and '.join(map(repr, _FORMATS))}."
        )
    return stored, metadata


def _read_file(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            stored = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            return stored, opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"folder: {file} cannot be read ({error}). Save it again.") from error


def _deltas(
    stored: Mapping[str, Tensor], factors: Mapping[str, str], folder: Path
) -> dict[str, Tensor]:
    """Return erased minus original by name: as stored, or the product of an adapter's matrices."""
    deltas = {
        key.removeprefix("delta/"): delta
        for key, delta in stored.items()
        if key.startswith("delta/")
    }
    adapter = _read_file(folder / WEIGHTS_FILE)[0] if factors else {}
    for name, layer in factors.items():
        down, up = (adapter.get(f"{PREFIX}{layer}.lora_{each}.weight") for each in "AB")
        if down is None or up is None:
            raise InputError(
                f"folder: {folder / WEIGHTS_FILE} lacks the adapter of {layer}. Save it again."
            )
        deltas[name] = low_rank_product(down, up)
    return deltas


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _wide(values: Tensor) -> Tensor:
    """The dtype in which differences are taken; integers (counters of BatchNorm) stay."""
    if values.is_floating_point() and values.dtype != torch.float64:
        return values.float()
    return values


def _moved(start: Tensor, delta: Tensor, sign: int, dtype: torch.dtype) -> Tensor:
    return (_wide(start) + sign * delta).to(dtype)


def _same_bits(one: Tensor, other: Tensor) -> Tensor:
    """Elementwise; a difference between 0.0 and -0.0 counts, NaN equals itself."""
    bits: Any = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return one.contiguous().view(bits) == other.contiguous().view(bits)


def _shape(shape: tuple[int, ...]) -> str:
    return str(list(shape))


_README = """# What an erasure changed in {name}

Put it on the original model, or take it off the erased one:

```python
import fasterase

fasterase.apply_delta(original, "this folder")
fasterase.apply_delta(erased, "this folder", sign=-1)
```
"""

_PEFT_README = """
It is also an adapter of peft:

```python
import peft

model = peft.PeftModel.from_pretrained(original, "this folder")
```
"""
