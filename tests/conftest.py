"""What all tests share."""

from __future__ import annotations

import pytest

from fasterase.evaluation import hurt
from tests.browser import browser

__all__ = ["browser"]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that the last minute has work for every worker."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def everyday_things(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure no everyday things: tokenizers of tests know few words, and thousands take seconds.

    Processes of their own, the demo's among them, and `test_hurt.py` measure them.
    """
    monkeypatch.setattr(hurt, "everyday_things", lambda: ())
