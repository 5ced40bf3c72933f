"""Small CLIP models of every supported kind with random weights, built offline.

Each builder is a pure function of its arguments (`seed` fixes the weights) and returns the
library's own module in eval mode. `vocab_size` defaults to the needs of the matching small
tokenizer: `simple_tokenizer()` for open_clip, `hf_tokenizer()` for transformers.
"""

from __future__ import annotations

import functools
import string
from typing import Any

import torch
from torch import nn

IMAGE_SIZE = 32
CONTEXT_LENGTH = 16
EMBED_DIM = 16
MEAN = (0.5, 0.4, 0.3)
STD = (0.3, 0.3, 0.2)

_CHARACTERS = string.ascii_lowercase + string.digits + " .,-'"
HF_VOCABULARY = {c: i for i, c in enumerate(["<pad>", "<unk>", *_CHARACTERS, "<start>", "<end>"])}
SIMPLE_VOCABULARY_SIZE = 49408


def open_clip_config(
    *,
    image_size: int = IMAGE_SIZE,
    embed_dim: int = EMBED_DIM,
    layers: int = 2,
    context_length: int = CONTEXT_LENGTH,
    vocab_size: int = SIMPLE_VOCABULARY_SIZE,
) -> dict[str, Any]:
    """Return the `model_cfg` of `open_clip_vit` with the same arguments."""
    shared = {"layers": layers, "width": 32}
    text = {"context_length": context_length, "vocab_size": vocab_size, "heads": 2}
    return {
        "embed_dim": embed_dim,
        "vision_cfg": {"image_size": image_size, "head_width": 16, "patch_size": 8, **shared},
        "text_cfg": {**text, **shared},
    }


def _build_open_clip(kind: str, config: dict[str, Any], seed: int) -> nn.Module:
    import open_clip

    torch.manual_seed(seed)
    module = getattr(open_clip, kind)(**config)
    if kind == "CoCa":
        # The library leaves this one uninitialised, and so different in every process.
        nn.init.normal_(module.text_decoder.text_projection, std=0.02)
    settings = {"size": module.visual.image_size, "mode": "RGB", "mean": MEAN, "std": STD}
    settings |= {"interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0}
    open_clip.model.set_model_preprocess_cfg(module, settings)
    return module.eval()


def open_clip_vit(*, seed: int = 0, **sizes: Any) -> nn.Module:
    """Build an open_clip `CLIP` with a ViT tower; `sizes` as in `open_clip_config`."""
    return _build_open_clip("CLIP", open_clip_config(**sizes), seed)


def open_clip_resnet(*, seed: int = 0, **sizes: Any) -> nn.Module:
    """Build an open_clip `CLIP` with a ModifiedResNet (BatchNorm), one bottleneck per stage."""
    config = open_clip_config(**sizes)
    size = config["vision_cfg"]["image_size"]
    tower = {"image_size": size, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}
    return _build_open_clip("CLIP", {**config, "vision_cfg": tower}, seed)


def open_clip_custom_text(*, seed: int = 0, siglip: bool = False, **sizes: Any) -> nn.Module:
    """Build an open_clip `CustomTextCLIP`; `siglip` adds a logit_bias and a projection bias."""
    config = open_clip_config(**sizes)
    if siglip:
        config["init_logit_bias"] = -10.0
        config["text_cfg"] |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    return _build_open_clip("CustomTextCLIP", config, seed)


def open_clip_coca(*, seed: int = 0, **sizes: Any) -> nn.Module:
    """Build an open_clip `CoCa`: attentional pooling, and a text decoder that no feature uses."""
    config = open_clip_config(**sizes)
    config["vision_cfg"] |= {"attn_pooler_heads": 2, "attn_pooler_queries": 8}
    config["vision_cfg"] |= {"attentional_pool": True, "output_tokens": True}
    config["multimodal_cfg"] = {**config["text_cfg"], "attn_pooler_heads": 2}
    config["text_cfg"] |= {"embed_cls": True, "output_tokens": True}
    return _build_open_clip("CoCa", config, seed)


@functools.cache
def simple_tokenizer(context_length: int = CONTEXT_LENGTH) -> Any:
    """Return open_clip's SimpleTokenizer at the small models' context length."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(context_length=context_length)


def hf_clip(*, seed: int = 0, **sizes: int) -> nn.Module:
    """Build a transformers `CLIPModel`; `sizes` as in `_hf_towers`."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    return CLIPModel(CLIPConfig(**_hf_towers(**sizes), projection_dim=EMBED_DIM)).eval()


def hf_siglip(*, seed: int = 0, **sizes: int) -> nn.Module:
    """Build a transformers `SiglipModel`; its embedding is as wide as its towers, 32."""
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(seed)
    return _warm_siglip(SiglipModel(SiglipConfig(**_hf_towers(**sizes))))


def hf_siglip2(*, seed: int = 0, **sizes: int) -> nn.Module:
    """Build a transformers `Siglip2Model` (NaFlex) with a patch grid for `image_size` pixels."""
    from transformers import Siglip2Config, Siglip2Model

    torch.manual_seed(seed)
    towers = _hf_towers(**sizes)
    text, vision = towers["text_config"], towers["vision_config"]
    vision["num_patches"] = (vision.pop("image_size") // vision["patch_size"]) ** 2
    text["projection_size"] = vision["hidden_size"]
    return _warm_siglip(Siglip2Model(Siglip2Config(**towers)))


def _hf_towers(
    *, image_size: int = IMAGE_SIZE, context_length: int = CONTEXT_LENGTH, layers: int = 2
) -> dict[str, dict[str, Any]]:
    transformer = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
    }
    text = {
        "vocab_size": len(HF_VOCABULARY),
        "max_position_embeddings": context_length,
        "bos_token_id": HF_VOCABULARY["<start>"],
        "eos_token_id": HF_VOCABULARY["<end>"],
        "pad_token_id": HF_VOCABULARY["<pad>"],
    }
    return {
        "text_config": {**text, **transformer},
        "vision_config": {"image_size": image_size, "patch_size": 8, **transformer},
    }


def _warm_siglip(module: nn.Module) -> nn.Module:
    # The library initialises both to 0; a real checkpoint has about log(10) and -10.
    with torch.no_grad():
        module.logit_scale.fill_(2.3)
        module.logit_bias.fill_(-10.0)
    return module.eval()


def hf_tokenizer(context_length: int = CONTEXT_LENGTH) -> Any:
    """Build a transformers fast tokenizer of lower-case characters, for the `hf_*` models."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(HF_VOCABULARY, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>",
        special_tokens=[(t, HF_VOCABULARY[t]) for t in ("<start>", "<end>")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<start>",
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=context_length,
    )


def hf_image_processor(image_size: int = IMAGE_SIZE) -> Any:
    """Build a transformers `CLIPImageProcessor` of the small models' size and statistics."""
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=list(MEAN),
        image_std=list(STD),
    )


def random_pairs(
    module_vocab: int = len(HF_VOCABULARY),
    *,
    count: int = 8,
    image_size: int = IMAGE_SIZE,
    context_length: int = CONTEXT_LENGTH,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pixels [count, 3, image_size, image_size] and ids [count, context_length].

    The ids end in the vocabulary's last id, which every small model reads as the end of text.
    """
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 3, image_size, image_size, generator=generator)
    ids = torch.randint(2, module_vocab - 2, (count, context_length), generator=generator)
    ids[:, 0] = module_vocab - 2
    ids[:, -1] = module_vocab - 1
    return pixels, ids
