"""Plans of the Triton launches: tiles, compile-time arguments, groups, strips of G."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fasterase.kernels.contrastive_layout import SLOTS, locate_rows
from fasterase.ops.contrastive.checks import HALF_DTYPES
from fasterase.ops.contrastive.operator import Batch, Groups

# Kernels defined under TRITON_INTERPRET=1 run in numpy, on CPU tensors.
INTERPRETED = not isinstance(locate_rows, triton.JITFunction)

# Elements of a strip of G: this many bytes, but never fewer than this many rows, since d_text is
# read and written once per strip.
WORKSPACE_BYTES = 256 * 2**20
LEAST_STRIP_ROWS = 2048


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


# By (kernel, half-precision features). "strip_with_reference" spills where it completes the KL, and
# on sm_100 always; smaller tiles would load half as much again. benchmarks/results has both counts.
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
    products: str  # as `resolve_products` returns them
    is_rounded: bool  # by a kernel, which fills the memory that is allocated here

    @classmethod
    def of(cls, batch: Batch, products: str) -> Features:
        """Prepare the features of a batch with contiguous rows."""
        given = [batch.image, batch.text]
        if batch.ref_image is not None and batch.ref_text is not None:
            given += [batch.ref_image, batch.ref_text]
        dtype = HALF_DTYPES.get(products, torch.float32)
        is_rounded = products in HALF_DTYPES and any(side.dtype != dtype for side in given)
        if is_rounded:
            sides = [side.new_empty(side.shape, dtype=dtype) for side in given]
        else:
            sides = [side.to(dtype) for side in given]
        return cls(sides[0], sides[1], sides[-2], sides[-1], products, is_rounded)

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(side.stride(0) for side in self[:4])

    @property
    def widths(self) -> tuple[int, int]:
        return self.image.shape[1], self.ref_image.shape[1]

    def tile(self, kernel: str) -> Tile:
        is_half = self.products in HALF_DTYPES
        return choose_tile(kernel, is_half, self.widths, _architecture(self.image.device))

    def meta(self, tile: Tile) -> dict[str, object]:
        """Compile-time arguments of kernels that multiply image and text."""
        # fp32 products come from three in TF32: as exact, and faster than without tensor cores.
        exact = "ieee" if _architecture(self.image.device) == "gfx" else "tf32x3"
        return tile.blocks | {
            "BLOCK_K": tile.block_k,
            "EVEN_K": all(width % tile.block_k == 0 for width in self.widths),
            "PRECISION": exact if self.products == "fp32" else "tf32",
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }


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
    """Name the architecture for `choose_tile`: such as "sm_90", or "gfx" for AMD's."""
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


class Pair(NamedTuple):
    """The one or two groups of a launch, as rows of the batch."""

    rows: slice
    sizes: tuple[int, int]  # 0 for a second group that is not there
    groups: slice

    @property
    def split(self) -> int:
        return self.sizes[0]

    @property
    def num_groups(self) -> int:
        return self.groups.stop - self.groups.start

    def count_blocks(self, block: int) -> int:
        """Blocks of rows that do not cross groups."""
        return sum(-(-n // block) for n in self.sizes)

    def count_rectangles(self, tile: Tile) -> int:
        """Programs of a sweep."""
        return sum(count_slots(n, tile.block_m) * count_slots(n, tile.block_n) for n in self.sizes)


def pairs_of_groups(groups: Groups) -> Iterator[Pair]:
    """Divide the groups, none of which is empty, into launches of two."""
    start = 0
    for k in range(0, len(groups), 2):
        first, second = (*groups[k : k + 2], 0)[:2]
        rows = slice(start, start + first + second)
        yield Pair(rows, (first, second), slice(k, min(k + 2, len(groups))))
        start = rows.stop


def count_slots(n: int, block: int) -> int:
    """As the kernels' function of that name."""
    blocks = -(-n // block)
    return -(-blocks // max(-(-blocks // int(SLOTS)), 1))


class Strip(NamedTuple):
    """Rows of G of one group, in the workspace of a launch."""

    group_start: int  # in the batch
    n: int  # size of the group
    first: int  # first row in the group
    num_rows: int
    offset: int  # in the workspace, in elements

    @property
    def rows(self) -> slice:
        return slice(self.group_start + self.first, self.group_start + self.first + self.num_rows)

    @property
    def cols(self) -> slice:
        return slice(self.group_start, self.group_start + self.n)

    def select(self, workspace: Tensor) -> Tensor:
        """G [num_rows, n] in the workspace."""
        stride = strip_stride(self.n)
        g = workspace[self.offset : self.offset + self.num_rows * stride]
        return g.view(self.num_rows, stride)[:, : self.n]


def strip_stride(n: int) -> int:
    """As the kernels' function of that name."""
    return -(-n // 64) * 64


def plan_strips(sizes: tuple[int, int], elements: int, block_m: int) -> list[tuple[Strip, Strip]]:
    """Divide the rows of G into launches of at most `elements` elements, a strip of each group.

    Both groups whole if they fit; else one strip per launch, of at least one row block, and the
    other has no rows.
    """
    first, second = sizes
    strides = strip_stride(first), strip_stride(second)
    if first * strides[0] + second * strides[1] <= elements:
        whole = Strip(0, first, 0, first, 0), Strip(first, second, 0, second, first * strides[0])
        return [whole]
    length = max(elements // max(strides) // block_m, 1) * block_m
    launches = []
    for group in (0, 1):
        for start in range(0, sizes[group], length):
            rows = [0, 0]
            rows[group] = min(length, sizes[group] - start)
            one, other = Strip(0, first, start, rows[0], 0), Strip(first, second, start, rows[1], 0)
            launches.append((one, other))
    return launches
