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
# Stages that shard something; stage 0 is plain data parallelism, which needs no DeepSpeed.
STAGES = (0, 1, 2, 3)
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
    if stage not in STAGES:
        raise InputError(
            f"deepspeed: zero_optimization.stage is {stage!r}. Use 1, 2 or 3, or 0 for plain data "
            "parallelism."
        )
    return config


def zero_stage(config: Mapping[str, Any]) -> int:
    """Return the ZeRO stage of a configuration that `read_deepspeed` returned."""
    return int(_section(config, "zero_optimization").get("stage", 0))


def complete(
    given: Mapping[str, Any], run: UnlearnConfig, *, precision: str, world_size: int
) -> dict[str, Any]:
    """Return what DeepSpeed is given: `given` with what the run decides filled in.

    Batches are the run's: DeepSpeed sees one step a step. Weights stay fp32 and matrix products
    run in `precision` by `torch_autocast`; its own `bf16` and `fp16` modes would add up the
    gradients of micro-batches in half precision.

    Raises:
        InputError: a value contradicts the run's; names both. Or `fp16`, which has no loss scaling
            here.
    """
    config = {name: value for name, value in given.items() if name not in _OURS}
    _check_batches(given, run, world_size)
    _check_optimizer(given, run)
    _check_precision(given, precision)
    clipping = run.max_grad_norm or 0.0
    _check("gradient_clipping", given.get("gradient_clipping"), clipping, "max_grad_norm")
    config |= {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clipping,
        "torch_autocast": {
            "enabled": precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        # The optimiser is the run's own object, bitsandbytes' included.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": given.get("steps_per_print", 10**9),
        "zero_optimization": {
            name: value
            for name, value in _section(given, "zero_optimization").items()
            if value != AUTO
        },
    }
    return config


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


def _check(key: str, found: Any, own: Any, option: str) -> None:
    """Refuse a value of the JSON that differs from the run's own."""
    if found is None or found == AUTO:
        return
    alike = list(found) == list(own) if isinstance(own, tuple) else found == own
    if not alike:
        raise InputError(
            f"deepspeed: {key} is {found!r}, but {option} is {own!r}. Make them equal, or write "
            '"auto" in the JSON.'
        )


def _check_batches(given: Mapping[str, Any], run: UnlearnConfig, world_size: int) -> None:
    pairs = run.batch_size + run.forget_batch_size
    micro = run.micro_batch_size or -(-pairs // world_size)
    for key, own, option in (
        ("train_batch_size", pairs, "batch_size + forget_batch_size"),
        ("train_micro_batch_size_per_gpu", micro, "micro_batch_size"),
        ("gradient_accumulation_steps", 1, "what fasterase needs (see micro_batch_size)"),
    ):
        _check(key, given.get(key), own, option)


def _check_optimizer(given: Mapping[str, Any], run: UnlearnConfig) -> None:
    optimizer = _section(given, "optimizer")
    kind = optimizer.get("type")
    if kind is not None and kind != AUTO:
        _check("optimizer.type", str(kind).lower(), run.optimizer, "optimizer")
    own = {"lr": run.lr, "betas": run.betas, "weight_decay": run.weight_decay}
    for name, value in _section(optimizer, "params").items():
        if name in own:
            _check(f"optimizer.params.{name}", value, own[name], name)
    if given.get("scheduler") not in (None, AUTO, {}):
        raise InputError(
            "deepspeed: a scheduler is given, but fasterase sets the learning rate itself. Remove "
            "it from the JSON, and use lr, schedule and warmup_steps."
        )


def _check_precision(given: Mapping[str, Any], precision: str) -> None:
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
    autocast = _section(given, "torch_autocast").get("enabled")
    is_bf16 = precision == "bf16"
    _check("torch_autocast.enabled", autocast, is_bf16, f"bf16 by precision={precision!r}")
