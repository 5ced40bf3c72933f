"""What turns pictures and captions into the pixels and token ids that a model takes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fasterase.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class ProcessorTransform:
    """A transformers image processor, one image at a time."""

    processor: Any

    def __call__(self, image: Image) -> Tensor:
        batch = self.processor(images=image.convert("RGB"), return_tensors="pt")
        return batch["pixel_values"][0].float()


@dataclass(frozen=True)
class SquashTransform:
    """Resize to exactly `size`, whatever the aspect, rescale to 0..1 and normalise.

    What a fixed-resolution SigLIP does; also how a NaFlex SigLIP 2 is given images here, whose own
    processor would keep the aspect and give every image another patch grid.
    """

    size: tuple[int, int]  # (height, width) pixels
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int  # PIL's number

    def __call__(self, image: Image) -> Tensor:
        from torchvision.transforms.functional import normalize, to_tensor

        height, width = self.size
        resized = image.convert("RGB").resize((width, height), resample=self.resample)
        return normalize(to_tensor(resized), list(self.mean), list(self.std))


def open_clip_transform(settings: Mapping[str, Any]) -> Callable[[Image], Tensor]:
    """The evaluation transform that open_clip makes of a model's `visual.preprocess_cfg`."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    # Settings read from a file hold lists for tuples; the same model must describe itself the same.
    plain = {key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()}
    return image_transform_v2(PreprocessCfg(**plain), is_train=False)


def user_transform(preprocess: Any, image_size: tuple[int, int]) -> Callable[[Image], Tensor]:
    """The caller's `preprocess=` as a transform, tried once on a grey image.

    Raises:
        InputError: not a transform or image processor, or its pixels are not [3, *image_size].
    """
    from PIL import Image

    processor = getattr(preprocess, "image_processor", preprocess)
    if hasattr(processor, "max_num_patches"):
        transform: Callable[[Any], Any] = naflex_transform(processor, image_size)
    elif is_image_processor(processor):
        transform = ProcessorTransform(processor)
    elif callable(preprocess):
        transform = preprocess
    else:
        raise InputError(
            f"preprocess: {type(preprocess).__name__} is neither a callable PIL image -> "
            "[3, H, W] tensor nor a transformers image processor"
        )
    height, width = image_size
    try:
        pixels = transform(Image.new("RGB", (width + 7, height + 3), (128, 128, 128)))
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"preprocess: {type(preprocess).__name__} failed on a plain RGB image: {error}"
        ) from error
    if not isinstance(pixels, Tensor) or not torch.is_floating_point(pixels):
        found = pixels.dtype if isinstance(pixels, Tensor) else type(pixels).__name__
        raise InputError(f"preprocess: gave {found} where a float tensor [3, H, W] is needed")
    if tuple(pixels.shape) != (3, height, width):
        raise InputError(
            f"preprocess: gave an image of shape {tuple(pixels.shape)}, but the model takes "
            f"{(3, height, width)} (channels, height, width)"
        )
    return transform


def is_image_processor(candidate: Any) -> bool:
    """Whether it is an image processor of transformers, told without importing that library."""
    return hasattr(candidate, "image_mean") and hasattr(candidate, "preprocess")


def naflex_transform(processor: Any, image_size: tuple[int, int]) -> SquashTransform:
    """A fixed-resolution transform with the statistics of a NaFlex (SigLIP 2) image processor."""
    mean: Sequence[float] = processor.image_mean
    std: Sequence[float] = processor.image_std
    return SquashTransform(image_size, tuple(mean), tuple(std), int(processor.resample))


def describe_transform(transform: Callable[..., Any] | None) -> str:
    """The settings of a transform as text, the same in every process."""
    if isinstance(transform, ProcessorTransform):
        return transform.processor.to_json_string()
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(transform))


class Tokens(NamedTuple):
    """Token ids of a batch of texts, with the attention mask where the model takes one."""

    ids: Tensor  # [B, L] int64
    mask: Tensor | None = None  # [B, L] int64, 1 on tokens and 0 on padding

    def to(self, device: torch.device | str) -> Tokens:
        """The same tokens on `device`."""
        return Tokens(self.ids.to(device), None if self.mask is None else self.mask.to(device))

    def index(self, rows: Any) -> Tokens:  # type: ignore[override]
        """The rows picked by whatever indexes a tensor: a slice, a mask, a list or a tensor."""
        return Tokens(self.ids[rows], None if self.mask is None else self.mask[rows])


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
    if isinstance(tokenizer, TextTokenizer):  # another DualEncoder's
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
