"""Upload a model to the Hugging Face hub, with a model card."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fasterase.errors import InputError
from fasterase.files import MARKER
from fasterase.models.dual_encoder import DualEncoder
from fasterase.models.openclip import CONFIG_FILE

TAGS = ("fasterase", "machine-unlearning", "clip")


def push_model(
    model: DualEncoder,
    name: str,
    *,
    facts: Sequence[str],
    private: bool,
    commit_message: str,
    token: str | None,
) -> str:
    """Save the model, write a card beside it, upload both, and return the URL of the repository.

    Args:
        model: the model to upload.
        name: `organisation/name`, or `name` for the user's own.
        facts: lines of the card about the run. Mind what they tell about the data.
        private: make the repository private if it is new; refuse one that is public.
        commit_message: of the upload.
        token: of the hub; None: as `hf auth login` or `HF_TOKEN` left it.

    Raises:
        InputError: `name` is not a repository's name; the hub refuses the token; the repository
            is public and `private` was asked for. Other errors of the hub are passed on.
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
        (saved / "README.md").write_text(
            model_card(saved, repository, model.public_name, facts), encoding="utf-8"
        )
        api.upload_folder(repo_id=repository, folder_path=str(saved), commit_message=commit_message)
    return f"{huggingface_hub.constants.ENDPOINT}/{repository}"


def model_card(folder: Path, repository: str, original: str, facts: Sequence[str]) -> str:
    """Return the card of a saved model: metadata, what was done, how to load it.

    Args:
        folder: the saved model.
        repository: where it will be.
        original: the name of the model before erasing.
        facts: lines about the run.
    """
    from huggingface_hub import ModelCardData

    library = json.loads((folder / MARKER).read_text(encoding="utf-8"))["library"]
    data = ModelCardData(
        library_name=library,
        pipeline_tag="zero-shot-image-classification",
        tags=list(TAGS),
    )
    return "\n".join(
        [
            f"---\n{data.to_yaml()}\n---",
            f"# {repository.rpartition('/')[2]}\n",
            f"`{original}`, from which fasterase erased chosen image-text associations.\n",
            *(f"- {fact}" for fact in facts),
            "\n## Load it\n",
            f"```python\n{_loading_code(folder, library, repository)}\n```\n",
            "Erasing suppresses an association in these weights. It is no proof that no trace is "
            "left, and it deletes no data.\n",
        ]
    )


def _loading_code(folder: Path, library: str, repository: str) -> str:
    if library == "peft":
        return (
            "from peft import PeftModel\n\n"
            f'model = PeftModel.from_pretrained(original_model, "{repository}")'
        )
    if library == "transformers":
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return (
            "import transformers\n\n"
            f'model = transformers.{config["architectures"][0]}.from_pretrained("{repository}")'
        )
    if (folder / CONFIG_FILE).is_file():
        return (
            "import open_clip\n\n"
            "model, _, preprocess = open_clip.create_model_and_transforms("
            f'"hf-hub:{repository}")\n'
            f'tokenizer = open_clip.get_tokenizer("hf-hub:{repository}")'
        )
    weights = next(path.name for path in sorted(folder.glob("*.safetensors")))
    return (
        "from huggingface_hub import hf_hub_download\n"
        "from safetensors.torch import load_file\n\n"
        "# Build the model as it was built before; open_clip has no name for its architecture.\n"
        f'model.load_state_dict(load_file(hf_hub_download("{repository}", "{weights}")))'
    )


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
