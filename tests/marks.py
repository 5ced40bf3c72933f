"""Marks that tests of several folders share."""

from __future__ import annotations

import pytest

# A few steps on random weights forget nothing, and random captions are close to each other.
SHORT_RUN = pytest.mark.filterwarnings("ignore:verdict", "ignore:retain. .* seem to name")
