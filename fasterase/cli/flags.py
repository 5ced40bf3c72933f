"""The flags of each sub-command that set no field of `UnlearnConfig`, as dataclasses.

A flag's help and group come from the docstring of the class that defines it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from fasterase.config import Recipe


@dataclass(frozen=True)
class SetFlags:
    """Flags that name a model and the sets of pairs.

    > Model and pairs

    Args:
        model: an open_clip name/tag (`ViT-B-32/laion2b_s34b_b79k`), `hf-hub:org/name` (open_clip),
            `hf:org/name` (transformers), a folder, or an open_clip checkpoint file.
        model_name: open_clip's name of the architecture of models that are checkpoint files.
        forget: pairs to forget: a CSV, TSV, JSONL, JSON or Parquet file (columns `filepath` and
            `title`), a folder of `x.jpg` + `x.txt`, a class-per-folder directory, or a WebDataset
            pattern (`shards/{000..099}.tar`).
        retain: pairs to keep, in any of the same forms.
        holdout: pairs in neither set, only measured, in any of the same forms.
        sets: further pairs that should be kept, only measured, each set as NAME=PATH (in YAML also
            a mapping).
        forget_sets: further pairs that should be forgotten as well, such as pictures that were not
            trained on, only measured, each set as NAME=PATH. The verdict is the worst over all.
    """

    model: str | None = None
    model_name: str | None = None
    forget: str | None = None
    retain: str | None = None
    holdout: str | None = None
    sets: list[str] | dict[str, str] | str = dataclasses.field(default_factory=list)
    forget_sets: list[str] | dict[str, str] | str = dataclasses.field(default_factory=list)


@dataclass(frozen=True)
class DataFlags:
    """Flags that split one source of pairs, and that name its columns.

    > One source to split

    Args:
        data: one source of pairs, in any form that `fasterase unlearn --forget` takes, that is
            split into those to forget and those to keep by exactly one of the next three flags.
        forget_expression: forget the pairs with a caption in which this regular expression is
            found, ignoring case, such as `\\bapples?\\b`.
        forget_ids: forget the pairs whose ids this file lists, one per line.
        forget_classes: forget the pairs of these classes, or with these captions, separated by
            commas.

    > Columns

    Args:
        image_key: column or tar entry of the image, if it does not have one of the usual names.
        text_key: column or tar entry of the caption, if it does not have one of the usual names.
    """

    data: str | None = None
    forget_expression: str | None = None
    forget_ids: str | None = None
    forget_classes: list[str] | None = None
    image_key: str | None = None
    text_key: str | None = None


@dataclass(frozen=True)
class UnlearnFlags(DataFlags, SetFlags):
    """Flags of `fasterase unlearn` other than the fields of `UnlearnConfig`.

    > Model and pairs

    Args:
        recipe: defaults to start from: `fasterase`, or `cliperase` for the paper's. Flags and YAML
            keys override the recipe.
    """

    recipe: Recipe = "fasterase"


@dataclass(frozen=True)
class EvaluateFlags(DataFlags, SetFlags):
    """Flags of `fasterase evaluate`.

    > Comparison

    Args:
        original: the model before erasing, for comparison.
        references: further models to compare with, each as NAME=MODEL, such as one retrained
            without the forget set.

    > Measuring

    Args:
        class_names: text file with one class name per line, for zero-shot accuracy.
        tasks: what models are used for, by name: zero_shot, retrieval, image_retrieval,
            linear_probe, prototypes, paraphrases.
        attacks: attempts to bring the concept back, by name: swap (needs `original`),
            probe, quantise, relearn, prompt, membership (needs `non_members`).
        non_members: pairs of the same source that no model was trained on, in any of the same
            forms.
        max_pairs: number of pairs to measure per set, drawn with `seed`.
        seed: seed of the draw and of the bootstrap intervals.
        device: where to run, such as `cuda:0`. `none`: the best available device.
        num_workers: processes that load and decode pairs, or `auto`.
        progress: show progress bars.
        output: also write the result to this file: the values as `.json`, or the report as `.md`.
        plots: also draw each task and attack to a file in this folder.
    """

    original: str | None = None
    references: list[str] | dict[str, str] | str = dataclasses.field(default_factory=list)
    class_names: str | None = None
    tasks: list[str] | str = dataclasses.field(default_factory=list)
    attacks: list[str] | str = dataclasses.field(default_factory=list)
    non_members: str | None = None
    max_pairs: int = 5000
    seed: int = 0
    device: str | None = None
    num_workers: int | Literal["auto"] = 0
    progress: bool = True
    output: str | None = None
    plots: str | None = None


@dataclass(frozen=True)
class SplitFlags(DataFlags):
    """Flags of `fasterase split`.

    > Output

    Args:
        output_dir: folder for the two sets: tables `forget.csv` and `retain.csv` (`.jsonl` where
            pairs have several captions) if the images are files, else lists of ids `forget.txt` and
            `retain.txt`.
    """

    output_dir: str | None = None


@dataclass(frozen=True)
class DemoFlags:
    """Flags of `fasterase demo` other than a few fields of `UnlearnConfig`.

    > Demo

    Args:
        forget: what to erase: a group (`food-drink`), a subgroup (`food-fruit`) or a regular
            expression on the names.
        model: erase from this model, named as for `fasterase unlearn`, instead of the one that
            ships with the package.
        recipe: `fasterase`, or `cliperase` for the paper's; the other one is shown for comparison.
        output_dir: folder for the erased model, history, plot and picture sheet. `none`:
            `runs/demo-` followed by what is erased.
        full: also print the table of every metric, which is always in `evaluation.txt`.
    """

    forget: str = "food-fruit"
    model: str | None = None
    recipe: Recipe = "fasterase"
    output_dir: str | None = None
    full: bool = False


@dataclass(frozen=True)
class PlanFlags:
    """Flags of `fasterase plan` other than a few fields of `UnlearnConfig`.

    > Job

    Args:
        model: an open_clip name with or without a tag (`ViT-bigG-14`), or in any other form that
            `fasterase unlearn` takes. No weights are read.
        pairs: number of pairs to keep.
        forget: number of pairs to forget. `none`: a hundredth of `pairs`.

    > Machine

    Args:
        gpus: number of GPUs.
        gpu_memory: memory of each in GB (10^9 bytes).
        tflops: dense peak of a GPU in TFLOP/s. `none`: an H100's.
        efficiency: share of that peak that training reaches.
        measure: run one micro-batch with random weights on this machine, and correct the memory of
            the activations by what it needs.
    """

    model: str | None = None
    pairs: int | None = None
    forget: int | None = None
    gpus: int = 1
    gpu_memory: float = 80.0
    tflops: float | None = None
    efficiency: float = 0.4
    measure: bool = False
