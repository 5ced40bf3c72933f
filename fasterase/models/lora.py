"""Low-rank adapters that a run puts on the model itself (`tune="lora:8"`), and takes off again.

LoRA (Hu et al., 2021, arXiv 2106.09685) adds to the weight W of a linear map the product of two
thin matrices, W + B A, and trains only these. Adapted are all linear maps inside the blocks of both
towers, whose `forward` is called; elsewhere (a ResNet's attention pooling, projections) weights are
read as plain matrices by functions that would never see an adapter. Of `nn.MultiheadAttention` only
the map to query, key and value is adapted: peft's layer for it puts another on `out_proj` and, in
version 0.21, counts that one twice, so it is left at zero.

While a run trains, peft's layers are in the model. Afterwards they are gone: the model has its own
modules and parameters again, with W + B A in them, and the adapter is kept beside it.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fasterase.errors import InputError, import_extra
from fasterase.models.wrapped import has_adapters

_ADAPTER = "default"


@dataclass
class LoraAdapter:
    """The adapter of a run, in peft's form; empty until its layers are taken off.

    Attributes:
        config: the `peft.LoraConfig`.
        state: name -> matrix as peft writes it, without its prefix, on the CPU. Those of a layer
            are `<layer>.lora_A.weight` [rank, inputs] and `<layer>.lora_B.weight` [outputs, rank].
        factors: name of each adapted weight -> its layer.
    """

    config: Any
    state: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[str, str] = field(default_factory=dict)

    def as_peft(self, words: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[Any, dict[str, Tensor]]:
        """Return config and state with `words`, which peft puts in by token.

        They are: name of a table of vectors -> ids [n] of tokens, and their new vectors [n, D].
        """
        if not words:
            return self.config, self.state
        layers = {name.removesuffix(".weight"): each for name, each in words.items()}
        config = copy.copy(self.config)
        config.trainable_token_indices = {name: ids.tolist() for name, (ids, _) in layers.items()}
        vectors = {
            f"{name}.token_adapter.trainable_tokens_delta": each
            for name, (_, each) in layers.items()
        }
        return config, self.state | vectors

    def product(self, weight: str) -> Tensor:
        """Return B A, what the adapter adds to a weight."""
        return layer_product(self.state, self.factors[weight])


def parse_rank(tune: str) -> int | None:
    """Return N of `"lora:N"`, None for any other `tune`."""
    match = re.fullmatch(r"lora:([1-9][0-9]*)", tune)
    return None if match is None else int(match[1])


def layer_product(state: Mapping[str, Tensor], layer: str) -> Tensor:
    """Return B [outputs, rank] A [rank, inputs] of a layer, the same bits on every machine."""
    down, up = (state[f"{layer}.lora_{each}.weight"] for each in "AB")
    total = up[:, :1] * down[:1]  # summed over the rank in order
    for k in range(1, len(down)):
        total += up[:, k : k + 1] * down[k : k + 1]
    return total


@contextmanager
def adapting(
    module: nn.Module, blocks: Iterable[Any], *, rank: int, seed: int, scale: nn.Parameter
) -> Iterator[LoraAdapter]:
    """Put adapters on the linear maps in `blocks`; afterwards take them off, into the weights.

    They begin as zero (B = 0), so that the model computes what it did before. Inside, only their
    parameters require a gradient, and `scale` (the temperature) if it did. Layers whose weights are
    frozen get none. The adapter is filled when the block ends.

    Raises:
        InputError: the model has adapters already.
        MissingExtraError: peft is not installed.
    """
    peft: Any = import_extra("peft", "peft", f"tune='lora:{rank}'")
    if has_adapters(module):
        raise InputError(
            f"tune='lora:{rank}': the model has adapters already, and only those would be trained. "
            "Leave tune='all' to train them, or merge them first (merge_and_unload)."
        )
    name_of = {id(part): name for name, part in module.named_modules()}
    layers: dict[str, nn.Module] = {
        name_of[id(layer)]: layer for layer in _linear_maps(blocks) if _weight(layer).requires_grad
    }
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    own = _own_parameters(layers.values())
    trains_scale = scale.requires_grad
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank,  # a scale of 1
        # Whole names: peft takes a plain name for the end of one, which both towers may share.
        target_modules="|".join(re.escape(name) for name in layers),
    )
    adapter = LoraAdapter(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, module, adapter_name=_ADAPTER)
    scale.requires_grad_(trains_scale)
    for name in layers:
        layer: Any = module.get_submodule(name)
        if isinstance(layer.base_layer, nn.MultiheadAttention):
            layer.base_layer.out_proj.requires_grad_(False)
            weights = _own_parameters([layer.base_layer])
            layer.register_forward_hook(functools.partial(_give_back, weights))
    try:
        yield adapter
    finally:
        state = peft.get_peft_model_state_dict(
            module, adapter_name=_ADAPTER, save_embedding_layers=False
        )
        adapter.state = {name: each.detach().cpu().clone() for name, each in state.items()}
        for name, layer in layers.items():  # the model's own in the place of peft's
            if isinstance(layer, nn.MultiheadAttention):
                setattr(layer, "out_proj", layer.out_proj.base_layer)  # noqa: B010
            module.set_submodule(name, layer)
        del module.peft_config
        _give_back(own)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        weight_names = {id(each): name for name, each in module.named_parameters()}
        with torch.no_grad():
            for name, layer in layers.items():
                weight = _weight(layer)
                adapter.factors[weight_names[id(weight)]] = name
                weight.add_(adapter.product(weight_names[id(weight)]).to(weight.device))


def adapted_weights(blocks: Iterable[Any]) -> list[nn.Parameter]:
    """Return the weights of all linear maps in `blocks`."""
    return [_weight(layer) for layer in _linear_maps(blocks)]


def _linear_maps(blocks: Iterable[Any]) -> Iterator[Any]:
    """Yield linear and attention layers; not the layers inside of the latter."""
    for block in blocks:
        inside: set[int] = set()
        for part in block.modules() if isinstance(block, nn.Module) else ():
            if isinstance(part, nn.MultiheadAttention):
                inside |= {id(each) for each in part.modules()}
                if part.in_proj_weight is not None:
                    yield part
            elif isinstance(part, nn.Linear) and id(part) not in inside:
                yield part


def _weight(layer: Any) -> nn.Parameter:
    return layer.in_proj_weight if isinstance(layer, nn.MultiheadAttention) else layer.weight


_Parameters = list[tuple[nn.Module, dict[str, nn.Parameter | None]]]


def _own_parameters(layers: Iterable[nn.Module]) -> _Parameters:
    """Note which parameters the layers and their parts have, in which order."""
    return [(part, dict(part._parameters)) for layer in layers for part in layer.modules()]


def _give_back(noted: _Parameters, *_: Any) -> None:
    """Give layers the parameters that they had.

    In each forward pass of an attention layer, peft puts new ones in their place: it adds B A and
    subtracts it again, which rounds.
    """
    for part, parameters in noted:
        part._parameters.clear()
        part._parameters.update(parameters)
