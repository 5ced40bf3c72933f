"""One run per output folder, also after a kill or an error, and in other processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest
from filelock import FileLock

from fasterase.engine.conditions import lock_run
from fasterase.errors import InputError
from tests.marks import SHORT_RUN
from tests.tiny_model import TinyModel, erase

# Holds the folder given until it is killed, and its worker a moment longer.
HOLD = """
import os, sys, time
from pathlib import Path
from fasterase.engine.conditions import lock_run
with lock_run(Path(sys.argv[1])):
    if os.fork() == 0:
        time.sleep(1.5)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


def test_another_process_is_named_and_its_kill_frees_the_folder_once_its_workers_end(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        (half := tmp_path / ".model.abc.partial" / "model").mkdir(parents=True)
        holder = f"process {process.pid} on {socket.gethostname()}, started 20"
        with pytest.raises(InputError, match=f"output_dir: .* in use by {holder}"):
            lock_run(tmp_path).__enter__()
        assert half.exists(), "the other run may be writing it"
        process.send_signal(signal.SIGKILL)
        process.wait()
        with lock_run(tmp_path):
            assert not half.parent.exists()


@pytest.mark.parametrize("said", ["{", "null", "[1]", '{"host": "here"}', '{"pid": "x"}'])
def test_a_holder_that_has_not_said_who_it_is(tmp_path, said):
    (tmp_path / ".run.json").write_text(said.replace("here", socket.gethostname()))
    with lock_run(tmp_path):
        (tmp_path / ".run.json").write_text(said)
        with pytest.raises(InputError, match="in use by another run"), lock_run(tmp_path):
            pass


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*args, **options):
        raise NotImplementedError("no flock")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with lock_run(tmp_path):
        pass
    assert "cannot be locked (no flock)" in caplog.text


@SHORT_RUN
def test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on(tmp_path):
    refused = []

    def start_another(record):
        with pytest.raises(InputError, match=rf"output_dir: .* by process {os.getpid()}") as caught:
            erase(output_dir=tmp_path, resume="never")
        refused.append(caught.value)

    assert len(erase(output_dir=tmp_path, callback=start_another).history) == 3
    assert len(refused) == 3
    erase(output_dir=tmp_path)


@SHORT_RUN
def test_a_run_that_failed_frees_its_folder_and_its_model(tmp_path):
    tower = TinyModel()

    def fail(record):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        erase(tower, output_dir=tmp_path, callback=fail)
    assert all(parameter.requires_grad for parameter in tower.module.parameters())
    with pytest.raises(InputError, match="forget"):
        erase(forget=[], output_dir=tmp_path)
    erase(output_dir=tmp_path)
    assert [path.name for path in tmp_path.glob(".*")] == [".run.lock"]
