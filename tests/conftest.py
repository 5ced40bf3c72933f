"""What all tests share."""

from __future__ import annotations

import pytest

from fasterase.engine import held_texts
from fasterase.evaluation import hurt
from tests.browser import browser

__all__ = ["browser"]


@pytest.fixture(autouse=True)
def everyday_things(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure and hold no words: tokenizers of tests know few words, and thousands take seconds.

    Processes of their own, the demo's among them, and the tests of both do.
    """
    monkeypatch.setattr(hurt, "everyday_things", lambda: ())
    monkeypatch.setattr(held_texts, "common_words", lambda: ())
