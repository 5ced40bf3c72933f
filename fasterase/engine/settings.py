"""Settings that this version cannot honour on this machine, refused before anything is touched."""

from __future__ import annotations

import os

from fasterase.config import UnlearnConfig
from fasterase.errors import InputError


def check_environment(settings: UnlearnConfig) -> None:
    """Refuse a run over several processes, which would train each rank on its own.

    Raises:
        InputError: `deepspeed` is set, or a launcher started more than one process.
    """
    if settings.deepspeed is not None:
        raise InputError(
            "deepspeed is set, but this version trains in one process. Leave it None; "
            "micro_batch_size bounds memory at any batch_size."
        )
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise InputError(
            f"WORLD_SIZE={world_size}: this version trains in one process. "
            "Start it without torchrun or the deepspeed launcher."
        )
