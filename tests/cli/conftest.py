"""The library replaced by a stand-in, so that a command only parses and calls."""

from __future__ import annotations

from pathlib import Path

import pytest

import fasterase
from tests.cli.fake_api import FakeApi


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command writes to a relative path is not to be left in the checkout."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def unlearn(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    monkeypatch.setitem(vars(fasterase), "unlearn", api := FakeApi())
    return api


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    monkeypatch.setitem(vars(fasterase), "evaluate", api := FakeApi())
    return api
