"""The library replaced by a stand-in, so that a command only parses and calls."""

from __future__ import annotations

import pytest

import fasterase
from tests.cli.fake_api import FakeApi


@pytest.fixture
def unlearn(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    return _replaced(monkeypatch, "unlearn")


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    return _replaced(monkeypatch, "evaluate")


def _replaced(monkeypatch: pytest.MonkeyPatch, name: str) -> FakeApi:
    api = FakeApi()
    monkeypatch.setitem(vars(fasterase), name, api)
    return api
