"""Which parameters `tune=` trains, from what each tower says it is made of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from fasterase.errors import InputError

Part = nn.Module | nn.Parameter

CHOICES = '"all", "image", "text", "projections" or "last:N" (N a positive number, as in "last:4")'


@dataclass(frozen=True)
class TowerParts:
    """One tower, front to back. Parts may overlap: a parameter is chosen once."""

    everything: Sequence[Part]  # all that the tower's features depend on
    blocks: Sequence[Part]  # transformer blocks or ResNet stages, first to last
    after_blocks: Sequence[Part]  # final norm, pooling and projection
    projection: Sequence[Part]  # the last map into the shared space


def select_parameters(
    module: nn.Module, image: TowerParts, text: TowerParts, tune: str
) -> list[tuple[str, nn.Parameter]]:
    """Name and parameter of what `tune` names, in the module's order; see `TwoTower.trainable`."""
    if tune == "all":
        parts = [*image.everything, *text.everything]
    elif tune == "image":
        parts = [*image.everything]
    elif tune == "text":
        parts = [*text.everything]
    elif tune == "projections":
        parts = [*image.projection, *text.projection]
    else:
        count = _last_count(tune)
        parts = [*_last_blocks("image", image, count), *_last_blocks("text", text, count)]
    chosen = {id(parameter) for parameter in _parameters(parts)}
    return [
        (name, parameter)
        for name, parameter in module.named_parameters()
        if id(parameter) in chosen and name not in ("logit_scale", "logit_bias")
    ]


def _last_count(tune: str) -> int:
    match = re.fullmatch(r"last:([1-9][0-9]*)", tune) if isinstance(tune, str) else None
    if match is None:
        raise InputError(f"tune: {tune!r} is not one of {CHOICES}")
    return int(match[1])


def _last_blocks(tower: str, parts: TowerParts, count: int) -> list[Part]:
    if count > len(parts.blocks):
        found = (
            f"the {tower} tower has {len(parts.blocks)} blocks"
            if parts.blocks
            else f"the {tower} tower's blocks cannot be told apart"
        )
        raise InputError(
            f'tune: "last:{count}" asks for {count} blocks of each tower, but {found}. '
            f'Use a smaller number or "{tower}" or "all".'
        )
    return [*parts.blocks[-count:], *parts.after_blocks]


def _parameters(parts: Iterable[Part]) -> Iterable[nn.Parameter]:
    for part in parts:
        if isinstance(part, nn.Parameter):
            yield part
        else:
            yield from part.parameters()
