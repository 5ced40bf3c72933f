"""What turns a PIL image into the pixels that a model takes, from each library's own description.

Every transform here is a small picklable callable, PIL image -> [3, H, W] float32, that holds no
weights: data-loader workers receive a copy of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
