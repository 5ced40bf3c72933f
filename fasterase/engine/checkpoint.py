"""Checkpoints of a run: written atomically, the last two kept, other runs' checkpoints refused."""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from fasterase.config import FREE, field_names
from fasterase.errors import ResumeError
from fasterase.files import (
    crc32,
    flush_to_disk,
    remove_leftovers,
    replace_folder,
    reporting_full_disk,
)
from fasterase.parallel.engine import TrainingState
from fasterase.parallel.ranks import ALONE, Ranks

log = logging.getLogger(__name__)

# Entries of a run's identity that are digests: messages do not print their values.
DIGESTS = frozenset({"model weights", "forget pairs", "retain pairs"})
KEPT = 2
MANIFEST, BEST = "state.json", "best.safetensors"
# Fields of a checkpoint that its manifest holds as they are.
PLAIN = ("step", "non_finite", "pacing", "seconds", "emphasised")


@dataclass(frozen=True)
class Checkpoint:
    """State after `step` steps: all that is needed to continue as if nothing had happened."""

    step: int
    training: TrainingState  # weights and optimiser
    non_finite: int  # consecutive steps that were not applied
    pacing: dict[str, Any]
    best: dict[str, Tensor]  # weights, where the pacing holds them
    seconds: float  # of the run so far
    # Retain rows that steps draw more often: made again, their features may round differently.
    emphasised: Sequence[int] = ()


class CheckpointFolder:
    """`output_dir/checkpoints` of one run, identified by its config, model and data.

    A checkpoint is a folder. Each rank writes a shard of the tensors; the first one writes the
    manifest `state.json`, which holds their checksums and its own, last, and then gives the folder
    its name. Another number of ranks can read them. To resume, all of `identity` must be equal but
    the fields of the config that may change.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], ranks: Ranks = ALONE) -> None:
        self.folder = folder
        # Through JSON, so that tuples and numbers compare as they will be read back.
        self.identity = json.loads(
            json.dumps({k: v for k, v in identity.items() if k not in field_names(FREE)})
        )
        self._ranks = ranks

    def save(self, checkpoint: Checkpoint) -> None:
        """Write `checkpoint`, and remove all but the last two up to it.

        Those of later steps are damaged ones, which the run went back behind.

        Raises:
            DiskFullError: there was no room; the checkpoints before it are kept.
        """
        ranks, target = self._ranks, self.folder / f"step-{checkpoint.step:09d}"
        if ranks.is_first:
            remove_leftovers(self.folder)
        tensors = dict(checkpoint.training.tensors)
        needed = sum(tensor.nbytes for tensor in (*tensors.values(), *checkpoint.best.values()))
        with (
            ranks.raising_together(),
            ranks.first_enters(lambda: replace_folder(target, sync=True, size_bytes=needed)) as new,
        ):
            full_disk = reporting_full_disk(new, target=target, size_bytes=needed)
            with ranks.raising_together(), full_disk:
                shard = new / f"shard-{ranks.rank + 1:05d}-of-{ranks.world_size:05d}.safetensors"
                save_file(tensors, shard)
                flush_to_disk(shard)
                checksum = shard.name, crc32(shard)
            checksums = dict(ranks.gather_objects(checksum))
            if ranks.is_first:
                self._write_manifest(new, checkpoint, checksums)
        if ranks.is_first:
            for later in (path for path in self._steps() if path > target):
                shutil.rmtree(later)
            self._remove_old()

    def _write_manifest(self, new: Path, checkpoint: Checkpoint, checksums: dict[str, int]) -> None:
        if checkpoint.best:
            save_file(checkpoint.best, new / BEST)
            checksums[BEST] = crc32(new / BEST)
        state = {
            **{name: getattr(checkpoint, name) for name in PLAIN},
            "training": checkpoint.training.scalars,
            "layout": checkpoint.training.layout,
            "checksums": checksums,
            "identity": self.identity,
        }
        text = json.dumps(state | {"checksum": _checksum(state)}, indent=1)
        (new / MANIFEST).write_text(text, encoding="utf-8")

    def clear(self) -> None:
        """Remove the checkpoints of an earlier run."""
        if self._ranks.is_first:
            shutil.rmtree(self.folder, ignore_errors=True)

    def load(self, resume: str) -> Checkpoint | None:
        """Return the last readable checkpoint; None if there is none, or for `resume="never"`.

        Raises:
            ResumeError: it is of another run; or none of several can be read; or `resume="must"`
                and there is none.
        """
        if resume == "never":
            return None
        path = self._ranks.on_first(lambda: self._find_readable(resume))
        if path is None:
            return None
        state = _read_manifest(path)
        # Mapped into memory: a rank reads those that it uses.
        tensors = {name: load_file(path / name) for name in state["checksums"]}
        best = tensors.pop(BEST, {})
        merged = dict(ChainMap(*tensors.values()))
        training = TrainingState(merged, state["training"], state["layout"])
        plain = {name: state[name] for name in PLAIN if name in state}
        return Checkpoint(training=training, best=best, **plain)

    def _find_readable(self, resume: str) -> Path | None:
        self._remove_old()
        found = self._steps()
        for path in reversed(found):
            try:
                state = _read_manifest(path)
                self._check_identity(state["identity"])
                for name, checksum in state["checksums"].items():
                    if crc32(path / name) != checksum:
                        raise ValueError(f"{name} is damaged")
                return path
            except ResumeError:
                raise
            # Damaged files make the readers raise errors of many kinds.
            except Exception as error:
                log.warning("The checkpoint %s cannot be read (%s).", path, error)
        if found:
            raise ResumeError(
                f"output_dir: none of the checkpoints in {self.folder} can be read. "
                "Start afresh with resume='never', or choose another output_dir."
            )
        if resume == "must":
            raise ResumeError(
                f"resume='must', but {self.folder} holds no checkpoint. "
                "Give the output_dir of the interrupted run, or resume='auto'."
            )
        return None

    def _steps(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))

    def _remove_old(self) -> None:
        for old in self._steps()[:-KEPT]:
            shutil.rmtree(old)

    def _check_identity(self, found: Mapping[str, Any]) -> None:
        changed = [
            f"the {name} differ"
            if name in DIGESTS
            else f"{name} was {found.get(name)!r}, now {self.identity.get(name)!r}"
            for name in sorted(set(found) | set(self.identity))
            if found.get(name) != self.identity.get(name)
        ]
        if changed:
            raise ResumeError(
                f"output_dir: {self.folder.parent} holds the checkpoint of another run "
                f"({'; '.join(changed)}). Continue with the config, model and data of that run, "
                "choose another output_dir, or start afresh with resume='never'."
            )


def _read_manifest(path: Path) -> dict[str, Any]:
    """Return what `state.json` holds; an error of any kind if it is damaged."""
    state = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    if state.pop("checksum") != _checksum(state):
        raise ValueError(f"{MANIFEST} is damaged")
    return state


def _checksum(state: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(state).encode())
