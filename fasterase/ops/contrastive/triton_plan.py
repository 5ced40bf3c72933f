"""Plans of the Triton launches: tiles, compile-time arguments, tables of the work."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator
from itertools import accumulate
from typing import NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

from fasterase.errors import InputError
from fasterase.kernels.contrastive_tables import SLOTS, Item, Segment, Span, load_item
from fasterase.ops.contrastive.operator import Batch
from fasterase.ops.contrastive.products import HALF_DTYPES

# Kernels defined under TRITON_INTERPRET=1 run in numpy, on CPU tensors.
INTERPRETED = not isinstance(load_item, triton.JITFunction)

# Rows per program of the kernels that add up slots.
SPAN = 128
# Strips visited together, so that concurrent tiles share rows and columns in L2.
_BAND = 8


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

    def divides(self, widths: tuple[int, ...]) -> bool:
        return all(width % self.block_k == 0 for width in widths)


# By (kernel, with reference, half-precision features): the fastest by the cost model of
# benchmarks/gpu_model among tiles without spills on sm_80, sm_90 and sm_100. fp32 products run
# without tensor cores ("ieee"), on smaller tiles. "strip" and "strip_online" fill the same strips
# and therefore share block_m.
TILES = {
    ("sums", False, True): Tile(128, 128, 64, 8, 3),
    ("sums", True, True): Tile(128, 64, 64, 8, 3),
    ("sums_online", False, True): Tile(64, 128, 64, 8, 3),
    ("sums_online", True, True): Tile(64, 64, 64, 8, 3),
    ("strip", False, True): Tile(128, 128, 64, 8, 3),
    ("strip", True, True): Tile(128, 128, 64, 8, 3),
    ("strip_online", False, True): Tile(128, 64, 64, 8, 3),
    ("strip_online", True, True): Tile(128, 32, 64, 8, 3),
    ("sums", False, False): Tile(64, 64, 32, 4, 3),
    ("sums", True, False): Tile(64, 64, 16, 8, 3),
    ("sums_online", False, False): Tile(64, 64, 32, 8, 3),
    ("sums_online", True, False): Tile(64, 64, 16, 8, 3),
    ("strip", False, False): Tile(64, 64, 32, 8, 3),
    ("strip", True, False): Tile(64, 64, 32, 8, 3),
    ("strip_online", False, False): Tile(64, 64, 32, 4, 3),
    ("strip_online", True, False): Tile(64, 64, 32, 8, 3),
}

# Replacements for one architecture, for widths that block_k divides: with the masks of other widths
# they would spill.
EVEN_TILES = {
    "sm_90": {
        ("sums", False, True): Tile(256, 128, 64, 8, 3),
        ("sums", True, True): Tile(64, 128, 64, 4, 3),
        ("strip", False, True): Tile(128, 256, 64, 8, 3),
    },
    # 64 KB of shared memory.
    "gfx": {("sums", False, True): Tile(128, 128, 64, 8, 2)},
}


def choose_tile(
    kernel: str, has_ref: bool, is_half: bool, widths: tuple[int, ...], architecture: str
) -> Tile:
    """Choose the tile of a launch.

    kernel: "sums", "sums_online", "strip" or "strip_online".
    widths: D of the features and of their reference.
    architecture: such as "sm_90", or "gfx" for AMD's; one without entries has the general tiles.
    """
    key = kernel, has_ref, is_half
    even = EVEN_TILES.get(architecture, {}).get(key)
    if even is not None and even.divides(widths):
        return even
    tile = TILES[key]
    if key == ("strip", True, True) and not tile.divides(widths):
        return tile._replace(block_n=tile.block_n // 2)
    return tile


class Features(NamedTuple):
    """A batch as the kernels multiply it: rows contiguous, all in one dtype."""

    image: Tensor  # [N, D]
    text: Tensor  # [N, D]
    scale: Tensor  # [] fp32
    ref_image: Tensor  # [N, D0]; without a reference, image, text and scale once more
    ref_text: Tensor
    ref_scale: Tensor
    has_ref: bool
    products: str  # as `resolve_products` returns them
    stretches: Tensor | None  # [matrices, 2] if rounded by `round_features`, which fills them

    @classmethod
    def of(cls, batch: Batch, products: str) -> Features:
        """Prepare the features of `with_contiguous_rows`.

        Features to be rounded to half precision have their memory here, and their numbers after
        `round_features`.
        """
        image, text, scale, ref_image, ref_text, ref_scale = batch
        given = [side for side in (image, text, ref_image, ref_text) if side is not None]
        dtype = HALF_DTYPES.get(products, torch.float32)
        stretches = None
        if products in HALF_DTYPES and any(side.dtype != dtype for side in given):
            stretches = scale.new_empty(batch.matrices, 2)
            sides = [torch.empty_like(side, dtype=dtype) for side in given]
            scale = torch.empty_like(scale)
            ref_scale = None if ref_scale is None else torch.empty_like(scale)
        else:
            sides = [side.to(dtype) for side in given]
        pair = (sides[0], sides[1], scale)
        ref = pair if ref_scale is None else (sides[2], sides[3], ref_scale)
        return cls(*pair, *ref, ref_scale is not None, products, stretches)

    @property
    def is_half(self) -> bool:
        return self.products in HALF_DTYPES

    def strides(self) -> tuple[int, int, int, int]:
        return (
            self.image.stride(0),
            self.text.stride(0),
            self.ref_image.stride(0),
            self.ref_text.stride(0),
        )

    def tile(self, kernel: str) -> Tile:
        return choose_tile(
            kernel,
            self.has_ref,
            self.is_half,
            (self.image.shape[1], self.ref_image.shape[1]),
            _architecture(self.image.device),
        )

    def meta(self, tile: Tile) -> dict[str, object]:
        """Compile-time arguments of kernels that multiply image and text."""
        return {
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "EVEN_K": self.image.shape[1] % tile.block_k == 0,
            "PRECISION": "tf32" if self.products == "tf32" else "ieee",
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }

    def ref_meta(self, tile: Tile) -> dict[str, object]:
        """Compile-time arguments of kernels that also multiply the reference."""
        return self.meta(tile) | {"EVEN_REF_K": self.ref_image.shape[1] % tile.block_k == 0}


def with_contiguous_rows(batch: Batch) -> Batch:
    """Make the rows contiguous, and an fp64 reference fp32."""

    def prepare(side: Tensor) -> Tensor:
        side = side if side.stride(1) == 1 or side.shape[1] == 1 else side.contiguous()
        return side.float() if side.dtype == torch.float64 else side

    ref_image, ref_text = (
        None if side is None else prepare(side) for side in (batch.ref_image, batch.ref_text)
    )
    return batch._replace(
        image=prepare(batch.image),
        text=prepare(batch.text),
        ref_image=ref_image,
        ref_text=ref_text,
    )


@functools.cache
def _architecture(device: torch.device) -> str:
    """Name the architecture for `choose_tile`: such as "sm_90", or "gfx" for AMD's."""
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


_Tables = TypeVar("_Tables")


def _is_capturing() -> bool:
    """Whether launches are being recorded into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _cached(make: Callable[..., _Tables]) -> Callable[..., _Tables]:
    """Cache the tables of the last 64 shapes, and forever those that CUDA graphs will read."""
    recent = functools.lru_cache(maxsize=64)(make)
    captured = functools.cache(recent)

    @functools.wraps(make)
    def tables(*shape: Hashable) -> _Tables:
        return (captured if _is_capturing() else recent)(*shape)

    return tables


class SumTables(NamedTuple):
    """Tables of a forward call, int32 on its device."""

    starts: Tensor  # [num_groups + 1] first row of each group
    items: Tensor  # [num_items, fields of Item]
    spans: Tensor  # [num_spans, fields of Span]


@_cached
def sum_tables(
    groups: tuple[int, ...], block_m: int, block_n: int, device: torch.device
) -> SumTables:
    """Make items of one rectangle of tiles each, at most SLOTS x SLOTS per group."""
    starts = [0, *accumulate(groups)]
    items: list[Item] = []
    spans: list[Span] = []
    for group, (start, n) in enumerate(zip(starts, groups, strict=False)):
        strips, chunks = _split(n, block_m), _split(n, block_n)
        for band in range(0, len(strips), _BAND):
            for chunk, cols in enumerate(chunks):
                for strip, rows in enumerate(strips[band : band + _BAND], start=band):
                    items.append(Item(start, n, *rows, strip, *cols, chunk, group))
        for first in range(0, n, SPAN):
            num_rows = min(SPAN, n - first)
            spans.append(Span(start + first, num_rows, len(strips), len(chunks), group, int(n > 1)))
    return SumTables(*(_table(rows, torch.int32, device) for rows in (starts, items, spans)))


def _split(n: int, block: int) -> list[tuple[int, int]]:
    """Split the blocks of n rows into at most SLOTS ranges (first, end)."""
    blocks = -(-n // block)
    step = -(-blocks // int(SLOTS))
    return [(first, min(first + step, blocks)) for first in range(0, blocks, step)]


class StripLaunch(NamedTuple):
    """Segments whose strips of G share the workspace at one time."""

    segments: tuple[Segment, ...]
    table: Tensor  # [num_segments, SEGMENT_FIELDS] int64


@_cached
def strip_launches(
    groups: tuple[int, ...], elements: int, block_m: int, block_n: int, device: torch.device
) -> tuple[StripLaunch, ...]:
    """Divide the rows of G into launches of at most `elements` elements.

    A strip has at least one row block, however small `elements` is.
    """
    return tuple(
        StripLaunch(tuple(segments), _table(segments, torch.int64, device))
        for segments in _segments_by_launch(groups, elements, block_m, block_n)
    )


def _segments_by_launch(
    groups: tuple[int, ...], elements: int, block_m: int, block_n: int
) -> Iterator[list[Segment]]:
    launch: list[Segment] = []
    used = tiles = start = 0
    for group, n in enumerate(groups):
        stride = -(-n // 64) * 64  # whole cache lines, which tensor-core GEMMs prefer
        first = 0
        while first < n:
            free = (elements - used) // stride
            rows = min(n - first, free if free >= n - first else free // block_m * block_m)
            if rows < 1:
                if launch:
                    yield launch
                    launch, used, tiles = [], 0, 0
                    continue
                rows = min(n - first, block_m)
            tiles += -(-rows // block_m) * -(-n // block_n)
            launch.append(
                Segment(
                    start=start,
                    n=n,
                    first=first,
                    num_rows=rows,
                    group=group,
                    offset=used,
                    stride=stride,
                    last_tile=tiles,
                )
            )
            used += rows * stride
            first += rows
        start += n
    if launch:
        yield launch


def _table(rows: object, dtype: torch.dtype, device: torch.device) -> Tensor:
    if _is_capturing():
        raise InputError(
            "groups and the shape of image are new to this process, and a CUDA graph that is being "
            "captured cannot copy tables to the GPU. Run the same step once before the capture."
        )
    return torch.tensor(rows, dtype=dtype).to(device)
