"""What an erasure changed in a model, as a file that can be put on and taken off again.

`delta.safetensors` holds, for every tensor that changed, `xor/<name>`: the bits of the original XOR
those of the erased tensor, as integers of the same width. XOR with either gives the other. Where
few numbers changed, `at/<name>` holds their positions, and `xor/<name>` only theirs.

After `tune="lora:N"` the differences of the adapted weights are products of two thin matrices.
These are not stored twice: the folder is peft's own, and the metadata name each weight's layer.
Subtracting one rounds: `at/<name>` holds the positions where that misses the original, and
`xor/<name>` the bits that are wrong there.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fasterase.errors import InputError
from fasterase.files import parse_path, replace_model_folder
from fasterase.models.dual_encoder import DualEncoder, frozen_copy, loading_code
from fasterase.models.load import DELTA_FILE, load_model
from fasterase.models.lora import LoraAdapter, layer_product
from fasterase.models.wrapped import PEFT_PREFIX, PEFT_WEIGHTS, write_adapter

_FORMAT = "fasterase-delta-4"
# Bytes of a number -> the integers that hold its bits.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def keep_original(
    model: DualEncoder, tune: str, *, logit_scale: bool, buffers: bool
) -> dict[str, Tensor]:
    """Copy to the CPU, in their own dtype, the tensors that a run may change.

    `buffers` are statistics of BatchNorm.
    """
    changing: dict[str, Tensor] = dict(model.trainable(tune))
    if table := model.word_table(tune):
        changing |= dict([table])
    if logit_scale:
        parameters = model.module.named_parameters()
        changing |= {name: each for name, each in parameters if each is model.logit_scale}
    if buffers:
        changing.update(model.module.named_buffers())
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in changing.items()
    }


def restored_original(model: DualEncoder, original: Mapping[str, Tensor]) -> DualEncoder:
    """Copy the erased model, with the weights that `keep_original` returned before the run."""
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
    """Write the folder that `apply_delta` reads, atomically; with an `adapter` peft loads it too.

    `original` is what `keep_original` returned before the run. Raises `InputError` where `folder`
    holds files that fasterase did not write.
    """
    from safetensors.torch import save_file

    now = _tensors(model.module)
    factors = {} if adapter is None else adapter.factors
    stored: dict[str, Tensor] = {}
    dtypes: dict[str, str] = {}
    shapes: dict[str, list[int]] = {}
    words: dict[str, tuple[Tensor, Tensor]] = {}
    for name, before in original.items():
        after = now[name].detach().cpu()
        has_product = name in factors
        start = after
        if adapter is not None and has_product:
            start = _add(after, adapter.product(name), -1)
        differ = _bits(start) ^ _bits(before)
        at = differ.flatten().nonzero()[:, 0]
        if not (has_product or len(at)):
            continue
        # Of a table of words often few rows have changed.
        if has_product or len(at) * (at.itemsize + differ.itemsize) < differ.nbytes:
            stored[f"at/{name}"], differ = at, differ.flatten()[at]
        stored[f"xor/{name}"] = differ
        # A table without an adapter is one of words, of which some were overwritten.
        if adapter is not None and not has_product and after.ndim == 2:
            rows = (before != after).any(1).nonzero()[:, 0]
            words[name] = rows, after[rows]
        dtypes[name] = str(after.dtype).removeprefix("torch.")
        shapes[name] = list(after.shape)
    taken, whole = (sum(each.nbytes for each in tensors.values()) for tensors in (stored, now))
    if adapter is None and taken > whole / 2:
        warnings.warn(
            f"the delta takes {taken / 1e6:,.1f} MB of the model's {whole / 1e6:,.1f} MB, since so "
            "many weights were trained. After tune='lora:8' it holds a small adapter instead.",
            stacklevel=3,
        )
    metadata = {
        "format": _FORMAT,
        "model": model.public_name,
        "original": fingerprint_weights(model.module, original),
        "erased": fingerprint_weights(model.module),
        "dtypes": json.dumps(dtypes),
        "shapes": json.dumps(shapes),
        "factors": json.dumps(factors),
    }
    with replace_model_folder(folder, library="fasterase.apply_delta") as new:
        save_file(stored, new / DELTA_FILE, metadata=metadata)
        readme = _README.format(name=model.public_name)
        if adapter is not None:
            write_adapter(*adapter.as_peft(words), model.module, new, home=Path(folder))
            readme += "\n" + loading_code(new, "peft", "this folder")
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
        InputError: `sign` is neither 1 nor -1; `folder` holds no readable delta, or a damaged one;
            the model has another architecture, or other weights than the delta was made for. The
            model is untouched.
    """
    if isinstance(sign, bool) or sign not in (1, -1):
        raise InputError(f"sign={sign!r} is neither 1 (put the delta on) nor -1 (take it off).")
    delta = _read(parse_path(folder, argument="folder"))
    encoder = load_model(model)
    tensors = _tensors(encoder.module)
    for name, wanted in delta.shapes.items():
        if name not in tensors or tensors[name].numel() != math.prod(wanted):
            found = f"is {list(tensors[name].shape)}" if name in tensors else "is missing"
            raise InputError(
                f"model: {encoder.name} has another architecture than {delta.model}, for "
                f"which {delta.file} was made: its `{name}` is {wanted}, the model's "
                f"{found}. Give the model that was erased."
            )
    _check_weights(encoder, delta, sign)
    try:
        moved = {
            name: delta.moved(name, tensors[name].detach().cpu(), sign).to(tensors[name].dtype)
            for name in delta.dtypes
        }
    except (KeyError, IndexError, RuntimeError) as error:
        raise InputError(f"folder: {delta.file} is damaged ({error!r}). Save it again.") from error
    if fingerprint_weights(encoder.module, moved) != delta.fingerprints[-sign]:
        raise InputError(
            f"folder: {delta.file} does not turn {encoder.name} into the weights that were saved. "
            "Load the model in the precision in which it was erased, or save the delta again: it "
            "may be damaged."
        )
    with torch.no_grad():
        for name, values in moved.items():
            tensors[name].copy_(values)
    return encoder.given


@dataclass(frozen=True)
class _Delta:
    """What a folder holds."""

    file: Path
    model: str  # name of the erased model
    fingerprints: dict[int, str]  # sign -> of the weights that it starts from
    dtypes: dict[str, torch.dtype]  # of all tensors that changed
    shapes: dict[str, list[int]]
    products: dict[str, Tensor]  # what an adapter adds to a weight
    stored: dict[str, Tensor]

    def moved(self, name: str, start: Tensor, sign: int) -> Tensor:
        """Return the erased tensor of the original (`sign=1`), or the other way round."""
        moved = start.to(self.dtypes[name], copy=True).contiguous()
        if name in self.products:
            moved = _add(moved, self.products[name], sign)
            if sign == 1:
                return moved
        at: Tensor | slice = self.stored.get(f"at/{name}", slice(None))
        _bits(moved).view(-1)[at] ^= self.stored[f"xor/{name}"].flatten()
        return moved


def fingerprint_weights(module: nn.Module, replaced: Mapping[str, Tensor] | None = None) -> str:
    """Return a SHA-256 of the weights alone, with those in `replaced` instead of the module's own.

    Half precision counts as fp32, in which some libraries load it.
    """
    own = _tensors(module)
    instead = {id(own[name]): tensor for name, tensor in (replaced or {}).items()}
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict(keep_vars=True).items()):
        values = _wide(instead.get(id(tensor), tensor).detach().cpu()).contiguous().reshape(-1)
        digest.update(f"{name} {values.dtype} {len(values)};".encode())
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_weights(encoder: DualEncoder, delta: _Delta, sign: int) -> None:
    found = fingerprint_weights(encoder.module)
    if found == delta.fingerprints[sign]:
        return
    if found == delta.fingerprints[-sign]:
        state = "already on" if sign == 1 else "not on"
        raise InputError(
            f"sign={sign}: {delta.file} is {state} {encoder.name}. "
            f"sign={-sign} {'takes it off' if sign == 1 else 'puts it on'}."
        )
    wanted = "original" if sign == 1 else "erased"
    raise InputError(
        f"model: the weights of {encoder.name} are not those of the {wanted} model that "
        f"{delta.file} was made for ({delta.model}), so the result would be neither model. "
        f"Load that {wanted} model, unchanged and in the precision in which it was erased."
    )


def _read(folder: Path) -> _Delta:
    file = folder / DELTA_FILE
    if not file.is_file():
        raise InputError(
            f"folder: {folder} holds no {DELTA_FILE}. Give a folder that "
            "result.save(folder, delta=True) wrote."
        )
    stored, metadata = _read_file(file)
    if metadata.get("format") != _FORMAT:
        raise InputError(
            f"folder: {file} has the format {metadata.get('format')!r}, and this version of "
            f"fasterase reads {_FORMAT!r}."
        )
    try:
        factors, named, known = (
            json.loads(metadata[key]) for key in ("factors", "dtypes", "shapes")
        )
        dtypes = {name: getattr(torch, dtype) for name, dtype in named.items()}
        for name, dtype in dtypes.items():
            if stored[f"xor/{name}"].dtype != _INTEGERS[dtype.itemsize]:
                raise TypeError(f"xor/{name} is {stored[f'xor/{name}'].dtype}")
        adapter = _read_file(folder / PEFT_WEIGHTS)[0] if factors else {}
        products = {
            name: layer_product(adapter, f"{PEFT_PREFIX}{layer}") for name, layer in factors.items()
        }
        fingerprints = {1: metadata["original"], -1: metadata["erased"]}
        shapes = {name: [int(each) for each in known[name]] for name in dtypes}
        return _Delta(file, metadata["model"], fingerprints, dtypes, shapes, products, stored)
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"folder: {folder} is damaged ({error!r}). Save it again.") from error


def _read_file(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            stored = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            return stored, opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"folder: {file} cannot be read ({error}). Save it again.") from error


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _wide(values: Tensor) -> Tensor:
    """Return values as they are hashed and added to; integers (counters of BatchNorm) stay."""
    if values.is_floating_point() and values.dtype != torch.float64:
        return values.float()
    return values


def _add(start: Tensor, product: Tensor, sign: int) -> Tensor:
    moved = _wide(start) + sign * product.reshape(start.shape)
    return moved.to(start.dtype).contiguous()


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().view(_INTEGERS[values.element_size()])


_README = """# What an erasure changed in {name}

Put it on the original model, or take it off the erased one:

```python
import fasterase

fasterase.apply_delta(original, "this folder")
fasterase.apply_delta(erased, "this folder", sign=-1)
```
"""
