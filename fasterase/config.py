"""`UnlearnConfig`: every setting of a run in one flat, frozen dataclass, loadable from YAML."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fasterase.errors import InputError


@dataclass(frozen=True)
class UnlearnConfig:
    """Settings of `fasterase.unlearn`. Defaults are fasterase's recipe, `cliperase()` the paper's.

    > Objective

    Args:
        forget_weight: weight of the forgetting loss (paper: 3).
        retain_weight: weight of the retention loss, CLIP's symmetric InfoNCE (paper: 1).
        consistency_weight: weight of the KL to the original's similarity distributions (paper: 3).
        anchor_weight: weight of the squared distance to the original's features over the retain
            pairs. Holds what InfoNCE and KL rows cannot see, a common shift of all features.
            0 is the paper.
        forget_loss: `"similarity"` lowers the cosine of matched forget pairs (paper);
            `"contrastive"` is gradient ascent on their InfoNCE.
        floor: cosine below which a forget pair is no longer pushed. `"auto"` takes the original's
            mean cosine of forget images with retain captions and the reverse; `None` is the paper.
        forget_augment: random affine and tint on forget images, so that the association goes from
            unseen pictures too. False is the paper.
        negatives: `"own"` two similarity matrices, forget and retain; `"joint"` one over both.

    > Steps

    Args:
        epochs: passes over the forget set; the retain set cycles.
        max_steps: optimiser steps; replaces `epochs`.
        batch_size: retain pairs a step, over all ranks, clipped to the set.
        forget_batch_size: forget pairs a step, over all ranks, clipped to the set.
        micro_batch_size: pairs encoded at a time. Below the batch, GradCache's two passes give the
            full batch's gradient in one micro-batch's memory. `None`: the whole batch at once.
        stop_when_forgotten: check the whole forget set once an epoch; stop when forgotten.

    > Optimiser

    Args:
        lr: peak learning rate.
        optimizer: `"adamw"`, `"adam"`, or with bitsandbytes (extra `scale`) `"adamw8bit"`,
            `"paged_adamw8bit"`, `"lion8bit"`.
        betas: decay rates of the moments.
        weight_decay: on matrices only; gains, biases and logit_scale never decay.
        warmup_steps: linear warm-up to `lr`.
        schedule: `"constant"`, or `"cosine"` to 0 at the last step.
        max_grad_norm: clip the global gradient norm; `None` does not clip.

    > Model

    Args:
        tune: `"all"`, `"image"`, `"text"`, `"projections"`, or `"last:N"` (blocks of each tower).
        train_logit_scale: train it too, clamped in the loss at max(100, its initial value).
        train_mode: towers in train mode (BatchNorm statistics move, Dropout active). False keeps
            them frozen in eval mode.
        precision: compute dtype of the towers, `"auto"` (bf16 on CUDA where the device has it,
            otherwise fp16; fp32 elsewhere), `"fp32"`, `"bf16"`, `"fp16"`. Weights stay fp32.
        backend: of the loss, see `fasterase.available_backends()`.
        device: where to run, such as `"cuda:0"`. `None`: where the model is, or for a model given
            by name the best device there is.
        deepspeed: DeepSpeed configuration (path or dict).

    > Run

    Args:
        seed: of sampling, caption choice, augmentation and Dropout.
        num_workers: processes that load and decode pairs. The order does not depend on it.
        progress: show progress bars.
        reference_cache: folder of the original's cached features, kept between runs. `None`: inside
            `output_dir`, or a temporary folder.
        output_dir: where history, checkpoints, the erased model and the evaluation go.
        save_every: steps between checkpoints. `None`: every ten minutes and at the end.
        resume: `"auto"` goes on from the last checkpoint in `output_dir` where there is one,
            `"never"` starts anew, `"must"` refuses to start anew.
        evaluation: measure before and after: `"quick"`, `"full"` or `None`.
        max_skipped: share of unreadable pairs above which the run stops (0.01 is 1 %).

    Raises:
        InputError: a value is outside its range; the message names the field.
    """

    # objective
    forget_weight: float = 3.0
    retain_weight: float = 1.0
    consistency_weight: float = 3.0
    anchor_weight: float = 10.0
    forget_loss: Literal["similarity", "contrastive"] = "similarity"
    floor: float | Literal["auto"] | None = "auto"
    forget_augment: bool = True
    negatives: Literal["own", "joint"] = "own"
    # steps
    epochs: int = 20
    max_steps: int | None = None
    batch_size: int = 256
    forget_batch_size: int = 64
    micro_batch_size: int | None = None
    stop_when_forgotten: bool = False
    # optimiser
    lr: float = 1e-5
    optimizer: Literal["adamw", "adam", "adamw8bit", "paged_adamw8bit", "lion8bit"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    max_grad_norm: float | None = 1.0
    # model
    tune: str = "all"
    train_logit_scale: bool = False
    train_mode: bool = False
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    backend: Literal["auto", "dense", "chunked", "cpu", "triton"] = "auto"
    device: str | None = None
    deepspeed: str | dict[str, Any] | None = None
    # run
    seed: int = 0
    num_workers: int = 0
    progress: bool = True
    reference_cache: str | None = None
    output_dir: str | None = None
    save_every: int | None = None
    resume: Literal["auto", "never", "must"] = "auto"
    evaluation: Literal["quick", "full"] | None = "quick"
    max_skipped: float = 0.01

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = coerced(field.name, getattr(self, field.name), hints[field.name])
            object.__setattr__(self, field.name, value)
        self._check_ranges()

    def _check_ranges(self) -> None:
        for name in (
            "forget_weight",
            "retain_weight",
            "consistency_weight",
            "anchor_weight",
            "weight_decay",
            "warmup_steps",
            "seed",
            "num_workers",
        ):
            _require(self, name, getattr(self, name) >= 0, "be 0 or more")
        for name in ("epochs", "batch_size", "forget_batch_size"):
            _require(self, name, getattr(self, name) >= 1, "be 1 or more")
        for name in ("max_steps", "micro_batch_size", "save_every"):
            value = getattr(self, name)
            _require(self, name, value is None or value >= 1, "be 1 or more, or None")
        _require(self, "lr", self.lr > 0, "be above 0")
        _require(self, "betas", all(0 <= beta < 1 for beta in self.betas), "lie in [0, 1)")
        clip = self.max_grad_norm
        _require(self, "max_grad_norm", clip is None or clip > 0, "be above 0, or None")
        _require(self, "max_skipped", 0 <= self.max_skipped <= 1, "lie in [0, 1]")
        if isinstance(self.floor, float):
            _require(self, "floor", -1 <= self.floor <= 1, "be a cosine in [-1, 1], 'auto' or None")
        tune = re.fullmatch(r"all|image|text|projections|last:[1-9]\d*", self.tune)
        _require(
            self,
            "tune",
            tune is not None,
            "be 'all', 'image', 'text', 'projections' or 'last:N' with N >= 1",
        )
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

    @classmethod
    def cliperase(cls, **overrides: Any) -> UnlearnConfig:
        """The paper's recipe as far as it is known, with `overrides`.

        Yang et al., CLIPErase, ACL 2025 (long.1469), as published descriptions report it: losses
        weighted 3, 1, 3, both encoders trained, Adam with betas (0.9, 0.98), lr 1e-6 (1e-8 on
        Flickr30K), batch 16, 20 epochs; no floor, no anchor, no augmentation and no clipping.
        Where the descriptions are silent the defaults of `UnlearnConfig` stand.
        """
        paper: dict[str, Any] = {
            "floor": None,
            "anchor_weight": 0.0,
            "forget_augment": False,
            "lr": 1e-6,
            "optimizer": "adam",
            "batch_size": 16,
            "forget_batch_size": 16,
            "max_grad_norm": None,
        }
        return cls(**_known_fields({**paper, **overrides}))

    @classmethod
    def from_yaml(cls, path: str | PathLike[str], **overrides: Any) -> UnlearnConfig:
        """Read a YAML mapping of fields; `overrides` win.

        Raises:
            InputError: the file is missing, is not a mapping, or names an unknown field.
        """
        import yaml

        file = Path(path)
        if not file.is_file():
            raise InputError(f"config: no file {file}. Give the path of a YAML file.")
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise InputError(f"config: {file} is not valid YAML: {error}") from error
        if not isinstance(values, Mapping):
            raise InputError(
                f"config: {file} holds a {type(values).__name__}, expected a mapping "
                "of field names to values, one `name: value` a line."
            )
        return cls(**_known_fields({**values, **overrides}))

    def replace(self, **overrides: Any) -> UnlearnConfig:
        """A copy with some fields changed.

        Raises:
            InputError: an override is not a field.
        """
        return dataclasses.replace(self, **_known_fields(overrides))

    def to_dict(self) -> dict[str, Any]:
        """Fields as plain values, fit for JSON and YAML."""
        values = dataclasses.asdict(self)
        values["betas"] = list(self.betas)
        return values


def field_names() -> tuple[str, ...]:
    """Names of all fields, in the order of their definition."""
    return tuple(field.name for field in dataclasses.fields(UnlearnConfig))


def _known_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    import difflib

    known = field_names()
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=3)
            hint = (
                f" Did you mean {' or '.join(close)}?" if close else f" Known: {', '.join(known)}."
            )
            raise InputError(f"unknown option `{name}`.{hint}")
    return dict(values)


def _require(config: UnlearnConfig, name: str, holds: bool, must: str) -> None:
    if not holds:
        raise InputError(f"{name}={getattr(config, name)!r} must {must}.")


def coerced(name: str, value: Any, hint: Any) -> Any:
    """`value` as `hint` asks, so that YAML's `1e-5` (a string) and ints for floats are accepted."""
    for option in _options(hint):
        accepted, result = _as_option(value, option)
        if accepted:
            return result
    expected = " or ".join(_spelled(option) for option in _options(hint))
    raise InputError(f"{name}={value!r} is not usable: expected {expected}.")


def _options(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) is Literal:
        return tuple(get_args(hint))
    if get_origin(hint) is tuple or get_origin(hint) is dict:
        return (hint,)
    parts = get_args(hint)
    if not parts:
        return (hint,)
    return tuple(option for part in parts for option in _options(part))


def _as_option(value: Any, option: Any) -> tuple[bool, Any]:
    if isinstance(option, str):
        return value == option, value
    if option is type(None):
        return value is None, None
    if option is bool:
        return isinstance(value, bool), value
    if option is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if option is float:
        return _as_float(value)
    if get_origin(option) is tuple:
        if isinstance(value, (list, tuple)) and len(value) == len(get_args(option)):
            floats = [_as_float(item) for item in value]
            return all(ok for ok, _ in floats), tuple(item for _, item in floats)
        return False, None
    if get_origin(option) is dict:
        return isinstance(value, Mapping), dict(value) if isinstance(value, Mapping) else None
    if option is str and isinstance(value, PathLike):
        return True, str(value)
    return isinstance(value, option), value


def _as_float(value: Any) -> tuple[bool, float]:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return False, 0.0
    try:
        number = float(value)
    except ValueError:
        return False, 0.0
    return math.isfinite(number), number


def _spelled(option: Any) -> str:
    if isinstance(option, str):
        return repr(option)
    if option is type(None):
        return "None (null in YAML)"
    if get_origin(option) is tuple:
        return f"{len(get_args(option))} numbers"
    if get_origin(option) is dict:
        return "a dict"
    return {"int": "a whole number", "float": "a finite number", "bool": "True or False"}.get(
        option.__name__, "text"
    )
