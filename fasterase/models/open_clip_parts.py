"""What the towers of an open_clip model are made of, for `trainable`."""

from __future__ import annotations

from typing import Any

from torch import nn

from fasterase.models.open_clip_reading import is_hf_text, text_tower
from fasterase.models.tuning import Part, TowerParts


def image_parts(module: Any, *, fixed_positions: bool) -> TowerParts:
    """The image tower of an open_clip model: ViT, ResNet or timm.

    Args:
        fixed_positions: a ViT's positional embedding is a table of sines, not learnt.
    """
    visual: Any = module.visual
    if hasattr(visual, "trunk"):
        return _timm_parts(visual)
    if hasattr(visual, "layer4"):
        blocks = [visual.layer1, visual.layer2, visual.layer3, visual.layer4]
        return TowerParts([visual], blocks, [visual.attnpool], [visual.attnpool.c_proj])
    after = _present(
        visual.attn_pool,
        getattr(visual, "attn_pool_contrastive", None),
        visual.ln_post,
        visual.proj,
    )
    fixed = visual.positional_embedding if fixed_positions else None
    everything = [parameter for parameter in visual.parameters() if parameter is not fixed]
    return TowerParts(
        everything, list(visual.transformer.resblocks), after, _present(visual.proj) or after
    )


def text_parts(module: Any) -> TowerParts:
    """The text tower of an open_clip model: its own transformer or one of transformers."""
    text: Any = text_tower(module)
    if is_hf_text(text):
        blocks = _longest_list(text.transformer)
        after = _after(text, blocks)
        return TowerParts([text], blocks, after, [*text.proj.parameters()] or after)
    blocks = list(text.transformer.resblocks)
    after = _present(text.ln_final, text.text_projection)
    everything = (
        [text.token_embedding, text.positional_embedding, text.transformer, *after]
        if text is module
        else [text]
    )
    return TowerParts(everything, blocks, after, _present(text.text_projection) or after)


def _timm_parts(visual: Any) -> TowerParts:
    trunk = visual.trunk
    blocks: list[nn.Module] = []
    for name in ("blocks", "stages"):
        blocks = blocks or list(getattr(trunk, name, ()))
    if not blocks and hasattr(trunk, "layer4"):
        blocks = [trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4]
    after = _after(visual, blocks)
    classifier = trunk.get_classifier()
    own = [*classifier.parameters()] if isinstance(classifier, nn.Module) else []
    return TowerParts([visual], blocks, after, [*visual.head.parameters()] or own or after)


def _longest_list(module: nn.Module) -> list[nn.Module]:
    """The layers of a transformers encoder, whose name differs between architectures."""
    lists = [list(part) for part in module.modules() if isinstance(part, nn.ModuleList)]
    return sorted(lists, key=len)[-1] if lists else []


def _after(tower: nn.Module, blocks: list[nn.Module]) -> list[Part]:
    """Parameters registered after the last block's: libraries register in the order of use."""
    parameters = list(tower.parameters())
    if not blocks:
        return []
    last = {id(parameter) for parameter in blocks[-1].parameters()}
    end = max(i for i, parameter in enumerate(parameters) if id(parameter) in last)
    return [*parameters[end + 1 :]]


def _present(*parts: Any) -> list[Part]:
    return [part for part in parts if part is not None]
