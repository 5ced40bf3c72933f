"""ZeRO-1, 2 and 3 by DeepSpeed: optimiser states, gradients and weights sharded over the ranks.

Of DeepSpeed's ways to take several backward passes a step, `coalesce_grad_reduction` is the one
that is exact at all three stages. It keeps the gradients of one's own micro-batches in full.

Its configuration is the user's JSON, completed from `UnlearnConfig`: values that are `"auto"` or
absent are filled in. One that contradicts the run's own settings is an error, since one of the two
would silently win.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterase.config import UnlearnConfig
from fasterase.errors import InputError, MissingExtraError, ResumeError, import_extra
from fasterase.models.dual_encoder import DualEncoder
from fasterase.models.forward import Features, Halfway, TowerForward
from fasterase.models.preprocessing import Tokens
from fasterase.parallel.engine import Engine, Step, TrainingState, as_json, is_number
from fasterase.parallel.ranks import Ranks

# It leaves out steps whose norm is not finite in fp32 too, and has `coalesce_grad_reduction`.
LEAST_VERSION = (0, 19, 8)
AUTO = "auto"
# Sections whose contents are the run's own.
_OURS = ("optimizer", "scheduler", "fp16", "bf16", "amp", "data_types")


def require_deepspeed() -> Any:
    """Import DeepSpeed, quietly; on a machine without a GPU it runs on the CPU.

    Raises `MissingExtraError` if it is not installed, or older than what is needed.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed: Any = import_extra("deepspeed", "scale", "deepspeed")
    found = tuple(int(part) for part in deepspeed.__version__.split("+")[0].split(".")[:3])
    if found < LEAST_VERSION:
        raise MissingExtraError(
            f"deepspeed {deepspeed.__version__} is too old: {'.'.join(map(str, LEAST_VERSION))} is "
            "needed. Install it with: pip install 'fasterase[scale]'"
        )
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Collectives in shared memory, for CPUs. Compiling them takes a minute, and a build that is
    # killed leaves a lock for which every later run would wait.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Of DeepSpeed's calls of PyTorch, in every step.
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated")
    return deepspeed


class ZeroEngine(Engine):
    """A DeepSpeed engine around a copy of the model, whose weights go back to it at the end.

    DeepSpeed rearranges the parameters of what it wraps, so the caller's module is left alone; on a
    GPU it waits in the memory of the host.
    """

    def __init__(
        self,
        forward: TowerForward,  # of the copy
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        *,
        config: Mapping[str, Any],  # DeepSpeed's, complete
        model: DualEncoder,  # the caller's
        ranks: Ranks,
    ) -> None:
        super().__init__(forward, parameters, optimizer, ranks=ranks)
        self._deepspeed = require_deepspeed()
        self._stage = zero_stage(config)
        self.in_lockstep = self._stage == 3
        self._model = model
        self._shapes = {name: each.shape for name, each in self._parameters.items()}
        for each in forward.parameters():
            if each.ndim == 0:  # logit_scale in most libraries; DeepSpeed cannot send it
                each.data = each.data.reshape(1)
        self._layout = f"ZeRO stage {self._stage}, number of ranks {ranks.world_size}"
        model.module.to("cpu")
        if ranks.world_size == 1:  # a launcher would have set it; DeepSpeed reads it in steps too
            os.environ.setdefault("LOCAL_RANK", "0")
        self._engine, self._optimizer, *_ = self._deepspeed.initialize(
            model=forward, optimizer=optimizer, config=dict(config), dist_init_required=False
        )

    def __call__(
        self, pixels: Tensor | Halfway | None = None, tokens: Tokens | Halfway | None = None
    ) -> Features:
        return Features(*self._engine(pixels, tokens))

    @contextlib.contextmanager
    def one_reduction(self) -> Iterator[None]:
        with self._engine.coalesce_grad_reduction():
            yield

    def step(self, lr: float, *, max_grad_norm: float, loss: Sequence[Tensor]) -> Step:
        self._set_lr(lr)
        # It leaves out a step whose gradients are not finite, and these are if the loss is.
        self._engine.step()
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), device=self.device)
        terms, grad_norm = self._read(loss, norm)
        is_finite = all(map(math.isfinite, (*terms, grad_norm)))
        return Step(terms, grad_norm, is_finite and self._engine.was_step_applied())

    def weights(self) -> dict[str, Tensor]:
        copies: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            with self._whole(parameter):
                if self._ranks.is_first:
                    whole = parameter.detach().reshape(self._shapes[name])
                    copies[name] = whole.to("cpu", copy=True)
        return copies

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                with self._whole(parameter, changed=True):
                    if self._ranks.is_first:
                        parameter.copy_(weights[name].reshape(parameter.shape))
                    if self._stage < 3:
                        self._ranks.broadcast_tensor(parameter.data)
                with self._whole(parameter):
                    loaded = parameter.detach().float().clone()
                # Also the fp32 shard of it, which checkpoints hold.
                self._set_own(parameter, loaded)

    def state(self) -> TrainingState:
        tensors: dict[str, Tensor] = {}
        states = self._states()
        keys = _resharded_keys(states)
        for place, (name, parameter) in enumerate(self._parameters.items()):
            # Assembled by all ranks, kept by the one that writes it.
            whole = {name: self._deepspeed.utils.safe_get_full_fp32_param(parameter)}
            for key in keys or ():
                whole[f"{key} of {name}"] = self._deepspeed.utils.safe_get_full_optimizer_state(
                    parameter, key
                )
            if place % self._ranks.world_size == self._ranks.rank:
                shape = self._shapes[name]
                tensors |= {each: value.reshape(shape).cpu() for each, value in whole.items()}
        if keys is None:
            for name, value in self._quantised(states).items():
                tensors[name] = value.detach().cpu().clone()
        # The same in every shard: how many steps were taken.
        first = next(iter(states), {})
        counts = {key: as_json(value) for key, value in first.items() if is_number(value)}
        numbers = dict.fromkeys(self._parameters, counts) if counts else {}
        layout = self._layout if keys is None else ""
        return TrainingState(tensors, {"optimizer": numbers}, layout)

    def restore(self, state: TrainingState) -> None:
        if state.layout and state.layout != self._layout:
            raise ResumeError(
                "output_dir: the optimiser states in its checkpoint are quantised shards of "
                f"{state.layout}, and this run has {self._layout}. They cannot be laid "
                "out anew: resume with the same numbers, or start afresh with resume='never'."
            )
        states = self._restore_numbers(state.scalars["optimizer"])
        keys = _resharded_keys(states)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                weight = state.tensors[name].to(self.device)
                with self._whole(parameter, changed=True):
                    parameter.copy_(weight.reshape(parameter.shape))
                # Also the fp32 shard of it that the optimiser steps on.
                self._set_own(parameter, weight)
                for key in keys or ():
                    moment = state.tensors[f"{key} of {name}"].to(self.device)
                    self._set_own(parameter, moment, key)
        if keys is None:
            for name, value in self._quantised(states).items():
                value.copy_(state.tensors[name])

    def export(self) -> None:
        theirs = dict(self._model.module.named_parameters())
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                with self._whole(parameter):
                    theirs[name].copy_(parameter.reshape(self._shapes[name]))
        self._engine.destroy()
        self._model.module.to(self.device)

    @contextlib.contextmanager
    def _whole(self, parameter: nn.Parameter, *, changed: bool = False) -> Iterator[None]:
        """Put a sharded parameter together for the block; take rank 0's changes if asked."""
        if self._stage < 3:
            yield
            return
        modifier = 0 if changed else None
        with self._deepspeed.zero.GatheredParameters([parameter], modifier_rank=modifier):
            yield

    def _set_own(self, parameter: nn.Parameter, value: Tensor, key: str | None = None) -> None:
        """Set this rank's shard of a weight, or of an optimiser state of it by its `key`."""
        utils = self._deepspeed.utils
        set_weight = utils.safe_set_full_fp32_param
        set_state = utils.safe_set_full_optimizer_state
        if self._stage == 3:
            # Rows of equal length, the last one padded with zeros.
            padded = F.pad(value.reshape(-1), (0, -value.numel() % self._ranks.world_size))
            value = padded.chunk(self._ranks.world_size)[self._ranks.rank]
            set_weight = utils.safe_set_local_fp32_param
            set_state = utils.safe_set_local_optimizer_state
        if key is None:
            set_weight(parameter, value)
        else:
            set_state(parameter, value, key)

    def _restore_numbers(self, numbers: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Create the optimiser's states if there were any, set their numbers, and return them."""
        if numbers:
            self._create_states()
        states = self._states()
        for values in states:
            for key, value in next(iter(numbers.values())).items():
                if isinstance(values[key], Tensor):
                    values[key].fill_(value)
                else:
                    values[key] = type(values[key])(value)
        return states

    def _states(self) -> list[dict[str, Any]]:
        """Return the states of this rank's shards, in the order in which they were created."""
        states = self._optimizer.optimizer.state
        if self._stage < 3:
            # DeepSpeed tells parameters where their states are after the first group's first step,
            # when the other groups have none yet.
            for weights, shard in zip(
                self._optimizer.bit16_groups,
                self._optimizer.single_partition_of_fp32_groups,
                strict=True,
            ):
                self._deepspeed.utils.lazy_init_hp_params_optimizer_state(weights, shard, states)
        return list(states.values())

    def _quantised(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the states of this rank's shards by name."""
        return {
            f"{key} of shard {place} on rank {self._ranks.rank}": value
            for place, values in enumerate(states)
            for key, value in values.items()
            if not is_number(value)
        }

    def _create_states(self) -> None:
        """Make the optimiser create its states, by a step that changes no weight."""
        height, width = self._model.image_size
        pixels = torch.zeros(1, 3, height, width, device=self.device)
        ids = torch.zeros(1, self._model.context_length, dtype=torch.long, device=self.device)
        with self.one_reduction():
            found = [each for each in self(pixels, Tokens(ids)) if each is not None]
            outputs = [each for each in found if each.requires_grad]
            torch.autograd.backward(outputs, [torch.zeros_like(each) for each in outputs])
        self.step(0.0, max_grad_norm=math.inf, loss=())


def _resharded_keys(states: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """Return the kinds of states that can be laid out anew: fp32 moments, one number a weight.

    None if there are others: quantised ones belong to the shard that they were computed for.
    """
    kinds = {
        key: value.dtype
        for values in states
        for key, value in values.items()
        if not is_number(value)
    }
    is_exact = "qmap1" not in kinds and all(each == torch.float32 for each in kinds.values())
    return sorted(kinds) if is_exact else None


def read_deepspeed(given: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration: a dict itself, or read from a file or one that ships (`"zero1"`).

    Raises:
        InputError: there is no such file, or it is not a JSON object with a known ZeRO stage.
    """
    config = dict(given) if isinstance(given, Mapping) else _read_json(given)
    stage = _find(config, "zero_optimization.stage", 0)
    if stage not in (0, 1, 2, 3):
        raise InputError(
            f"deepspeed: zero_optimization.stage is {stage!r}. Use 1, 2 or 3, or 0 for plain data "
            "parallelism."
        )
    return config


def zero_stage(config: Mapping[str, Any]) -> int:
    """Return the ZeRO stage of a configuration that `read_deepspeed` returned."""
    return int(_find(config, "zero_optimization.stage", 0))


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
    zero = given.get("zero_optimization", {})
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
    shipped = files("fasterase.parallel") / "configs"
    path: Any = Path(given).expanduser()
    if not path.is_file():
        path = shipped / f"{given.removesuffix('.json')}.json"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        names = sorted(each.name for each in shipped.iterdir())
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


def _find(config: Mapping[str, Any], path: str, default: object = None) -> Any:
    """Return the value at a path such as `"optimizer.params.lr"`, or the default."""
    *sections, name = path.split(".")
    for each in sections:
        config = config.get(each, {})
        if not isinstance(config, Mapping):
            raise InputError(f"deepspeed: {each} must be an object; found {config!r}.")
    return config.get(name, default)


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
        found = _find(given, key)
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
        if _find(given, f"{name}.enabled") is True:
            raise InputError(
                f"deepspeed: {name}.enabled would add up gradients in half precision. Remove it "
                "from the JSON; precision='bf16' runs matrix products in bf16 over fp32 weights."
            )
