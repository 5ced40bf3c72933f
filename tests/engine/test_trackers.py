"""Trackers see every step, the settings and the evaluation; a missing one is refused at once."""

from __future__ import annotations

import sys
from functools import partial
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import fasterase
from tests.marks import SHORT_RUN
from tests.tiny_model import erase

run = partial(erase, lr=1e-2, evaluation="quick")
pytestmark = SHORT_RUN


def events(folder):
    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def test_tensorboard_gets_steps_settings_and_evaluation(tmp_path):
    seen = []
    result = run(report_to="tensorboard", output_dir=tmp_path, callback=seen.append)
    assert seen == result.history
    found = events(tmp_path / "tensorboard")
    for term in ("total", "forget", "anchor"):
        logged = [(event.step, event.value) for event in found.Scalars(f"loss/{term}")]
        expected = [(record["step"], record[term]) for record in result.history]
        assert logged == [(step, pytest.approx(value)) for step, value in expected]
    assert [event.value for event in found.Scalars("lr")] == pytest.approx([1e-2] * 3)
    for name, value in result.evaluation.flat().items():
        assert [event.value for event in found.Scalars(name)] == [pytest.approx(value)], name
    content = found.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["lr"].number_value == 1e-2
    assert settings["forget_loss"].string_value == "similarity"


def test_a_resumed_run_logs_each_step_once(tmp_path):
    options = {"report_to": "tensorboard", "output_dir": tmp_path, "max_steps": 4}
    run(**options, save_every=1, callback=lambda record: record["step"] == 2)
    run(**options)
    steps = [event.step for event in events(tmp_path / "tensorboard").Scalars("loss/total")]
    assert steps == [1, 2, 3, 4]


def test_without_output_dir_the_logs_are_in_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(report_to="tensorboard", evaluation=None)
    (folder,) = (tmp_path / "runs").iterdir()
    assert len(events(folder).Scalars("loss/total")) == 3


class Wandb:
    """Stands in for the library: keeps what it is told."""

    def __init__(self) -> None:
        self.run = self.arguments = None
        self.logged: list[dict] = []
        self.summary: dict = {}
        self.finished: list[int] = []
        self.log = self.logged.append
        self.config = SimpleNamespace(update=self.set)

    def set(self, values, *, allow_val_change) -> None:
        self.arguments = values

    def init(self, **arguments):
        self.arguments = arguments
        return self

    def finish(self, exit_code: int) -> None:
        self.finished.append(exit_code)


@pytest.fixture
def wandb(monkeypatch):
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


def test_wandb_gets_steps_settings_and_evaluation(tmp_path, wandb):
    result = run(report_to="wandb", output_dir=tmp_path)
    settings = {"project": "fasterase", "config": result.config.to_dict()}
    assert wandb.arguments == {**settings, "dir": str(tmp_path)}
    assert [values["step"] for values in wandb.logged] == [1, 2, 3]
    assert [values["loss/total"] for values in wandb.logged] == [r.total for r in result.history]
    residue = {"forget/residue": result.residue}
    assert wandb.summary == result.evaluation.flat() | residue
    assert wandb.finished == [0]


def test_a_run_that_fails_is_marked_as_failed(wandb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fail(record):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        run(report_to="wandb", callback=fail)
    assert wandb.finished == [1]
    assert wandb.arguments["dir"] == "runs"


def test_an_active_run_is_used_and_left_open(wandb):
    wandb.run = wandb
    result = run(report_to="wandb", evaluation=None)
    assert wandb.arguments == result.config.to_dict()
    assert len(wandb.logged) == 3
    assert not wandb.finished


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"lr": 2e-2}, fasterase.ResumeError),
        ({"max_steps": 1}, fasterase.ResumeError),
        ({"deepspeed": {}, "tune": "lora:2"}, fasterase.InputError),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_a_refused_run_leaves_no_log(name, change, error, wandb, tmp_path):
    folder = tmp_path / "run"
    run(output_dir=folder, evaluation=None)
    before = {path.name for path in folder.iterdir()}
    with pytest.raises(error):
        run(output_dir=folder, evaluation=None, report_to=name, **change)
    assert {path.name for path in folder.iterdir()} == before
    assert (wandb.arguments, wandb.finished) == (None, [])


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_tracker_is_refused_before_the_model_is_loaded(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(fasterase.MissingExtraError, match=rf"fasterase\[{name}\]"):
        fasterase.unlearn("no such model", "f", "r", report_to=name)
