"""The fields of `UnlearnConfig` as keywords. Written by `python -m tools.overrides`."""

from __future__ import annotations

from os import PathLike
from typing import Any, Literal, TypedDict


class Overrides(TypedDict, total=False):
    """What `fasterase.unlearn` and `fasterase.plan` take as `**overrides`; see `UnlearnConfig`."""

    forget_weight: float
    retain_weight: float
    consistency_weight: float
    anchor_weight: float
    forget_loss: Literal["similarity", "contrastive"]
    floor: float | Literal["auto"] | None
    cross_weight: float | Literal["auto"]
    forget_augment: bool
    forget_words: bool | list[str]
    negatives: Literal["own", "joint"]
    epochs: int | Literal["auto"]
    max_steps: int | None
    max_damage: float | None
    batch_size: int
    forget_batch_size: int
    micro_batch_size: int | None
    thorough: bool
    stop_when_forgotten: bool
    lr: float | Literal["auto"]
    optimizer: Literal["adamw", "adam", "adamw8bit", "paged_adamw8bit", "lion8bit"]
    betas: tuple[float, float]
    weight_decay: float
    warmup_steps: int
    schedule: Literal["constant", "cosine"]
    max_grad_norm: float | None
    tune: str
    train_logit_scale: bool
    train_mode: bool
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    activation_checkpointing: bool
    prefix_cache: float | None
    backend: Literal["auto", "dense", "chunked", "cpu", "triton"]
    device: str | None
    deepspeed: str | PathLike[str] | dict[str, Any] | None
    seed: int
    num_workers: int | Literal["auto"]
    progress: bool
    reference_cache: str | PathLike[str] | None
    output_dir: str | PathLike[str] | None
    save_every: int | None
    resume: Literal["auto", "never", "must"]
    evaluation: Literal["quick", "full"] | None
    max_skipped: float
    remember_erased: bool
    report_to: Literal["tensorboard", "wandb"] | None
    rank_timeout: float
    erase: Literal["concept", "link"]
