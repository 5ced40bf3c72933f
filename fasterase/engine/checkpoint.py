"""Checkpoints of a run: written atomically, the last two kept, other runs' checkpoints refused."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fasterase.errors import ResumeError
from fasterase.files import remove_leftovers, replace_folder

log = logging.getLogger(__name__)

# Fields that a resumed run may change: how far it goes, and what does not change its weights (but
# for the last bits: `device` and `micro_batch_size`).
FREE_FIELDS = frozenset(
    {
        "epochs",
        "max_steps",
        "stop_when_forgotten",
        "micro_batch_size",
        "activation_checkpointing",
        "device",
        "num_workers",
        "progress",
        "reference_cache",
        "output_dir",
        "save_every",
        "resume",
        "evaluation",
        "max_skipped",
        "report_to",
    }
)
# Entries of a run's identity that are digests: messages do not print their values.
DIGESTS = frozenset({"model weights", "forget pairs", "retain pairs"})
KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """State after `step` steps: all that is needed to continue as if nothing had happened.

    Attributes:
        step: steps done.
        tensors: trained parameters by name, and buffers where training moves them.
        optimizer: its state dict.
        scaler: state dict of the loss scaling.
        non_finite: consecutive steps that were not applied.
        pacing: state of the pacing.
        best: the best weights so far, where the pacing keeps them.
        seconds: wall time of the run so far.
    """

    step: int
    tensors: dict[str, Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    non_finite: int
    pacing: dict[str, Any]
    best: dict[str, Tensor]
    seconds: float


class CheckpointFolder:
    """`output_dir/checkpoints` of one run, identified by its config, model and data.

    Args:
        folder: where the checkpoints are.
        identity: what must be equal to resume: the config's fields, the model's fingerprint, the
            manifests of forget and retain.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        # Through JSON, so that tuples and numbers compare as they will be read back.
        self.identity = json.loads(
            json.dumps({k: v for k, v in identity.items() if k not in FREE_FIELDS})
        )

    def save(self, checkpoint: Checkpoint) -> None:
        """Write `checkpoint` and remove all but the last two."""
        target = self.folder / f"step-{checkpoint.step:09d}"
        if target.is_dir():
            return
        remove_leftovers(self.folder)
        state = {
            "step": checkpoint.step,
            "non_finite": checkpoint.non_finite,
            "pacing": checkpoint.pacing,
            "seconds": checkpoint.seconds,
            "identity": self.identity,
        }
        with replace_folder(target, sync=True, size_bytes=_tensor_bytes(checkpoint)) as new:
            save_file(checkpoint.tensors, new / "weights.safetensors")
            if checkpoint.best:
                save_file(checkpoint.best, new / "best.safetensors")
            torch.save(
                {"optimizer": checkpoint.optimizer, "scaler": checkpoint.scaler},
                new / "optimizer.pt",
            )
            (new / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        self._remove_old()

    def clear(self) -> None:
        """Remove the checkpoints of an earlier run."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def load(self, resume: str, *, device: torch.device) -> Checkpoint | None:
        """Return the last readable checkpoint; None if there is none, or for `resume="never"`.

        Raises:
            ResumeError: it belongs to a run with another config, model or data; or none of several
                can be read; or `resume="must"` and there is none.
        """
        if resume == "never":
            return None
        self._remove_old()
        found = self._steps()
        for path in reversed(found):
            try:
                return self._read(path, device)
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
        return sorted(self.folder.glob("step-*")) if self.folder.is_dir() else []

    def _remove_old(self) -> None:
        for old in self._steps()[:-KEPT]:
            shutil.rmtree(old)

    def _read(self, path: Path, device: torch.device) -> Checkpoint:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        self._check_identity(state["identity"])
        saved = torch.load(path / "optimizer.pt", map_location=device, weights_only=True)
        best = path / "best.safetensors"
        return Checkpoint(
            step=state["step"],
            tensors=load_file(path / "weights.safetensors", device=str(device)),
            optimizer=saved["optimizer"],
            scaler=saved["scaler"],
            non_finite=state["non_finite"],
            pacing=state["pacing"],
            best=load_file(best) if best.is_file() else {},
            seconds=state["seconds"],
        )

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


def _tensor_bytes(checkpoint: Checkpoint) -> int:
    """Return what the tensors of a checkpoint take on disk."""
    stored = (checkpoint.tensors, checkpoint.best, checkpoint.optimizer["state"])
    return sum(tensor.nbytes for values in stored for tensor in _tensors(values))


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested dicts, in which bitsandbytes keeps its states."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _tensors(entry)
