"""open_clip's `CLIP`, `CustomTextCLIP` and `CoCa` as a `TwoTower`."""

from __future__ import annotations

import difflib
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fasterase.errors import InputError
from fasterase.extras import require
from fasterase.models.folder import written_whole
from fasterase.models.image_transform import open_clip_transform, user_transform
from fasterase.models.open_clip_config import adjusted, named_config, recognised
from fasterase.models.open_clip_files import write_config, write_readme, write_weights
from fasterase.models.open_clip_parts import image_parts, text_parts
from fasterase.models.open_clip_reading import (
    Config,
    embed_dim,
    image_size,
    is_hf_text,
    kind_of,
    text_tower,
)
from fasterase.models.text_tokenizer import TextTokenizer, user_tokenizer
from fasterase.models.tuning import TowerParts
from fasterase.models.two_tower import Tokens, TwoTower

_DEFAULT_CONTEXT_LENGTH = 77  # open_clip's own, where a transformers text tower states none


class OpenClipTower(TwoTower):
    """An open_clip model.

    Args:
        module: `CLIP`, `CustomTextCLIP` or `CoCa`.
        name: for people.
        config: its `model_cfg`; None when unknown, and then `save` writes the weights alone.
        tokenizer, preprocess: the caller's, None for `found_tokenizer` and the model's own.
        found_tokenizer: what open_clip holds to be this model's tokenizer, if known.
    """

    module: Any
    text_tokenizer: TextTokenizer | None

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str,
        config: Config | None,
        tokenizer: Any = None,
        preprocess: Any = None,
        found_tokenizer: Any = None,
    ) -> None:
        self.module = module
        self.name = name
        self.config = config
        self.embed_dim = embed_dim(module)
        self.image_size = image_size(module)
        text = text_tower(module)
        self.context_length = int(text.context_length)
        if is_hf_text(text):
            stated = (config or {}).get("text_cfg", {}).get("context_length")
            self.context_length = min(
                stated or _DEFAULT_CONTEXT_LENGTH, self.context_length or _DEFAULT_CONTEXT_LENGTH
            )
        self.vocab_size = int(text.vocab_size)
        settings = getattr(self.module.visual, "preprocess_cfg", None)
        if preprocess is not None:
            self.image_transform = user_transform(preprocess, self.image_size)
        else:
            self.image_transform = None if settings is None else open_clip_transform(settings)
        self.text_tokenizer = self._choose_tokenizer(tokenizer, found_tokenizer)

    def _choose_tokenizer(self, given: Any, found: Any) -> TextTokenizer | None:
        if given is not None:
            return user_tokenizer(given, self.context_length, self.vocab_size, with_mask=False)
        if found is None:
            return None
        try:
            return user_tokenizer(found, self.context_length, self.vocab_size, with_mask=False)
        except InputError:
            # open_clip's fallback tokenizer on a model of another vocabulary: not this model's.
            return None

    def _image_features(self, pixels: Tensor) -> Tensor:
        weight = next(p for p in self.module.visual.parameters() if p.ndim > 1)
        return self.module.encode_image(pixels.to(weight.dtype), normalize=False)

    def _text_features(self, tokens: Tokens) -> Tensor:
        return self.module.encode_text(tokens.ids, normalize=False)

    def image_parts(self) -> TowerParts:
        vision = self.config["vision_cfg"] if self.config is not None else {}
        fixed = vision.get("pos_embed_type") == "sin_cos_2d"
        return image_parts(self.module, fixed_positions=fixed)

    def text_parts(self) -> TowerParts:
        return text_parts(self.module)

    def save(self, folder: Path) -> None:
        """Write what `open_clip.create_model_and_transforms("local-dir:FOLDER")` reads.

        That is `open_clip_config.json`, one safetensors file and the tokenizer's files. Where the
        architecture is unknown the weights are written alone. README.md in the folder says how to
        load either.
        """
        tokenizer: Any = getattr(self.text_tokenizer, "source", None)
        with written_whole(folder, library="open_clip") as new:
            write_weights(self.module, new)
            if hasattr(tokenizer, "save_pretrained"):
                tokenizer.save_pretrained(new)
            if self.config is not None:
                write_config(self.module, self.config, tokenizer, new)
            write_readme(self.name, Path(folder).name, new, loadable=self.config is not None)


def from_instance(
    module: nn.Module, *, tokenizer: Any, preprocess: Any, model_name: str | None
) -> OpenClipTower:
    """Adapt a module of open_clip; its architecture is `model_name`, or recognised, or read off it.

    Raises:
        InputError: `model_name`, `tokenizer` or `preprocess` does not fit the module.
    """
    if model_name is not None:
        config: Config | None = named_config(module, model_name)
        names = [model_name]
    else:
        config, names = recognised(module)
    found = None
    if tokenizer is None and names and _agree_on_tokenizer(names):
        found = _found_tokenizer(names[0])
    return OpenClipTower(
        module,
        name=names[0] if names else type(module).__name__,
        config=config,
        tokenizer=tokenizer,
        preprocess=preprocess,
        found_tokenizer=found,
    )


def from_name(name: str, tag: str | None, *, tokenizer: Any, preprocess: Any) -> OpenClipTower:
    """Load real weights by open_clip's architecture name and pretrained tag.

    Raises:
        InputError: no such tag, or its weights cannot be had.
    """
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    settings = open_clip.get_pretrained_cfg(name, tag) if tag else {}
    if not settings:
        near = difflib.get_close_matches(tag or "", tags, n=3, cutoff=0.4)
        raise InputError(
            f"model: {name!r} needs "
            + (f"one of its pretrained tags, not {tag!r}" if tag else "a pretrained tag after '/'")
            + (f"; close: {', '.join(near)}" if near else "")
            + f". Its tags: {', '.join(tags) if tags else 'none, open_clip has no weights for it'}"
        )
    # The weights of some tags were trained with QuickGELU under a name without it; open_clip only
    # warns and would run them with the wrong activation.
    module = _create(name, pretrained=tag, force_quick_gelu=bool(settings.get("quick_gelu")))
    return OpenClipTower(
        module,
        name=f"{name}/{tag}",
        config=adjusted(open_clip.get_model_config(name), module),
        tokenizer=tokenizer,
        preprocess=preprocess,
        found_tokenizer=None if tokenizer is not None else _found_tokenizer(name),
    )


def from_source(source: str, *, name: str, tokenizer: Any, preprocess: Any) -> OpenClipTower:
    """Load `"hf-hub:org/name"` or `"local-dir:FOLDER"`.

    Raises:
        InputError: the hub or the folder does not give a model with all its weights.
    """
    import open_clip

    module = _create(source)
    return OpenClipTower(
        module,
        name=name,
        config=adjusted(open_clip.get_model_config(source), module),
        tokenizer=tokenizer,
        preprocess=preprocess,
        found_tokenizer=None if tokenizer is not None else _found_tokenizer(source),
    )


def _create(name: str, **options: Any) -> nn.Module:
    """The library's `create_model`, but never with random weights nor by unpickling objects."""
    import open_clip

    _check_text_extra(name)
    try:
        module = open_clip.create_model(name, require_pretrained=True, weights_only=True, **options)
    except Exception as error:
        tag = f"/{options['pretrained']}" if options.get("pretrained") else ""
        raise InputError(
            f"model: open_clip could not load {name}{tag}: {error}. Its weights must be on this "
            "machine, complete and of this architecture, or reachable over the network (see "
            "HF_HUB_OFFLINE and the hub's cache); a folder works without network"
        ) from error
    return module.eval()


def _check_text_extra(name: str) -> None:
    import open_clip

    if name.startswith("hf-hub:"):
        return  # Its configuration is not here yet; the library's own message names transformers.
    try:
        config = open_clip.get_model_config(name) or {}
    except (OSError, ValueError):
        return  # A folder without a readable configuration: create_model says so.
    if config.get("text_cfg", {}).get("hf_model_name"):
        require("transformers", "hf", f"The text tower of {name}")


def _found_tokenizer(name: str) -> Any:
    """open_clip's tokenizer for a name, hub id or folder; None, with a warning, if out of reach."""
    import open_clip

    try:
        return open_clip.get_tokenizer(name)
    except Exception as error:
        warnings.warn(
            f"the tokenizer of {name} could not be loaded, so captions must be token ids unless "
            f"tokenizer= is given: {error}",
            stacklevel=3,
        )
        return None


def _agree_on_tokenizer(names: list[str]) -> bool:
    import open_clip

    def tokenizer_of(name: str) -> tuple[Any, ...]:
        text = open_clip.get_model_config(name)["text_cfg"]
        keys = ("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs")
        return tuple(text.get(key) for key in keys)

    return all(tokenizer_of(name) == tokenizer_of(names[0]) for name in names)


def is_open_clip(module: nn.Module) -> bool:
    """Whether the module is one that this adapter takes, told without importing the library."""
    return kind_of(module) is not None
