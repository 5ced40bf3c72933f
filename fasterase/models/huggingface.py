"""transformers' `CLIPModel`, `SiglipModel` and `Siglip2Model` as a `DualEncoder`.

SigLIP was trained with a sigmoid loss; here the objective's softmax acts on its similarities at
its own scale, and `logit_bias` is left alone (a softmax does not see it).

A SigLIP 2 of the NaFlex kind (`Siglip2Model`) takes patches of any aspect. Here it is run at one
resolution, the square that its position grid covers: images are resized to it whatever their
aspect, and cut into patches in the adapter. Checkpoints of SigLIP 2 at a fixed resolution are
`SiglipModel`s and need none of this.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fasterase.errors import InputError, import_extra
from fasterase.files import replace_model_folder
from fasterase.models.dual_encoder import DualEncoder, Tokens, TowerParts
from fasterase.models.preprocessing import (
    TextTokenizer,
    is_image_processor,
    user_tokenizer,
    user_transform,
)

if TYPE_CHECKING:
    from PIL.Image import Image


CLASSES = {"clip": "CLIPModel", "siglip": "SiglipModel", "siglip2": "Siglip2Model"}
# One safetensors file up to this size; the library would shard (v4) or not (v5) by itself.
MAX_SHARD_SIZE = "5GB"


class HuggingFaceEncoder(DualEncoder):
    """A transformers model.

    Args:
        module: `CLIPModel`, `SiglipModel` or `Siglip2Model`.
        name: for people.
        source: folder or hub id that its tokenizer and image processor are looked for in.
        online: whether that look may use the network.
        tokenizer, preprocess: the caller's, which come first.
    """

    module: Any
    text_tokenizer: TextTokenizer | None

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str,
        source: str | None,
        online: bool,
        tokenizer: Any = None,
        preprocess: Any = None,
    ) -> None:
        self.module = module
        self.name = name
        config = self.module.config
        text, vision = config.text_config, config.vision_config
        self.context_length = int(text.max_position_embeddings)
        self.vocab_size = int(text.vocab_size)
        self._patch_size = int(vision.patch_size) if _is_naflex(module) else None
        self.image_size = _naflex_size(vision) if _is_naflex(module) else _size(vision.image_size)
        # SigLIP states its width in text_config, where it is also the vision tower's.
        self.embed_dim = int(
            text.projection_size if hasattr(text, "projection_size") else config.projection_dim
        )
        if tokenizer is None and source is not None:
            self.text_tokenizer = self._found_tokenizer(source, online)
        elif tokenizer is not None:
            self.text_tokenizer = self._wrap_tokenizer(tokenizer)
        else:
            self.text_tokenizer = None
        self._processor: Any = None
        self.image_transform = self._choose_transform(preprocess, tokenizer, source, online)

    def _wrap_tokenizer(self, tokenizer: Any) -> TextTokenizer:
        return user_tokenizer(tokenizer, self.context_length, self.vocab_size, with_mask=True)

    def _found_tokenizer(self, source: str, online: bool) -> TextTokenizer | None:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=not online)
            wrapped = self._wrap_tokenizer(tokenizer)
            first, second = wrapped(["a photo of a cat", "two dogs on the grass"]).ids
        except Exception:
            return None  # None there, or not for this model: the caller is told when it is needed.
        # Without its files the library may hand out a tokenizer with an empty vocabulary.
        return None if torch.equal(first, second) else wrapped

    def _choose_transform(
        self, preprocess: Any, tokenizer: Any, source: str | None, online: bool
    ) -> Callable[[Image], Tensor] | None:
        if preprocess is None and is_image_processor(getattr(tokenizer, "image_processor", None)):
            preprocess = tokenizer  # A CLIPProcessor given as tokenizer brings both.
        if preprocess is None and source is not None:
            from transformers import AutoImageProcessor

            try:
                preprocess = AutoImageProcessor.from_pretrained(source, local_files_only=not online)
                transform = user_transform(preprocess, self.image_size)
            except Exception:
                return None
            self._processor = preprocess
            return transform
        if preprocess is None:
            return None
        processor = getattr(preprocess, "image_processor", preprocess)
        if is_image_processor(processor):
            self._processor = processor
        return user_transform(preprocess, self.image_size)

    def _image_features(self, pixels: Tensor) -> Tensor:
        if self._patch_size is None:
            output = self.module.get_image_features(pixel_values=pixels)
        else:
            patches, mask, shapes = cut_patches(pixels, self._patch_size)
            output = self.module.get_image_features(
                pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shapes
            )
        return _features(output)

    def _text_features(self, tokens: Tokens) -> Tensor:
        return _features(
            self.module.get_text_features(input_ids=tokens.ids, attention_mask=tokens.mask)
        )

    def image_parts(self) -> TowerParts:
        tower: Any = self.module.vision_model
        head = getattr(tower, "head", None) or getattr(self.module, "visual_projection", None)
        projection = [] if head is None else [head]
        after = [tower.post_layernorm, *projection]
        return TowerParts(
            [tower, *projection], list(tower.encoder.layers), after, projection or after
        )

    def text_parts(self) -> TowerParts:
        tower: Any = self.module.text_model
        projection = getattr(tower, "head", None) or self.module.text_projection
        return TowerParts(
            [tower, projection],
            list(tower.encoder.layers),
            [tower.final_layer_norm, projection],
            [projection],
        )

    def save(self, folder: Path) -> None:
        """Write what `from_pretrained` reads, with tokenizer and image processor where known."""
        with replace_model_folder(folder, library="transformers") as new:
            self.module.save_pretrained(new, max_shard_size=MAX_SHARD_SIZE)
            tokenizer = getattr(self.text_tokenizer, "source", None)
            companions: tuple[Any, ...] = (tokenizer, self._processor)
            for companion in companions:
                if hasattr(companion, "save_pretrained"):
                    companion.save_pretrained(new)


def is_transformers(module: nn.Module) -> bool:
    """Whether the module is one that this adapter takes, told without importing the library."""
    return any(
        ancestor.__module__.partition(".")[0] == "transformers"
        and ancestor.__name__ in CLASSES.values()
        for ancestor in type(module).__mro__
    )


def from_instance(module: nn.Module, *, tokenizer: Any, preprocess: Any) -> HuggingFaceEncoder:
    """Adapt a module of transformers, with the tokenizer and processor it was loaded beside.

    Those are looked for only on this machine: in its folder, or in the hub's cache.
    """
    return HuggingFaceEncoder(
        module,
        name=type(module).__name__,
        source=getattr(module, "name_or_path", None) or None,
        online=False,
        tokenizer=tokenizer,
        preprocess=preprocess,
    )


def from_source(
    source: str, *, name: str, online: bool, tokenizer: Any, preprocess: Any
) -> HuggingFaceEncoder:
    """Load a hub id or a `from_pretrained` folder, in fp32, all weights real.

    Raises:
        InputError: not a supported CLIP, out of reach, or some weights are missing.
        MissingExtraError: transformers is not installed.
    """
    transformers = import_extra("transformers", "hf", f"Loading {name}")
    try:
        config = transformers.AutoConfig.from_pretrained(source, local_files_only=not online)
    except Exception as error:
        raise _unreachable(name, error) from error
    if config.model_type not in CLASSES:
        raise InputError(
            f"model: {name} is a {config.model_type!r} model; of transformers only "
            f"{', '.join(CLASSES.values())} are supported"
        )
    kind = getattr(transformers, CLASSES[config.model_type])
    try:
        module, report = kind.from_pretrained(
            source,
            config=config,
            local_files_only=not online,
            weights_only=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise _unreachable(name, error) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            f"model: {name} lacks {len(missing)} of the model's weights, which would be random: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )
    return HuggingFaceEncoder(
        # Version 5 keeps the checkpoint's dtype, which may be half; training needs fp32 weights.
        module.float(),
        name=name,
        source=source,
        online=online,
        tokenizer=tokenizer,
        preprocess=preprocess,
    )


def cut_patches(
    pixels: Tensor,  # [B, 3, H, W]
    patch_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, P, 3 * patch_size^2] patches, row by row, each pixel's channels together; mask; grid.

    The order of `Siglip2ImageProcessor`, without its padding: mask [B, P] is all ones and the grid
    [B, 2] holds every image's (rows, columns).
    """
    batch, channels, height, width = pixels.shape
    if height % patch_size or width % patch_size:
        raise InputError(
            f"image: {height} x {width} pixels cannot be cut into the model's patches of "
            f"{patch_size} x {patch_size}"
        )
    rows, columns = height // patch_size, width // patch_size
    grid = pixels.reshape(batch, channels, rows, patch_size, columns, patch_size)
    patches = grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)
    mask = torch.ones(batch, rows * columns, dtype=torch.int32, device=pixels.device)
    shapes = torch.tensor([[rows, columns]], device=pixels.device).expand(batch, 2)
    return patches, mask, shapes


def _features(output: Any) -> Tensor:
    # A tensor before version 5, since then an output object whose pooled part is projected.
    return output if isinstance(output, Tensor) else output.pooler_output


def _is_naflex(module: nn.Module) -> bool:
    return any(ancestor.__name__ == "Siglip2Model" for ancestor in type(module).__mro__)


def _naflex_size(vision: Any) -> tuple[int, int]:
    side = math.isqrt(vision.num_patches) * int(vision.patch_size)
    return side, side


def _size(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _unreachable(name: str, error: Exception) -> InputError:
    return InputError(
        f"model: transformers could not load {name}: {error}. It must be a folder written by "
        "save_pretrained, or a hub id whose files are in the cache or reachable over the network "
        "(see HF_HUB_OFFLINE)"
    )
