"""Turn pictures and captions into the pixels and token ids that a model takes.

An `ImageTransform` works in two parts where it can: data-loader workers resize and crop, and send
bytes; the device normalises them. That is a quarter of the memory and transfer of float32 pixels.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fasterase.errors import InputError
from fasterase.transfers import to_device

if TYPE_CHECKING:
    from PIL.Image import Image


class Tokens(NamedTuple):
    """Token ids of a batch of texts, with the attention mask where the model takes one."""

    ids: Tensor  # [B, L] int64
    mask: Tensor | None = None  # [B, L] int64, 1 on tokens and 0 on padding

    @property
    def device(self) -> torch.device:
        return self.ids.device

    def to(self, device: torch.device | str) -> Tokens:
        """Move the tokens to `device`."""
        mask = None if self.mask is None else to_device(self.mask, device)
        return Tokens(to_device(self.ids, device), mask)

    def index(self, rows: Any) -> Tokens:  # type: ignore[override]
        """Pick rows by anything that indexes a tensor: a slice, a mask, a list or a tensor."""
        return Tokens(self.ids[rows], None if self.mask is None else self.mask[rows])


@dataclass(frozen=True)
class ImageTransform:
    """PIL image -> pixels, whole or in two parts; picklable as its callables are, no weights."""

    whole: Callable[[Image], Tensor]  # -> [3, H, W] float32: the model's own or the caller's
    parts: TransformParts | None = None  # None where they cannot be told apart

    @classmethod
    def of(cls, whole: Callable[[Image], Tensor], picture: Image) -> ImageTransform:
        """Split `whole` if its parts give the same numbers on `picture`."""
        try:
            parts = _propose_parts(whole)
            if parts is None:
                return cls(whole)
            expected, pixels = _run_seeded(whole, picture), _run_seeded(parts.pixels, picture)
            same = pixels.dtype == torch.uint8 and pixels.shape == expected.shape
            same = same and torch.allclose(parts.normalise(pixels), expected, rtol=1e-6, atol=1e-5)
        except Exception:
            return cls(whole)  # An unusual transform: correct whole, and only slower.
        return cls(whole, parts if same else None)

    def __call__(self, image: Image) -> Tensor:
        """Return [3, H, W] float32, resized, cropped and normalised."""
        return self.whole(image)

    def pixels(self, image: Image) -> Tensor:
        """Resize and crop: [3, H, W] uint8, or the float32 of the whole where it does not split."""
        return self.whole(image) if self.parts is None else self.parts.pixels(image)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Turn uint8 [..., 3, H, W] into float32 on the same device; return floats unchanged."""
        if pixels.is_floating_point():
            return pixels
        if self.parts is None or pixels.dtype != torch.uint8:
            raise InputError(
                f"preprocess: {pixels.dtype} pixels cannot be normalised: only uint8 can, and only "
                "where the preprocess has a mean and standard deviation of its own to apply. Give "
                "the float tensors that it returns, or a torchvision Compose that ends in ToTensor "
                "and Normalize"
            )
        return self.parts.normalise(pixels)


@dataclass(frozen=True)
class TransformParts:
    """The two parts of an image transform."""

    pixels: Callable[[Image], Tensor]  # -> [3, H, W] uint8
    divisor: float = 255.0  # maps 0..255 to the range that mean and std refer to; 255 for 0..1
    mean: tuple[float, ...] = (0.0,)  # one value per channel, or one for all
    std: tuple[float, ...] = (1.0,)

    def normalise(
        self,
        pixels: Tensor,  # [..., 3, H, W] uint8
    ) -> Tensor:
        """(pixels / divisor - mean) / std in float32, in torchvision's order of operations."""

        def per_channel(numbers: tuple[float, ...]) -> Tensor:  # [3, 1, 1] or [1, 1, 1]
            # Filled on the device: copying from the host would wait for all work queued before.
            return torch.stack([values.new_full((1, 1), number) for number in numbers])

        values = pixels.to(torch.float32).div_(self.divisor)
        return values.sub_(per_channel(self.mean)).div_(per_channel(self.std))


class TextTokenizer:
    """A tokenizer of either library, or any callable; picklable if that, its `source`, is."""

    def __init__(self, source: Any, context_length: int, *, with_mask: bool) -> None:
        self.source = source
        self.context_length = context_length
        self.with_mask = with_mask
        try:
            takes_length = "context_length" in inspect.signature(source).parameters
        except (TypeError, ValueError):
            takes_length = False
        self._options: dict[str, Any] = {"context_length": context_length} if takes_length else {}
        if is_hf_tokenizer(source):
            self._options = {
                "padding": "max_length",
                "truncation": True,
                "max_length": context_length,
                "return_tensors": "pt",
            }

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Encode `texts`: ids [B, context_length] int64, with a mask where the model takes one."""
        try:
            encoded, mask = self.source(list(texts), **self._options), None
        except Exception as error:
            # What the library `tokenizers` raises for a word that a vocabulary without an unknown
            # token lacks.
            if type(error) is Exception:
                raise ValueError(f"tokenizer: {error}") from error
            raise
        if isinstance(encoded, Mapping) or hasattr(encoded, "input_ids"):
            encoded, mask = encoded["input_ids"], encoded.get("attention_mask")
        ids = torch.as_tensor(encoded)
        if ids.ndim != 2 or ids.shape[0] != len(texts) or torch.is_floating_point(ids):
            raise InputError(
                f"tokenizer: {type(self.source).__name__} gave {ids.dtype} of shape "
                f"{tuple(ids.shape)} for {len(texts)} texts; integer ids "
                f"[{len(texts)}, {self.context_length}] are needed"
            )
        if ids.shape[1] > self.context_length:
            raise InputError(
                f"tokenizer: {type(self.source).__name__} gave {ids.shape[1]} tokens per text, but "
                f"the model takes {self.context_length}; make it truncate to that length"
            )
        return Tokens(ids.long(), mask.long() if self.with_mask and mask is not None else None)


def wrap_transform(preprocess: Any, image_size: tuple[int, int]) -> ImageTransform:
    """Make the caller's `preprocess=` an `ImageTransform`, after trying it on one picture.

    It may be the `image_transform` of another model, too. `InputError` if its pixels are not
    [3, *image_size].
    """
    if isinstance(preprocess, ImageTransform):
        preprocess = preprocess.whole
    if is_hf_tokenizer(preprocess):
        raise InputError(
            f"preprocess: {type(preprocess).__name__} is a tokenizer; pass it as tokenizer="
        )
    if hasattr(preprocess, "max_num_patches"):
        whole: Callable[[Image], Any] = _squash_naflex(preprocess, image_size)
    elif is_image_processor(preprocess):
        whole = ProcessorTransform(preprocess)
    elif callable(preprocess):
        whole = preprocess
    else:
        raise InputError(
            f"preprocess: {type(preprocess).__name__} is neither a callable PIL image -> "
            "[3, H, W] tensor nor a transformers image processor"
        )
    picture = _noise_picture(image_size)
    with _naming_failure(f"preprocess: {type(preprocess).__name__} failed on a plain RGB image"):
        pixels = _run_seeded(whole, picture)
    expected = (3, *image_size)
    is_tensor = isinstance(pixels, Tensor)
    if not is_tensor or not pixels.is_floating_point() or pixels.shape != expected:
        found = (
            f"{pixels.dtype} of shape {tuple(pixels.shape)}" if is_tensor else type(pixels).__name__
        )
        raise InputError(
            f"preprocess: gave {found}, but the model takes float tensors of shape {expected} "
            "(channels, height, width)"
        )
    return ImageTransform.of(whole, picture)


def build_open_clip_transform(
    settings: Mapping[str, Any], image_size: tuple[int, int]
) -> ImageTransform:
    """Build the evaluation transform that open_clip makes from `visual.preprocess_cfg`."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    # Settings read from a file hold lists instead of tuples; the description must not differ.
    plain = {key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()}
    whole = image_transform_v2(PreprocessCfg(**plain), is_train=False)
    return ImageTransform.of(whole, _noise_picture(image_size))


def describe_transform(transform: Callable[..., Any] | None) -> str:
    """Describe the settings of a transform as text, the same in every process."""
    if isinstance(transform, ImageTransform):
        transform = transform.whole
    if isinstance(transform, ProcessorTransform):
        return transform.processor.to_json_string()
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(transform))


def wrap_tokenizer(
    tokenizer: Any, context_length: int, vocab_size: int, *, with_mask: bool
) -> TextTokenizer:
    """Make the caller's `tokenizer=` a `TextTokenizer`, after trying it on one caption."""
    if isinstance(tokenizer, TextTokenizer):  # another DualEncoder's
        tokenizer = tokenizer.source
    if is_image_processor(tokenizer):
        raise InputError(
            f"tokenizer: {type(tokenizer).__name__} is an image processor; pass it as preprocess="
        )
    if not callable(tokenizer):
        raise InputError(
            f"tokenizer: {type(tokenizer).__name__} is not callable. Give an open_clip tokenizer, "
            "a transformers tokenizer or processor, or a callable list of str -> [B, L] ids"
        )
    wrapped = TextTokenizer(tokenizer, context_length, with_mask=with_mask)
    with _naming_failure(f"tokenizer: {type(tokenizer).__name__} failed on a plain caption"):
        ids = wrapped(["a photo of a cat"]).ids
    if int(ids.max()) >= vocab_size:
        raise InputError(
            f"tokenizer: {type(tokenizer).__name__} gave the id {int(ids.max())}, but the model's "
            f"vocabulary has {vocab_size}: it is not this model's tokenizer"
        )
    return wrapped


@contextmanager
def _naming_failure(what: str) -> Iterator[None]:
    """Make any error of the caller's function an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what}: {error}") from error


def read_size(size: int | Sequence[int]) -> tuple[int, int]:
    """Return (height, width) of a size that a library gives as one number or two."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def is_image_processor(candidate: Any) -> bool:
    """Whether it is a transformers image processor, without importing that library."""
    return hasattr(candidate, "image_mean") and hasattr(candidate, "preprocess")


def is_hf_tokenizer(candidate: Any) -> bool:
    """Whether it is a transformers tokenizer, without importing that library."""
    return hasattr(candidate, "convert_tokens_to_ids") and hasattr(candidate, "pad_token_id")


@dataclass(frozen=True)
class ProcessorTransform:
    """Run a transformers image processor on one image."""

    processor: Any

    def __call__(self, image: Image) -> Tensor:
        return self._run(image).float()

    def propose_parts(self) -> TransformParts:
        processor = self.processor
        rescales = getattr(processor, "do_rescale", False)
        normalises = getattr(processor, "do_normalize", False)
        return TransformParts(
            self._resize,
            divisor=1 / processor.rescale_factor if rescales else 1.0,
            mean=tuple(processor.image_mean) if normalises else (0.0,),
            std=tuple(processor.image_std) if normalises else (1.0,),
        )

    def _resize(self, image: Image) -> Tensor:
        return self._run(image, do_rescale=False, do_normalize=False)

    def _run(self, image: Image, **options: bool) -> Tensor:
        batch = self.processor(images=image.convert("RGB"), return_tensors="pt", **options)
        return batch["pixel_values"][0]


def _squash_naflex(processor: Any, image_size: tuple[int, int]) -> Callable[[Image], Tensor]:
    """Resize to exactly `image_size` with the statistics of a NaFlex (SigLIP 2) image processor."""
    # The processor itself would keep the aspect ratio and give every image another patch grid.
    from torchvision.transforms import Compose, Normalize, Resize, ToTensor

    resize = Resize(image_size, interpolation=int(processor.resample))
    normalise = Normalize(processor.image_mean, processor.image_std)
    return Compose([_convert_to_rgb, resize, ToTensor(), normalise])


def _convert_to_rgb(image: Image) -> Image:
    return image.convert("RGB")


def _propose_parts(whole: Callable[[Image], Tensor]) -> TransformParts | None:
    from torchvision.transforms import Compose, Normalize, PILToTensor, ToTensor

    if isinstance(whole, ProcessorTransform):
        return whole.propose_parts()
    if not isinstance(whole, Compose):
        return None
    *steps, last = whole.transforms
    mean: Sequence[float] = (0.0,)
    std: Sequence[float] = (1.0,)
    if isinstance(last, Normalize):
        mean, std = last.mean, last.std
        *steps, last = steps
    if not isinstance(last, ToTensor):  # open_clip's MaybeToTensor is a ToTensor
        return None
    head = Compose([*steps, PILToTensor(), torch.Tensor.contiguous])
    return TransformParts(head, mean=tuple(map(float, mean)), std=tuple(map(float, std)))


def _noise_picture(image_size: tuple[int, int]) -> Image:
    """A random RGB picture a little larger than `image_size`, the same at every call."""
    from PIL import Image

    height, width = image_size
    generator = torch.Generator().manual_seed(0)
    shape = (height + 3, width + 7, 3)
    return Image.fromarray(torch.randint(256, shape, generator=generator).byte().numpy())


def _run_seeded(transform: Callable[[Image], Tensor], picture: Image) -> Tensor:
    """Run a transform, which may be a random augmentation, without touching the global state."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return transform(picture)


# On the library's own module. The underscores keep it out of state dicts and saved configurations.
_COMPANIONS = "_fasterase_companions"


@dataclass(frozen=True)
class Companions:
    """`tokenizer=` and `preprocess=` of a model, by its library or the caller; None: unknown."""

    tokenizer: Any = None
    preprocess: Any = None

    @classmethod
    def from_arguments(cls, tokenizer: Any, preprocess: Any) -> Companions:
        """Take transformers processors, which hold both, apart where the other one is None."""
        if _is_processor(tokenizer):
            preprocess = tokenizer if preprocess is None else preprocess
            tokenizer = tokenizer.tokenizer
        if _is_processor(preprocess):
            tokenizer = preprocess.tokenizer if tokenizer is None else tokenizer
            preprocess = preprocess.image_processor
        return cls(tokenizer, preprocess)

    def or_else(self, other: Companions) -> Companions:
        """Return these, with those of `other` in the place of None."""
        return Companions(
            other.tokenizer if self.tokenizer is None else self.tokenizer,
            other.preprocess if self.preprocess is None else self.preprocess,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Companions:
        return self

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        # A pickled model must be readable without fasterase, and a caller's function may not be
        # picklable: None takes this place.
        return type(None), ()


def remember(module: nn.Module, companions: Companions) -> None:
    """Keep them on the module, so that they are found when it is passed in again, or a copy."""
    setattr(module, _COMPANIONS, companions)


def remembered(module: nn.Module) -> Companions:
    """Return what `remember` kept on the module; nothing known otherwise."""
    return getattr(module, _COMPANIONS, None) or Companions()


def _is_processor(candidate: Any) -> bool:
    return hasattr(candidate, "image_processor") and hasattr(candidate, "tokenizer")
