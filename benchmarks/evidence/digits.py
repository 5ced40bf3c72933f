"""Erase a digit from a small CLIP of handwriting, beside the same model trained without it.

    python -m benchmarks.evidence.digits [--processes 2] [--seeds 1]

The pairs are scikit-learn's 1,797 scans of handwritten digits (8 x 8 pixels) with four wordings
each; recipes were tuned with emoji. The first two thirds are trained on, the last third is only
measured. A small CLIP learns them (InfoNCE with labels), the default recipe erases one digit, once
as it is and once with thorough=True, and another CLIP of the same seed learns all but that digit.
Every figure is measured on all four models. --work keeps models and measurements, so an interrupted
command resumes. Writes digits.csv, a row per digit, seed and model, to --output, and prints the
means.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.model import CLIP
from PIL import Image

import fasterase
from benchmarks import small_clips
from benchmarks.command import comparison_parser, exit_with
from benchmarks.evidence.attacks import RELEARNED, SWAPPED, attacks_of
from benchmarks.evidence.task import FORGET_SETS, keep_evaluation
from benchmarks.processes import call_all
from benchmarks.result_files import group_table, sum_up, write_csv
from fasterase.demo.run import recipe_config
from fasterase.errors import import_extra
from fasterase.files import check_writable, replace_file
from fasterase.report.evaluation import Evaluation

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDINGS = ("a handwritten {}", "the digit {}", "{} written by hand", "the number {}")
MODELS = ("original", "retrained", "erased", "erased, thorough")

STEPS, BATCH, LEARNING_RATE = 300, 256, 1e-3
IMAGE_SIZE, CONTEXT_LENGTH = 32, 16
VISION = {"image_size": IMAGE_SIZE, "patch_size": 8, "layers": 4, "width": 64, "head_width": 16}
TEXT = {"context_length": CONTEXT_LENGTH, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2}
ATTACKED = (*SWAPPED, *RELEARNED)

Pair = dict[str, Any]


class Scans:
    """The scans, by digit: trained ones and unseen ones."""

    def __init__(self) -> None:
        datasets = import_extra("sklearn.datasets", "eval", "the scans of digits")
        found = datasets.load_digits()
        pairs = []
        for scan, digit in zip(found.images, found.target.tolist(), strict=True):
            picture = Image.fromarray((15 * scan).astype(np.uint8)).convert("RGB")
            texts = [each.format(DIGITS[digit]) for each in WORDINGS]
            pairs.append((digit, {"image": picture, "text": texts}))
        first_unseen = 2 * len(pairs) // 3
        self._trained, self._unseen = pairs[:first_unseen], pairs[first_unseen:]

    def trained(self, digits: Iterable[int]) -> list[Pair]:
        """Return the pairs of some digits that models are trained on."""
        return [pair for digit, pair in self._trained if digit in set(digits)]

    def unseen(self, digits: Iterable[int]) -> list[Pair]:
        """Return the pairs of some digits that no model has seen."""
        return [pair for digit, pair in self._unseen if digit in set(digits)]


def build_model(seed: int) -> CLIP:
    """Return the small CLIP with random weights."""
    torch.manual_seed(seed)
    return CLIP(embed_dim=64, vision_cfg=VISION, text_cfg=TEXT).eval()


def companions() -> dict[str, Any]:
    """Return the tokenizer and preprocess of all models."""
    half = (0.5,) * 3
    return {
        "tokenizer": open_clip.SimpleTokenizer(context_length=CONTEXT_LENGTH),
        "preprocess": open_clip.image_transform(IMAGE_SIZE, is_train=False, mean=half, std=half),
    }


def trained_model(scans: Scans, digits: Sequence[int], *, seed: int, work: Path) -> CLIP:
    """Train a model on some digits, or load the one that an earlier command trained."""
    file = work / f"digits-{''.join(map(str, digits))}_seed{seed}.pt"
    model = build_model(seed)
    if not file.is_file():
        _train(model, scans.trained(digits), seed=seed)
        with replace_file(file) as temporary:
            torch.save(model.state_dict(), temporary)
    model.load_state_dict(torch.load(file, weights_only=True))
    return model


def _train(model: CLIP, pairs: Sequence[Pair], *, seed: int) -> None:
    given = companions()
    pixels = torch.stack([given["preprocess"](pair["image"]) for pair in pairs])
    tokens = torch.stack([given["tokenizer"](pair["text"]) for pair in pairs])
    _, numbers = np.unique([pair["text"][0] for pair in pairs], return_inverse=True)
    labels = torch.from_numpy(numbers)
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[small_clips.Features]:
        for _ in range(STEPS):
            rows = torch.randperm(len(pairs), generator=generator)[:BATCH]
            wording = torch.randint(len(WORDINGS), rows.shape, generator=generator)
            image = model.encode_image(pixels[rows], normalize=True)
            text = model.encode_text(tokens[rows, wording], normalize=True)
            yield image, text, model.logit_scale.exp(), labels[rows]

    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    model.train()
    small_clips.train(
        batches(), optimizer, model.logit_scale, steps=STEPS, learning_rate=LEARNING_RATE
    )
    model.eval()


def run(place: tuple[int, int], work: Path) -> Evaluation:
    """Erase a digit twice and measure the four models, or read what an earlier command measured."""
    digit, seed = place
    file = work / f"{DIGITS[digit]}_seed{seed}.json"
    return keep_evaluation(file, lambda: _erase(digit, seed, work))


def _erase(digit: int, seed: int, work: Path) -> Evaluation:
    scans, others = Scans(), [each for each in range(len(DIGITS)) if each != digit]
    forget, retain = scans.trained([digit]), scans.trained(others)
    original, erased, thorough = (
        trained_model(scans, range(len(DIGITS)), seed=seed, work=work) for _ in range(3)
    )
    config = recipe_config("fasterase", small_model=True, seed=seed, progress=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "verdict")  # it is in the results
        for model in (erased, thorough):
            asked = config.replace(thorough=model is thorough)
            fasterase.unlearn(model, forget, retain, config=asked, **companions())
        return fasterase.evaluate(
            erased,
            forget,
            retain,
            forget_sets={"forget-unseen": scans.unseen([digit])},
            holdout=scans.unseen(others),
            original=original,
            references={
                "retrained": trained_model(scans, others, seed=seed, work=work),
                "erased, thorough": thorough,
            },
            class_names=DIGITS,
            templates=WORDINGS,
            attacks=attacks_of(ATTACKED),
            seed=seed,
            progress=False,
            **companions(),
        )


def rows_of(digit: str, seed: int, evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    """Yield a row per model: shares from 0 to 1, and the verdicts."""
    assert evaluation.original is not None
    scores = {"original": evaluation.original, "erased": evaluation.scores, **evaluation.references}
    for model in MODELS:
        verdicts = evaluation.set_verdicts["model" if model == "erased" else model]
        row: dict[str, Any] = {"digit": digit, "seed": seed, "model": model}
        for name in FORGET_SETS:
            row[f"{name} accuracy"] = scores[model][name]["zero_shot_accuracy"]
            row[f"{name} residue"] = evaluation.mean_residue(name, scores[model])
            row[f"{name} verdict"] = verdicts[name]
        for name, title in (("retain", "others"), ("holdout", "others, unseen")):
            row[f"{title} accuracy"] = scores[model][name]["zero_shot_accuracy"]
        for each in ATTACKED:
            found = evaluation.attacks[each.attack][each.key].by_model()
            row[each.title], *_ = found["model" if model == "erased" else model]
        yield row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the means of each model over digits and seeds as Markdown, in percent."""
    figures = [name for name in rows[0] if name not in ("digit", "seed", "model")]
    return group_table(rows, ["model"], figures, sum_up)


def main(argv: Sequence[str] | None = None) -> None:
    parser = comparison_parser(__doc__, work="runs/digits", seeds=1)
    known = range(len(DIGITS))
    parser.add_argument("--digits", nargs="+", type=int, default=known, choices=known)
    options = parser.parse_args(argv)
    check_writable(options.work, argument="--work")
    places = [(digit, seed) for seed in range(options.seeds) for digit in options.digits]
    found = call_all(run, places, options.work, processes=options.processes)
    rows = [
        row
        for digit, seed in sorted(found)
        for row in rows_of(DIGITS[digit], seed, found[digit, seed])
    ]
    write_csv(options.output / "digits.csv", rows)
    print(table(rows))


if __name__ == "__main__":
    exit_with(main)
