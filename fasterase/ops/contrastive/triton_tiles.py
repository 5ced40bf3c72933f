"""Tiles of the Triton kernels that multiply features, by what they run on."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """A kernel's tile and launch parameters."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @property
    def lanes(self) -> int:
        """Rows that different threads hold where a warp takes 16 rows, 8 and 8 of the same."""
        return min(self.block_m // 2, 8 * self.num_warps)

    def divides(self, widths: tuple[int, ...]) -> bool:
        return all(width % self.block_k == 0 for width in widths)


# By (kernel, with reference, half-precision features): of those that spill nothing on sm_80, sm_90
# and sm_100 (benchmarks/gpu_model) the fastest by its cost model. fp32 products
# run without tensor cores ("ieee"), on smaller tiles. "strip" and "strip_online" fill the same
# strips and agree in block_m.
TILES = {
    ("sweep", False, True): Tile(128, 128, 64, 8, 3),
    ("sweep", True, True): Tile(128, 64, 64, 8, 3),
    ("online", False, True): Tile(64, 128, 64, 8, 3),
    ("online", True, True): Tile(64, 64, 64, 8, 3),
    ("strip", False, True): Tile(128, 128, 64, 8, 3),
    ("strip", True, True): Tile(128, 128, 64, 8, 3),
    ("strip_online", False, True): Tile(128, 64, 64, 8, 3),
    ("strip_online", True, True): Tile(128, 32, 64, 8, 3),
    ("sweep", False, False): Tile(64, 64, 32, 4, 3),
    ("sweep", True, False): Tile(64, 64, 16, 8, 3),
    ("online", False, False): Tile(64, 64, 32, 8, 3),
    ("online", True, False): Tile(64, 64, 16, 8, 3),
    ("strip", False, False): Tile(64, 64, 32, 8, 3),
    ("strip", True, False): Tile(64, 64, 32, 8, 3),
    ("strip_online", False, False): Tile(64, 64, 32, 4, 3),
    ("strip_online", True, False): Tile(64, 64, 32, 8, 3),
}

# Instead, on one architecture, for widths that block_k divides: the masks of others would spill.
EVEN_TILES = {
    "sm_90": {
        ("sweep", False, True): Tile(256, 128, 64, 8, 3),
        ("sweep", True, True): Tile(64, 128, 64, 4, 3),
        ("strip", False, True): Tile(128, 256, 64, 8, 3),
    },
    # 64 KB of shared memory.
    "gfx": {("sweep", False, True): Tile(128, 128, 64, 8, 2)},
}


def choose_tile(
    kernel: str, has_ref: bool, is_half: bool, widths: tuple[int, ...], architecture: str
) -> Tile:
    """The tile of a launch.

    kernel: "sweep", "online", "strip" or "strip_online".
    widths: D of the features, and of their reference.
    architecture: "sm_90" and the like, "gfx" for AMD's; one without entries has the general tiles.
    """
    key = kernel, has_ref, is_half
    even = EVEN_TILES.get(architecture, {}).get(key)
    if even is not None and even.divides(widths):
        return even
    tile = TILES[key]
    if key == ("strip", True, True) and not tile.divides(widths):
        return tile._replace(block_n=tile.block_n // 2)
    return tile
