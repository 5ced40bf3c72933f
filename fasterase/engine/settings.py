"""Settings that cannot be honoured on this machine, refused before anything is touched."""

from __future__ import annotations

import os

from fasterase.config import UnlearnConfig
from fasterase.engine.optim import EIGHT_BIT, bitsandbytes_for
from fasterase.errors import InputError, ResumeError
from fasterase.ops.contrastive.backends import choose


def check_environment(settings: UnlearnConfig) -> None:
    """Refuse what is not there, and a run over processes that would each train on its own.

    Raises:
        InputError: `deepspeed` is set, or a launcher started more than one process; `backend` is
            not available; `resume="must"` without an `output_dir`.
        MissingExtraError: an 8-bit optimiser without bitsandbytes.
    """
    choose(settings.backend)
    if settings.optimizer in EIGHT_BIT:
        bitsandbytes_for(settings.optimizer)
    if settings.resume == "must" and settings.output_dir is None:
        raise ResumeError(
            "resume='must' without output_dir: a run goes on from the checkpoints in its "
            "output_dir. Give the output_dir of the interrupted run, or resume='auto'."
        )
    if settings.deepspeed is not None:
        raise InputError(
            "deepspeed is set, but this version trains in one process. Leave it None; "
            "micro_batch_size bounds memory at any batch_size."
        )
    world_size = int(os.environ.get("WORLD_SIZE") or 1)
    if world_size > 1:
        raise InputError(
            f"WORLD_SIZE={world_size}: this version trains in one process. "
            "Start it without torchrun or the deepspeed launcher."
        )
