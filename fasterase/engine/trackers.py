"""Experiment trackers, told of each step by the callback: TensorBoard, Weights & Biases, none.

They begin with the first step or result: a run that is refused before leaves no log.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any

from fasterase.config import UnlearnConfig, format_yaml
from fasterase.engine.history import StepRecord
from fasterase.errors import import_extra
from fasterase.objective import EraseLoss

Callback = Callable[[StepRecord], object]

# Where logs go without an `output_dir`.
DEFAULT_FOLDER = Path("runs")


class Tracker:
    """Logs nothing; the base of those that do."""

    def __init__(self, config: UnlearnConfig) -> None:
        self._config = config

    def log(self, record: StepRecord) -> None:
        """Log one step."""

    def summarise(self, values: Mapping[str, float]) -> None:
        """Log the measurements after the last step."""

    def close(self, *, failed: bool) -> None:
        """End the log; `failed` says that the run was stopped by an error."""

    def followed_by(self, callback: Callback | None) -> Callback | None:
        """Return a callback that logs each record before `callback` sees it."""

        def log_then_call(record: StepRecord) -> object:
            self.log(record)
            return callback(record) if callback is not None else None

        return callback if type(self) is Tracker else log_then_call


class TensorBoardTracker(Tracker):
    """Event files in `output_dir/tensorboard`, or in `runs/` under a name with time and host."""

    def __init__(self, config: UnlearnConfig) -> None:
        super().__init__(config)
        require_tracker("tensorboard")
        self._writer: Any = None
        self._results: dict[str, float] = {}

    def log(self, record: StepRecord) -> None:
        writer = self._open(first_step=record["step"])
        for name, value in _flat(record).items():
            writer.add_scalar(name, value, record["step"])

    def summarise(self, values: Mapping[str, float]) -> None:
        self._open(first_step=None)
        self._results = dict(values)

    def close(self, *, failed: bool) -> None:
        if self._writer is None:
            return
        settings = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in self._config.to_dict().items()
        }
        # TensorBoard takes hyperparameters together with the results.
        self._writer.add_hparams(settings, self._results, run_name=".")
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

    def __init__(self, config: UnlearnConfig) -> None:
        super().__init__(config)
        self._wandb = require_tracker("wandb")
        self._own: Any = None  # the run, if it is not the caller's

    @cached_property
    def _run(self) -> Any:
        config = self._config.to_dict()
        if self._wandb.run is not None:
            self._wandb.run.config.update(config, allow_val_change=True)
            return self._wandb.run
        folder = Path(self._config.output_dir or DEFAULT_FOLDER)
        folder.mkdir(parents=True, exist_ok=True)
        project = None if "WANDB_PROJECT" in os.environ else "fasterase"
        self._own = self._wandb.init(project=project, dir=str(folder), config=config)
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


def require_tracker(name: str | None) -> Any:
    """Import the library behind `report_to` and return it; None for None.

    Raises:
        MissingExtraError: it is not installed.
    """
    return None if name is None else import_extra(name, name, f"report_to={name!r}")


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
