"""The one interface to CLIP models: two encoders, scale, tokenizer, preprocessing and save.

Only the adapters (`openclip.py`, `huggingface.py`) know a library. SigLIP's `logit_bias` is
ignored: it shifts every logit equally and cancels in the objective's softmax.

A "tower" is one encoder: the image tower or the text tower.
"""

from __future__ import annotations

import abc
import copy
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterase.errors import InputError
from fasterase.files import replace_model_folder
from fasterase.models.lora import adapted_weights
from fasterase.models.openclip_config import CONFIG_FILE
from fasterase.models.preprocessing import Companions, ImageTransform, Tokens, describe_transform
from fasterase.models.wrapped import check_trainable, has_adapters, save_adapters, unwrap
from fasterase.numerals import counted

if TYPE_CHECKING:
    from PIL.Image import Image


def without_folders(name: str) -> str:
    """Return the last part of a path on this machine, and any other name of a model as it is."""
    path = Path(name).expanduser()
    return path.name if path.is_absolute() or path.exists() else name


class DualEncoder(abc.ABC):
    """A CLIP model of any library, under one set of names.

    Attributes:
        library: the one that loads what `save` writes: "open_clip" or "transformers".
        module: the library's own object; training changes it in place.
        wrapper: what the caller put around `module` and passed in, such as a `PeftModel`; None if
            `module` itself was passed in.
        name: display name, such as "ViT-B-32/laion2b_s34b_b79k" or "CLIPModel".
        embed_dim: D, the width of the shared embedding.
        image_size: (height, width) in pixels that the image tower takes.
        context_length: L, the tokens that the text tower takes.
        vocab_size: token ids are below it.
        image_transform: PIL image -> [3, H, W], the deterministic evaluation transform; None when
            unknown. Holds no weights, so data-loader workers can pickle it.
        text_tokenizer: list of str -> `Tokens`, picklable in the same way; None when unknown.
    """

    library: str
    module: nn.Module
    wrapper: nn.Module | None = None
    name: str
    embed_dim: int
    image_size: tuple[int, int]
    context_length: int
    vocab_size: int
    image_transform: ImageTransform | None
    text_tokenizer: Callable[[Sequence[str]], Tokens] | None

    @abc.abstractmethod
    def _image_features(self, pixels: Tensor) -> Tensor:
        """Run the library's image encoder: [B, 3, H, W] float -> [B, D], not normalised."""

    @abc.abstractmethod
    def _text_features(self, tokens: Tokens) -> Tensor:
        """Run the library's text encoder: [B, L] ids -> [B, D], not normalised."""

    @abc.abstractmethod
    def image_parts(self) -> TowerParts: ...

    @abc.abstractmethod
    def text_parts(self) -> TowerParts: ...

    @abc.abstractmethod
    def _write_model(self, folder: Path) -> None:
        """Write weights and configuration as the library reads them; the tokenizer is in place."""

    def encode_image(
        self,
        pixels: Tensor,  # [B, 3, H, W] uint8 of `image_transform.pixels`, or preprocessed floats
    ) -> Tensor:  # [B, D] unit rows
        """Encode images; fp32 under autocast and for half-precision weights (fp64 stays fp64).

        Raises:
            InputError: uint8 pixels, and `image_transform` is unknown or does not split.
        """
        if pixels.dtype == torch.uint8:
            pixels = self._known_transform("uint8 pixels").normalise(pixels)
        return _unit_rows(self._image_features(pixels))

    def encode_text(
        self,
        tokens: Tokens,  # [B, L]
    ) -> Tensor:  # [B, D] unit rows
        """Encode texts, in the same precision."""
        return _unit_rows(self._text_features(tokens))

    def save(self, folder: Path) -> None:
        """Write a folder that the model's own library loads, completely or not at all.

        It holds the model, tokenizer and image processor where known, and a README.md that says how
        to load it. Of a model with adapters, only these are written (see `save_adapters`).

        Raises:
            InputError: `folder` exists and is neither empty nor a model saved by fasterase.
        """
        library = "peft" if has_adapters(self.module) else self.library
        with replace_model_folder(folder, library=library) as new:
            for companion in (self.companions.tokenizer, self.companions.preprocess):
                if hasattr(companion, "save_pretrained"):
                    companion.save_pretrained(new)
            if library == "peft":
                save_adapters(self.module, new, home=Path(folder))
            else:
                self._write_model(new)
            code = loading_code(new, library, Path(folder).name)
            readme = f"# {self.public_name}, after unlearning with fasterase\n\n{code}"
            (new / "README.md").write_text(readme, encoding="utf-8")

    @property
    def public_name(self) -> str:
        """The name without the folders of this machine, for files that are passed on."""
        return without_folders(self.name)

    @property
    def given(self) -> nn.Module:
        """The object that the caller passed in: `wrapper`, or `module` itself."""
        return self.module if self.wrapper is None else self.wrapper

    @property
    def companions(self) -> Companions:
        """Tokenizer and preprocessing in the form in which they can be passed in again."""
        return Companions(
            getattr(self.text_tokenizer, "source", self.text_tokenizer),
            getattr(self.image_transform, "whole", self.image_transform),
        )

    @property
    def logit_scale(self) -> nn.Parameter:
        """Logarithm of the scale, the library's own parameter: [] or [1]."""
        return self.module.logit_scale  # type: ignore[return-value]

    def scale(self) -> Tensor:
        """Return [] exp(logit_scale), differentiable."""
        return self.logit_scale.exp().reshape(())

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.logit_scale.device

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Encode texts as token ids [B, L]; `InputError` without a tokenizer."""
        if self.text_tokenizer is None:
            raise InputError(
                f"tokenizer: {self.name} came without one and its architecture names none, so "
                "captions given as strings cannot be read. Pass tokenizer= (an open_clip or "
                "transformers tokenizer, or a callable list of str -> [B, L] ids), or give "
                "captions as token ids."
            )
        return self.text_tokenizer(texts)

    def preprocess(self, image: Image) -> Tensor:
        """Transform a picture to [3, H, W] float32; `InputError` without a transform."""
        return self._known_transform("images that are not float tensors")(image)

    def selected(self, tune: str) -> list[tuple[str, nn.Parameter]]:
        """Return name and parameter of everything that `tune` names, in the module's order.

        `"all"`; `"image"` or `"text"`, one tower; `"projections"`, the last map of each tower into
        the shared space; `"last:N"`, the last N blocks of each tower (stages of a ResNet) and
        everything after them; `"lora:N"`, the linear maps in the blocks of both towers, which
        adapters of rank N change. Never included: the temperature (logit_scale), logit_bias, and
        weights that no feature depends on (CoCa's decoder).

        Raises:
            InputError: unknown `tune`, a tower has fewer than N blocks, or no linear maps in them.
        """
        towers = {"image": self.image_parts(), "text": self.text_parts()}
        chosen: set[int] = set()
        for part in _select_parts(towers, tune):
            parameters = [part] if isinstance(part, nn.Parameter) else part.parameters()
            chosen |= set(map(id, parameters))
        return [
            (name, parameter)
            for name, parameter in self.module.named_parameters()
            if id(parameter) in chosen and name not in ("logit_scale", "logit_bias")
        ]

    def trainable(self, tune: str) -> list[tuple[str, nn.Parameter]]:
        """Return what `tune` names and the caller has not frozen (`requires_grad=False`).

        Raises:
            InputError: as `selected` and `check_trainable`, or all of it is frozen.
        """
        check_trainable(self.module, self.name)
        selected = self.selected(tune)
        free = [(name, parameter) for name, parameter in selected if parameter.requires_grad]
        if not free:
            named = counted(len(selected), "parameter")
            raise InputError(
                f'tune: "{tune}" names {named} of {self.name}, and all are '
                "frozen (requires_grad=False), so nothing is left to train. Unfreeze what may "
                "change, as in model.requires_grad_(True), or choose another tune"
            )
        return free

    def word_table(self, tune: str) -> tuple[str, nn.Parameter] | None:
        """Return name and parameter of the vectors of all tokens, [vocab_size, width].

        None where they are not known or frozen, or not among what `tune` names. `"lora:N"` puts no
        adapter on them, but vectors of words may be replaced.
        """
        tables = {
            part.weight
            for parts in self.text_parts().everything
            if isinstance(parts, nn.Module)
            for part in parts.modules()
            if isinstance(part, nn.Embedding) and part.num_embeddings == self.vocab_size
        }
        chosen = self.selected("text" if tune.startswith("lora:") else tune)
        found = [each for each in chosen if each[1] in tables and each[1].requires_grad]
        return found[0] if len(tables) == len(found) == 1 else None

    def fingerprint(self) -> str:
        """Return a SHA-256 of all that features depend on: weights, preprocessing and tokenizer."""
        digest = hashlib.sha256()
        hash_tensors(digest, self.module.state_dict())
        digest.update(f"{self.image_size};{describe_transform(self.image_transform)};".encode())
        if self.text_tokenizer is not None:
            probe = self.text_tokenizer(["A photo of 2 café tables, 37°!"]).ids
            digest.update(f"{self.context_length};{probe.tolist()}".encode())
        return digest.hexdigest()

    def _known_transform(self, images: str) -> ImageTransform:
        if self.image_transform is None:
            raise InputError(
                f"preprocess: {self.name} came without its image preprocessing, so {images} cannot "
                "be read. Pass preprocess= (a callable PIL image -> [3, H, W] float tensor, or a "
                "transformers image processor), or give float tensors that are already "
                "preprocessed."
            )
        return self.image_transform


def loading_code(folder: Path, library: str, name: str, *, on_hub: bool = False) -> str:
    """Return the part of a README that says how `library` loads the model in `folder`.

    `name` is that of the final folder, or of the repository `on_hub`.
    """
    if library == "peft":
        lines = [
            "from peft import PeftModel\n",
            f'model = PeftModel.from_pretrained(original_model, "{name}")',
        ]
    elif library == "transformers":
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config["architectures"][0]
        lines = ["import transformers\n", f'model = transformers.{kind}.from_pretrained("{name}")']
    elif (folder / CONFIG_FILE).is_file():
        source = f"hf-hub:{name}" if on_hub else f"local-dir:{name}"
        lines = [
            "import open_clip\n",
            f'model, _, preprocess = open_clip.create_model_and_transforms("{source}")',
            f'tokenizer = open_clip.get_tokenizer("{source}")',
        ]
    else:
        weights = next((path.name for path in sorted(folder.glob("*.safetensors"))), "")
        file = f'hf_hub_download("{name}", "{weights}")' if on_hub else f'"{name}/{weights}"'
        lines = [
            *(["from huggingface_hub import hf_hub_download"] if on_hub else []),
            "from safetensors.torch import load_file\n",
            "# Build the model as it was built before; open_clip has no name for its architecture.",
            "# logit_scale and logit_bias are stored 0-d: reshape them where the module has [1].",
            f"model.load_state_dict(load_file({file}))",
        ]
    return "\n".join(["## Load it\n", "```python", *lines, "```\n"])


Part = nn.Module | nn.Parameter


@dataclass(frozen=True)
class TowerParts:
    """The parts of one tower, front to back. They may overlap: a parameter counts once."""

    everything: Sequence[Part]  # all that the tower's features depend on
    blocks: Sequence[Part]  # transformer blocks or ResNet stages, first to last
    after_blocks: Sequence[Part]  # final norm, pooling and projection
    projection: Sequence[Part]  # the last map into the shared space


def hash_tensors(digest: hashlib._Hash, tensors: Mapping[str, Tensor]) -> None:
    """Add names, dtypes, shapes and values of tensors, in their order, to `digest`."""
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)


def _copy_around(
    model: DualEncoder, module: nn.Module, wrapper: nn.Module | None = None
) -> DualEncoder:
    """Copy a model, with another module in the place of its own."""
    copied = copy.copy(model)
    copied.module, copied.wrapper = module, wrapper
    return copied


def frozen_copy(model: DualEncoder) -> DualEncoder:
    """Copy a model with weights of its own, in eval mode and without gradients."""
    module = copy.deepcopy(model.module).eval().requires_grad_(False)
    module.zero_grad(set_to_none=True)
    return _copy_around(model, module)


def copy_with(model: DualEncoder, make: Callable[[Tensor], Tensor]) -> DualEncoder:
    """Copy a model with `make(tensor)` in place of every tensor; shared tensors stay shared."""
    memo: dict[int, Any] = {}
    for part in model.module.modules():
        for value in [*part._parameters.values(), *part._buffers.values(), *vars(part).values()]:
            if isinstance(value, nn.Parameter):
                new = make(value.detach())
                memo[id(value)] = nn.Parameter(new, requires_grad=value.requires_grad)
            elif isinstance(value, Tensor):
                memo[id(value)] = make(value)
    return _copy_around(model, copy.deepcopy(model.module, memo))


def separate_copy(model: DualEncoder) -> DualEncoder:
    """Copy a model with weights of its own, and the wrapper with it."""
    given = copy.deepcopy(model.given)
    return _copy_around(model, unwrap(given), None if model.wrapper is None else given)


def _unit_rows(features: Tensor) -> Tensor:
    if features.dtype != torch.float64:
        features = features.float()
    return F.normalize(features, dim=-1)


def _select_parts(towers: Mapping[str, TowerParts], tune: str) -> list[Part]:
    if tune in ("all", *towers):
        named = [parts for tower, parts in towers.items() if tune in ("all", tower)]
        return [part for parts in named for part in parts.everything]
    if tune == "projections":
        return [part for parts in towers.values() for part in parts.projection]
    match = re.fullmatch(r"(last|lora):([1-9][0-9]*)", tune) if isinstance(tune, str) else None
    if match is None:
        raise InputError(
            f'tune: {tune!r} is not one of "all", "image", "text", "projections", "last:N" or '
            '"lora:N" (N a positive number, as in "last:4")'
        )
    count, chosen = int(match[2]), list[Part]()
    for tower, parts in towers.items():
        weights = adapted_weights(parts.blocks) if match[1] == "lora" else []
        if match[1] == "lora" and not weights:
            raise InputError(
                f'tune: "{tune}" adapts the linear maps in the blocks of both towers, and none '
                f"were found in the {tower} tower (a ResNet has convolutions). "
                'Use "all" or another tune.'
            )
        if match[1] == "last" and count > len(parts.blocks):
            has = counted(len(parts.blocks), "block")
            raise InputError(
                f'tune: "{tune}" asks for {count} blocks of each tower, but the {tower} tower has '
                f'{has}. Use a smaller number or "{tower}" or "all".'
            )
        chosen += weights or [*parts.blocks[-count:], *parts.after_blocks]
    return chosen
