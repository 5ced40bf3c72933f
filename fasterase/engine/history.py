"""What a run tells of its steps: records, `history.jsonl`, and logs of experiment trackers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any

from fasterase.config import UnlearnConfig, format_yaml
from fasterase.errors import import_extra
from fasterase.files import append_whole, to_json, write_text
from fasterase.objective import EraseLoss


class StepRecord(dict[str, Any]):
    """One step: `step` (from 1), `total`, `forget`, `retain`, `consistency`, `anchor`, `lr`,
    `grad_norm`, `applied` (False if the step was not finite and left out) and `seconds`; where an
    automatic run has looked, also `residue` and `least_residue`, the largest and smallest of a
    direction, and `damage`, the share of retain recall@1 that is lost.

    A dict, ready for JSON and trackers, whose keys are also attributes.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


Callback = Callable[[StepRecord], object]


class HistoryFile:
    """`history.jsonl`: one record per line, from `earlier` ones of the first `keep_steps` steps."""

    def __init__(self, path: Path, *, keep_steps: int) -> None:
        self.earlier = [record for record in read_history(path) if record["step"] <= keep_steps]
        self._path = write_text(path, "".join(to_json(each) + "\n" for each in self.earlier))

    def append(self, record: StepRecord) -> None:
        """Append a line, or raise `DiskFullError`; the lines before it are kept."""
        # Unbuffered: a buffer that could not be written would be tried again on closing.
        with self._path.open("ab", buffering=0) as file:
            append_whole(file, to_json(record).encode() + b"\n", path=self._path)


def read_history(path: Path) -> list[StepRecord]:
    """Return the records of a history file, without a last line that a kill has cut off."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            break
        # JSON has no NaN.
        values = {name: math.nan if each is None else each for name, each in found.items()}
        records.append(StepRecord(values))
    return records


class Tracker:
    """Logs nothing. Others begin with the first step: a run refused before it leaves no log."""

    def __init__(self, config: UnlearnConfig) -> None:
        self._config = config

    def log(self, record: StepRecord) -> None:
        """Log one step."""

    def summarise(self, values: Mapping[str, float]) -> None:
        """Log the measurements after the last step."""

    def close(self, *, failed: bool) -> None:
        """End the log; `failed` says that the run was stopped by an error."""

    def followed_by(self, callback: Callback | None) -> Callback:
        """Return a callback that logs each record before `callback` sees it."""

        def log_then_call(record: StepRecord) -> object:
            self.log(record)
            return callback is not None and callback(record)

        return log_then_call


class TensorBoardTracker(Tracker):
    """Event files in `output_dir/tensorboard`, or in `runs/` under a name with time and host."""

    _writer: Any = None

    def log(self, record: StepRecord) -> None:
        writer = self._open(first_step=record["step"])
        for name, value in _flat(record).items():
            writer.add_scalar(name, value, record["step"])

    def summarise(self, values: Mapping[str, float]) -> None:
        settings = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in self._config.to_dict().items()
        }
        # TensorBoard takes hyperparameters together with the results.
        self._open(first_step=None).add_hparams(settings, dict(values), run_name=".")

    def close(self, *, failed: bool) -> None:
        if self._writer is not None:
            self._writer.close()

    def _open(self, *, first_step: int | None) -> Any:
        """Open the writer when the first step is known: a resumed run repeats some steps."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            output = self._config.output_dir
            folder = None if output is None else str(Path(output) / "tensorboard")
            self._writer = SummaryWriter(folder, purge_step=first_step)
            self._writer.add_text("config", f"```yaml\n{format_yaml(self._config.to_dict())}```")
        return self._writer


class WandbTracker(Tracker):
    """A run of Weights & Biases: the caller's if one is active, else one of its own.

    Wandb's environment variables apply; its files go to `output_dir`, or to `runs/`.
    """

    _own: Any = None  # the run, if it is not the caller's

    @cached_property
    def _run(self) -> Any:
        wandb = require_tracker("wandb")
        config = self._config.to_dict()
        if wandb.run is not None:
            wandb.run.config.update(config, allow_val_change=True)
            return wandb.run
        folder = Path(self._config.output_dir or "runs")
        folder.mkdir(parents=True, exist_ok=True)
        project = None if "WANDB_PROJECT" in os.environ else "fasterase"
        self._own = wandb.init(project=project, dir=str(folder), config=config)
        return self._own

    def log(self, record: StepRecord) -> None:
        # With the step as a value: an active run counts steps of its own.
        self._run.log({**_flat(record), "step": record["step"]})

    def summarise(self, values: Mapping[str, float]) -> None:
        self._run.summary.update(dict(values))

    def close(self, *, failed: bool) -> None:
        if self._own is not None:
            self._own.finish(exit_code=int(failed))


TRACKERS = {None: Tracker, "tensorboard": TensorBoardTracker, "wandb": WandbTracker}


def require_tracker(name: str) -> Any:
    """Import the library behind `report_to`, or raise `MissingExtraError`."""
    return import_extra(name, name, f"report_to={name!r}")


@contextmanager
def tracking(config: UnlearnConfig) -> Iterator[Tracker]:
    """Yield the tracker that `config.report_to` names, and close it in the end."""
    tracker = TRACKERS[config.report_to](config)
    failed = True
    try:
        yield tracker
        failed = False
    finally:
        tracker.close(failed=failed)


def _flat(record: StepRecord) -> dict[str, float]:
    """Name the losses `loss/<term>`, and leave out what is not a number."""
    return {
        f"loss/{name}" if name in EraseLoss._fields else name: float(value)
        for name, value in record.items()
        if name != "step" and isinstance(value, Real)
    }
