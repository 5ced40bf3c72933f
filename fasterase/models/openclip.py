"""open_clip's `CLIP`, `CustomTextCLIP` and `CoCa` as a `DualEncoder`."""

from __future__ import annotations

import difflib
import json
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fasterase.errors import InputError
from fasterase.models.dual_encoder import DualEncoder, Part, Tokens, TowerParts, without_folders
from fasterase.models.openclip_config import (
    CONFIG_FILE,
    Config,
    adjust_config,
    as_trained,
    build_from_config,
    build_same,
    find_config,
    get_named_config,
    is_hf_text,
    name_of_weights,
    read_embed_dim,
    read_image_size,
    text_tower,
)
from fasterase.models.preprocessing import (
    Companions,
    ImageTransform,
    TextTokenizer,
    build_open_clip_transform,
    is_hf_tokenizer,
    wrap_tokenizer,
    wrap_transform,
)
from fasterase.models.wrapped import plain_state

WEIGHTS_FILE = "open_clip_model.safetensors"
_DEFAULT_CONTEXT_LENGTH = 77  # open_clip's own, for a transformers text tower that states none


class OpenClipEncoder(DualEncoder):
    """An open_clip model: `CLIP`, `CustomTextCLIP` or `CoCa`.

    Args:
        given: the caller's tokenizer and preprocessing, which take precedence.
        config: its `model_cfg`; None when unknown, and then `save` writes the weights alone.
        source: the name, hub id or folder that open_clip finds its tokenizer by; None if unknown.
    """

    library = "open_clip"
    module: Any
    text_tokenizer: TextTokenizer | None

    def __init__(
        self,
        module: nn.Module,
        given: Companions,
        *,
        name: str,
        config: Config | None,
        source: str | None,
    ) -> None:
        self.module = module
        self.name = name
        self.config = config
        self.embed_dim = read_embed_dim(module)
        self.image_size = read_image_size(module)
        self.context_length = _context_length(module, config)
        self.vocab_size = int(text_tower(module).vocab_size)
        settings = getattr(self.module.visual, "preprocess_cfg", None)
        self.image_transform: ImageTransform | None = None
        if given.preprocess is not None:
            self.image_transform = wrap_transform(given.preprocess, self.image_size)
        elif settings is not None:
            self.image_transform = build_open_clip_transform(settings, self.image_size)
        self.text_tokenizer = self._choose_tokenizer(given.tokenizer, source)

    def _choose_tokenizer(self, given: Any, source: str | None) -> TextTokenizer | None:
        sizes = self.context_length, self.vocab_size
        if given is not None:
            return wrap_tokenizer(given, *sizes, with_mask=False)
        if source is None:
            return None
        try:
            import open_clip

            return wrap_tokenizer(open_clip.get_tokenizer(source), *sizes, with_mask=False)
        except InputError:
            pass  # open_clip's fallback for a model of another vocabulary: not this model's
        except Exception as error:
            warnings.warn(
                f"the tokenizer of {source} could not be loaded, so captions must be token ids "
                f"unless tokenizer= is given: {error}",
                stacklevel=3,
            )
        return None

    def _image_features(self, pixels: Tensor) -> Tensor:
        # A matrix: gains may be kept in fp32. Sharded ones are all vectors, and all of one dtype.
        weight = max(self.module.visual.parameters(), key=lambda each: each.ndim)
        return self.module.encode_image(pixels.to(weight.dtype), normalize=False)

    def _text_features(self, tokens: Tokens) -> Tensor:
        return self.module.encode_text(tokens.ids, normalize=False)

    def image_parts(self) -> TowerParts:
        visual: Any = self.module.visual
        if hasattr(visual, "trunk"):
            return _timm_parts(visual)
        if stages := _resnet_stages(visual):
            return TowerParts([visual], stages, [visual.attnpool], [visual.attnpool.c_proj])
        contrastive = getattr(visual, "attn_pool_contrastive", None)
        after = _present(visual.attn_pool, contrastive, visual.ln_post, visual.proj)
        everything = list(visual.parameters())
        vision = self.config["vision_cfg"] if self.config is not None else {}
        if vision.get("pos_embed_type") == "sin_cos_2d":  # a table of sines, not learnt
            everything = [each for each in everything if each is not visual.positional_embedding]
        blocks = list(visual.transformer.resblocks)
        return TowerParts(everything, blocks, after, _present(visual.proj) or after)

    def text_parts(self) -> TowerParts:
        text: Any = text_tower(self.module)
        if is_hf_text(text):
            # The attribute that holds the layers differs between architectures.
            parts = text.transformer.modules()
            lists = [list(part) for part in parts if isinstance(part, nn.ModuleList)]
            blocks = max(reversed(lists), key=len, default=[])
            after = _after(text, blocks)
            return TowerParts([text], blocks, after, [*text.proj.parameters()] or after)
        after = _present(text.ln_final, text.text_projection)
        everything = [text]
        if text is self.module:
            everything = [text.token_embedding, text.positional_embedding, text.transformer, *after]
        blocks = list(text.transformer.resblocks)
        return TowerParts(everything, blocks, after, _present(text.text_projection) or after)

    def _write_model(self, folder: Path) -> None:
        """Write what open_clip reads as `"local-dir:..."`; without `config` the weights alone."""
        from safetensors.torch import save_file

        # Each with memory of its own, as safetensors wants; open_clip reads 0-d temperatures.
        state = {k: v.detach().cpu().clone() for k, v in plain_state(self.module).items()}
        for name, tensor in state.items():
            is_scalar = name in ("logit_scale", "logit_bias")
            state[name] = tensor.reshape(()) if is_scalar else tensor.contiguous()
        save_file(state, folder / WEIGHTS_FILE, {"format": "pt"})
        if self.config is None:
            return
        config, tokenizer = deepcopy(self.config), self.companions.tokenizer
        text = config["text_cfg"]
        if hasattr(tokenizer, "save_pretrained"):
            _describe_tokenizer(text, tokenizer)
        elif text.get("hf_tokenizer_name"):
            warnings.warn(
                f"the model is saved without its tokenizer {text['hf_tokenizer_name']!r}, which "
                "was not loaded; open_clip.get_tokenizer will look for its files in the saved "
                "folder",
                stacklevel=2,
            )
        settings = dict(getattr(self.module.visual, "preprocess_cfg", None) or {})
        settings.pop("size", None)  # open_clip takes it from the tower
        written = {"model_cfg": config, "preprocess_cfg": settings}
        (folder / CONFIG_FILE).write_text(json.dumps(written, indent=2) + "\n")


def from_instance(module: nn.Module, given: Companions, model_name: str | None) -> OpenClipEncoder:
    """Adapt a module; its architecture is `model_name`, or recognised, or read off it."""
    if model_name is None:
        config, names = find_config(module)
    else:
        config, names = adjust_config(get_named_config(model_name), module), [model_name]
        if build_same(config, module) is None:
            raise InputError(
                f"model_name: the weights of this {type(module).__name__} do not have the shapes "
                f"of {model_name!r}; name its real architecture or leave model_name out"
            )
    agreed = names and all(_tokenizer_of(name) == _tokenizer_of(names[0]) for name in names)
    name = names[0] if names else type(module).__name__
    source = name if agreed else None
    return OpenClipEncoder(module, given, name=name, config=config, source=source)


def from_name(name: str, tag: str, given: Companions, *, empty: bool) -> OpenClipEncoder:
    """Load real weights by open_clip's architecture name and pretrained tag, or none if `empty`."""
    import open_clip

    settings = open_clip.get_pretrained_cfg(name, tag) if tag else {}
    if not settings and not empty:
        tags = open_clip.list_pretrained_tags_by_model(name)
        near = difflib.get_close_matches(tag, tags, n=3, cutoff=0.4)
        raise InputError(
            f"model: {name!r} needs "
            + (f"one of its pretrained tags, not {tag!r}" if tag else "a pretrained tag after '/'")
            + (f"; close: {', '.join(near)}" if near else "")
            + f". Its tags: {', '.join(tags) if tags else 'none, open_clip has no weights for it'}"
        )
    # Some tags' weights were trained with QuickGELU under a name without it; open_clip only
    # warns and would run them with the wrong activation.
    quick = bool(settings.get("quick_gelu"))
    shown = f"{name}/{tag}" if tag else name
    return from_source(name, given, name=shown, tag=tag, quick_gelu=quick, empty=empty)


def from_source(
    source: str,
    given: Companions,
    *,
    name: str,
    tag: str | None = None,
    quick_gelu: bool = False,
    empty: bool = False,
) -> OpenClipEncoder:
    """Load `"hf-hub:org/name"`, `"local-dir:FOLDER"`, or an architecture name with its `tag`.

    Never with random weights, and never by unpickling objects; on the meta device if `empty`.

    Raises:
        InputError: the source does not give a model with all its weights.
    """
    import open_clip

    try:
        config = open_clip.get_model_config(source)
        if empty:
            module = build_from_config({**config, "quick_gelu": True} if quick_gelu else config)
        else:
            module = open_clip.create_model(
                source,
                pretrained=tag,
                force_quick_gelu=quick_gelu,
                require_pretrained=True,
                weights_only=True,
            )
    except Exception as error:
        raise InputError(
            f"model: open_clip could not load {name}: {error}. Its "
            f"{'configuration' if empty else 'weights'} must be on this machine, complete and of "
            "this architecture, or reachable over the network (see HF_HUB_OFFLINE and the hub's "
            "cache); a folder that holds all of it works without network"
        ) from error
    config = adjust_config(config, module)
    tokenizer_source = None if empty else source
    return OpenClipEncoder(module.eval(), given, name=name, config=config, source=tokenizer_source)


def from_checkpoint(file: Path, given: Companions, model_name: str | None) -> OpenClipEncoder:
    """Load a checkpoint of open_clip's training or a state dict; only tensors are unpickled.

    A file says nothing of preprocessing: without the caller's it is open_clip's standard one.
    `InputError` if `model_name`, or without it any known architecture, does not fit the weights.
    """
    import open_clip

    state = _read_weights(file)
    if model_name is None:
        model_name = name_of_weights(state, file)
    trained = as_trained(state, get_named_config(model_name))
    bias = {"init_logit_bias": trained["init_logit_bias"]} if "init_logit_bias" in trained else {}
    try:
        module = open_clip.create_model(
            model_name,
            load_weights=False,
            pretrained_text=False,
            force_custom_text=trained.get("custom_text", False),
            force_image_size=trained["vision_cfg"].get("image_size"),
            force_context_length=trained["text_cfg"].get("context_length"),
            **bias,
        ).eval()
        open_clip.load_checkpoint(module, str(file), strict=True, weights_only=True)
    except Exception as error:
        raise InputError(
            f"model_name: the weights in {file} do not fit {model_name!r}: {error}. Name the "
            "architecture that they were trained with"
        ) from error
    config, name = adjust_config(trained, module), f"{model_name} ({file.name})"
    return OpenClipEncoder(module, given, name=name, config=config, source=model_name)


def _read_weights(file: Path) -> dict[str, Tensor]:
    """Read the state dict, without the prefix that data-parallel training gives it."""
    from open_clip.factory import load_state_dict

    try:
        state = load_state_dict(str(file), weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"model: {file} cannot be read as weights: {reason} Only tensors are loaded "
            "(weights_only=True). Give a checkpoint of open_clip's training or the state dict of a "
            "model; weights that OpenAI published load by name, as in 'ViT-B-32/openai'"
        ) from error
    if not any(name.startswith("visual.") for name in state):
        found = ", ".join(list(state)[:3])
        raise InputError(
            f"model: {file} holds no weights of an open_clip model (it begins with {found}). Give "
            "a file with open_clip's state dict, or the folder of a transformers model"
        )
    return state


def _context_length(module: nn.Module, config: Config | None) -> int:
    text = text_tower(module)
    if not is_hf_text(text):
        return int(text.context_length)
    stated = (config or {}).get("text_cfg", {}).get("context_length")
    return min(each or _DEFAULT_CONTEXT_LENGTH for each in (stated, int(text.context_length)))


def _tokenizer_of(name: str) -> list[Any]:
    import open_clip

    text = open_clip.get_model_config(name)["text_cfg"]
    return [text.get(key) for key in ("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs")]


def _describe_tokenizer(text: Config, source: Any) -> None:
    """Make `text_cfg` ask for an HFTokenizer, which open_clip reads from the folder itself."""
    inner = source if is_hf_tokenizer(source) else source.tokenizer
    name = without_folders(getattr(inner, "name_or_path", ""))
    text.setdefault("hf_tokenizer_name", name or "tokenizer")
    options = text.get("tokenizer_kwargs") or {}
    clean = getattr(getattr(source, "clean_fn", None), "__name__", "").removeprefix("_clean_")
    if clean in ("lower", "whitespace", "canonicalize"):
        options["clean"] = clean
    if getattr(source, "strip_sep_token", False):
        options["strip_sep_token"] = True
    if options:
        text["tokenizer_kwargs"] = options
    if getattr(source, "tokenizer_mode", ""):
        text["tokenizer_mode"] = source.tokenizer_mode


def _timm_parts(visual: Any) -> TowerParts:
    trunk = visual.trunk
    blocks = [*getattr(trunk, "blocks", ())] or [*getattr(trunk, "stages", ())]
    blocks = blocks or _resnet_stages(trunk)
    after = _after(visual, blocks)
    classifier = trunk.get_classifier()
    own = [*classifier.parameters()] if isinstance(classifier, nn.Module) else []
    return TowerParts([visual], blocks, after, [*visual.head.parameters()] or own or after)


def _resnet_stages(tower: Any) -> list[nn.Module]:
    names = ("layer1", "layer2", "layer3", "layer4")
    return [getattr(tower, name) for name in names] if hasattr(tower, "layer4") else []


def _after(tower: nn.Module, blocks: list[nn.Module]) -> list[Part]:
    """Parameters registered after the last block's: libraries register in the order of use."""
    if not blocks:
        return []
    parameters = list(tower.parameters())
    last = set(map(id, blocks[-1].parameters()))
    end = max(place for place, parameter in enumerate(parameters) if id(parameter) in last)
    return [*parameters[end + 1 :]]


def _present(*parts: Any) -> list[Part]:
    return [part for part in parts if part is not None]
