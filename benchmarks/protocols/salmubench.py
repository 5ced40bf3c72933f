"""SALMUBench (Selvas-Sala et al., CVPR 2026, arXiv 2603.26316): erase links of faces and facts.

A compromised CLIP has learned names, addresses and numbers of made-up personas beside their faces.
The links of the split `forget` are erased; those of other personas (`holdout_identity`) and other
facts of the same ones (`holdout_association`) are measured and never trained on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import fasterase
from benchmarks.protocols.salmubench_scores import GEN_KNOW, MEASURES, SPLITS, Personas, open_scores
from benchmarks.protocols.utility import TOP_1, open_imagenet, score_model
from benchmarks.result_files import markdown_table
from fasterase.config import UnlearnConfig
from fasterase.errors import InputError, import_extra
from fasterase.files import check_creatable, to_json, write_text
from fasterase.pairs.open import open_pairs
from fasterase.pairs.table import JoinedTable, PairTable

SCORES, TABLE, SETTINGS = "salmubench.json", "table.md", "settings.json"
COMPROMISED, CLEAN = (
    f"hf-hub:cvc-mmu/clip-vit-b-16-salmu-{name}" for name in ("compromised", "clean")
)
SOURCE = "cvc-mmu/salmubench-512-redistributed"
SALMUBENCH_DATA = (
    "the evaluation set as the hub stores it (`data/forget-*.parquet` and the other splits, "
    f"beside three json files): hf download {SOURCE} --repo-type dataset --local-dir DATA. The "
    "models are gated, for research only, and the data may be: log in (hf auth login) and accept "
    "the conditions on the page of each first"
)
# Of the clean and the compromised model: a third party's run of the benchmark's own evaluator
# (github.com/wutt6678/GMUL), which left out GenKnow; the rest: third parties' notes on the paper.
_REPORTED = {
    "compromised": (0.236, 0.322, 0.951, 0.084, 0.183, 0.638, 0.321, 0.321, 0.305, 0.280),
    "clean": (0.001, 0.142, 0.602, 0.011, 0.151, 0.633, 0.143, 0.143, 0.331, 0.309),
    "CLIPErase": (0.001, None, None, None, None, 0.634, 0.024, 0.024, None, None),
}
REPORTED = {
    f"reported: {method}": dict(zip(MEASURES, values, strict=True))
    for method, values in _REPORTED.items()
}
NOTES = """\
RetFail (MRR of the caption that states the fact) is to be low and GenKnow (ImageNet, top 1) high;
the others are to be as the clean model's: an erasure that goes below takes more than the link.
GenKnow needs --imagenet. The definitions are those that third parties' use of the benchmark's
evaluator shows; its code was not seen: the features and the fit of ACS, the prompt and candidates
of IdZSC and the distractors drawn for RetFail are not known to be these. Reported figures are
third parties', those of CLIPErase (5x budget) and of GenKnow from notes on the paper.
"""


def run_salmubench(
    data: Path,
    output: Path,
    *,
    model: str = COMPROMISED,
    clean: str = CLEAN,
    configs: Mapping[str, UnlearnConfig],
    imagenet: Path | None = None,
    max_pairs: int | None = None,
) -> str:
    """Erase with each recipe, score it beside both models, and return the table.

    Table and figures are written to `output`, each method's to a folder of its own with the erased
    model. What is there is not run again, and an interrupted erasure resumes.

    Args:
        data: folder of the evaluation set.
        model, clean: the compromised and the clean model, as `fasterase.unlearn` takes them.
        configs: name of a method -> its recipe.
        imagenet: folder of ImageNet's validation pictures; None leaves GenKnow out.
        max_pairs: pairs measured of each split; None: all. All are erased.

    Raises:
        InputError: a folder does not hold its data, or in another form; or `output` holds figures
            of other models, or of another number of pairs.
    """
    import_extra("sklearn", "eval", "ACS of SALMUBench")
    check_creatable(output, argument=f"--output={str(output)!r}")
    splits, personas = read_benchmark(data)
    scores = [open_scores(splits, personas, max_pairs)]
    if imagenet is not None:
        scores.append(open_imagenet(imagenet, max_pairs))
    _check_same(output / SETTINGS, {"model": model, "clean": clean, "max_pairs": max_pairs})
    found: dict[str, dict[str, float | None]] = {}
    for method in ("compromised", "clean", *configs):
        folder = output / method
        measured = _read_scores(folder / SCORES)
        if not measured or (imagenet is not None and GEN_KNOW not in measured):
            if method in configs:
                name = _erase(model, splits, folder, configs[method])
            else:
                name = clean if method == "clean" else model
            _write_scores(folder / SCORES, score_model(name, scores))
            measured = _read_scores(folder / SCORES)
        found[method] = measured
    table = format_table(found)
    write_text(output / TABLE, table)
    return table


def _check_same(file: Path, settings: Mapping[str, Any]) -> None:
    """Keep what is measured in a folder; refuse to mix it with anything else."""
    if file.is_file():
        known = json.loads(file.read_text(encoding="utf-8"))
        if known != settings:
            raise InputError(
                f"--output={str(file.parent)!r} holds figures with {known}, and {dict(settings)} "
                "were asked for now. Choose another --output."
            )
    write_text(file, to_json(settings, indent=1) + "\n")


def read_benchmark(folder: Path) -> tuple[dict[str, PairTable], Personas]:
    """Read the splits from the hub's Parquet shards, and what the json files say of the personas.

    Raises:
        InputError: files are missing or in another form; the message says where they are from.
    """

    def read(name: str) -> Any:
        try:
            return json.loads((folder / name).read_text(encoding="utf-8"))
        except OSError as error:
            raise _not_there(folder, name) from error
        except ValueError as error:
            raise InputError(f"{folder / name} is no JSON ({error}). Download it again.") from error

    facts = read("identities_metadata.json"), read("sensitive_set_captions_metadata.json")
    try:
        fields = {str(file): str(each["data_field"]) for file, each in facts[1].items()}
        names = {str(who): str(each["name"]) for who, each in facts[0].items()}
        fragile = frozenset(map(str, read("fragile_set_ids.json")))
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(
            f"--data={str(folder)!r}: its json files are not in the published form ({error!r}): "
            "personas with a `name`, pictures with a `data_field`, a list of pictures. Put there "
            f"{SALMUBENCH_DATA}."
        ) from error
    splits = {name: _open_split(folder, name) for name in SPLITS}
    return splits, Personas(names, facts[0], fields, fragile)


def _open_split(folder: Path, name: str) -> PairTable:
    shards = sorted((folder / "data").glob(f"{name}-*.parquet"))
    if not shards:
        raise _not_there(folder, f"data/{name}-*.parquet")
    return JoinedTable(name, [open_pairs(shard, name=name) for shard in shards])


def _not_there(folder: Path, name: str) -> InputError:
    return InputError(
        f"--data={str(folder)!r} holds no SALMUBench ({name} is missing). Put there "
        f"{SALMUBENCH_DATA}."
    )


def _erase(model: str, splits: Mapping[str, PairTable], folder: Path, config: UnlearnConfig) -> str:
    """Erase the links to forget, if that is not done, and return the folder of the model."""
    erased = folder / "model"
    if not erased.is_dir():
        fasterase.unlearn(
            model,
            splits["forget"],
            splits["retain_synth"],
            config=config.replace(output_dir=str(folder), evaluation=None),
        )
    return str(erased)


def _write_scores(path: Path, values: Mapping[str, np.ndarray]) -> None:
    """Write each measure's mean over the pairs that count (null without one), and their values."""
    entries: dict[str, dict[str, Any]] = {}
    for measure, each in values.items():
        counted = each[~np.isnan(each)]
        mean = float(counted.mean()) if len(counted) else None
        name = GEN_KNOW if measure == TOP_1 else measure
        entries[name] = {"mean": mean, "pairs": len(counted), "scores": each.tolist()}
    write_text(path, to_json(entries, indent=1) + "\n")


def _read_scores(path: Path) -> dict[str, float | None]:
    """Return measure -> its mean; nothing if there is no such file."""
    entries = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {measure: each["mean"] for measure, each in entries.items()}


def format_table(found: Mapping[str, Mapping[str, float | None]]) -> str:
    """Return a Markdown table with a row per method, those that are reported, and the notes."""
    arrows = {"RetFail": " ↓", GEN_KNOW: " ↑"}
    rows = []
    for method, values in (*found.items(), *REPORTED.items()):
        cells = (values.get(measure) for measure in MEASURES)
        rows.append([method, *("-" if each is None else f"{each:.3f}" for each in cells)])
    columns = ["method", *(measure + arrows.get(measure, "") for measure in MEASURES)]
    return f"{markdown_table(columns, rows)}\n{NOTES}"
