"""open_clip's `CLIP`, `CustomTextCLIP` and `CoCa` as a `DualEncoder`."""

from __future__ import annotations

import difflib
import json
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fasterase.errors import InputError, import_extra
from fasterase.files import replace_model_folder
from fasterase.models.dual_encoder import DualEncoder, Part, Tokens, TowerParts
from fasterase.models.openclip_config import (
    Config,
    adjusted,
    embed_dim,
    image_size,
    is_hf_text,
    kind_of,
    named_config,
    recognised,
    text_tower,
)
from fasterase.models.preprocessing import (
    TextTokenizer,
    is_hf_tokenizer,
    open_clip_transform,
    user_tokenizer,
    user_transform,
)

_DEFAULT_CONTEXT_LENGTH = 77  # open_clip's own, where a transformers text tower states none


class OpenClipEncoder(DualEncoder):
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
        with replace_model_folder(folder, library="open_clip") as new:
            write_weights(self.module, new)
            if hasattr(tokenizer, "save_pretrained"):
                tokenizer.save_pretrained(new)
            if self.config is not None:
                write_config(self.module, self.config, tokenizer, new)
            write_readme(self.name, Path(folder).name, new, loadable=self.config is not None)


def from_instance(
    module: nn.Module, *, tokenizer: Any, preprocess: Any, model_name: str | None
) -> OpenClipEncoder:
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
    return OpenClipEncoder(
        module,
        name=names[0] if names else type(module).__name__,
        config=config,
        tokenizer=tokenizer,
        preprocess=preprocess,
        found_tokenizer=found,
    )


def from_name(name: str, tag: str | None, *, tokenizer: Any, preprocess: Any) -> OpenClipEncoder:
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
    return OpenClipEncoder(
        module,
        name=f"{name}/{tag}",
        config=adjusted(open_clip.get_model_config(name), module),
        tokenizer=tokenizer,
        preprocess=preprocess,
        found_tokenizer=None if tokenizer is not None else _found_tokenizer(name),
    )


def from_source(source: str, *, name: str, tokenizer: Any, preprocess: Any) -> OpenClipEncoder:
    """Load `"hf-hub:org/name"` or `"local-dir:FOLDER"`.

    Raises:
        InputError: the hub or the folder does not give a model with all its weights.
    """
    import open_clip

    module = _create(source)
    return OpenClipEncoder(
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
        import_extra("transformers", "hf", f"The text tower of {name}")


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


CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"


def write_weights(module: nn.Module, folder: Path) -> None:
    """Write the state dict as the one safetensors file of `folder`."""
    from safetensors.torch import save_file

    save_file(_state_to_write(module), folder / WEIGHTS_FILE, {"format": "pt"})


def write_config(module: Any, config: Config, tokenizer: Any, folder: Path) -> None:
    """Write `model_cfg` and `preprocess_cfg`; `tokenizer`'s own files are in `folder` by now."""
    config = deepcopy(config)
    text = config["text_cfg"]
    if hasattr(tokenizer, "save_pretrained"):
        _describe_tokenizer(text, tokenizer)
    elif text.get("hf_tokenizer_name"):
        warnings.warn(
            f"the model is saved without its tokenizer {text['hf_tokenizer_name']!r}, which is not "
            "at hand; open_clip.get_tokenizer will look for its files in the saved folder",
            stacklevel=2,
        )
    settings = dict(getattr(module.visual, "preprocess_cfg", None) or {})
    settings.pop("size", None)  # open_clip takes it from the tower
    written = {"model_cfg": config, "preprocess_cfg": settings}
    (folder / CONFIG_FILE).write_text(json.dumps(written, indent=2) + "\n")


def write_readme(name: str, folder_name: str, folder: Path, *, loadable: bool) -> None:
    """Write how to load the folder."""
    (folder / "README.md").write_text(_readme(name, folder_name, loadable), encoding="utf-8")


def _describe_tokenizer(text: Config, source: Any) -> None:
    """Make `text_cfg` ask for an HFTokenizer, which open_clip reads from the folder itself."""
    inner = source if is_hf_tokenizer(source) else source.tokenizer
    text.setdefault("hf_tokenizer_name", getattr(inner, "name_or_path", "") or "tokenizer")
    clean = getattr(getattr(source, "clean_fn", None), "__name__", "").removeprefix("_clean_")
    options = {
        "clean": clean if clean in ("lower", "whitespace", "canonicalize") else None,
        "strip_sep_token": getattr(source, "strip_sep_token", False) or None,
    }
    kept = {key: value for key, value in options.items() if value is not None}
    if kept:
        text["tokenizer_kwargs"] = {**(text.get("tokenizer_kwargs") or {}), **kept}
    if getattr(source, "tokenizer_mode", ""):
        text["tokenizer_mode"] = source.tokenizer_mode


def _state_to_write(module: nn.Module) -> dict[str, Tensor]:
    """Every tensor on the CPU, contiguous and with memory of its own, the temperature 0-d."""
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict().items():
        written = tensor.detach().cpu().contiguous()
        if name in ("logit_scale", "logit_bias"):
            written = written.reshape(())
        if written.data_ptr() in seen:
            written = written.clone()
        seen.add(written.data_ptr())
        state[name] = written
    return state


def _readme(name: str, folder_name: str, loadable: bool) -> str:
    if loadable:
        how = (
            "Load it with open_clip:\n\n```python\nimport open_clip\n\n"
            "model, _, preprocess = open_clip.create_model_and_transforms("
            f'"local-dir:{folder_name}")\n```\n'
        )
    else:
        how = (
            f"The architecture is not one that open_clip describes, so there is no {CONFIG_FILE}.\n"
            "Build the module the way you did before, then load the weights:\n\n```python\n"
            "from safetensors.torch import load_file\n\n"
            f'model.load_state_dict(load_file("{WEIGHTS_FILE}"))\n```\n\n'
            "logit_scale and logit_bias are stored 0-d; reshape them where the module has [1].\n"
        )
    return f"# {name}, after unlearning with fasterase\n\n{how}"


def image_parts(module: Any, *, fixed_positions: bool) -> TowerParts:
    """The image tower of an open_clip model: ViT, ResNet or timm.

    Args:
        fixed_positions: a ViT's positional embedding is a table of sines, not learnt.
    """
    visual: Any = module.visual
    if hasattr(visual, "trunk"):
        return _timm_parts(visual)
    if hasattr(visual, "layer4"):
        blocks = [visual.layer1, visual.layer2, visual.layer3, visual.layer4]
        return TowerParts([visual], blocks, [visual.attnpool], [visual.attnpool.c_proj])
    after = _present(
        visual.attn_pool,
        getattr(visual, "attn_pool_contrastive", None),
        visual.ln_post,
        visual.proj,
    )
    fixed = visual.positional_embedding if fixed_positions else None
    everything = [parameter for parameter in visual.parameters() if parameter is not fixed]
    return TowerParts(
        everything, list(visual.transformer.resblocks), after, _present(visual.proj) or after
    )


def text_parts(module: Any) -> TowerParts:
    """The text tower of an open_clip model: its own transformer or one of transformers."""
    text: Any = text_tower(module)
    if is_hf_text(text):
        blocks = _longest_list(text.transformer)
        after = _after(text, blocks)
        return TowerParts([text], blocks, after, [*text.proj.parameters()] or after)
    blocks = list(text.transformer.resblocks)
    after = _present(text.ln_final, text.text_projection)
    everything = (
        [text.token_embedding, text.positional_embedding, text.transformer, *after]
        if text is module
        else [text]
    )
    return TowerParts(everything, blocks, after, _present(text.text_projection) or after)


def _timm_parts(visual: Any) -> TowerParts:
    trunk = visual.trunk
    blocks: list[nn.Module] = []
    for name in ("blocks", "stages"):
        blocks = blocks or list(getattr(trunk, name, ()))
    if not blocks and hasattr(trunk, "layer4"):
        blocks = [trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4]
    after = _after(visual, blocks)
    classifier = trunk.get_classifier()
    own = [*classifier.parameters()] if isinstance(classifier, nn.Module) else []
    return TowerParts([visual], blocks, after, [*visual.head.parameters()] or own or after)


def _longest_list(module: nn.Module) -> list[nn.Module]:
    """The layers of a transformers encoder, whose name differs between architectures."""
    lists = [list(part) for part in module.modules() if isinstance(part, nn.ModuleList)]
    return sorted(lists, key=len)[-1] if lists else []


def _after(tower: nn.Module, blocks: list[nn.Module]) -> list[Part]:
    """Parameters registered after the last block's: libraries register in the order of use."""
    parameters = list(tower.parameters())
    if not blocks:
        return []
    last = {id(parameter) for parameter in blocks[-1].parameters()}
    end = max(i for i, parameter in enumerate(parameters) if id(parameter) in last)
    return [*parameters[end + 1 :]]


def _present(*parts: Any) -> list[Part]:
    return [part for part in parts if part is not None]
