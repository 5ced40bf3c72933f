"""Count the instructions of a compiled kernel: all of it by unit, and the path of one tile.

`count_nvidia` and `count_amd` count what a listing contains. One tile executes less of it, which
`trace` finds: one arm of each if/else (the shorter: the slow arm of these kernels serves batches
whose fixed shift failed), no mask of tiles at an edge, and the loop over the features' depth many
times. A trace counts the warp instructions of one warp.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

# An instruction belongs to the first pattern that its name matches.
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
    at: int  # address, or line number
    name: str
    is_conditional: bool
    target: int | None  # of a jump


_SASS_LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Zx0-9_.]+)(.*?);")
_FP32 = re.compile(r"FFMA|FADD|FMUL|IMAD")
_ALU = re.compile(
    r"I|LOP|SHF|LEA|SEL|FSEL|FSETP|FMNMX|PRMT|F2F|PLOP|VOTE|BMSK|SGXT|POPC|FLO|LEA|P2R|R2P"
)
_EFFECT = re.compile(r"MUFU|SHFL|BAR|LD|ST|RED|ATOM|EXIT|BRA")
# Registers per thread of a shared-memory instruction, by its suffix; 1 without one of these.
_WIDTH = {"64": 2, "128": 4, "U16": 1, "U8": 1}


class Instructions(NamedTuple):
    """Instructions of one warp; multiply by the number of warps for a tile."""

    issued: float = 0.0  # all of them: a scheduler issues one per clock
    fp32: float = 0.0  # FFMA, FADD, FMUL, IMAD
    alu: float = 0.0  # integers, logic, comparisons, selects, conversions
    special: float = 0.0  # MUFU
    shuffle: float = 0.0
    shared_bytes: float = 0.0  # by instructions, spills, and the tensor cores' operands
    flops: float = 0.0  # of the tensor cores

    def __add__(self, other: Any) -> Instructions:
        return Instructions(*(a + b for a, b in zip(self, other, strict=True)))

    def __mul__(self, by: Any) -> Instructions:
        return Instructions(*(a * by for a in self))


class Trace(NamedTuple):
    """One tile's instructions."""

    steps: tuple[Instructions, ...]  # one step of each loop over depth
    rest: Instructions
    run: Instructions | None = None  # once for all tiles that share one loop over depth, if any do


def count_nvidia(sass: str) -> dict[str, int]:
    """Count the instructions of a SASS listing by unit."""
    return _counts(_parse_sass(sass), _NVIDIA)


def count_amd(assembly: str) -> dict[str, int]:
    """Count the instructions of AMD assembly by unit."""
    return _counts(_parse_amd(assembly), _AMD)


def trace(sass: str) -> Trace:
    """Find what one tile executes, from a kernel's SASS listing.

    Several tiles share a loop over depth that has a conditional epilogue inside.
    """
    code = _parse_sass(sass)
    products = [op.at for op in code if _is_product(op)]
    loops = [(op.target, op.at) for op in code if op.target is not None and op.target < op.at]
    inner = sorted(
        (first, last)
        for first, last in loops
        if any(first <= at <= last for at in products)
        and not any(
            (a, b) != (first, last) and first <= a and b <= last and _has(products, a, b)
            for a, b in loops
        )
    )
    outer = [
        (first, last)
        for first, last in loops
        if (first, last) not in inner and all(first <= a and b <= last for a, b in inner)
    ]
    first, last = min(outer, key=lambda x: x[1] - x[0]) if outer else (0, code[-1].at)
    executed = _executed([op for op in code if first <= op.at <= last], products)
    ranges = [[op for op in code if a <= op.at <= b] for a, b in inner]
    rest = _sum([op for op in executed if not any(a <= op.at <= b for a, b in inner)])
    step, epilogue = _shared_loop(ranges, products)
    if epilogue:
        return Trace((_sum(step),), _sum(_executed(epilogue, products)), rest)
    return Trace(tuple(map(_sum, ranges)), rest)


def _shared_loop(loops: list[list[_Op]], products: list[int]) -> tuple[list[_Op], list[_Op]]:
    """Split a loop that several tiles share into (one step, the epilogue); both empty otherwise.

    The epilogue is either inside the loop, where most steps jump over it, or before the loop,
    where the last step jumps back to it.
    """
    if len(loops) == 1:
        (loop,) = loops
        epilogue = _epilogue(loop, products)
        return [op for op in loop if op not in epilogue], epilogue
    if len(loops) == 2 and loops[0][0].at < loops[1][0].at <= loops[0][-1].at < loops[1][-1].at:
        return loops[1], [op for op in loops[0] if op.at < loops[1][0].at]
    return [], []


def _epilogue(loop: list[_Op], products: list[int]) -> list[_Op]:
    """Find the instructions, exponentials included, that only the last step of a tile executes."""
    skipped = [
        [other for other in loop if op.at < other.at < op.target]
        for op in loop
        if op.is_conditional and op.target is not None and op.at < op.target <= loop[-1].at
        if not _has(products, op.at, op.target)
    ]
    with_exponentials = [ops for ops in skipped if any(op.name.startswith("MUFU") for op in ops)]
    return max(with_exponentials, key=len, default=[])


def _sum(ops: list[_Op]) -> Instructions:
    return sum(map(_cost, ops), Instructions())


def _parse_sass(sass: str) -> list[_Op]:
    code = []
    for line in sass.splitlines():
        found = _SASS_LINE.match(line)
        if found:
            target = re.search(r"BRA.*?0x([0-9a-f]+)", found[3] + found[4])
            at = int(found[1], 16)
            code.append(_Op(at, found[3], bool(found[2]), int(target[1], 16) if target else None))
    return code


def _parse_amd(assembly: str) -> list[_Op]:
    """Parse a listing without addresses; line numbers stand in for them."""
    lines = assembly.splitlines()
    labels = {line.split(":")[0]: at for at, line in enumerate(lines) if line.startswith(".LBB")}
    code = []
    for at, line in enumerate(lines):
        found = re.match(r"\s+([a-z]+_\w+)(?:\s+(\.LBB\w+))?", line)
        if found:
            is_conditional = found[1].startswith("s_cbranch")
            code.append(_Op(at, found[1], is_conditional, labels.get(found[2])))
    return code


def _is_product(op: _Op) -> bool:
    return re.match(r"HGMMA|HMMA|UTCHMMA", op.name) is not None


def _has(products: list[int], first: int, last: int) -> bool:
    return any(first <= at < last for at in products)


def _executed(code: list[_Op], products: list[int]) -> list[_Op]:
    """Follow the code up to an unconditional exit, through the shorter arm of every if/else.

    An if without else that only selects masks a tile at an edge; it is left out.
    """
    index = {op.at: k for k, op in enumerate(code)}
    executed = []
    k = 0
    while k < len(code):
        op = code[k]
        executed.append(op)
        k += 1
        if op.name == "EXIT" and not op.is_conditional:
            break
        if op.target is None or op.target <= op.at:
            continue
        other = index.get(op.target)
        if other is None or _has(products, op.at, op.target):
            continue
        if not op.is_conditional:
            k = other
            continue
        jump = code[other - 1]
        has_else = jump.name == "BRA" and not jump.is_conditional and jump.target is not None
        if has_else and jump.target in index and index[jump.target] > other:
            end = index[jump.target]
            if end - other < other - k and not _has(products, op.target, jump.target):
                k = other
        elif any(x.name.startswith("FSEL") for x in code[k:other]) and not any(
            _EFFECT.match(x.name) for x in code[k:other]
        ):
            k = other
    return executed


def _cost(op: _Op) -> Instructions:
    name = op.name
    one = Instructions(issued=1)
    product = re.match(r"HGMMA\.64x(\d+)x(\d+)", name)
    if product:
        # A quarter of a warpgroup's instruction per warp. Both operands come from shared memory.
        n, depth = int(product[1]), int(product[2])
        flops, operands = 2 * 64 * n * depth, (64 + n) * depth * 2
        return one._replace(flops=flops / 4, shared_bytes=operands / 4)
    if name.startswith("HMMA"):
        return one._replace(flops=2 * 16 * 8 * (16 if "16816" in name else 8))
    if name.startswith("MUFU"):
        return one._replace(special=1)
    if re.match(r"SHFL|REDUX", name):
        return one._replace(shuffle=1)
    if name.startswith(("LDSM", "STSM")):
        return one._replace(shared_bytes=128 * int(name[-1] if name[-1].isdigit() else 1))
    if name.startswith(("LDS", "STS", "LDL", "STL")):  # spills use the same unit
        return one._replace(shared_bytes=128 * _WIDTH.get(name.split(".")[-1], 1))
    if _FP32.match(name):
        return one._replace(fp32=1)
    if _ALU.match(name):
        return one._replace(alu=1)
    return one


def _counts(code: list[_Op], units: dict[str, str]) -> dict[str, int]:
    """Return `loop_<unit>`, in the innermost loop with tensor-core products, and `total_<unit>`."""
    loops = [
        [op.name for op in code if jump.target <= op.at <= jump.at]
        for jump in code
        if jump.target is not None and jump.target < jump.at
    ]
    product = re.compile(units["tensor"])
    with_products = [loop for loop in loops if any(map(product.match, loop))]
    inner = min(with_products, key=len, default=[])
    counts: dict[str, int] = {}
    for place, names in (("loop", inner), ("total", [op.name for op in code])):
        counts |= dict.fromkeys((f"{place}_{unit}" for unit in (*units, "other")), 0)
        for name in names:
            unit = next((u for u, pattern in units.items() if re.match(pattern, name)), "other")
            counts[f"{place}_{unit}"] += 1
    return counts
