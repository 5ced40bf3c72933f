"""A Stable Diffusion, its CLIP and a detector with random weights, in their libraries' formats."""

from __future__ import annotations

import functools
import json
import string
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.small_models import simple_tokenizer

LETTERS = string.ascii_lowercase
START, END = 2 * len(LETTERS), 2 * len(LETTERS) + 1
TEXT = {
    "vocab_size": 2 * len(LETTERS) + 2,
    "max_position_embeddings": 24,
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "bos_token_id": START,
    "eos_token_id": END,
    "pad_token_id": END,
}
# TEXT with the vocabulary of CLIP, for `full_tokenizer`.
FULL = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
VISION = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
}


@functools.cache
def clip_tokenizer() -> Any:
    """Return transformers' `CLIPTokenizer`, with letters for its vocabulary."""
    pieces = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    return _tokenizer(pieces, [])


@functools.cache
def full_tokenizer() -> Any:
    """Return transformers' `CLIPTokenizer` with CLIP's own vocabulary, which open_clip ships."""
    simple = simple_tokenizer()
    pieces = sorted(simple.encoder, key=simple.encoder.get)[:-2]
    return _tokenizer(pieces, [" ".join(pair) for pair in simple.bpe_ranks])


def _tokenizer(pieces: list[str], merges: list[str]) -> Any:
    numbers = {piece: i for i, piece in enumerate((*pieces, "<|startoftext|>", "<|endoftext|>"))}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps(numbers), encoding="utf-8")
        merged = "\n".join(["#version: 0.2", *merges])
        Path(folder, "merges.txt").write_text(merged, encoding="utf-8")
        length = TEXT["max_position_embeddings"]
        return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=length)


def clip(*, seed: int = 0, **text: Any) -> Any:
    """Build a transformers `CLIPModel`; `text` overrides `TEXT`."""
    torch.manual_seed(seed)
    towers = {"text_config": TEXT | text, "vision_config": VISION}
    return transformers.CLIPModel(transformers.CLIPConfig(**towers, projection_dim=16)).eval()


def text_encoder(*, seed: int = 0, **text: Any) -> Any:
    """Build a transformers `CLIPTextModel`; `text` overrides `TEXT`."""
    torch.manual_seed(seed)
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**(TEXT | text))).eval()


def save_pipeline(folder: Path, encoder: Any, tokenizer: Any) -> str:
    """Write a Stable Diffusion with this text encoder and tokenizer, as diffusers does."""
    import diffusers

    torch.manual_seed(1)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=encoder.config.hidden_size,
        attention_head_dim=2,
    )
    # Random weights would hardly listen to the text.
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if "attn2" in name and weight.ndim == 2:
                weight.mul_(4)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(
            clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return str(folder)


def save_detector(folder: Path, kind: str) -> str:
    """Write an `"OwlViT"` or `"Owlv2"` with its processor, as transformers does."""
    config = getattr(transformers, f"{kind}Config")(
        text_config=TEXT, vision_config=VISION, projection_dim=TEXT["hidden_size"]
    )
    torch.manual_seed(2)
    detector = getattr(transformers, f"{kind}ForObjectDetection")(config)
    # Otherwise every score is 1.
    with torch.no_grad():
        for weight in (
            *detector.class_head.logit_shift.parameters(),
            detector.class_head.logit_scale.weight,
        ):
            weight.zero_()
    detector.save_pretrained(folder)
    size = {"height": VISION["image_size"], "width": VISION["image_size"]}
    images = getattr(transformers, f"{kind}ImageProcessor")(size=size)
    getattr(transformers, f"{kind}Processor")(images, clip_tokenizer()).save_pretrained(folder)
    return str(folder)
