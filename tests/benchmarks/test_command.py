"""What is wrong with a benchmark's command line is one line, and exit code 2."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from benchmarks.command import comparison_parser, exit_with
from fasterase.errors import DiskFullError, InputError

ROOT = Path(__file__).parents[2]
_STARTS = '\nif __name__ == "__main__":\n'


def commands() -> list[Path]:
    files = sorted((ROOT / "benchmarks").rglob("*.py"))
    return [each for each in files if _STARTS in each.read_text(encoding="utf-8")]


def test_every_command_reports_its_errors_in_the_same_place():
    others = [
        each.stem
        for each in commands()
        if not re.search(_STARTS + r"    exit_with\(main\)\n$", each.read_text(encoding="utf-8"))
    ]
    # This one only prints, and takes no arguments.
    assert others == ["scale_versions"]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("evidence.attacks --erased demo", "--erased demo: expected NAME=WHERE"),
        ("evidence.digits --work FILE", "--work: FILE cannot be created"),
        pytest.param(
            "systems.end_to_end --concept nonsense --output new.csv",
            "'nonsense' chooses no concept",
            marks=pytest.mark.slow,  # said by a process of its own
        ),
        ("evidence --methods magic", "--methods: 'magic' is none of"),
        ("evidence --settings none.csv", "--settings: no file none.csv"),
        ("evidence --retrained drink", "--retrained drink: expected NAME=WHERE"),
        ("loss.gpu_model --against none.csv", "--against: none.csv has no times"),
        ("systems.gpu_stages --wheels none", "no *.whl in none"),
        ("evidence --retrained fish=none", "--retrained fish: expected one of food-fruit"),
        ("evidence --retrained drink=none", "--retrained drink: there is no folder none"),
        ("robustness --concepts nonsense", "'nonsense' chooses no concept"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "file"
    file.touch()
    module, *arguments = words.replace("FILE", str(file)).split()
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(f"benchmarks.{module}", run_name="__main__", alter_sys=True)
    assert stopped.value.code == 2
    found = capsys.readouterr().err
    assert said.replace("FILE", str(file)) in found
    assert found.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in found
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("count", ["0", "-1", "two"])
def test_there_is_a_process_or_more(count, capsys):
    parser = comparison_parser("", work="runs", seeds=1)
    assert parser.parse_args(["--processes", "3"]).processes == 3
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args([f"--processes={count}"])
    assert stopped.value.code == 2
    assert f"--processes: {count}: give a number of 1 or more" in capsys.readouterr().err


def test_other_ends(capsys):
    def fail(error):
        raise error

    for code in (None, 0, 75):
        with pytest.raises(SystemExit) as stopped:
            exit_with(lambda code=code: code)
        assert stopped.value.code == code
    for error, code in ((InputError("a:\nb"), 2), (DiskFullError("no room"), 1)):
        with pytest.raises(SystemExit) as stopped:
            exit_with(lambda error=error: fail(error))
        assert stopped.value.code == code
    assert capsys.readouterr().err == "error: a: b\nerror: no room\n"
    with pytest.raises(ZeroDivisionError):
        exit_with(lambda: 1 // 0)
