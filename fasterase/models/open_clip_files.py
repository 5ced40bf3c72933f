"""The files of a saved open_clip model, as the library's `local-dir:` reads them."""

from __future__ import annotations

import json
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fasterase.models.open_clip_reading import Config
from fasterase.models.text_tokenizer import is_hf_tokenizer

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
