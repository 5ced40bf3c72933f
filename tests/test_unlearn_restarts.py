"""One output folder, one run; and what a run that goes on says and counts."""

from __future__ import annotations

import json
import os

import pytest

import fasterase
from fasterase.errors import InputError
from tests.tiny_model import TinyModel, pairs

FORGET, RETAIN = pairs(6, seed=1), pairs(20, seed=2)


@pytest.fixture(autouse=True)
def _verdicts_are_no_news(recwarn):
    """Short runs warn that they have not forgotten."""


def run(folder, *, callback=None, **config):
    settings = {"lr": 1e-3, "batch_size": 8, "forget_batch_size": 4, "max_steps": 4}
    settings |= {"progress": False, "evaluation": None, "output_dir": folder}
    return fasterase.unlearn(
        TinyModel(), FORGET, RETAIN, callback=callback, **{**settings, **config}
    )


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on(tmp_path):
    refused = []

    def start_another(record):
        with pytest.raises(InputError, match=rf"output_dir: .* by process {os.getpid()}") as caught:
            run(tmp_path, resume="never")
        refused.append(caught.value)

    assert len(run(tmp_path, callback=start_another).history) == 4
    assert len(refused) == 4
    run(tmp_path)


def test_a_run_that_failed_frees_its_folder(tmp_path):
    def fail(record):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(tmp_path, callback=fail)
    with pytest.raises(InputError, match="forget"):
        fasterase.unlearn(TinyModel(), [], RETAIN, output_dir=tmp_path)
    run(tmp_path)
    assert not (tmp_path / ".run.json").exists()


def stop_at(step):
    return lambda record: record.step == step


def test_seconds_add_up_over_restarts_and_resuming_says_from_where(tmp_path, capsys):
    first = run(tmp_path, callback=stop_at(2))
    path = tmp_path / "checkpoints" / "step-000000002" / "state.json"
    state = json.loads(path.read_text())
    assert 0 < state["seconds"] <= first.seconds
    path.write_text(json.dumps({**state, "seconds": 1000.0}))
    capsys.readouterr()
    second = run(tmp_path, progress=True)
    assert 1000 < second.seconds < 1100
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("resuming after step 2") == 1
    assert run(tmp_path / "other").seconds < 100
