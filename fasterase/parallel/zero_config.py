"""DeepSpeed's configuration: the user's JSON, completed from `UnlearnConfig` and checked by it.

Values that are `"auto"` or absent are filled in. A value that contradicts the run's own settings is
an error, since one of the two would silently win.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from fasterase.config import UnlearnConfig
from fasterase.errors import InputError

AUTO = "auto"
# Sections whose contents are the run's own.
_OURS = ("optimizer", "scheduler", "fp16", "bf16", "amp", "data_types")


def read_deepspeed(given: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration as a dict, from a file, the name of one that ships, or a dict.

    Args:
        given: the path of a JSON file; `"zero1"`, `"zero2"`, `"zero3"` or `"zero3_offload"` (with
            or without `.json`); or the configuration itself.

    Raises:
        InputError: there is no such file, or it is not a JSON object with a known ZeRO stage.
    """
    config = dict(given) if isinstance(given, Mapping) else _read_json(given)
    stage = _section(config, "zero_optimization").get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise InputError(
            f"deepspeed: zero_optimization.stage is {stage!r}. Use 1, 2 or 3, or 0 for plain data "
            "parallelism."
        )
    return config


def zero_stage(config: Mapping[str, Any]) -> int:
    """Return the ZeRO stage of a configuration that `read_deepspeed` returned."""
    return int(_section(config, "zero_optimization").get("stage", 0))


def complete(run: UnlearnConfig, *, precision: str, world_size: int) -> dict[str, Any]:
    """Return what DeepSpeed is given: `run.deepspeed` with what the run decides filled in.

    Batches are the run's: DeepSpeed sees one step a step. Weights stay fp32 and matrix products
    run in `precision` by `torch_autocast`; its own `bf16` and `fp16` modes would add up the
    gradients of micro-batches in half precision.

    Raises:
        InputError: a value contradicts the run's; names both. Or `fp16`, which has no loss scaling
            here.
    """
    assert run.deepspeed is not None
    given = read_deepspeed(run.deepspeed)
    _check_settings(given, run, precision, world_size)
    _check_modes(given, precision)
    zero = _section(given, "zero_optimization")
    return {name: value for name, value in given.items() if name not in _OURS} | {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": run.max_grad_norm or 0.0,
        "torch_autocast": {
            "enabled": precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        # The optimiser is the run's own object, bitsandbytes' included.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": given.get("steps_per_print", 10**9),
        "zero_optimization": {name: value for name, value in zero.items() if value != AUTO},
    }


def _read_json(given: str) -> dict[str, Any]:
    shipped = files("fasterase.parallel") / "configs" / f"{given.removesuffix('.json')}.json"
    path = Path(given).expanduser()
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else shipped.read_text("utf-8")
    except OSError as error:
        names = sorted(each.name for each in (files("fasterase.parallel") / "configs").iterdir())
        raise InputError(
            f"deepspeed: no file {given}. Give the path of DeepSpeed's JSON, or one of those that "
            f"ship with fasterase: {', '.join(names)}."
        ) from error
    try:
        config = json.loads(text)
    except ValueError as error:
        raise InputError(f"deepspeed: {given} is not valid JSON ({error}).") from error
    if not isinstance(config, dict):
        raise InputError(f"deepspeed: {given} holds no JSON object, but {type(config).__name__}.")
    return config


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name, {})
    if not isinstance(found, Mapping):
        raise InputError(f"deepspeed: {name} must be an object; found {found!r}.")
    return found


def _check_settings(
    given: Mapping[str, Any], run: UnlearnConfig, precision: str, world_size: int
) -> None:
    """Refuse values of the JSON that differ from the run's own."""
    pairs = run.batch_size + run.forget_batch_size
    micro = run.micro_batch_size or -(-pairs // world_size)
    for key, own, option in (
        ("train_batch_size", pairs, "batch_size + forget_batch_size"),
        ("train_micro_batch_size_per_gpu", micro, "micro_batch_size"),
        ("gradient_accumulation_steps", 1, "what fasterase needs (see micro_batch_size)"),
        ("gradient_clipping", run.max_grad_norm or 0.0, "max_grad_norm"),
        ("optimizer.type", run.optimizer, "optimizer"),
        ("optimizer.params.lr", run.lr, "lr"),
        ("optimizer.params.betas", run.betas, "betas"),
        ("optimizer.params.weight_decay", run.weight_decay, "weight_decay"),
        ("torch_autocast.enabled", precision == "bf16", f"bf16 by precision={precision!r}"),
    ):
        *sections, name = key.split(".")
        section = given
        for each in sections:
            section = _section(section, each)
        found = section.get(name)
        if isinstance(found, str):
            found = found.lower()  # DeepSpeed writes "AdamW"
        elif isinstance(found, list):
            found = tuple(found)
        if found not in (None, AUTO, own):
            raise InputError(
                f"deepspeed: {key} is {found!r}, but {option} is {own!r}. Make them equal, or "
                'write "auto" in the JSON.'
            )


def _check_modes(given: Mapping[str, Any], precision: str) -> None:
    """Refuse what would take a part of the training out of the run's hands."""
    if given.get("scheduler") not in (None, AUTO, {}):
        raise InputError(
            "deepspeed: a scheduler is given, but fasterase sets the learning rate itself. Remove "
            "it from the JSON, and use lr, schedule and warmup_steps."
        )
    if precision == "fp16":
        raise InputError(
            "precision='fp16' does not go with deepspeed: its loss scaling would be DeepSpeed's. "
            "Use 'bf16' or 'fp32', or torchrun without deepspeed."
        )
    for name in ("fp16", "bf16", "amp"):
        if _section(given, name).get("enabled") is True:
            raise InputError(
                f"deepspeed: {name}.enabled would add up gradients in half precision. Remove it "
                "from the JSON; precision='bf16' runs matrix products in bf16 over fp32 weights."
            )
