"""Define the demo's small CLIP: tokenizer, architecture, and the open_clip folder to save it as."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasterase.demo.emoji import EmojiInfo, class_name, naming_captions
from fasterase.files import replace_file, write_text

IMAGE_SIZE = 64
CONTEXT_LENGTH = 16
VOCABULARY = 3400  # makes nearly every word of the captions one token
MEAN = STD = (0.5, 0.5, 0.5)  # so white, the background, is +1
INITIAL_SCALE = 25.0


def build_tokenizer(records: list[EmojiInfo]) -> Any:
    """Train a byte-level BPE on the captions of all concepts; all models share its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    texts = [caption for record in records for caption in naming_captions(record)]
    texts += [class_name(record[level]) for record in records for level in ("group", "subgroup")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY - 1,
        special_tokens=["<pad>", "<start>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # open_clip reads the text feature at the highest id in a row, so <end> must come last.
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("<start>", "<end>")],
    )
    return tokenizer


def tokenize(tokenizer: Any, texts: list[str]) -> Tensor:
    """Return token ids [len(texts), 16], the same as open_clip's from the saved folder."""
    tokenizer.enable_truncation(CONTEXT_LENGTH)
    tokenizer.enable_padding(pad_id=0, pad_token="<pad>", length=CONTEXT_LENGTH)
    return torch.tensor([encoded.ids for encoded in tokenizer.encode_batch(texts)])


def model_config(vocab_size: int) -> dict[str, Any]:
    """Return open_clip's configuration of the model."""
    return {
        "embed_dim": 128,
        "vision_cfg": {
            "image_size": IMAGE_SIZE,
            "patch_size": 16,
            "width": 192,
            "layers": 4,
            "head_width": 64,
        },
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": vocab_size,
            "width": 128,
            "heads": 2,
            "layers": 2,
            # Any name makes open_clip read the tokenizer files in the folder.
            "hf_tokenizer_name": "fasterase-demo",
        },
    }


def build_model(config: dict[str, Any]) -> Any:
    """Build an untrained open_clip CLIP with the initial scale."""
    from open_clip import CLIP

    return CLIP(**config, init_logit_scale=math.log(INITIAL_SCALE))


def save(model: nn.Module, tokenizer: Any, output: Path) -> None:
    """Write an open_clip folder: weights in fp16, configuration, tokenizer files."""
    from safetensors.torch import save_file

    weights = {
        name: tensor if name == "logit_scale" else tensor.half()
        for name, tensor in model.state_dict().items()
    }
    with replace_file(output / "open_clip_model.safetensors") as temporary:
        save_file(weights, temporary)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    with replace_file(output / "tokenizer.json") as temporary:
        tokenizer.save(str(temporary))
    # Written by hand: transformers 5 would name a class that transformers 4 does not know, and for
    # transformers 4 add_prefix_space here overrides tokenizer.json.
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT_LENGTH,
        "bos_token": "<start>",
        "eos_token": "<end>",
        "pad_token": "<pad>",
        "add_prefix_space": True,
        "clean_up_tokenization_spaces": False,
    }
    preprocess = {
        "size": [IMAGE_SIZE, IMAGE_SIZE],
        "mean": MEAN,
        "std": STD,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    config = {"model_cfg": model_config(tokenizer.get_vocab_size()), "preprocess_cfg": preprocess}
    files = {"tokenizer_config.json": tokenizer_config, "open_clip_config.json": config}
    for name, content in files.items():
        write_text(output / name, json.dumps(content, indent=2) + "\n")
