"""The library replaced by a stand-in, so that a command only parses and calls."""

from __future__ import annotations

import pytest

import fasterase
from tests.cli.fake_api import FakeApi


@pytest.fixture
def unlearn(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    monkeypatch.setitem(vars(fasterase), "unlearn", api := FakeApi())
    return api


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    monkeypatch.setitem(vars(fasterase), "evaluate", api := FakeApi())
    return api
