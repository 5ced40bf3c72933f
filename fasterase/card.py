"""The model card of an erased model, as the Hugging Face hub reads it, and the upload of both."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fasterase.config import UnlearnConfig, describe_recipe
from fasterase.errors import InputError
from fasterase.evaluation.metrics import CONTEST_HIT, METRICS
from fasterase.evaluation.verdict import WITHHELD
from fasterase.facts import RunFacts
from fasterase.files import MARKER
from fasterase.models.dual_encoder import DualEncoder, loading_code
from fasterase.numerals import counted
from fasterase.page import LIMITS, state
from fasterase.provenance import FILE, erasures
from fasterase.report.templating import render

CARD = "README.md"
TASK = "zero-shot-image-classification"
TAGS = ("fasterase", "machine-unlearning", "clip")
# Names of sets that say nothing of what they hold.
_PLAIN = ("forget", "retain", "holdout", WITHHELD)
# What the metadata tells of sets to forget, and of the others.
_FORGET = (CONTEST_HIT, "image_to_text_residue", "text_to_image_residue")
_KEEP = ("zero_shot_accuracy", "image_to_text_recall@1", "text_to_image_recall@1")


def read_base(name: str) -> dict[str, Any]:
    """Return `base_model` and `license` of the model of a name, as far as this machine knows them.

    They come from the card in its folder, or in the hub's cache; nothing is downloaded.
    """
    import huggingface_hub
    from huggingface_hub.repocard import metadata_load

    folder = Path(name).expanduser()
    repository: str | None = None
    card: object = None
    if folder.exists():
        # An instance has the name of its class; a folder of that name is no model by chance alone.
        card = folder / CARD if any(folder.glob("*.safetensors")) else None
    elif repository := _repository(name):
        try:
            card = huggingface_hub.try_to_load_from_cache(repository, CARD)
        except ValueError:  # it cannot be the name of one
            repository = None
    try:
        data = metadata_load(card) or {} if isinstance(card, str | Path) else {}
    except Exception:  # missing, or a stranger's YAML: a card is written without it
        data = {}
    found = {key: data[key] for key in ("license", "base_model") if isinstance(data.get(key), str)}
    return found if repository is None else {**found, "base_model": repository}


def _repository(name: str) -> str | None:
    """Return the hub's repository that a name of a model stands for; None if it stands for none."""
    prefix, _, rest = name.partition(":")
    if prefix in ("hf", "hf-hub"):
        path = rest.partition("@")[0]
    else:
        import open_clip

        architecture, _, tag = name.partition("/")
        path = open_clip.get_pretrained_cfg(architecture, tag).get("hf_hub", "")
    parts = [part for part in path.split("/") if part]
    return "/".join(parts[:2]) if len(parts) >= 2 else None


def model_card(
    run: RunFacts, folder: Path, base: Mapping[str, Any], repository: str | None = None
) -> str:
    """Return the card of the model that was saved in `folder`.

    It holds no caption and no word of the data, and names of sets only if the concept is stated.

    Args:
        run: how the model came about.
        base: what `read_base` returned before the run's folder was written.
        repository: the model's own, on the hub; None for the folder alone.
    """
    from huggingface_hub import ModelCardData

    library = json.loads((folder / MARKER).read_text(encoding="utf-8"))["library"]
    title = (repository or run.record["parent"]["name"]).rpartition("/")[2]
    names = _public_names(run)
    results = list(_results(run, names))
    settings = dict(run.settings)
    if isinstance(settings["forget_words"], list | tuple):
        settings["forget_words"] = True  # the words themselves would tell
    if repository is None:
        loading = (folder / CARD).read_text(encoding="utf-8").partition("\n")[2]
    else:
        loading = loading_code(folder, library, repository, on_hub=True)
    facts: dict[str, Any] = dict(base)
    if "base_model" in base:
        facts["base_model_relation"] = "adapter" if library == "peft" else "finetune"
    if results:
        facts |= {"model_name": title, "eval_results": results}
    library_name = library.partition(".")[0]
    data = ModelCardData(library_name=library_name, pipeline_tag=TASK, tags=[*TAGS], **facts)
    text = render(
        "card.md",
        title=title,
        run=run,
        names=names,
        limits=state(run)[LIMITS],
        recipe=describe_recipe(UnlearnConfig(**settings)),
        chain=erasures(run.record),
        loading=loading.strip(),
        is_delta=library == "fasterase.apply_delta",
        record_file=FILE if (folder / FILE).is_file() else None,
    )
    return f"---\n{data.to_yaml()}\n---\n{text}"


def _public_names(run: RunFacts) -> dict[str, str]:
    """Return set -> what a card calls it."""
    measured = () if run.evaluation is None else run.evaluation.scores
    names = {name: name for name in (*run.record["data"], *run.traces, *measured)}
    if run.record["concept"] is not None:
        return names
    others = [name for name in names if name not in _PLAIN]
    return names | {name: f"further set {i}" for i, name in enumerate(others, start=1)}


def _results(run: RunFacts, names: Mapping[str, str]) -> Iterator[Any]:
    from huggingface_hub import EvalResult

    evaluation = run.evaluation
    if evaluation is None:
        return
    titles = {metric.key: metric.title.removesuffix(", %") for metric in METRICS}
    for name, scores in evaluation.scores.items():
        aim = "to forget" if name in evaluation.forget_sets else "to keep"
        pairs = counted(evaluation.pairs[name], "pair")
        for key in _FORGET if name in evaluation.forget_sets else _KEEP:
            if key in scores:
                yield EvalResult(
                    task_type=TASK,
                    dataset_type=re.sub(r"\W+", "-", names[name]),
                    dataset_name=f"{names[name]} ({pairs}, {aim})",
                    metric_type=key,
                    metric_name=titles[key],
                    metric_value=round(scores[key], 4),
                )


def push_model(
    model: DualEncoder,
    run: RunFacts,
    name: str,
    *,
    private: bool,
    commit_message: str,
    token: str | None,
) -> str:
    """Upload the model with its card, and return the URL; see `UnlearnResult.push_to_hub`."""
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
        text = model_card(run, saved, read_base(model.name), repository)
        (saved / CARD).write_text(text, encoding="utf-8")
        api.upload_folder(repo_id=repository, folder_path=str(saved), commit_message=commit_message)
    return f"{huggingface_hub.constants.ENDPOINT}/{repository}"


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
