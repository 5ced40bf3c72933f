"""`UnlearnConfig`, every option of a run in one frozen dataclass, and its YAML form."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_type_hints

from typing_extensions import Unpack

from fasterase.errors import InputError
from fasterase.option_values import parse_value, special_values, suggest_names
from fasterase.overrides import Overrides

Recipe = Literal["fasterase", "cliperase"]

# What a YAML file for `fasterase unlearn --config` may hold besides fields: `unlearn`'s arguments.
COMMAND_KEYS = (
    *("model", "model_name", "forget", "retain", "holdout", "sets", "forget_sets", "concept"),
    *("request", "data", "forget_expression", "forget_ids", "forget_classes"),
    *("image_key", "text_key", "recipe", "found"),
)

# What is true of a field, in its metadata.
# A resumed run may change it: how far it goes, and what does not change its weights (but for the
# last bits: `device` and `micro_batch_size`).
FREE = "free"
# It is no part of the recipe: where a run keeps its files, how processes share it, what it shows.
BOOKKEEPING = "bookkeeping"
# These commands take it as a flag, beside `fasterase unlearn`.
PLAN, DEMO, EVALUATE, FIND = "plan", "demo", "evaluate", "find"
# `--help` shows it where it does not show every flag.
BASIC = "basic"
# It names a file or a folder, so that a `Path` will do.
PATH = "path"


class Limit(NamedTuple):
    """What holds of a field's numbers, words and lists, and how to say so."""

    holds: Callable[[Any], object]
    must: str


def _are_words(value: bool | list[str]) -> bool:
    if isinstance(value, bool):
        return True
    return bool(value) and all(re.search(r"[^\W\d_]", each) for each in value)


NOT_NEGATIVE = Limit(lambda x: x >= 0, "be 0 or more")
POSITIVE = Limit(lambda x: x > 0, "be above 0")
COUNT = Limit(lambda x: x >= 1, "be 1 or more")
SHARE = Limit(lambda x: 0 <= x <= 1, "be in [0, 1]")
COSINE = Limit(lambda x: -1 <= x <= 1, "be a cosine in [-1, 1]")
DECAYS = Limit(lambda betas: all(0 <= x < 1 for x in betas), "be in [0, 1)")
WORDS = Limit(_are_words, "be True, False or a list of words")
TUNE = Limit(
    re.compile(r"all|image|text|projections|(last|lora):[1-9]\d*").fullmatch,
    "be 'all', 'image', 'text', 'projections', 'last:N' or 'lora:N' with N >= 1",
)


def _field(default: Any, *tags: str, **facts: Any) -> Any:
    """Return a field of which `tags` are true; `facts` are its `limit` and the `paper`'s value."""
    return dataclasses.field(default=default, metadata={**dict.fromkeys(tags, True), **facts})


@dataclass(frozen=True)
class UnlearnConfig:
    """Configuration of `fasterase.unlearn`.

    The defaults are fasterase's own recipe; `UnlearnConfig.cliperase()` gives the paper's.

    > Objective

    Args:
        erase: `"concept"`: what the forget pairs show, in both towers. `"link"`: only what their
            captions say of these pictures, such as the telephone number of a face. The text tower
            alone is trained (`tune="all"` becomes `"text"`), so who has the original's text tower
            still finds the link, and the verdict does not count that; retain pairs with the same
            pictures and other captions are kept; only words that are named lose their meaning; no
            forget pair is withheld. With the loss `"similarity"` and the floor `"auto"`, made-up
            facts in the captions' wordings, held like retain pairs, replace floor and cross terms.
        forget_weight: weight of the forgetting loss (paper: 3).
        retain_weight: weight of the retention loss, CLIP's symmetric InfoNCE (paper: 1).
        consistency_weight: weight of the KL divergence to the similarity distributions of the
            original (paper: 3).
        anchor_weight: weight of the squared distance to the original's features, over the retain
            pairs. Prevents a common shift of all features, which InfoNCE and the KL cannot see.
            0 is the paper.
        forget_loss: `"similarity"` lowers the cosine of matched forget pairs (paper);
            `"contrastive"` is gradient ascent on their InfoNCE.
        floor: cosine below which a forget pair is no longer pushed. `"auto"` takes the original's
            mean cosine between forget images and retain captions, and between retain images and
            forget captions, or 0 without retain pairs; pairs then rest 0.15 standard deviations of
            these above it. `None` is the paper.
        cross_weight: weight, within the `"similarity"` loss, of the cosines of forget images with
            the original's features of their captions, and the reverse: both towers forget, neither
            below the floor, and their mean cosines with retained features move to it. `"auto"` is
            1, and 0 with `tune="image"`, whose text tower is the original's. 0 is the paper; a
            tower may then tell, beside the original's other one.
        forget_augment: apply random affine transforms and tints to forget images, so that the
            association is erased for unseen pictures too. False is the paper.
        forget_words: before training, replace the embeddings of words that are to be forgotten
            with neutral ones: what was known of them is gone, not hidden. True takes the word that
            `concept` names (of several, the rare ones) and, with 1,000 or more different retain
            captions, rare words that forget captions often have and these never; a list takes its
            words. Tokens that other words or retain captions use stay. Needs `tune="all"`, `"text"`
            or `"lora:N"`; other runs go without. False is the paper.
        negatives: `"own"` uses one similarity matrix per set; `"joint"` uses one over both sets.

    > Steps

    Args:
        epochs: `"auto"` trains until the verdict is "forgotten", within `max_damage` and 400 steps
            (or one pass over the forget set, if that is more); a number is passes over the forget
            set. The retain set is cycled, with "auto" the tenth nearest to forget captions up to
            eight times as often as the rest.
        max_steps: number of optimiser steps; replaces `epochs`.
        max_damage: share of recall@1 that retain pairs withheld from training, and the forget set's
            neighbours, may lose with `epochs="auto"` (0.03 is 3 points); `None` for any. It counts
            as exceeded when the near end of its confidence interval is, or when a quarter of the
            everyday words in `evaluation.outside` have lost most of their neighbours.
        batch_size: retain pairs per step over all ranks, at most the size of the set; with four
            concepts twice, with nine three times as many.
        forget_batch_size: forget pairs per step over all ranks, likewise.
        micro_batch_size: pairs encoded at a time. If smaller than the batch, GradCache's two passes
            compute the gradient of the full batch in the memory of one micro-batch. `None`: encode
            the whole batch at once, with several concepts as many pairs as with one. In eval mode a
            caption that repeats is encoded once a step.
        thorough: with `epochs="auto"` and cross terms, wait twice as long for towers that, beside
            the original's other one, find more than a tenth of a set's images: at more steps and
            damage to neighbours.
        stop_when_forgotten: with a number of `epochs`, check the verdict once per epoch, and stop
            once it is no longer "remembered".

    > Optimiser

    Args:
        lr: `"auto"` makes the forgetting loss follow a falling line and is held back by how far the
            features of retain pairs move; or the peak learning rate.
        optimizer: `"adamw"`, `"adam"`, or with bitsandbytes (extra `scale`) `"adamw8bit"`,
            `"paged_adamw8bit"`, `"lion8bit"`: the states of large matrices take 8 bits, all others
            (norms, biases, embeddings, logit_scale) and the weights stay fp32. Lion's step is the
            sign of its moment, so it needs a smaller rate than Adam's.
        betas: decay rates of the moments.
        weight_decay: applied to matrices only; gains, biases and logit_scale never decay.
        warmup_steps: steps of linear warm-up to `lr`.
        schedule: `"constant"`, or `"cosine"` to 0 at the last step.
        max_grad_norm: clip the global gradient norm to this value; `None` does not clip.

    > Model

    Args:
        tune: what to train: `"all"`, `"image"`, `"text"`, `"projections"`, `"last:N"` (the last N
            blocks of each tower), or `"lora:N"` (low-rank adapters of rank N on the linear maps in
            the blocks, added to the weights at the end; extra `peft`).
        train_logit_scale: train logit_scale too; the loss clamps it at max(100, its initial value).
        train_mode: put the towers in train mode (BatchNorm statistics move, Dropout is active).
            False keeps them in eval mode.
        precision: compute dtype of the towers: `"auto"` (bf16 on CUDA devices that support it, fp16
            on other CUDA devices, fp32 elsewhere), `"fp32"`, `"bf16"`, `"fp16"`. Weights stay fp32.
        activation_checkpointing: keep only the input of each block of both towers for the backward
            pass, which runs the block again: less memory, same gradients, one more forward pass.
        prefix_cache: GB (10^9 bytes) of disk for outputs of the lower blocks, which `"last:N"` and
            `"projections"` freeze: each pair runs through them once. `None`: in each step.
        backend: implementation of the loss, see `fasterase.available_backends()`.
        device: where to run, such as `"cuda:0"`. `None`: where the model is, or the best available
            device for a model given by name.
        deepspeed: ZeRO by DeepSpeed: a JSON file, one of those that ship (`"zero1"`, `"zero2"`,
            `"zero3"`, `"zero3_offload"`), or a dict. What it leaves out or sets to `"auto"` comes
            from these settings; see docs/processes.md. `None`: plain data parallelism if a launcher
            starts several processes.

    > Run

    Args:
        seed: seed of sampling, caption choice, augmentation and Dropout.
        num_workers: processes that load and decode pairs, per rank; `"auto"`: the cores of the host
            divided by its ranks, less one, at most 16. Does not affect the order of the pairs.
        progress: say how far it is.
        reference_cache: folder for the cached features of the original, kept between runs. `None`:
            inside `output_dir`, or a temporary folder.
        output_dir: folder for the history, checkpoints, the erased model and the evaluation.
        save_every: steps between checkpoints; `None` saves every ten minutes. The last step is
            always saved.
        resume: `"auto"` resumes from the last checkpoint in `output_dir` if there is one,
            `"never"` starts from scratch, `"must"` fails without a checkpoint.
        evaluation: measure before and after erasing: `"quick"` (at most 1,000 pairs per set, 200
            bootstrap resamples), `"full"` (at most 5,000 pairs, 1,000 resamples) or `None`. It also
            chooses the pairs that judge `epochs="auto"`, which does not resume with another one.
        max_skipped: share of unreadable pairs above which the run stops (0.01 is 1 %). A single one
            never stops it, unless this is 0.
        remember_erased: keep salted digests of the pairs to forget in the record beside the saved
            model: later erasures leave such pairs out of their retain sets, and judge them again.
        report_to: log each step, the settings and the evaluation to `"tensorboard"` or `"wandb"`
            (extras of these names), in `output_dir` or else in `runs/`.
        rank_timeout: seconds after which a rank without a sign of life ends the run of all.

    Raises:
        InputError: a value is outside its range; the message names the field.
    """

    # objective
    forget_weight: float = _field(3.0, limit=NOT_NEGATIVE)
    retain_weight: float = _field(1.0, limit=NOT_NEGATIVE)
    consistency_weight: float = _field(3.0, limit=NOT_NEGATIVE)
    anchor_weight: float = _field(30.0, limit=NOT_NEGATIVE, paper=0.0)
    forget_loss: Literal["similarity", "contrastive"] = "similarity"
    floor: float | Literal["auto"] | None = _field("auto", limit=COSINE, paper=None)
    cross_weight: float | Literal["auto"] = _field("auto", limit=NOT_NEGATIVE, paper=0.0)
    forget_augment: bool = _field(True, paper=False)
    forget_words: bool | list[str] = _field(True, limit=WORDS, paper=False)  # noqa: RUF009
    negatives: Literal["own", "joint"] = _field("own", PLAN)
    # steps
    epochs: int | Literal["auto"] = _field("auto", FREE, PLAN, limit=COUNT, paper=20)
    max_steps: int | None = _field(None, FREE, PLAN, DEMO, BASIC, limit=COUNT)
    max_damage: float | None = _field(0.03, BASIC, limit=SHARE)
    batch_size: int = _field(256, PLAN, BASIC, limit=COUNT, paper=16)
    forget_batch_size: int = _field(64, PLAN, limit=COUNT, paper=16)
    micro_batch_size: int | None = _field(None, FREE, PLAN, BASIC, limit=COUNT)
    thorough: bool = False
    stop_when_forgotten: bool = _field(False, FREE)
    # optimiser
    lr: float | Literal["auto"] = _field("auto", PLAN, DEMO, BASIC, limit=POSITIVE, paper=1e-6)
    optimizer: Literal["adamw", "adam", "adamw8bit", "paged_adamw8bit", "lion8bit"] = _field(
        "adamw", PLAN, DEMO, paper="adam"
    )
    betas: tuple[float, float] = _field((0.9, 0.98), limit=DECAYS)
    weight_decay: float = _field(0.0, limit=NOT_NEGATIVE)
    warmup_steps: int = _field(0, limit=NOT_NEGATIVE)
    schedule: Literal["constant", "cosine"] = "constant"
    max_grad_norm: float | None = _field(1.0, limit=POSITIVE, paper=None)
    # model
    tune: str = _field("all", PLAN, BASIC, limit=TUNE)
    train_logit_scale: bool = _field(False, PLAN)
    train_mode: bool = False
    precision: Literal["auto", "fp32", "bf16", "fp16"] = _field("auto", PLAN, FIND, BASIC)
    activation_checkpointing: bool = _field(False, FREE, PLAN)
    prefix_cache: float | None = _field(None, PLAN, limit=POSITIVE)
    backend: Literal["auto", "dense", "chunked", "cpu", "triton"] = _field("auto", PLAN)
    device: str | None = _field(None, FREE, PLAN, EVALUATE, FIND, BASIC)
    deepspeed: str | dict[str, Any] | None = _field(  # noqa: RUF009
        None, FREE, BOOKKEEPING, DEMO, BASIC, PATH
    )
    # run
    seed: int = _field(0, DEMO, BASIC, limit=NOT_NEGATIVE)
    num_workers: int | Literal["auto"] = _field(
        0, FREE, BOOKKEEPING, PLAN, DEMO, EVALUATE, FIND, BASIC, limit=NOT_NEGATIVE
    )
    progress: bool = _field(True, FREE, BOOKKEEPING, PLAN, DEMO, EVALUATE, FIND)
    reference_cache: str | None = _field(None, FREE, BOOKKEEPING, FIND, PATH)
    output_dir: str | None = _field(None, FREE, BOOKKEEPING, BASIC, PATH)
    save_every: int | None = _field(None, FREE, BOOKKEEPING, limit=COUNT)
    resume: Literal["auto", "never", "must"] = _field("auto", FREE, BOOKKEEPING, BASIC)
    evaluation: Literal["quick", "full"] | None = _field("quick", FREE, BASIC)
    max_skipped: float = _field(0.01, FREE, limit=SHARE)
    remember_erased: bool = _field(True, FREE)
    report_to: Literal["tensorboard", "wandb"] | None = _field(None, FREE, BOOKKEEPING)
    rank_timeout: float = _field(60.0, FREE, BOOKKEEPING, limit=POSITIVE)
    # last, since the others may have been given by position
    erase: Literal["concept", "link"] = "concept"

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            name, limit = field.name, field.metadata.get("limit")
            value = parse_value(name, getattr(self, name), hints[name])
            if PATH in field.metadata and isinstance(value, str):
                value = os.path.expanduser(value)
            object.__setattr__(self, name, value)
            special = special_values(hints[name])
            if limit is not None and value not in special:
                must = ", or ".join([limit.must, *map(repr, special)])
                self._check(name, limit.holds(value), must)
        if self.erases_link:
            if self.tune == "all":
                object.__setattr__(self, "tune", "text")
            self._check("tune", self.tune == "text", "be 'text' or 'all' with erase='link'")
        if not (self.forget_weight or self.retain_weight or self.consistency_weight):
            raise InputError(
                "forget_weight, retain_weight and consistency_weight are all 0: nothing to train. "
                "Give at least one of them a positive weight."
            )
        if self.forget_loss == "contrastive" and isinstance(self.floor, float):
            raise InputError(
                f"floor={self.floor} acts on cosines, but forget_loss='contrastive' has none. "
                "Use floor='auto' or None, or forget_loss='similarity'."
            )
        if self.thorough:
            self._check("thorough", self.runs_until_forgotten, "be False with numbers of steps")
            is_crossed = self.used_cross_weight > 0 and self.tune not in ("image", "text")
            needed = "be False where one tower is frozen or cross_weight is 0 (see cross_weight)"
            self._check("thorough", is_crossed, needed)
        self._check_automatic()

    def _check(self, name: str, holds: object, must: str) -> None:
        if not holds:
            raise InputError(f"{name}={getattr(self, name)!r} must {must}.")

    def _check_automatic(self) -> None:
        """Refuse options that the automatic recipe cannot be combined with."""
        chosen = [f"lr={self.lr!r}"] if self.lr == "auto" else []
        chosen += [f"epochs={self.epochs!r}"] if self.runs_until_forgotten else []
        if not chosen:
            return
        automatic, numbers = " and ".join(chosen), "numbers for lr and epochs (or max_steps)"
        for name, endless in (("forget_loss", "contrastive"), ("floor", None)):
            if getattr(self, name) == endless:
                usual = getattr(type(self), name)
                raise InputError(
                    f"{name}={endless!r} has no end that {automatic} could aim at. Give {numbers}, "
                    f"or use {name}={usual!r}."
                )
        if not self.forget_weight:
            raise InputError(
                f"forget_weight=0 with {automatic}: nothing is forgotten. Give {numbers}."
            )
        for name in ("schedule", "warmup_steps"):
            usual = getattr(type(self), name)
            must = f"be {usual!r} with {automatic}; or give {numbers}"
            self._check(name, getattr(self, name) == usual, must)

    @property
    def runs_until_forgotten(self) -> bool:
        """Whether the run ends by itself: `epochs="auto"`, and no `max_steps`."""
        return self.epochs == "auto" and self.max_steps is None

    @property
    def erases_link(self) -> bool:
        """Whether the pictures to forget stay what they are."""
        return self.erase == "link"

    @property
    def used_cross_weight(self) -> float:
        """`cross_weight` as a number: 0 where forget pairs have no cosines to lower."""
        if not self.forget_weight or self.forget_loss != "similarity":
            return 0.0
        if self.cross_weight == "auto":
            return 0.0 if self.tune == "image" else 1.0
        return self.cross_weight

    @classmethod
    def cliperase(cls, **overrides: Unpack[Overrides]) -> UnlearnConfig:
        """Return the paper's recipe as far as it is known, with `overrides`.

        Yang et al., CLIPErase, ACL 2025 (long.1469), as published descriptions report it: losses
        weighted 3, 1, 3; both encoders trained; Adam with betas (0.9, 0.98), lr 1e-6 (1e-8 on
        Flickr30K), batch 16, 20 epochs; no floor, no anchor, no augmentation and no clipping.
        Anything the descriptions do not mention keeps the default of `UnlearnConfig`.
        """
        fields = dataclasses.fields(cls)
        paper = {f.name: f.metadata["paper"] for f in fields if "paper" in f.metadata}
        return cls(**_check_names({**paper, **overrides}))

    @classmethod
    def from_yaml(cls, path: str | PathLike[str], **overrides: Unpack[Overrides]) -> UnlearnConfig:
        """Read a YAML mapping of fields; `overrides` win.

        The file may be one for `--config`, such as `--print_config` writes: `recipe` chooses the
        defaults, and other keys of the command line (`COMMAND_KEYS`) are left out.

        Raises:
            InputError: the file is missing, is not a mapping, or names an unknown field.
        """
        values = read_yaml(path)
        recipe = parse_value("recipe", values.pop("recipe", "fasterase"), Recipe)
        fields = {name: value for name, value in values.items() if name not in COMMAND_KEYS}
        return (cls.cliperase if recipe == "cliperase" else cls)(
            **_check_names({**fields, **overrides})
        )

    def replace(self, **overrides: Unpack[Overrides]) -> UnlearnConfig:
        """Return a copy with some fields changed.

        Raises:
            InputError: an override is not a field.
        """
        return dataclasses.replace(self, **_check_names(overrides))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, ready for JSON and YAML."""
        values = dataclasses.asdict(self)
        values["betas"] = list(self.betas)
        return values

    def recipe(self) -> dict[str, Any]:
        """Return the fields that say how to erase, as plain values; none names a folder."""
        others = field_names(BOOKKEEPING)
        return {name: value for name, value in self.to_dict().items() if name not in others}


def field_names(tag: str | None = None) -> tuple[str, ...]:
    """Return the names of all fields, or of those with a tag, in the order of their definition."""
    fields = dataclasses.fields(UnlearnConfig)
    return tuple(field.name for field in fields if tag is None or tag in field.metadata)


def describe_recipe(config: UnlearnConfig) -> str:
    """Return the name of the closest recipe and the fields in which `config` differs from it."""
    changes = {}
    for name, base in (
        ("fasterase defaults", UnlearnConfig()),
        ("cliperase (the paper's)", UnlearnConfig.cliperase()),
    ):
        values = {each: getattr(config, each) for each in config.recipe()}
        changes[name] = [f"{n}={v!r}" for n, v in values.items() if v != getattr(base, n)]
    closest = min(changes, key=lambda name: len(changes[name]))
    return "; ".join(filter(None, [closest, ", ".join(changes[closest])]))


def read_yaml(path: str | PathLike[str]) -> dict[str, Any]:
    """Read the mapping in a YAML configuration file; an empty file gives an empty one.

    The words `none` and `None` mean no value, as they do on the command line; in YAML only `null`
    does.

    Raises:
        InputError: the file is missing, cannot be read, or does not hold a mapping.
    """
    import yaml

    file = Path(os.path.expanduser(path))
    if not file.is_file():
        raise InputError(f"config: no file {file}. Give the path of a YAML file.")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise InputError(f"config: {file} cannot be read: {error.strerror}") from error
    # PyYAML raises YAMLError for the syntax, and ValueError or KeyError for malformed scalars.
    except (yaml.YAMLError, ValueError, KeyError) as error:
        raise InputError(f"config: {file} is not valid YAML: {error}") from error
    if not isinstance(values, Mapping):
        raise InputError(
            f"config: {file} holds a {type(values).__name__}, expected a mapping "
            "of field names to values, with one `name: value` per line."
        )
    return {name: None if value in ("none", "None") else value for name, value in values.items()}


def format_yaml(values: Mapping[str, Any]) -> str:
    """Format plain values as YAML that `read_yaml` reads back."""
    import yaml

    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)


# Other libraries' words for arguments of `unlearn`.
_ARGUMENTS = {
    "processor": " Pass it as preprocess= or tokenizer=: it gives both.",
    "image_processor": " Pass it as preprocess=.",
    "transform": " Pass it as preprocess=.",
}


def _check_names(values: Mapping[str, Any]) -> dict[str, Any]:
    known = field_names()
    for name in values:
        if name not in known:
            hint = _ARGUMENTS.get(name) or suggest_names(
                name, known, otherwise=f"Known: {', '.join(known)}."
            )
            raise InputError(f"unknown option `{name}`.{hint}")
    return dict(values)
