"""The contrastive operator on Triton kernels, as torch operators.

`fasterase::contrastive_triton` runs on CUDA tensors. Under TRITON_INTERPRET=1 the same code runs on
CPU tensors as `fasterase::contrastive_triton_interpreted`.

Memory O(N D) and a workspace of WORKSPACE_BYTES. FLOPs, forward and backward: 12 n^2 D per group
with the KL, 8 n^2 D without. Half-precision products go into fp32 logits, and G is rounded to their
dtype beside its diagonal. The diagonal and the features' gradients come from the features as given.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fasterase.errors import InputError
from fasterase.kernels.contrastive_gradients import (
    feature_gradients,
    gradient_factors,
    gradient_strip,
    gradient_strip_from_cosines,
    gradient_strip_without_reference,
)
from fasterase.kernels.contrastive_losses import losses_and_softmaxes
from fasterase.kernels.contrastive_shift import (
    group_shifts,
    norms_and_diagonal,
    round_features,
)
from fasterase.kernels.contrastive_sums import (
    add_partial_sums,
    row_and_column_sums,
    row_and_column_sums_with_reference,
)
from fasterase.kernels.contrastive_sums_online import row_and_column_sums_online
from fasterase.kernels.contrastive_tables import (
    PART_STATS,
    PART_STATS_WITH_REF,
    SLOTS,
    SOFTMAX_FIELDS,
    SUMS,
    SUMS_WITH_REF,
    Segment,
)
from fasterase.ops.contrastive.operator import Batch, Gradients, Groups, Wanted, register
from fasterase.ops.contrastive.products import refuse_tf32
from fasterase.ops.contrastive.triton_plan import (
    INTERPRETED,
    SPAN,
    Features,
    StripLaunch,
    strip_launches,
    sum_tables,
    with_contiguous_rows,
)

# Bytes of G (and of S and S0 if cuBLAS makes them) allocated at one time in a backward pass.
WORKSPACE_BYTES = 256 * 2**20

# Tiles that share one loop over depth in `gradient_strip_without_reference`. More would leave too
# few programs to balance.
RUN_LENGTH = 4
# Tile of `gradient_strip_from_cosines`, which only reads and writes.
_COSINES_TILE = (32, 128)
# Rows and depth of `norms_and_diagonal` and `feature_gradients`, which stream the features.
_ROWS, _DEPTH = 16, 128
# fp16 is normal down to 6e-5; with |G| <= 6 this keeps probabilities of 1e-8 and stays below 65504.
_GAIN_FP16 = 8192.0


def _num_programs(device: torch.device, wanted: int) -> int:
    """Limit the programs to two per multiprocessor.

    Kernels with more than 128 registers per thread fit once; the second block then follows the
    first, and the work is balanced just as well.
    """
    if INTERPRETED:
        return min(wanted, 2)
    return min(wanted, 2 * torch.cuda.get_device_properties(device).multi_processor_count)


def forward(batch: Batch, groups: Groups, products: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute (losses [4 or 2, N], softmaxes [matrices, SOFTMAX_FIELDS, 2, N], flags, peaks).

    losses: ce row, ce column, kl row, kl column; fp32.
    softmaxes: as in `kernels/contrastive_tables.py`; fp32.
    flags: [num_groups] int32; 1 if a group has one shift per row and column instead of one for all.
    peaks: [matrices, 2, num_groups] fp32, the length of the longest row of either tower.
    """
    batch = with_contiguous_rows(batch)
    features = Features.of(batch, products)
    image, text, scale, ref_image, ref_text, ref_scale, has_ref = features[:7]
    device, n, matrices = image.device, len(image), batch.matrices
    num_groups = len(groups)
    num_parts = int(PART_STATS_WITH_REF if has_ref else PART_STATS)
    num_sums = int(SUMS_WITH_REF if has_ref else SUMS)
    new = image.new_empty
    norms = new((matrices, 2, n), dtype=torch.float32)
    diagonals = new((matrices, n), dtype=torch.float32)
    shifts = new((matrices, num_groups), dtype=torch.float32)
    flags = new((num_groups,), dtype=torch.int32)
    peaks = new((matrices, 2, num_groups), dtype=torch.float32)
    parts = new((2, num_parts, int(SLOTS), n), dtype=torch.float32)
    sums = new((2, num_sums, n), dtype=torch.float32)
    losses = new((2 * matrices, n), dtype=torch.float32)
    softmaxes = new((matrices, int(SOFTMAX_FIELDS), 2, n), dtype=torch.float32)

    for k, (left, right, pair_scale) in enumerate(_pairs(batch)):
        norms_and_diagonal[(triton.cdiv(n, _ROWS),)](
            left, right, pair_scale, norms[k], diagonals[k], left.stride(0), right.stride(0), n,
            left.shape[1], BLOCK_R=_ROWS, BLOCK_K=_DEPTH,
        )  # fmt: skip
    tile = features.tile("sums")
    tables = sum_tables(groups, tile.block_m, tile.block_n, device)
    group_shifts[(num_groups, matrices)](
        norms, batch.scale, batch.ref_scale if has_ref else batch.scale, tables.starts, shifts,
        peaks, flags, n, BLOCK=1024,
    )  # fmt: skip
    _round(features, batch, peaks)
    arguments = (image, text, ref_image, ref_text, scale, ref_scale)
    widths = (image.shape[1], ref_image.shape[1])
    num_items = len(tables.items)
    programs = (_num_programs(device, num_items),)
    if has_ref:
        row_and_column_sums_with_reference[programs](
            *arguments, shifts, tables.items, parts, *features.strides(), num_items, num_groups, n,
            *widths, **features.ref_meta(tile),
        )  # fmt: skip
    else:
        row_and_column_sums[programs](
            image, text, scale, shifts, tables.items, parts, image.stride(0), text.stride(0),
            num_items, n, widths[0], LANES=tile.lanes, **features.meta(tile),
        )  # fmt: skip
    spans = (len(tables.spans),)
    add_partial_sums[spans](parts, tables.spans, sums, flags, n, HAS_REF=has_ref, BLOCK_R=SPAN)
    tile = features.tile("sums_online")
    online = sum_tables(groups, tile.block_m, tile.block_n, device)
    num_items = len(online.items)
    row_and_column_sums_online[(_num_programs(device, num_items),)](
        *arguments, flags, online.items, parts, *features.strides(), num_items, n, *widths,
        HAS_REF=has_ref, **features.ref_meta(tile),
    )  # fmt: skip
    losses_and_softmaxes[spans](
        parts, sums, online.spans, shifts, flags, diagonals, losses, softmaxes, num_groups,
        n, HAS_REF=has_ref, BLOCK_R=SPAN,
    )  # fmt: skip
    return losses, softmaxes, flags, peaks


def _pairs(batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The current image, text and scale, and the reference's if there is one."""
    yield batch.image, batch.text, batch.scale
    if batch.ref_image is not None and batch.ref_text is not None and batch.ref_scale is not None:
        yield batch.ref_image, batch.ref_text, batch.ref_scale


def _round(features: Features, batch: Batch, peaks: Tensor) -> None:
    """Fill features of half precision from the batch, where the batch has others."""
    if features.stretches is None:
        return
    rounded = (features[:3], features[3:6])
    for k, (image, text, scale) in enumerate(_pairs(batch)):
        n, width = image.shape
        round_features[(triton.cdiv(n, _ROWS),)](
            image, text, scale, peaks[k], *rounded[k], features.stretches[k], image.stride(0),
            text.stride(0), peaks.shape[2], n, width, BLOCK_R=_ROWS, BLOCK_K=_DEPTH,
        )  # fmt: skip


def is_fused_faster(features: Features) -> bool:
    """Choose between the two ways to make G, until both are measured on the GPU at hand.

    Fused for half-precision features, where only G touches memory (6 bytes per element, instead of
    22 and as many again for the reference). Not for fp32, whose exact products are faster in cuBLAS
    than in a kernel without tensor cores.
    """
    return features.is_half


class _Strips(NamedTuple):
    """Fills the workspace with strips of G."""

    features: Features
    softmaxes: Tensor
    factors: Tensor
    flags: Tensor
    workspace: Tensor
    gain: float

    def fill(self, launch: StripLaunch, online_launch: StripLaunch) -> None:
        """Compute the strips of one launch from the features."""
        if self.features.has_ref:
            self._fill(launch, is_online=False)
        else:
            self._fill_without_reference(launch)
        self._fill(online_launch, is_online=True)

    def _fill(self, launch: StripLaunch, *, is_online: bool) -> None:
        """Compute the strips of the groups that are flagged, or of the others.

        One program per tile; online, where tiles seldom have work, only as many as run at once.
        """
        features = self.features
        image, text, scale, ref_image, ref_text, ref_scale, has_ref = features[:7]
        num_tiles = launch.segments[-1].last_tile
        programs = _num_programs(image.device, num_tiles) if is_online else num_tiles
        gradient_strip[(programs,)](
            image, text, ref_image, ref_text, scale, ref_scale, self.softmaxes, self.factors,
            self.flags, launch.table, self.workspace, *features.strides(), num_tiles, len(image),
            image.shape[1], ref_image.shape[1], self.gain, IS_ONLINE=is_online, HAS_REF=has_ref,
            **features.ref_meta(features.tile("strip_online" if is_online else "strip")),
        )  # fmt: skip

    def _fill_without_reference(self, launch: StripLaunch) -> None:
        """Compute the strips of the groups that are not flagged."""
        features = self.features
        image, text, scale = features[:3]
        tile = features.tile("strip")
        num_tiles = launch.segments[-1].last_tile
        # Longer runs only if there are enough tiles for all multiprocessors.
        length = max(1, min(RUN_LENGTH, num_tiles // _num_programs(image.device, num_tiles)))
        programs = sum(
            triton.cdiv(triton.cdiv(segment.num_rows, tile.block_m), length)
            * triton.cdiv(segment.n, tile.block_n)
            for segment in launch.segments
        )
        gradient_strip_without_reference[(programs,)](
            image, text, scale, self.softmaxes, self.factors, self.flags, launch.table,
            self.workspace, image.stride(0), text.stride(0), len(image), image.shape[1], length,
            self.gain, **features.meta(tile),
        )  # fmt: skip

    def fill_from_cosines(self, segment: Segment, g: Tensor) -> None:
        """Compute one segment's strip `g` from cosines made by cuBLAS."""
        features = self.features
        rows, cols = segment.batch_rows, segment.batch_cols
        cosines = self.softmaxes.new_empty(2 if features.has_ref else 1, *g.shape)
        _multiply(features.image[rows], features.text[cols].T, cosines[0], beta=0)
        if features.has_ref:
            _multiply(features.ref_image[rows], features.ref_text[cols].T, cosines[1], beta=0)
        block_m, block_n = _COSINES_TILE
        grid = (triton.cdiv(segment.num_rows, block_m), triton.cdiv(segment.n, block_n))
        gradient_strip_from_cosines[grid](
            cosines[0], cosines[-1], features.scale, features.ref_scale, self.softmaxes,
            self.factors, self.flags, g, cosines.stride(1), g.stride(0), segment.start, segment.n,
            segment.first, segment.num_rows, segment.group, len(features.image), self.gain,
            HAS_REF=features.has_ref, BLOCK_M=block_m, BLOCK_N=block_n,
        )  # fmt: skip


def backward(
    upstream: Tensor,  # [4 or 2, N]
    batch: Batch,
    softmaxes: Tensor,
    flags: Tensor,
    peaks: Tensor,
    groups: Groups,
    products: str,
    *,
    wants_image: bool,
    wants_text: bool,
    is_rounded: bool,
    is_fused: bool | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Compute the gradients of `(upstream * losses).sum()` in image, text and scale.

    is_rounded: return image's and text's in their own dtypes, otherwise in fp32.
    is_fused: make strips of G from the features in one kernel, otherwise S and S0 by cuBLAS in fp32
        and G from them; None: as `is_fused_faster` chooses.
    """
    batch = with_contiguous_rows(batch)
    features = Features.of(batch, products)
    _round(features, batch, peaks)
    if is_fused is None:
        is_fused = is_fused_faster(features)
    image, text, has_ref = features.image, features.text, features.has_ref
    n, width = image.shape
    peak = upstream.abs().masked_fill(~upstream.isfinite(), 0.0).amax()
    peak = torch.where(peak == 0, 1.0, peak)
    factors = softmaxes.new_empty(len(softmaxes), 2, n)
    diagonal = softmaxes.new_empty(n)
    gradient_factors[(triton.cdiv(n, SPAN),)](
        upstream.contiguous(), peak, softmaxes, factors, diagonal, n, HAS_REF=has_ref, BLOCK_R=SPAN
    )
    # The gradient of scale follows from either tower's, so one is made even if neither is wanted.
    makes_image = wants_image or not wants_text
    d_image = softmaxes.new_empty(n, width) if makes_image else None
    d_text = softmaxes.new_zeros(n, width) if wants_text else None

    element_bytes = image.element_size() + (0 if is_fused else 4 * len(softmaxes))
    launches, online_launches = (
        strip_launches(
            groups, WORKSPACE_BYTES // element_bytes, tile.block_m, tile.block_n, image.device
        )
        for tile in (features.tile("strip"), features.tile("strip_online"))
    )
    ends = (launch.segments[-1] for launch in launches)
    workspace = image.new_empty(max(end.offset + end.num_rows * end.stride for end in ends))
    gain = _GAIN_FP16 if image.dtype == torch.float16 else 1.0
    strips = _Strips(features, softmaxes, factors, flags, workspace, gain)
    for launch, online_launch in zip(launches, online_launches, strict=True):
        if is_fused:
            strips.fill(launch, online_launch)
        for segment in launch.segments:
            rows, cols = segment.batch_rows, segment.batch_cols
            g = workspace[segment.offset :][: segment.num_rows * segment.stride]
            g = g.view(segment.num_rows, segment.stride)[:, : segment.n]
            if not is_fused:
                strips.fill_from_cosines(segment, g)
            if d_image is not None:
                _multiply(g, text[cols], d_image[rows], beta=0)
            if d_text is not None:
                _multiply(g.T, image[rows], d_text[cols], beta=1)

    d_scale = softmaxes.new_empty(n)
    is_stretched = features.stretches is not None
    image_stretch, text_stretch = peak, peak  # not read
    if features.stretches is not None:
        image_stretch, text_stretch = features.stretches[0]
    results: list[Tensor | None] = []
    for made, tower, partner, stretch in (
        (d_image, batch.image, batch.text, text_stretch),
        (d_text, batch.text, batch.image, image_stretch),
    ):
        if made is None:
            results.append(None)
            continue
        in_place = tower.dtype == torch.float32 or not is_rounded
        gradients = made if in_place else torch.empty_like(made, dtype=tower.dtype)
        feature_gradients[(triton.cdiv(n, _ROWS),)](
            made, diagonal, tower, partner, batch.scale, peak, stretch, gradients, d_scale,
            tower.stride(0), partner.stride(0), n, width, gain, IS_STRETCHED=is_stretched,
            BLOCK_R=_ROWS, BLOCK_K=_DEPTH,
        )  # fmt: skip
        results.append(gradients)
    return results[0] if wants_image else None, results[1], d_scale.sum()


def _multiply(left: Tensor, right: Tensor, out: Tensor, *, beta: int) -> None:
    """out = beta * out + left @ right, with out in fp32: never rounded between strips."""
    if left.dtype == torch.float32 or not left.is_cuda:
        out.addmm_(left.float(), right.float(), beta=beta)
    elif beta:
        torch.addmm(out, left, right, out_dtype=torch.float32, out=out)
    else:
        torch.mm(left, right, out_dtype=torch.float32, out=out)


def _check(batch: Batch, groups: Groups, is_differentiable: bool, products: str) -> tuple[Any, ...]:
    """Refuse what the kernels cannot take; the operators' option is how to multiply."""
    if not batch.image.is_cuda and not INTERPRETED:
        raise InputError(
            f"backend='triton' needs CUDA tensors; image is on {batch.image.device}. Move the "
            f"batch to a GPU, or use backend='auto'."
        )
    if batch.scale.dtype == torch.float64:
        raise InputError(
            "backend='triton' computes in fp32; got float64 features. Convert them with .float(), "
            "or use backend='chunked'."
        )
    return (products,)


def _forward(batch: Batch, groups: Groups, products: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(batch.image):
        return forward(batch, groups, products)


def _backward(
    upstream: Tensor,
    batch: Batch,
    saved: tuple[Tensor, ...],
    groups: Groups,
    wanted: Wanted,
    products: str,
) -> Gradients:
    softmaxes, flags, peaks = saved
    device = batch.image.device
    with (
        torch.cuda.device_of(batch.image),
        torch.autocast(device.type, enabled=False),
        refuse_tf32() if products == "fp32" else contextlib.nullcontext(),
    ):
        return backward(
            upstream,
            batch,
            softmaxes,
            flags,
            peaks,
            groups,
            products,
            wants_image=wanted.image,
            wants_text=wanted.text,
            is_rounded=wanted.rounded,
        )


contrastive_triton = register(
    "contrastive_triton_interpreted" if INTERPRETED else "contrastive_triton",
    {
        "flags": lambda batch, groups, products: batch.scale.new_empty(
            len(groups), dtype=torch.int32
        ),
        "peaks": lambda batch, groups, products: batch.scale.new_empty(
            batch.matrices, 2, len(groups)
        ),
    },
    key="CPU" if INTERPRETED else "CUDA",
    forward=_forward,
    backward=_backward,
    options_schema="str products",
    options=_check,
    backward_takes_options=True,
    # torch.compile(mode="reduce-overhead") would take a first call's tables for leaked outputs.
    tags=(torch.Tag.cudagraph_unsafe,),
)
