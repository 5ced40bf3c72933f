"""What turns captions into the token ids that a model takes, from each library's own tokenizers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fasterase.errors import InputError
from fasterase.models.two_tower import Tokens


class TextTokenizer:
    """A tokenizer of either library, or any callable, at one model's context length.

    Picklable wherever the tokenizer is, and holds no weights: data-loader workers receive a copy.

    Attributes:
        source: the tokenizer as it was given; what `save` writes beside the weights.
    """

    def __init__(self, source: Any, context_length: int, *, with_mask: bool) -> None:
        self.source = source
        self.context_length = context_length
        self.with_mask = with_mask
        self._takes_length = not is_hf_tokenizer(source) and _accepts(source, "context_length")

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Ids [B, context_length] int64 of `texts`, with a mask where the model takes one."""
        ids, mask = self._encode(list(texts))
        if ids.ndim != 2 or ids.shape[0] != len(texts) or torch.is_floating_point(ids):
            raise InputError(
                f"tokenizer: {type(self.source).__name__} gave {ids.dtype} of shape "
                f"{tuple(ids.shape)} for {len(texts)} texts; integer ids "
                f"[{len(texts)}, {self.context_length}] are needed"
            )
        if ids.shape[1] > self.context_length:
            raise InputError(
                f"tokenizer: {type(self.source).__name__} gave {ids.shape[1]} tokens a text, but "
                f"the model takes {self.context_length}; make it truncate to that length"
            )
        return Tokens(ids.long(), mask.long() if self.with_mask and mask is not None else None)

    def _encode(self, texts: list[str]) -> tuple[Tensor, Tensor | None]:
        if is_hf_tokenizer(self.source):
            encoded = self.source(
                texts,
                padding="max_length",
                truncation=True,
                max_length=self.context_length,
                return_tensors="pt",
            )
        elif self._takes_length:
            encoded = self.source(texts, context_length=self.context_length)
        else:
            encoded = self.source(texts)
        if isinstance(encoded, Mapping) or hasattr(encoded, "input_ids"):
            return torch.as_tensor(encoded["input_ids"]), encoded.get("attention_mask")
        return torch.as_tensor(encoded), None


def user_tokenizer(
    tokenizer: Any, context_length: int, vocab_size: int, *, with_mask: bool
) -> TextTokenizer:
    """The caller's `tokenizer=` at a model's context length, tried once on a caption.

    Raises:
        InputError: not a tokenizer, or its ids do not fit the model's vocabulary or length.
    """
    if isinstance(tokenizer, TextTokenizer):  # another TwoTower's
        tokenizer = tokenizer.source
    if hasattr(tokenizer, "image_processor") and hasattr(tokenizer, "tokenizer"):
        tokenizer = tokenizer.tokenizer
    if not callable(tokenizer):
        raise InputError(
            f"tokenizer: {type(tokenizer).__name__} is not callable. Give an open_clip tokenizer, "
            "a transformers tokenizer or processor, or a callable list of str -> [B, L] ids"
        )
    wrapped = TextTokenizer(tokenizer, context_length, with_mask=with_mask)
    try:
        ids = wrapped(["a photo of a cat"]).ids
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"tokenizer: {type(tokenizer).__name__} failed on a plain caption: {error}"
        ) from error
    if int(ids.max()) >= vocab_size:
        raise InputError(
            f"tokenizer: {type(tokenizer).__name__} gave the id {int(ids.max())}, but the model's "
            f"vocabulary has {vocab_size}: it is not this model's tokenizer"
        )
    return wrapped


def is_hf_tokenizer(candidate: Any) -> bool:
    """Whether it is a tokenizer of transformers, told without importing that library."""
    return hasattr(candidate, "convert_tokens_to_ids") and hasattr(candidate, "pad_token_id")


def _accepts(function: Callable[..., Any], argument: str) -> bool:
    try:
        return argument in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
