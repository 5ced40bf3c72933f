"""The keywords that type checkers know are the fields of `UnlearnConfig`."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import fasterase
from fasterase.config import UnlearnConfig
from fasterase.overrides import Overrides
from tools import overrides

ROOT = Path(__file__).parents[1]


def test_the_keywords_are_those_of_the_dataclass():
    assert overrides.FILE.read_text(encoding="utf-8") == overrides.render()
    names = [field.name for field in dataclasses.fields(UnlearnConfig)]
    assert list(Overrides.__annotations__) == names
    for call in (fasterase.unlearn, fasterase.plan, UnlearnConfig.replace):
        assert typing.get_type_hints(call)["overrides"], "tools that look at run time find it"


@pytest.mark.slow
def test_mypy_finds_a_misspelt_option_and_a_wrong_value(tmp_path):
    start = "from pathlib import Path\nimport fasterase\nfasterase.unlearn('m', 'f', 'r', "
    lines = {
        "right": f"{start}max_steps=3, lr='auto', betas=(0.9, 0.98), output_dir=Path('o'))\n",
        "misspelt": f"{start}max_stepps=3)\n",
        "wrong": f"{start}tune=4)\n",
    }
    for name, text in lines.items():
        (tmp_path / f"{name}.py").write_text(text)
    files = [str(tmp_path / f"{name}.py") for name in lines]
    found = subprocess.run(
        [sys.executable, "-m", "mypy", *files], cwd=ROOT, capture_output=True, text=True
    ).stdout
    assert 'Unexpected keyword argument "max_stepps"' in found
    assert 'Argument "tune" to "unlearn" has incompatible type "int"' in found
    assert "right.py" not in found
    assert found.count("error:") == 2, found
