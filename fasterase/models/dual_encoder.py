"""The one interface over CLIP libraries: two encoders, scale, tokenizer, preprocess and save.

All of fasterase sees a `DualEncoder`; only the adapters (`open_clip.py`, `transformers.py`) know a
library. SigLIP models are taken too: the objective's softmax acts on their similarities, and
their `logit_bias`, which moves every logit alike and so cancels in a softmax, is left alone.
"""

from __future__ import annotations

import abc
import copy
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterase.errors import InputError
from fasterase.models.preprocessing import Tokens, describe_transform

if TYPE_CHECKING:
    from PIL.Image import Image


class DualEncoder(abc.ABC):
    """A CLIP model of some library: what the objective needs of it, under one set of names.

    Attributes:
        module: the library's own object; `trainable` and training change it in place.
        name: for people, "ViT-B-32/laion2b_s34b_b79k" or "CLIPModel".
        embed_dim: D, the width of the shared embedding.
        image_size: (height, width) in pixels that the image tower takes.
        context_length: L, tokens that the text tower takes.
        vocab_size: token ids are below it.
        image_transform: PIL image -> [3, H, W] float32, the deterministic evaluation transform;
            None when unknown. Holds no weights, so data-loader workers can pickle it.
        text_tokenizer: list of str -> `Tokens`, equally picklable; None when unknown.
    """

    module: nn.Module
    name: str
    embed_dim: int
    image_size: tuple[int, int]
    context_length: int
    vocab_size: int
    image_transform: Callable[[Image], Tensor] | None
    text_tokenizer: Callable[[Sequence[str]], Tokens] | None

    @abc.abstractmethod
    def _image_features(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, D], as the library gives them, before normalisation."""

    @abc.abstractmethod
    def _text_features(self, tokens: Tokens) -> Tensor:
        """[B, L] ids -> [B, D], as the library gives them, before normalisation."""

    @abc.abstractmethod
    def image_parts(self) -> TowerParts:
        """What the image tower is made of, for `trainable`."""

    @abc.abstractmethod
    def text_parts(self) -> TowerParts:
        """What the text tower is made of, for `trainable`."""

    @abc.abstractmethod
    def save(self, folder: Path) -> None:
        """Write a folder that the model's own library loads, in one piece or not at all.

        Raises:
            InputError: `folder` exists and is neither empty nor a model saved by fasterase.
        """

    def encode_image(
        self,
        pixels: Tensor,  # [B, 3, H, W] preprocessed
    ) -> Tensor:  # [B, D] unit rows
        """Image features of unit length; fp32 whatever autocast or the weights are (fp64 stays)."""
        return _unit_rows(self._image_features(pixels))

    def encode_text(
        self,
        tokens: Tokens,  # [B, L]
    ) -> Tensor:  # [B, D] unit rows
        """Text features of unit length; fp32 whatever autocast or the weights are (fp64 stays)."""
        return _unit_rows(self._text_features(tokens))

    @property
    def logit_scale(self) -> nn.Parameter:
        """Logarithm of the scale, the library's own parameter: [] or [1]."""
        return self.module.logit_scale  # type: ignore[return-value]

    def scale(self) -> Tensor:
        """[] exp(logit_scale), differentiable."""
        return self.logit_scale.exp().reshape(())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.logit_scale.device

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Token ids [B, L] of `texts`; `InputError` naming `tokenizer` when none is known."""
        if self.text_tokenizer is None:
            raise InputError(
                f"tokenizer: {self.name} came without one and its architecture names none, so "
                "captions given as strings cannot be read. Pass tokenizer= (an open_clip or "
                "transformers tokenizer, or a callable list of str -> [B, L] ids), or give "
                "captions as token ids."
            )
        return self.text_tokenizer(texts)

    def preprocess(self, image: Image) -> Tensor:
        """[3, H, W] float32; `InputError` naming `preprocess` when the model carries none."""
        if self.image_transform is None:
            raise InputError(
                f"preprocess: {self.name} came without its image preprocessing, so images that are "
                "not float tensors cannot be read. Pass preprocess= (a callable PIL image -> "
                "[3, H, W] float tensor, or a transformers image processor), or give float tensors "
                "that are already preprocessed."
            )
        return self.image_transform(image)

    def trainable(self, tune: str) -> list[tuple[str, nn.Parameter]]:
        """Name and parameter of what `tune` trains, in the module's order.

        Args:
            tune: `"all"`; `"image"` or `"text"`, one tower; `"projections"`, the last map into the
                shared space of each tower; `"last:N"`, the last N blocks of each tower (stages of a
                ResNet) and all that follows them. The temperature (logit_scale) and logit_bias are
                never among them, nor are weights that no feature depends on (CoCa's decoder).

        Raises:
            InputError: unknown `tune`, or N beyond the blocks that a tower has.
        """
        return select_parameters(self.module, self.image_parts(), self.text_parts(), tune)

    def fingerprint(self) -> str:
        """SHA-256 over weights, image size, preprocessing and tokenizer: equal means same features.

        Weights on the CPU are hashed in place (about 1 GB/s); others are copied one at a time.
        """
        digest = hashlib.sha256()
        for name, tensor in self.module.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(memoryview(flat.view(torch.uint8).numpy()))
        digest.update(f"{self.image_size};{describe_transform(self.image_transform)};".encode())
        if self.text_tokenizer is not None:
            probe = self.text_tokenizer(["A photo of 2 café tables, 37°!"]).ids
            digest.update(f"{self.context_length};{probe.tolist()}".encode())
        return digest.hexdigest()


def _unit_rows(features: Tensor) -> Tensor:
    if features.dtype != torch.float64:
        features = features.float()
    return F.normalize(features, dim=-1)


def frozen_copy(tower: DualEncoder) -> DualEncoder:
    """A copy that shares nothing trainable with `tower`: own weights, eval mode, no gradients."""
    frozen = copy.copy(tower)
    frozen.module = copy.deepcopy(tower.module).eval().requires_grad_(False)
    frozen.module.zero_grad(set_to_none=True)
    return frozen


Part = nn.Module | nn.Parameter

CHOICES = '"all", "image", "text", "projections" or "last:N" (N a positive number, as in "last:4")'


@dataclass(frozen=True)
class TowerParts:
    """One tower, front to back. Parts may overlap: a parameter is chosen once."""

    everything: Sequence[Part]  # all that the tower's features depend on
    blocks: Sequence[Part]  # transformer blocks or ResNet stages, first to last
    after_blocks: Sequence[Part]  # final norm, pooling and projection
    projection: Sequence[Part]  # the last map into the shared space


def select_parameters(
    module: nn.Module, image: TowerParts, text: TowerParts, tune: str
) -> list[tuple[str, nn.Parameter]]:
    """Name and parameter of what `tune` names, in module order; see `DualEncoder.trainable`."""
    if tune == "all":
        parts = [*image.everything, *text.everything]
    elif tune == "image":
        parts = [*image.everything]
    elif tune == "text":
        parts = [*text.everything]
    elif tune == "projections":
        parts = [*image.projection, *text.projection]
    else:
        count = _last_count(tune)
        parts = [*_last_blocks("image", image, count), *_last_blocks("text", text, count)]
    chosen = {id(parameter) for parameter in _parameters(parts)}
    return [
        (name, parameter)
        for name, parameter in module.named_parameters()
        if id(parameter) in chosen and name not in ("logit_scale", "logit_bias")
    ]


def _last_count(tune: str) -> int:
    match = re.fullmatch(r"last:([1-9][0-9]*)", tune) if isinstance(tune, str) else None
    if match is None:
        raise InputError(f"tune: {tune!r} is not one of {CHOICES}")
    return int(match[1])


def _last_blocks(tower: str, parts: TowerParts, count: int) -> list[Part]:
    if count > len(parts.blocks):
        found = (
            f"the {tower} tower has {len(parts.blocks)} blocks"
            if parts.blocks
            else f"the {tower} tower's blocks cannot be told apart"
        )
        raise InputError(
            f'tune: "last:{count}" asks for {count} blocks of each tower, but {found}. '
            f'Use a smaller number or "{tower}" or "all".'
        )
    return [*parts.blocks[-count:], *parts.after_blocks]


def _parameters(parts: Iterable[Part]) -> Iterable[nn.Parameter]:
    for part in parts:
        if isinstance(part, nn.Parameter):
            yield part
        else:
            yield from part.parameters()
