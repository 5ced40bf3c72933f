"""Counts of instructions by the unit that executes them, from a compiled kernel's listing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

# A name belongs to the first pattern that fits.
_NVIDIA = {
    "tensor": r"HGMMA|HMMA|UTCHMMA|UTCQMMA|QGMMA",
    "special": r"MUFU",
    "shuffle": r"SHFL|REDUX",
    "shared": r"LDS|STS|LDSM|STSM|LDT",
    "global": r"LDG|STG|UTMA|UBLKCP",
    "local": r"LDL|STL",
    "fp32": r"FFMA|FADD|FMUL|FSEL|FSETP|FMNMX",
}
_AMD = {
    "tensor": r"v_mfma|v_smfmac",
    "special": r"v_(exp|log|rcp|rsq|sqrt)_",
    "shuffle": r"ds_bpermute|ds_permute|ds_swizzle|v_permlane|v_\w+_dpp",
    "shared": r"ds_",
    "global": r"global_|buffer_|flat_",
    "local": r"scratch_",
    "fp32": r"v_(pk_)?(fma|fmac|add|sub|mul|max|min|cmp_\w+)_f32",
}


class _Op(NamedTuple):
    at: int
    name: str
    target: int | None  # of a jump


class Counts(NamedTuple):
    loop: dict[str, int]  # the innermost loop with tensor-core products
    total: dict[str, int]


def count_nvidia(sass: str) -> Counts:
    return _counts(list(_parse_sass(sass)), _NVIDIA)


def count_amd(assembly: str) -> Counts:
    return _counts(list(_parse_amd(assembly)), _AMD)


def _parse_sass(sass: str) -> Iterator[_Op]:
    for line in sass.splitlines():
        found = re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*?);", line)
        if found:
            target = re.search(r"BRA.*?0x([0-9a-f]+)", found[2] + found[3])
            yield _Op(int(found[1], 16), found[2], int(target[1], 16) if target else None)


def _parse_amd(assembly: str) -> Iterator[_Op]:
    """Lines stand for addresses."""
    lines = assembly.splitlines()
    labels = {line.split(":")[0]: at for at, line in enumerate(lines) if line.startswith(".LBB")}
    for at, line in enumerate(lines):
        found = re.match(r"\s+([a-z]+_\w+)(?:\s+(\.LBB\w+))?", line)
        if found:
            yield _Op(at, found[1], labels.get(found[2]))


def _counts(code: list[_Op], units: dict[str, str]) -> Counts:
    loops = [
        [op.name for op in code if jump.target <= op.at <= jump.at]
        for jump in code
        if jump.target is not None and jump.target < jump.at
    ]
    with_products = [loop for loop in loops if _by_unit(loop, units)["tensor"]]
    inner = min(with_products, key=len, default=[])
    return Counts(_by_unit(inner, units), _by_unit([op.name for op in code], units))


def _by_unit(names: list[str], units: dict[str, str]) -> dict[str, int]:
    counts = dict.fromkeys((*units, "other"), 0)
    for name in names:
        unit = next((u for u, pattern in units.items() if re.match(pattern, name)), "other")
        counts[unit] += 1
    return counts
