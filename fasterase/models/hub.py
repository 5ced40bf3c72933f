"""Upload a model to the Hugging Face hub; how a saved model is loaded."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasterase.errors import InputError
from fasterase.models.openclip_config import CONFIG_FILE

if TYPE_CHECKING:
    from fasterase.models.dual_encoder import DualEncoder

TASK = "zero-shot-image-classification"
TAGS = ("fasterase", "machine-unlearning", "clip")


def push_model(
    model: DualEncoder,
    name: str,
    *,
    card: Callable[[Path, str], str],
    private: bool,
    commit_message: str,
    token: str | None,
) -> str:
    """Upload the model with a card, and return the URL; see `UnlearnResult.push_to_hub`.

    `card` returns the card from the folder of the model and the name of the repository.
    """
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(
            f"name: {name!r} is not the name of a repository ({error}). Give 'organisation/name', "
            "or 'name' for one of your own."
        ) from error
    api = huggingface_hub.HfApi(token=token)
    repository = _find_or_create(api, name, private=private)
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "model"
        model.save(saved)
        text = card(saved, repository)
        (saved / "README.md").write_text(text, encoding="utf-8")
        api.upload_folder(repo_id=repository, folder_path=str(saved), commit_message=commit_message)
    return f"{huggingface_hub.constants.ENDPOINT}/{repository}"


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


def _find_or_create(api: Any, name: str, *, private: bool) -> str:
    """Return the full name of the repository."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return str(getattr(api.create_repo(name, private=private), "repo_id", name))
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise InputError(
                "token: the hub does not accept it, or there is none. Log in with `hf auth login`, "
                "set HF_TOKEN, or pass token=."
            ) from error
        # 409: it exists. 403: a token for this repository alone may not create any.
        if status not in (403, 409):
            raise
    found = api.repo_info(name)
    if private and not found.private:
        raise InputError(
            f"private=True, but {name} exists and is public. Give another name, or make it private "
            "on the hub first."
        )
    return found.id
