"""The models that the benchmark of the attacks is given."""

from __future__ import annotations

import pytest

from benchmarks import attacks
from fasterase.errors import InputError


def test_models_have_names() -> None:
    assert attacks.parse_models(["a=b", "c=d=e"]) == {"a": "b", "c": "d=e"}
    for entry in ("a", "=b", "a=", f"{attacks.RETRAINED}=b"):
        with pytest.raises(InputError, match=r"--erased .*: expected NAME=FOLDER"):
            attacks.parse_models([entry])
