"""Write `fasterase/overrides.py`: the fields of `UnlearnConfig` as keywords for type checkers.

python -m tools.overrides
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fasterase.config import PATH, UnlearnConfig

FILE = Path(__file__).parents[1] / "fasterase" / "overrides.py"
_HEAD = '''"""The fields of `UnlearnConfig` as keywords. Written by `python -m tools.overrides`."""

from __future__ import annotations

from os import PathLike
from typing import Any, Literal, TypedDict


class Overrides(TypedDict, total=False):
    """What `fasterase.unlearn` and `fasterase.plan` take as `**overrides`; see `UnlearnConfig`."""

'''


def render() -> str:
    """Return the text of the module."""
    lines = []
    for field in dataclasses.fields(UnlearnConfig):
        hint = str(field.type).replace("'", '"')  # as written: annotations are strings
        if PATH in field.metadata:
            hint = hint.replace("str", "str | PathLike[str]", 1)
        lines.append(f"    {field.name}: {hint}\n")
    return _HEAD + "".join(lines)


if __name__ == "__main__":
    FILE.write_text(render(), encoding="utf-8")
    print(f"Written: {FILE}")
