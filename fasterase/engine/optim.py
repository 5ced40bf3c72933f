"""The trained parameters, the optimiser over them, and the engine that holds both."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fasterase.config import UnlearnConfig
from fasterase.engine.job import Job
from fasterase.errors import InputError, import_extra
from fasterase.models.dual_encoder import DualEncoder
from fasterase.models.forward import TowerForward
from fasterase.parallel.engine import Engine
from fasterase.parallel.zero import ZeroEngine, complete, read_deepspeed, zero_stage

# Option values -> bitsandbytes classes.
EIGHT_BIT = {
    "adamw8bit": "AdamW8bit",
    "paged_adamw8bit": "PagedAdamW8bit",
    "lion8bit": "Lion8bit",
}
# bitsandbytes keeps 32 bits for smaller tensors. Once DeepSpeed has flattened a group into one
# tensor it can no longer tell, so the groups are made with the same limit.
_SMALLEST_QUANTISED = 4096


@dataclass(frozen=True)
class Trained:
    """Names of the trained parameters, chosen before anything wraps the model or shards it."""

    decayed: tuple[str, ...]  # those with weight decay: matrices
    # Gains, biases, class tokens and logit_scale (which some libraries keep as a vector) stay where
    # the data puts them; pulling them to zero changes the function, not its complexity.
    undecayed: tuple[str, ...]
    # Those whose optimiser state may have 8 bits: large weights of linear maps and convolutions.
    quantisable: frozenset[str]
    image: bool  # whether any of the tower is trained
    text: bool
    scale: bool
    overwritten: str | None = None  # changed before the first step alone; kept with the others

    @classmethod
    def choose(cls, model: DualEncoder, tune: str, *, logit_scale: bool) -> Trained:
        """Choose what `tune` names, and logit_scale if asked, without what the caller has frozen.

        Raises:
            InputError: see `DualEncoder.trainable`; or logit_scale is asked for and frozen.
        """
        chosen = dict(model.trainable(tune))
        if logit_scale:
            if not model.logit_scale.requires_grad:
                raise InputError(
                    "train_logit_scale: logit_scale is frozen (requires_grad=False). Unfreeze it "
                    "with requires_grad_(True), or leave train_logit_scale False"
                )
            named = model.module.named_parameters()
            chosen |= {name: each for name, each in named if each is model.logit_scale}
        decayed = [n for n, p in chosen.items() if p.ndim >= 2 and not n.endswith("logit_scale")]
        return cls(
            decayed=tuple(decayed),
            undecayed=tuple(name for name in chosen if name not in decayed),
            quantisable=frozenset(
                name for name in decayed if _is_quantisable(model.module, name, chosen[name])
            ),
            image=any(name in chosen for name, _ in model.selected("image")),
            text=any(name in chosen for name, _ in model.selected("text")),
            scale=logit_scale,
        )

    @property
    def names(self) -> set[str]:
        return {*self.decayed, *self.undecayed}

    def parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Return the trained parameters of `module` by name, in its own order."""
        names = self.names
        return {name: each for name, each in module.named_parameters() if name in names}


def build_optimizer(
    module: nn.Module,
    trained: Trained,
    *,
    name: str,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.Optimizer:
    """Return the optimiser over the trained parameters of `module`.

    It steps on its own, or inside DeepSpeed, which may flatten and shard its groups.

    Raises:
        MissingExtraError: an 8-bit optimiser without bitsandbytes.
    """
    eight_bit = name in EIGHT_BIT
    quantised = trained.quantisable if eight_bit else frozenset()
    parameters = trained.parameters(module)
    groups: list[dict[str, Any]] = [
        {
            "params": [parameters[each] for each in names],
            "weight_decay": decay,
            **({"optim_bits": bits} if eight_bit else {}),
        }
        for names, decay, bits in (
            ([each for each in trained.decayed if each in quantised], weight_decay, 8),
            ([each for each in trained.decayed if each not in quantised], weight_decay, 32),
            (trained.undecayed, 0.0, 32),
        )
        if names
    ]
    kind: Any = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}.get(name)
    if eight_bit:
        kind = _with_bits_of_group(getattr(require_bitsandbytes(name).optim, EIGHT_BIT[name]))
    return kind(groups, lr=lr, betas=betas)


def _is_quantisable(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    path, _, own = name.rpartition(".")
    is_table = isinstance(module.get_submodule(path), nn.Embedding)
    # Projections are bare parameters in some libraries: `proj`, `text_projection`.
    is_product = own.endswith(("weight", "proj", "projection")) and not is_table
    return is_product and parameter.ndim >= 2 and parameter.numel() >= _SMALLEST_QUANTISED


def _with_bits_of_group(kind: type[torch.optim.Optimizer]) -> Any:
    """Return a subclass of a bitsandbytes optimiser that reads `optim_bits` off its groups.

    bitsandbytes has exceptions by the index of a parameter, which DeepSpeed loses: it steps one
    flattened group at a time.
    """

    class BitsOfGroup(kind):  # type: ignore[valid-type, misc]
        def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
            config = super().get_config(gindex, pindex, group)
            return {**config, "optim_bits": group["optim_bits"]}

    BitsOfGroup.__name__ = BitsOfGroup.__qualname__ = kind.__name__
    return BitsOfGroup


def require_bitsandbytes(optimizer: str) -> ModuleType:
    """Import the library behind the 8-bit optimisers, or raise `MissingExtraError`."""
    return import_extra("bitsandbytes", "scale", f"optimizer={optimizer!r}")


def shards(config: UnlearnConfig) -> bool:
    """Whether the run shards anything, so that the engine needs a model of its own."""
    return config.deepspeed is not None and zero_stage(read_deepspeed(config.deepspeed)) > 0


def build_engine(job: Job, trained: Trained, working: DualEncoder) -> Engine:
    """Return the engine of a job, whose model gets the result in the end.

    The `working` model, whose `requires_grad` and modes are set, is trained: the job's own, or a
    copy for DeepSpeed to take apart.

    Raises:
        InputError: DeepSpeed's configuration contradicts the run's.
    """
    config = job.config
    forward = TowerForward(
        working, precision=job.precision, image_trained=trained.image, text_trained=trained.text
    )
    parameters = trained.parameters(working.module)
    optimizer = build_optimizer(
        working.module,
        trained,
        name=config.optimizer,
        lr=0.0,  # the pacing sets it at each step
        betas=config.betas,
        weight_decay=config.weight_decay,
    )
    if working is job.model:
        named = working.module.named_parameters()
        return Engine(
            forward,
            parameters,
            optimizer,
            overwritten={name: each for name, each in named if name == trained.overwritten},
            moves_buffers=config.train_mode,
            ranks=job.ranks,
        )
    completed = complete(config, precision=job.precision, world_size=job.ranks.world_size)
    return ZeroEngine(
        forward, parameters, optimizer, config=completed, model=job.model, ranks=job.ranks
    )
