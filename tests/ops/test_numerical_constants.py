"""The limits of the shift are equal in torch, C++ and Triton, which cannot share one definition."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fasterase.ops.contrastive import chunked

ROOT = Path(__file__).resolve().parents[2]


def find_one(sources: list[Path], pattern: str) -> str:
    """The one match in all sources; Triton's are read as text, since triton may be missing."""
    texts = (path.read_text(encoding="utf-8") for path in sorted(sources))
    found = [match for text in texts for match in re.findall(pattern, text, re.MULTILINE)]
    assert len(found) == 1, (pattern, found)
    return found[0]


def read_cpp(name: str) -> float:
    sources = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc").glob("*.cpp")]
    value = find_one(sources, rf"^constexpr double {name} = ([^;]+);")
    return float.fromhex(value) if value.startswith("0x") else float(value)


def read_triton(name: str) -> float:
    """`tl.constexpr(66.0)` or `tl.constexpr(2.0**-80)`."""
    pattern = rf"^_?{name}(?:: tl\.constexpr)? = tl\.constexpr\(([^)]+)\)"
    base, _, exponent = find_one([*(ROOT / "kernels").glob("*.py")], pattern).partition("**")
    return float(base) ** float(exponent or 1)


@pytest.mark.parametrize("name", ["HEADROOM", "UNDERFLOW"])
def test_all_backends_share_their_limits(name):
    value = getattr(chunked, name)
    assert read_cpp(f"k{name.capitalize()}") == value
    assert read_triton(name) == value
