"""transformers' `CLIPModel`, `SiglipModel` and `Siglip2Model` as a `DualEncoder`.

A NaFlex SigLIP 2 (`Siglip2Model`) takes patches of images of any aspect ratio. Here it runs at one
resolution, the square that its position grid covers: images are resized to that square, and the
adapter cuts them into patches. Fixed-resolution SigLIP 2 checkpoints are `SiglipModel`s and need
none of this.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasterase.errors import InputError, import_extra
from fasterase.models.dual_encoder import DualEncoder, Tokens, TowerParts
from fasterase.models.preprocessing import (
    Companions,
    ImageTransform,
    TextTokenizer,
    is_image_processor,
    read_size,
    wrap_tokenizer,
    wrap_transform,
)
from fasterase.models.wrapped import plain_state

_CLASSES = {"clip": "CLIPModel", "siglip": "SiglipModel", "siglip2": "Siglip2Model"}


class HuggingFaceEncoder(DualEncoder):
    """A transformers model: `CLIPModel`, `SiglipModel` or `Siglip2Model`.

    Args:
        given: the caller's tokenizer and preprocessing, which take precedence.
        source: folder or hub id to look for the library's in; `online`: on the network, too.
    """

    library = "transformers"
    module: Any
    text_tokenizer: TextTokenizer | None

    def __init__(
        self,
        module: nn.Module,
        given: Companions,
        *,
        name: str,
        source: str | None,
        online: bool,
    ) -> None:
        self.module = module
        self.name = name
        config = self.module.config
        text, vision = config.text_config, config.vision_config
        self.context_length = int(text.max_position_embeddings)
        self.vocab_size = int(text.vocab_size)
        self._patch_size: int | None = None
        size: Any = getattr(vision, "image_size", None)
        if any(ancestor.__name__ == "Siglip2Model" for ancestor in type(module).__mro__):
            self._patch_size = int(vision.patch_size)
            size = math.isqrt(vision.num_patches) * self._patch_size
        self.image_size = read_size(size)
        # SigLIP states its width in text_config, where it is also the vision tower's.
        self.embed_dim = int(
            text.projection_size if hasattr(text, "projection_size") else config.projection_dim
        )
        self.image_processor: Any = None  # the library's, which `save` writes
        self.text_tokenizer, self.image_transform = None, None
        if given.tokenizer is not None:
            self.text_tokenizer = self._wrap_tokenizer(given.tokenizer)
        if given.preprocess is not None:
            self.image_transform = self._wrap_transform(given.preprocess)
        # Missing, or of another model: `tokenize` and `preprocess` say so when it is needed.
        if given.tokenizer is None and source is not None:
            with contextlib.suppress(Exception):
                from transformers import AutoTokenizer

                found = AutoTokenizer.from_pretrained(source, local_files_only=not online)
                tokenizer = self._wrap_tokenizer(found)
                first, second = tokenizer(["a photo of a cat", "two dogs on the grass"]).ids
                # Without the tokenizer's files the library may return one without a vocabulary.
                self.text_tokenizer = None if torch.equal(first, second) else tokenizer
        if given.preprocess is None and source is not None:
            with contextlib.suppress(Exception):
                from transformers import AutoImageProcessor

                found = AutoImageProcessor.from_pretrained(source, local_files_only=not online)
                self.image_transform = self._wrap_transform(found)

    def _wrap_tokenizer(self, tokenizer: Any) -> TextTokenizer:
        return wrap_tokenizer(tokenizer, self.context_length, self.vocab_size, with_mask=True)

    def _wrap_transform(self, preprocess: Any) -> ImageTransform:
        transform = wrap_transform(preprocess, self.image_size)
        if is_image_processor(preprocess):
            self.image_processor = preprocess
        return transform

    @property
    def companions(self) -> Companions:
        """The tokenizer, and the image processor itself where there is one."""
        known = super().companions
        return Companions(known.tokenizer, self.image_processor or known.preprocess)

    def _image_features(self, pixels: Tensor) -> Tensor:
        inputs = {"pixel_values": pixels}
        if self._patch_size is not None:
            inputs = _cut_patches(pixels, self._patch_size)
        return _features(self.module.get_image_features(**inputs))

    def _text_features(self, tokens: Tokens) -> Tensor:
        inputs = {"input_ids": tokens.ids, "attention_mask": tokens.mask}
        return _features(self.module.get_text_features(**inputs))

    def image_parts(self) -> TowerParts:
        tower: Any = self.module.vision_model
        head = getattr(tower, "head", None) or getattr(self.module, "visual_projection", None)
        projection = [] if head is None else [head]
        after = [tower.post_layernorm, *projection]
        blocks = list(tower.encoder.layers)
        return TowerParts([tower, *projection], blocks, after, projection or after)

    def text_parts(self) -> TowerParts:
        tower: Any = self.module.text_model
        projection = getattr(tower, "head", None) or self.module.text_projection
        after = [tower.final_layer_norm, projection]
        return TowerParts([tower, projection], list(tower.encoder.layers), after, [projection])

    def _write_model(self, folder: Path) -> None:
        # One safetensors file up to this size; by default the library shards in version 4.
        state = plain_state(self.module)
        with _without_bars():
            self.module.save_pretrained(folder, state_dict=state, max_shard_size="5GB")


def is_transformers(module: nn.Module) -> bool:
    """Whether this adapter takes the module; does not import the library."""
    return any(
        ancestor.__module__.partition(".")[0] == "transformers"
        and ancestor.__name__ in _CLASSES.values()
        for ancestor in type(module).__mro__
    )


def from_instance(module: nn.Module, given: Companions) -> HuggingFaceEncoder:
    """Adapt a module, with the tokenizer and image processor that this machine has for it."""
    source = getattr(module, "name_or_path", None) or None
    return HuggingFaceEncoder(
        module, given, name=type(module).__name__, source=source, online=False
    )


def from_source(
    source: str, given: Companions, *, name: str, online: bool, empty: bool = False
) -> HuggingFaceEncoder:
    """Load a hub id or a `from_pretrained` folder in fp32, never with random weights.

    With `empty` it is on the meta device. `InputError` where it is no supported CLIP model, out of
    reach, or without some of its weights.
    """
    config = read_config(source, name=name, online=online)
    if empty:
        return from_config(config, name=name)
    module = load_weights(_class_of(config, name), source, config, name=name, online=online)
    # Version 5 keeps the checkpoint's dtype, which may be half; training needs fp32 weights.
    # Quantised ones can only be measured, and the library refuses to change their dtype.
    module = module if getattr(module, "is_quantized", False) else module.float()
    return HuggingFaceEncoder(module, given, name=name, source=source, online=online)


def load_weights(kind: Any, source: str, config: Any, *, name: str, online: bool) -> Any:
    """Load the library's class `kind`; `InputError` if out of reach or weights are missing."""
    try:
        with _without_bars():
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
    return module


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Hide transformers' bars, which stay in a terminal and fill a log; not those of downloads."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )
    from transformers.utils import logging

    def show(bars: bool, downloads: bool) -> None:
        with warnings.catch_warnings():
            # HF_HUB_DISABLE_PROGRESS_BARS decides over downloads alone.
            warnings.filterwarnings("ignore", "Cannot (en|dis)able progress bars", UserWarning)
            (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
            (enable_progress_bars if downloads else disable_progress_bars)()

    shows, downloads = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    show(False, downloads)
    try:
        yield
    finally:
        show(shows, downloads)


def read_config(source: str, *, name: str, online: bool) -> Any:
    """Read the library's configuration of a hub id or folder; `InputError` if out of reach."""
    transformers = import_extra("transformers", "hf", f"Loading {name}")
    try:
        return transformers.AutoConfig.from_pretrained(source, local_files_only=not online)
    except Exception as error:
        raise _unreachable(name, error) from error


def from_config(config: Any, *, name: str) -> HuggingFaceEncoder:
    """Build a model from the library's configuration on the meta device, without weights."""
    with torch.device("meta"):
        module = _class_of(config, name)(config).eval()
    return HuggingFaceEncoder(module, Companions(), name=name, source=None, online=False)


def _class_of(config: Any, name: str) -> Any:
    import transformers

    if config.model_type not in _CLASSES:
        raise InputError(
            f"model: {name} is a {config.model_type!r} model; the supported transformers "
            f"classes are {', '.join(_CLASSES.values())}"
        )
    return getattr(transformers, _CLASSES[config.model_type])


def _cut_patches(
    pixels: Tensor,  # [B, 3, H, W]
    patch_size: int,
) -> dict[str, Tensor]:
    """Cut images into patches [B, P, 3 * patch_size^2] in the order of `Siglip2ImageProcessor`.

    Without padding: the mask [B, P] is all ones, and the shapes [B, 2] are (rows, columns).
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
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def _features(output: Any) -> Tensor:
    # A tensor before version 5; since then an output object with the projection as pooler_output.
    return output if isinstance(output, Tensor) else output.pooler_output


def _unreachable(name: str, error: Exception) -> InputError:
    return InputError(
        f"model: transformers could not load {name}: {error}. It must be a folder written by "
        "save_pretrained, or a hub id whose files are in the cache or reachable over the network "
        "(see HF_HUB_OFFLINE)"
    )
