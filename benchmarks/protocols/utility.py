"""What CLIPs are compared by: zero-shot accuracy on ImageNet, retrieval on COCO and Flickr30K.

Both models see the same pictures. The interval is that of the difference, query by query: a model's
own interval is far wider than what an erasure costs. (Captions of one picture are queries of their
own, so that text->image intervals are a little narrow.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from benchmarks.protocols.published import COCO_FILES, FLICKR_FILES, KarpathyFiles, read_karpathy
from benchmarks.result_files import markdown_table
from fasterase.encode import PairEncoder
from fasterase.engine.model_state import best_device, placed
from fasterase.errors import InputError
from fasterase.evaluation.evaluator import sampled_rows
from fasterase.evaluation.metrics import bootstrap_intervals
from fasterase.evaluation.tasks import DIRECTIONS, RECALL_DEPTHS, encode_captions, rank_captions
from fasterase.evaluation.zero_shot import encode_classes, score_accuracy
from fasterase.files import to_json, write_text
from fasterase.models.load import load_model
from fasterase.pairs.open import open_pairs

NUMBERS = "utility.json"
RESAMPLES = 1000
IMAGENET, TOP_1 = "imagenet", "ImageNet, zero-shot top 1"
IMAGENET_DATA = (
    "the validation pictures in their 1,000 folders n01440764, n01443537, ... (from "
    "https://image-net.org, sorted as for torchvision.datasets.ImageFolder)"
)
KARPATHY = {"coco": COCO_FILES, "flickr30k": FLICKR_FILES}
DATA = {IMAGENET: IMAGENET_DATA, **{name: files.data for name, files in KARPATHY.items()}}
COLUMNS = ("measure", "queries", "original, %", "erased, %", "difference", "95 % interval")

# Returns measure -> [n] of each query, 1 if it is answered rightly, else 0.
Score = Callable[[PairEncoder], dict[str, np.ndarray]]


def run_utility(
    model: str, original: str, data: Mapping[str, Path], output: Path, *, max_pairs: int | None
) -> str:
    """Score both models on each data set, and return the table; figures go to `output`.

    Args:
        data: names in `DATA` -> folders.
        max_pairs: pictures of each data set; None: all.
    """
    if not data:
        raise InputError(f"no data set: give one or more of --{', --'.join(DATA)}.")
    scores = [
        open_imagenet(folder, max_pairs)
        if name == IMAGENET
        else _retrieval(name, folder, KARPATHY[name], max_pairs)
        for name, folder in data.items()
    ]
    before, after = (score_model(name, scores) for name in (original, model))
    differences = {measure: after[measure] - before[measure] for measure in before}
    rows, numbers = [], {}
    for measure, lost in differences.items():
        shares = float(before[measure].mean()), float(after[measure].mean())
        (ends,) = bootstrap_intervals({measure: lost}, resamples=RESAMPLES, seed=0).values()
        names = ("original", "erased", "low", "high", "queries")
        numbers[measure] = dict(zip(names, (*shares, *ends, len(lost)), strict=True))
        cells = [f"{100 * share:.2f}" for share in shares]
        cells += [f"{100 * (shares[1] - shares[0]):+.2f}"]
        cells += [" to ".join(f"{100 * end:+.2f}" for end in ends)]
        rows.append([measure, f"{len(lost):,}", *cells])
    write_text(output / NUMBERS, to_json(numbers, indent=1) + "\n")
    return markdown_table(COLUMNS, rows)


def score_model(name: str, scores: list[Score]) -> dict[str, np.ndarray]:
    """Score a model; only one is in memory at a time."""
    model = load_model(name)
    with placed(model, device=best_device()):
        encoder = PairEncoder(model, progress=True)
        return {key: values for score in scores for key, values in score(encoder).items()}


def open_imagenet(folder: Path, max_pairs: int | None) -> Score:
    """Score accuracy over the 1,000 classes, by open_clip's names and OpenAI's 80 templates.

    Raises:
        InputError: `folder` does not hold the classes.
    """
    import open_clip

    names = open_clip.IMAGENET_CLASSNAMES
    classes = sorted(path for path in folder.glob("n*") if path.is_dir())
    if len(classes) != len(names):
        raise InputError(
            f"--{IMAGENET}={str(folder)!r} holds {len(classes):,} folders n..., not "
            f"{len(names):,}. Put there {IMAGENET_DATA}."
        )
    # By number: two names stand for two classes each.
    found = [
        (path, number)
        for number, each in enumerate(classes)
        for path in sorted(each.iterdir())
        if path.is_file()
    ]
    pairs = open_pairs(
        [{"image": str(path), "text": names[number]} for path, number in found], name=IMAGENET
    )
    labels = np.array([number for _, number in found])
    templates = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    rows = sampled_rows(len(pairs), max_pairs, seed=0)

    def score(encoder: PairEncoder) -> dict[str, np.ndarray]:
        features = encoder.pairs(pairs, rows, description="ImageNet")
        directions = encode_classes(encoder.texts, names, templates)
        right = score_accuracy(features.image, directions, labels[features.rows])
        return {TOP_1: right}

    return score


def _retrieval(name: str, folder: Path, files: KarpathyFiles, max_pairs: int | None) -> Score:
    """Recall on the test pictures of Karpathy's split, in both directions."""
    images = read_karpathy(folder, files, argument=name)
    pairs = open_pairs([pair for split, pair in images if split == "test"], name=name)
    rows = sampled_rows(len(pairs), max_pairs, seed=0)

    def score(encoder: PairEncoder) -> dict[str, np.ndarray]:
        features = encoder.pairs(pairs, rows, description=files.name)
        captions, place, text = encode_captions(encoder, pairs, features)
        return {
            f"{files.name}, {DIRECTIONS[key]} R@{k}": found.hit(k)
            for key, _, found in rank_captions(features.image, captions, place, text)
            for k in RECALL_DEPTHS
        }

    return score
