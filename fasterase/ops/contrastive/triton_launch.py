"""Launches of the Triton kernels: a forward and a backward of the contrastive operator."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fasterase.kernels import contrastive as forward_kernels
from fasterase.kernels import contrastive_backward as backward_kernels
from fasterase.kernels import contrastive_sweep as sweep_kernels
from fasterase.kernels.contrastive_online import sweep_online
from fasterase.kernels.contrastive_strip_run import strip_run
from fasterase.kernels.contrastive_tiles import SLOTS
from fasterase.ops.contrastive.triton_features import INTERPRETED as INTERPRETED
from fasterase.ops.contrastive.triton_features import Features as Features
from fasterase.ops.contrastive.triton_schedule import (
    SPAN,
    Segment,
    strip_tables,
    sweep_tables,
)

# Bytes of G (and of S and S0 where cuBLAS makes them) alive in a backward.
WORKSPACE_BYTES = 256 * 2**20

# Tiles that share one loop over depth in `strip_run`: more would leave fewer programs to even out.
RUN = 4
# Of `strip_of_logits`, which only reads and writes.
_LOGITS_TILE = (32, 128)
# Rows and depth of `row_statistics` and `gradients`, which stream the features.
_ROWS, _DEPTH = 16, 128
# fp16 is normal down to 6e-5; with |G| <= 6 this keeps probabilities of 1e-8 and stays below 65504.
_GAIN_FP16 = 8192.0


def _num_programs(device: torch.device, wanted: int) -> int:
    """Programs for two blocks a multiprocessor.

    Kernels of more than 128 registers a thread have room for one at a time; the second block then
    follows the first, and the work is spread as evenly.
    """
    if INTERPRETED:
        return min(wanted, 2)
    return min(wanted, 2 * torch.cuda.get_device_properties(device).multi_processor_count)


def forward(features: Features, groups: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """(losses [4 or 2, N], softmaxes [matrices, 3, 2, N], flags [num_groups]), all but flags fp32.

    losses: ce row, ce column, kl row, kl column. softmaxes, rows and columns: the shift, off over
    the sum of exp(s - shift), and off, the mass beside the diagonal. A flag is 1 where a group has
    a shift a row and column, not one of its own.
    """
    image, text, scale, ref_image, ref_text, ref_scale, has_ref = features
    device, n = image.device, len(image)
    matrices = 2 if has_ref else 1
    num_groups = len(groups)
    new = image.new_empty
    norms = new((matrices, 2, n), dtype=torch.float32)
    own = new((matrices, n), dtype=torch.float32)
    shift = new((matrices, num_groups), dtype=torch.float32)
    flags = new((num_groups,), dtype=torch.int32)
    parts = new((2, 5 if has_ref else 2, int(SLOTS), n), dtype=torch.float32)
    sums = new((2, 3 if has_ref else 1, n), dtype=torch.float32)
    losses = new((2 * matrices, n), dtype=torch.float32)
    softmaxes = new((matrices, 3, 2, n), dtype=torch.float32)

    tile = features.tile("sweep")
    tables = sweep_tables(groups, tile.block_m, tile.block_n, device)
    pairs = ((image, text, scale), (ref_image, ref_text, ref_scale))[:matrices]
    for k, (left, right, by) in enumerate(pairs):
        forward_kernels.row_statistics[(triton.cdiv(n, _ROWS),)](
            left, right, by, norms[k], own[k], left.stride(0), right.stride(0), n, left.shape[1],
            BLOCK_R=_ROWS, BLOCK_K=_DEPTH,
        )  # fmt: skip
    forward_kernels.bounds[(num_groups, matrices)](
        norms, scale, ref_scale, tables.starts, shift, flags, n, BLOCK=1024
    )
    arguments = (image, text, ref_image, ref_text, scale, ref_scale)
    widths = (image.shape[1], ref_image.shape[1])
    num_items = len(tables.items)
    programs = (_num_programs(device, num_items),)
    if has_ref:
        sweep_kernels.sweep_reference[programs](
            *arguments, shift, tables.items, parts, *features.strides(), num_items, num_groups, n,
            *widths, **features.ref_meta(tile),
        )  # fmt: skip
    else:
        sweep_kernels.sweep[programs](
            image, text, scale, shift, tables.items, parts, image.stride(0), text.stride(0),
            num_items, n, widths[0], LANES=tile.lanes, **features.meta(tile),
        )  # fmt: skip
    spans = (len(tables.spans),)
    forward_kernels.reduce_sums[spans](
        parts, tables.spans, sums, flags, n, HAS_REF=has_ref, BLOCK_R=SPAN
    )
    tile = features.tile("online")
    online = sweep_tables(groups, tile.block_m, tile.block_n, device)
    num_items = len(online.items)
    sweep_online[(_num_programs(device, num_items),)](
        *arguments, flags, online.items, parts, *features.strides(), num_items, n, *widths,
        HAS_REF=has_ref, **features.ref_meta(tile),
    )  # fmt: skip
    forward_kernels.finalise[spans](
        parts, sums, online.spans, shift, flags, own, losses, softmaxes, num_groups,
        n, HAS_REF=has_ref, BLOCK_R=SPAN,
    )  # fmt: skip
    return losses, softmaxes, flags


def is_fused_faster(features: Features) -> bool:
    """The rule until both ways are measured on the GPU at hand.

    Fused for half-precision features, where G alone touches memory (6 bytes an element, not 22 and
    as many again for the reference); not for fp32, whose exact products cuBLAS makes faster than a
    kernel without tensor cores.
    """
    return features.is_half


def backward(
    upstream: Tensor,  # [4 or 2, N] fp32
    features: Features,
    softmaxes: Tensor,  # [matrices, 3, 2, N]
    flags: Tensor,  # [num_groups]
    groups: tuple[int, ...],
    *,
    wants_image: bool,
    wants_text: bool,
    is_rounded: bool,
    is_fused: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Gradients of `(upstream * losses).sum()` in image, text and scale.

    is_rounded: whether image's and text's come in the features' dtype, else in fp32.
    is_fused: whether one kernel makes a strip of G from the features, or cuBLAS makes S and S0 in
        fp32 and a kernel turns them into G; `is_fused_faster` chooses.
    """
    image, text, scale, _, _, _, has_ref = features
    n, width = image.shape
    unit = upstream.abs().masked_fill(~upstream.isfinite(), 0.0).amax()
    unit = torch.where(unit == 0, 1.0, unit)
    factors = softmaxes.new_empty(len(softmaxes), 2, n)
    own = softmaxes.new_empty(n)
    backward_kernels.coefficients[(triton.cdiv(n, SPAN),)](
        upstream.contiguous(), unit, softmaxes, factors, own, n, HAS_REF=has_ref, BLOCK_R=SPAN
    )
    # The gradient of scale follows from either tower's; one is made for it where none is wanted.
    makes_image = wants_image or not wants_text
    d_image = softmaxes.new_empty(n, width) if makes_image else None
    d_text = softmaxes.new_zeros(n, width) if wants_text else None
    gain = _GAIN_FP16 if image.dtype == torch.float16 else 1.0

    size = image.element_size() + (0 if is_fused else 4 * len(softmaxes))
    elements = WORKSPACE_BYTES // size
    launches, online_launches = (
        strip_tables(groups, elements, tile.block_m, tile.block_n, image.device)
        for tile in (features.tile("strip"), features.tile("strip_online"))
    )
    largest = max(last.offset + last.rows * last.stride for (*_, last), _ in launches)
    workspace = image.new_empty(largest)
    for (segments, table), (online_segments, online_table) in zip(
        launches, online_launches, strict=True
    ):
        if is_fused:
            arguments = (features, softmaxes, factors, flags, workspace, gain)
            if has_ref:
                _strip(*arguments, segments, table, is_online=False)
            else:
                _strip_run(*arguments, segments, table)
            _strip(*arguments, online_segments, online_table, is_online=True)
        for segment in segments:
            rows, cols = segment.batch_rows, segment.batch_cols
            g = workspace[segment.offset :][: segment.rows * segment.stride]
            g = g.view(segment.rows, segment.stride)[:, : segment.n]
            if not is_fused:
                _strip_of_logits(features, softmaxes, factors, flags, segment, g, gain)
            if d_image is not None:
                _product(g, text[cols], d_image[rows], beta=0)
            if d_text is not None:
                _product(g.T, image[rows], d_text[cols], beta=1)

    d_scale = softmaxes.new_empty(n)
    results: list[Tensor | None] = []
    for products, side, other in ((d_image, image, text), (d_text, text, image)):
        if products is None:
            results.append(None)
            continue
        in_place = side.dtype == torch.float32 or not is_rounded
        out = products if in_place else torch.empty_like(products, dtype=side.dtype)
        backward_kernels.gradients[(triton.cdiv(n, _ROWS),)](
            products, own, side, other, scale, unit, out, d_scale, side.stride(0), other.stride(0),
            n, width, gain, BLOCK_R=_ROWS, BLOCK_K=_DEPTH,
        )  # fmt: skip
        results.append(out)
    return results[0] if wants_image else None, results[1], d_scale.sum()


def _strip_run(
    features: Features,
    softmaxes: Tensor,
    factors: Tensor,
    flags: Tensor,
    workspace: Tensor,
    gain: float,
    segments: tuple[Segment, ...],
    table: Tensor,
) -> None:
    """Write the strips of one launch without a reference, of the groups whose flag is not set."""
    image, text, scale = features[:3]
    tile = features.tile("strip")
    num_tiles = segments[-1].last_tile
    # Longer runs only where there are tiles enough for all multiprocessors.
    run = max(1, min(RUN, num_tiles // _num_programs(image.device, num_tiles)))
    programs = sum(
        triton.cdiv(triton.cdiv(segment.rows, tile.block_m), run)
        * triton.cdiv(segment.n, tile.block_n)
        for segment in segments
    )
    strip_run[(programs,)](
        image, text, scale, softmaxes, factors, flags, table, workspace, image.stride(0),
        text.stride(0), len(image), image.shape[1], run, gain, **features.meta(tile),
    )  # fmt: skip


def _strip(
    features: Features,
    softmaxes: Tensor,
    factors: Tensor,
    flags: Tensor,
    workspace: Tensor,
    gain: float,
    segments: tuple[Segment, ...],
    table: Tensor,
    *,
    is_online: bool,
) -> None:
    """Write the strips of one launch, of the groups whose flag is set or of the others.

    A program a tile; where seldom one has work, just enough programs to look at all tiles.
    """
    image, text, scale, ref_image, ref_text, ref_scale, has_ref = features
    num_tiles = segments[-1].last_tile
    programs = _num_programs(image.device, num_tiles) if is_online else num_tiles
    backward_kernels.strip[(programs,)](
        image, text, ref_image, ref_text, scale, ref_scale, softmaxes, factors, flags, table,
        workspace, *features.strides(), num_tiles, len(image), image.shape[1], ref_image.shape[1],
        gain, IS_ONLINE=is_online, HAS_REF=has_ref,
        **features.ref_meta(features.tile("strip_online" if is_online else "strip")),
    )  # fmt: skip


def _strip_of_logits(
    features: Features,
    softmaxes: Tensor,
    factors: Tensor,
    flags: Tensor,
    segment: Segment,
    g: Tensor,
    gain: float,
) -> None:
    """Write one segment's strip of G, its cosines made by cuBLAS."""
    rows, cols = segment.batch_rows, segment.batch_cols
    cosines = softmaxes.new_empty(2 if features.has_ref else 1, *g.shape)
    _product(features.image[rows], features.text[cols].T, cosines[0], beta=0)
    if features.has_ref:
        _product(features.ref_image[rows], features.ref_text[cols].T, cosines[1], beta=0)
    block_m, block_n = _LOGITS_TILE
    grid = (triton.cdiv(segment.rows, block_m), triton.cdiv(segment.n, block_n))
    backward_kernels.strip_of_logits[grid](
        cosines[0], cosines[-1], features.scale, features.ref_scale, softmaxes, factors, flags, g,
        cosines.stride(1), g.stride(0), segment.start, segment.n, segment.first, segment.rows,
        segment.group, len(features.image), gain,
        HAS_REF=features.has_ref, BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip


def _product(left: Tensor, right: Tensor, out: Tensor, *, beta: int) -> None:
    """out = beta * out + left @ right, out in fp32: never rounded between strips."""
    if left.dtype == torch.float32 or not left.is_cuda:
        out.addmm_(left.float(), right.float(), beta=beta)
    elif beta:
        torch.addmm(out, left, right, out_dtype=torch.float32, out=out)
    else:
        torch.mm(left, right, out_dtype=torch.float32, out=out)
