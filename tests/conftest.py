"""What all tests share."""

from __future__ import annotations

import pytest

from fasterase.evaluation import hurt
from tests.browser import browser

__all__ = ["browser"]


@pytest.fixture(autouse=True)
def everyday_things(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure no everyday things: tokenizers of tests know few words, and thousands take seconds.

    Processes of their own, the demo's among them, and `test_hurt.py` measure them.
    """
    monkeypatch.setattr(hurt, "everyday_things", lambda: ())
