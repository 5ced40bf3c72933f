"""What a run needs to begin: a machine that can do it, and ranks that agree on it."""

from __future__ import annotations

from collections.abc import Mapping

from torch.nn.modules.batchnorm import _BatchNorm

from fasterase.config import UnlearnConfig
from fasterase.engine.build_engine import shards
from fasterase.engine.optim import EIGHT_BIT, require_bitsandbytes
from fasterase.engine.trackers import require_tracker
from fasterase.errors import InputError, ResumeError
from fasterase.models.dual_encoder import DualEncoder
from fasterase.ops.contrastive.api import choose_backend
from fasterase.pairs.table import PairTable
from fasterase.parallel.ranks import Ranks
from fasterase.parallel.zero import require_deepspeed


def check_same(seen: Mapping[str, str], ranks: Ranks) -> None:
    """Refuse ranks that were given another model or other pairs than the first one."""
    everyone = ranks.gather_objects(seen)
    for rank, other in enumerate(everyone):
        differing = [name for name in seen if other[name] != everyone[0][name]]
        if differing:
            raise InputError(
                f"{' and '.join(differing)}: rank {rank} has others than rank 0. Every process "
                "must pass the same model (seed it before it is made, or load it) and the same "
                "pairs; the ranks divide each batch among themselves."
            )


def check_train_mode(model: DualEncoder, config: UnlearnConfig, ranks: Ranks) -> None:
    """Raise `InputError` for BatchNorm statistics that the ranks would take apart."""
    if not config.train_mode or ranks.world_size == 1:
        return
    if any(isinstance(part, _BatchNorm) for part in model.module.modules()):
        raise InputError(
            "train_mode=True with several processes: the BatchNorm statistics of each would be of "
            "its own pairs. Leave train_mode False, which freezes them, or use one process."
        )


def check_retain(retain: PairTable, config: UnlearnConfig) -> None:
    """Raise `InputError` for settings that an empty retain set leaves without an aim."""
    if len(retain):
        return
    if config.lr == "auto" or config.runs_until_forgotten or config.stop_when_forgotten:
        raise InputError(
            "`retain` is empty, so there is nothing to tell by whether the concept is forgotten, "
            "and what that costs. Give numbers for lr and epochs (or max_steps) and no "
            "stop_when_forgotten, or pairs to keep."
        )
    if not config.forget_weight:
        raise InputError(
            "`retain` is empty and forget_weight=0: nothing to train. Give pairs to keep, or a "
            "positive forget_weight."
        )


def check_steps_left(config: UnlearnConfig, total_steps: int, *, taken: int) -> None:
    """Raise `ResumeError` where the run in `output_dir` has taken more steps than are asked for."""
    if taken <= total_steps:
        return
    asked = f"max_steps={total_steps}"
    if config.max_steps is None:
        asked = f"epochs={config.epochs} ({total_steps} steps)"
    raise ResumeError(
        f"{asked}: the run in output_dir={config.output_dir!r} has taken {taken} steps already. "
        f"Give {taken} or more to continue it, choose another output_dir, or start afresh with "
        "resume='never'."
    )


def check_environment(config: UnlearnConfig) -> None:
    """Refuse options that this machine cannot honour, before anything is touched.

    Raises:
        InputError: `deepspeed` names no readable configuration; `backend` is not available;
            `resume="must"` without an `output_dir`.
        MissingExtraError: an 8-bit optimiser without bitsandbytes; `deepspeed` without DeepSpeed;
            `report_to` without its tracker.
    """
    choose_backend(config.backend)
    if config.optimizer in EIGHT_BIT:
        require_bitsandbytes(config.optimizer)
    require_tracker(config.report_to)
    if config.resume == "must" and config.output_dir is None:
        raise ResumeError(
            "resume='must' without output_dir: a run resumes from the checkpoints in its "
            "output_dir. Give the output_dir of the interrupted run, or resume='auto'."
        )
    if shards(config):
        require_deepspeed()


def identify(source: PairTable) -> str:
    """Return a string that identifies the set.

    It is the set's manifest, or only its size if it changes on every read.
    """
    return source.digest() if source.stable else f"{len(source)} pairs, changing"
