"""Plans of the Triton launches: tiles, compile-time arguments, strips of G."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fasterase.kernels.contrastive_layout import SLOTS, stat_stride
from fasterase.ops.contrastive.checks import HALF_DTYPES
from fasterase.ops.contrastive.operator import Batch

# Kernels defined under TRITON_INTERPRET=1 run in numpy, on CPU tensors.
INTERPRETED = not isinstance(stat_stride, triton.JITFunction)

# Elements of a strip of G: this many bytes, but never fewer than this many rows, since d_text is
# read and written once per strip.
WORKSPACE_BYTES = 256 * 2**20
LEAST_STRIP_ROWS = 2048


Sides = tuple[Tensor, Tensor, Tensor, Tensor]


class Tile(NamedTuple):
    """A kernel's tile and launch parameters."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @property
    def lanes(self) -> int:
        """Rows that different threads hold, if a warp has 16 rows and each thread 2 of them."""
        return min(self.block_m // 2, 8 * self.num_warps)

    @property
    def blocks(self) -> dict[str, int]:
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n}


# By (kernel, half-precision features). benchmarks/results has what they occupy.
TILES = {
    ("sums", True): Tile(128, 128, 64, 8, 3),
    ("sums_with_reference", True): Tile(128, 64, 64, 8, 3),
    ("sums_online", True): Tile(64, 64, 64, 8, 3),
    ("strip", True): Tile(128, 128, 64, 8, 3),
    ("strip_with_reference", True): Tile(128, 128, 64, 8, 3),
    ("strip_online", True): Tile(128, 32, 64, 8, 3),
    ("sums", False): Tile(64, 64, 32, 4, 3),
    ("sums_with_reference", False): Tile(64, 64, 16, 8, 3),
    ("sums_online", False): Tile(64, 64, 16, 8, 3),
    ("strip", False): Tile(64, 64, 32, 8, 3),
    ("strip_with_reference", False): Tile(64, 64, 32, 8, 3),
    ("strip_online", False): Tile(64, 64, 32, 8, 3),
}

# Replacements for one architecture, for widths that block_k divides: with the masks of other widths
# they would spill.
EVEN_TILES = {
    "sm_90": {
        ("sums", True): Tile(256, 128, 64, 8, 3),
        ("sums_with_reference", True): Tile(64, 128, 64, 4, 3),
        ("strip", True): Tile(128, 256, 64, 8, 3),
    },
    # A tile of 128 x 128 would spill 592 bytes a thread.
    "sm_100": {("strip_with_reference", True): Tile(128, 64, 64, 8, 3)},
    # 64 KB of shared memory.
    "gfx": {("sums", True): Tile(128, 128, 64, 8, 2)},
}

# The fastest tiles that were measured on a GPU, if `gpu_tiles.json` of `make gpu` was put here.
MEASURED = Path(__file__).with_name("tiles.json")


def read_tiles(path: Path) -> dict[str, dict[tuple[str, bool], Tile]]:
    """Return measured tiles by architecture, as `EVEN_TILES` has them; none without the file."""
    table = json.loads(path.read_text("utf-8"))["tiles"] if path.is_file() else {}
    return {
        architecture: {(kernel, True): Tile(*numbers) for kernel, numbers in tiles.items()}
        for architecture, tiles in table.items()
    }


for _name, _tiles in read_tiles(MEASURED).items():
    EVEN_TILES.setdefault(_name, {}).update(_tiles)


def choose_tile(kernel: str, is_half: bool, widths: tuple[int, ...], architecture: str) -> Tile:
    """Choose the tile of a launch with features of these widths, D and D0."""
    key = kernel, is_half
    tile = EVEN_TILES.get(architecture, {}).get(key, TILES[key])
    if all(width % tile.block_k == 0 for width in widths):
        return tile
    tile = TILES[key]
    return tile._replace(block_n=64) if key == ("strip_with_reference", True) else tile


class Features(NamedTuple):
    """A batch as the kernels multiply it: rows contiguous, all in one dtype."""

    image: Tensor  # [N, D]
    text: Tensor  # [N, D]
    ref_image: Tensor  # [N, D0]; without a reference, image and text once more
    ref_text: Tensor
    strides: tuple[int, ...]  # of the four
    widths: tuple[int, int]
    products: str  # as `resolve_products` returns them
    is_rounded: bool  # by a kernel, which fills the memory that is allocated here

    @classmethod
    def of(cls, given: Sides, products: str) -> Features:
        """Prepare features with contiguous rows."""
        image, text, ref_image, ref_text = given
        dtype = HALF_DTYPES.get(products, torch.float32)
        is_rounded = False
        if any(side.dtype != dtype for side in given):
            is_rounded = products in HALF_DTYPES
            made = [
                side.new_empty(side.shape, dtype=dtype) if is_rounded else side.to(dtype)
                for side in (given[:2] if ref_image is image and ref_text is text else given)
            ]
            image, text, ref_image, ref_text = made[0], made[1], made[-2], made[-1]
        strides = image.stride(0), text.stride(0), ref_image.stride(0), ref_text.stride(0)
        widths = image.shape[1], ref_image.shape[1]
        return cls(image, text, ref_image, ref_text, strides, widths, products, is_rounded)

    def plan(self, kernel: str) -> tuple[Tile, dict[str, Any]]:
        """A kernel's tile and compile-time arguments."""
        return plan_kernel(kernel, self.products, self.widths, self.image.device)


@functools.lru_cache(maxsize=1024)
def plan_kernel(
    kernel: str, products: str, widths: tuple[int, int], device: torch.device
) -> tuple[Tile, dict[str, Any]]:
    """The tile and the compile-time arguments of a kernel that multiplies image and text."""
    architecture = _architecture(device)
    tile = choose_tile(kernel, products in HALF_DTYPES, widths, architecture)
    # fp32 products come from three in TF32: as exact, and faster than without tensor cores.
    exact = "ieee" if architecture == "gfx" else "tf32x3"
    return tile, tile.blocks | {
        "BLOCK_K": tile.block_k,
        "EVEN_K": all(width % tile.block_k == 0 for width in widths),
        "PRECISION": exact if products == "fp32" else "tf32",
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def select_sides(batch: Batch) -> Sides:
    """image and text, and the reference's or, without one, image and text once more."""
    if batch.ref_image is None or batch.ref_text is None:
        return batch.image, batch.text, batch.image, batch.text
    return batch.image, batch.text, batch.ref_image, batch.ref_text


def with_contiguous_rows(batch: Batch) -> Batch:
    """Make the rows contiguous, and an fp64 reference fp32."""

    def prepare(side: Tensor) -> Tensor:
        if side.dim() == 0:
            return side
        side = side if side.stride(1) == 1 or side.shape[1] == 1 else side.contiguous()
        return side.float() if side.dtype == torch.float64 else side

    return batch.map(prepare)


@functools.cache
def _architecture(device: torch.device) -> str:
    """Name the architecture for `choose_tile`: such as "sm_90", or "gfx" for AMD's.

    "sm_100" is every Blackwell for data centres (10.0 and 10.3): all have the same registers.
    """
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx"
    major, minor = torch.cuda.get_device_capability(device)
    return "sm_100" if major == 10 else f"sm_{major}{minor}"


def count_rectangles(n: int, tile: Tile) -> int:
    """Programs of a sweep."""
    return count_slots(n, tile.block_m) * count_slots(n, tile.block_n)


def count_slots(n: int, block: int) -> int:
    """As the kernels' function of that name."""
    blocks = -(-n // block)
    return -(-blocks // max(-(-blocks // int(SLOTS)), 1))


def strip_stride(n: int) -> int:
    """As the kernels' function of that name."""
    return -(-n // 64) * 64


def plan_strips(n: int, elements: int, block_m: int) -> list[slice]:
    """Divide the rows of G into strips of equal length, but for the last one's remainder.

    All rows if they fit in `elements` elements; else whole row blocks, at least one.
    """
    stride = strip_stride(n)
    longest = max(elements // stride // block_m, 1) * block_m
    count = 1 if n * stride <= elements else -(-n // longest)
    length = -(-n // count // block_m) * block_m
    return [slice(start, min(start + length, n)) for start in range(0, n, length)]
