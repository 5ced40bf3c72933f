"""What one tile of a compiled kernel executes: instructions by pipe, along the usual path.

`compiled_kernels` counts what a kernel contains. A tile runs less of it: of an if/else, one arm
(the shorter: the slow arm of these kernels is for batches whose fixed shift failed), no mask of
tiles at an edge, and the loop over the features' depth many times. All counts are warp
instructions, a warp.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from benchmarks import compiled_kernels


class Instructions(NamedTuple):
    """Of one warp; what a tile's warps do together is this times their number."""

    issued: float = 0.0  # all of them: a scheduler issues one a clock
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

    steps: tuple[Instructions, ...]  # of a step of each loop over depth
    rest: Instructions
    run: Instructions | None = None  # once for the tiles that share one loop over depth, if so


class Path(NamedTuple):
    """What one tile takes."""

    trace: Trace
    registers: int
    stack_bytes: int
    shared_bytes: int


class _Op(NamedTuple):
    at: int
    name: str
    is_conditional: bool
    target: int | None


_LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Zx0-9_.]+)(.*?);")
_FP32 = re.compile(r"FFMA|FADD|FMUL|IMAD")
_ALU = re.compile(
    r"I|LOP|SHF|LEA|SEL|FSEL|FSETP|FMNMX|PRMT|F2F|PLOP|VOTE|BMSK|SGXT|POPC|FLO|LEA|P2R|R2P"
)
_EFFECT = re.compile(r"MUFU|SHFL|BAR|LD|ST|RED|ATOM|EXIT|BRA")
# Registers a thread of a shared-memory instruction: .32 where nothing says more.
_WIDTH = {"64": 2, "128": 4, "U16": 1, "U8": 1}


def measure(launch: compiled_kernels.Launch, sm: int) -> Path:
    """The path of a launch, compiled for an architecture."""
    cubin = compiled_kernels.build(launch, f"sm_{sm}")
    registers, stack = compiled_kernels.resources(cubin.asm["cubin"])
    sass = compiled_kernels.tool("cuobjdump", "--dump-sass", cubin=cubin.asm["cubin"])
    return Path(trace(sass), registers, stack, cubin.metadata.shared)


def trace(sass: str) -> Trace:
    """Of a kernel's SASS listing.

    A loop over depth with a conditional epilogue inside is one for several tiles.
    """
    code = _parse(sass)
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
    """(a step, the epilogue) of one loop for several tiles, or nothing.

    The epilogue stands inside the loop, and most steps jump over it; or before the loop, and the
    last step jumps back to it.
    """
    if len(loops) == 1:
        (loop,) = loops
        epilogue = _epilogue(loop, products)
        return [op for op in loop if op not in epilogue], epilogue
    if len(loops) == 2 and loops[0][0].at < loops[1][0].at <= loops[0][-1].at < loops[1][-1].at:
        return loops[1], [op for op in loops[0] if op.at < loops[1][0].at]
    return [], []


def _epilogue(loop: list[_Op], products: list[int]) -> list[_Op]:
    """What the loop skips, exponentials among it, but for a tile's last step."""
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


def _parse(sass: str) -> list[_Op]:
    code = []
    for line in sass.splitlines():
        found = _LINE.match(line)
        if found:
            target = re.search(r"BRA.*?0x([0-9a-f]+)", found[3] + found[4])
            at = int(found[1], 16)
            code.append(_Op(at, found[3], bool(found[2]), int(target[1], 16) if target else None))
    return code


def _is_product(op: _Op) -> bool:
    return re.match(r"HGMMA|HMMA|UTCHMMA", op.name) is not None


def _has(products: list[int], first: int, last: int) -> bool:
    return any(first <= at < last for at in products)


def _executed(code: list[_Op], products: list[int]) -> list[_Op]:
    """Straight through, the shorter arm of every if/else, up to an unconditional exit.

    An if without else that only selects is the mask of a tile at an edge, and left out.
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
        # One instruction of a warpgroup: a quarter of it a warp. Both operands from shared memory.
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
    if name.startswith(("LDS", "STS", "LDL", "STL")):  # spills take the same way as shared memory
        return one._replace(shared_bytes=128 * _WIDTH.get(name.split(".")[-1], 1))
    if _FP32.match(name):
        return one._replace(fp32=1)
    if _ALU.match(name):
        return one._replace(alu=1)
    return one
