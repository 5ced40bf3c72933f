"""One run per output folder, also after a kill, in other threads and other processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from fasterase.engine.conditions import lock_run
from fasterase.errors import InputError

# Holds the folder given until it is killed.
HOLD = """
import sys, time
from pathlib import Path
from fasterase.engine.conditions import lock_run
with lock_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_another_process_is_named_and_its_kill_frees_the_folder(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        named = (
            rf"output_dir: .* in use by process {process.pid} on {socket.gethostname()}, started 20"
        )
        with pytest.raises(InputError, match=named), lock_run(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
    with lock_run(tmp_path):
        pass


def test_orphaned_workers_of_a_killed_run_are_waited_for(tmp_path):
    code = HOLD.replace(
        'print("held", flush=True)',
        """
    import os
    if os.fork() == 0:
        time.sleep(1.5)
        os._exit(0)
    print("held", flush=True)""",
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
        with lock_run(tmp_path):
            pass


def test_a_second_run_of_this_process_is_refused_and_the_first_keeps_the_lock(tmp_path):
    def again():
        with lock_run(tmp_path):
            pass

    with lock_run(tmp_path):
        for _ in range(2):
            with pytest.raises(InputError, match=rf"in use by process {os.getpid()} on"):
                again()
        caught = []

        def in_thread():
            try:
                again()
            except InputError as error:
                caught.append(error)

        thread = threading.Thread(target=in_thread)
        thread.start()
        thread.join()
        assert len(caught) == 1
    again()


def test_an_error_frees_the_folder_and_nothing_but_the_lock_is_left(tmp_path):
    with pytest.raises(ZeroDivisionError), lock_run(tmp_path):
        raise ZeroDivisionError
    assert names_in(tmp_path) == [".run.lock"]
    with lock_run(tmp_path):
        pass


def test_a_holder_that_has_not_said_who_it_is(tmp_path):
    with lock_run(tmp_path):
        (tmp_path / ".run.json").write_text("{")
        with pytest.raises(InputError, match="in use by another run"), lock_run(tmp_path):
            pass


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    from filelock import FileLock

    def refuse(*args, **options):
        raise NotImplementedError("no flock")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with lock_run(tmp_path):
        pass
    assert "cannot be locked (no flock)" in caplog.text


def test_no_folder_needs_no_lock():
    with lock_run(None), lock_run(None):
        pass
