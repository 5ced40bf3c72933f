"""The contrastive operator on Triton kernels, as torch operators.

`fasterase::contrastive_triton` runs on CUDA tensors. Under TRITON_INTERPRET=1 the same code runs on
CPU tensors as `fasterase::contrastive_triton_interpreted`.

FLOPs, forward and backward: 12 n^2 D per group with the KL, 8 n^2 D without. Memory O(N D): the
gradients in fp32, features that are rounded, partial sums (4 x 32 floats per pair, 10 x 32 with the
KL), and a strip of G of WORKSPACE_BYTES or LEAST_STRIP_ROWS rows. A step with the KL also has 32
partial sums per row and one per block of rows of a strip and column.

Half-precision products go into fp32 logits, and G is rounded to their dtype beside its diagonal.
The diagonal and the features' gradients come from the features as given.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasterase.errors import InputError
from fasterase.kernels.contrastive_gradients import (
    feature_gradients,
    gradient_factors,
    gradient_strip,
    gradient_strip_without_reference,
)
from fasterase.kernels.contrastive_layout import (
    PART_STATS,
    PART_STATS_WITH_REF,
    SLOTS,
    SOFTMAX_FIELDS,
)
from fasterase.kernels.contrastive_losses import losses_and_softmaxes
from fasterase.kernels.contrastive_shift import diagonals_and_peaks, shifts_and_rounded_features
from fasterase.kernels.contrastive_sums import (
    add_partial_sums,
    row_and_column_sums,
    row_and_column_sums_with_reference,
)
from fasterase.kernels.contrastive_sums_online import row_and_column_sums_online
from fasterase.ops.contrastive import triton_plan
from fasterase.ops.contrastive.checks import refuse_tf32
from fasterase.ops.contrastive.operator import Batch, Gradients, Groups, Wanted, register
from fasterase.ops.contrastive.triton_plan import (
    INTERPRETED,
    Features,
    Pair,
    Strip,
    count_slots,
    pairs_of_groups,
    plan_strips,
    strip_stride,
    with_contiguous_rows,
)

# Tiles that share one loop over depth in `gradient_strip`. More would leave too few programs to
# balance.
RUN_LENGTH = 4
# Rows per program of kernels on vectors.
_SPAN = 128
# Rows and depth of kernels that stream the features.
_ROWS, _DEPTH = 16, 128
# fp16 is normal down to 6e-5; with |G| <= 6 this keeps probabilities of 1e-8 and stays below 65504.
_GAIN_FP16 = 8192.0


class _Problem(NamedTuple):
    """The groups of a launch, prepared for products."""

    batch: Batch  # as given, rows contiguous
    pair: Pair
    features: Features
    diagonals: Tensor  # [matrices, N]
    scales: Tensor  # [matrices] of the products
    stretches: Tensor  # [matrices, 2]
    shifts: Tensor  # [matrices, 2 (groups)]
    upstream: Tensor  # [2 * matrices, N] weights of the losses; not read if there are none
    upstream_peak: Tensor  # [1]
    flags: Tensor  # [2] int32; 1 if a group has a shift per row and column instead of one for all

    @classmethod
    def prepare(
        cls, batch: Batch, pair: Pair, products: str, upstream: Tensor | None = None
    ) -> _Problem:
        """Select the pair's rows of the batch and of upstream, and prepare them."""
        batch = batch.map(lambda x: x[pair.rows] if x.dim() else x)
        features = Features.of(batch, products)
        n, matrices = len(batch.image), batch.matrices
        has_upstream = upstream is not None
        new = batch.scale.new_empty
        diagonals = new(matrices, n)
        scales, stretches, shifts, peak = new(5 * matrices + 1).split(
            [matrices, 2 * matrices, 2 * matrices, 1]
        )
        problem = cls(
            batch,
            pair,
            features,
            diagonals,
            scales,
            stretches,
            shifts,
            diagonals if upstream is None else upstream[:, pair.rows].contiguous(),
            peak,
            new(2, dtype=torch.int32),
        )
        blocks = pair.count_blocks(_ROWS)
        peaks = new(matrices, 3, blocks)
        has_ref = matrices == 2
        image, text, scale, ref_image, ref_text, ref_scale = batch
        given: Any = image, text, *((ref_image, ref_text) if has_ref else (image, text))
        arguments = (*given, scale, ref_scale if has_ref else scale)
        strides = tuple(side.stride(0) for side in given)
        sizes = (pair.split, n, *features.widths)
        meta = {"HAS_REF": has_ref, "HAS_UPSTREAM": has_upstream, "BLOCK_K": _DEPTH}
        diagonals_and_peaks[(blocks, matrices)](
            *arguments, problem.upstream, diagonals, peaks, *strides, *sizes, BLOCK_R=_ROWS, **meta
        )
        programs = -(-n // _ROWS) if features.is_rounded else 1
        shifts_and_rounded_features[(programs, matrices)](
            *arguments, peaks, *features[:4], problem.scales, problem.stretches, problem.shifts,
            problem.flags, problem.upstream_peak, *strides, *sizes, ROUNDS=features.is_rounded,
            PEAK_ROWS=_ROWS, BLOCK_R=_ROWS, **meta,
        )  # fmt: skip
        return problem

    @property
    def has_ref(self) -> bool:
        return self.batch.matrices == 2

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Strides and sizes, as kernels that multiply image and text take them."""
        return (*self.features.strides, self.pair.split, len(self.batch.image))


class _Softmaxes(NamedTuple):
    """What the strips of G need of the softmaxes."""

    fields: Tensor  # [matrices, SOFTMAX_FIELDS, 2, N]
    flags: Tensor  # [2] int32; 1 if a group has a shift per row and column instead of one for all
    factors: Tensor  # [matrices, 2, N] weights times the fields, once they are known
    diagonal: Tensor  # [N] of G, likewise

    @classmethod
    def of(cls, fields: Tensor, flags: Tensor) -> _Softmaxes:
        matrices, _, _, n = fields.shape
        return cls(fields, flags, fields.new_empty(matrices, 2, n), fields.new_empty(n))


def _compute_losses(problem: _Problem, *, is_step: bool) -> tuple[Tensor, _Softmaxes]:
    """(losses [4 or 2, N], softmaxes).

    In a step weights are known and strips of G follow, which find the sums of e0 * (s0 - s): sweep
    over one matrix after the other, with larger tiles, and leave that part of the KL out.
    """
    pair, features, has_ref = problem.pair, problem.features, problem.has_ref
    split, n, matrices = pair.split, len(problem.batch.image), problem.batch.matrices
    has_cross = has_ref and not is_step
    num_sums = matrices + has_cross
    num_parts = int(PART_STATS_WITH_REF if has_ref else PART_STATS)
    new = problem.diagonals.new_empty
    parts = new(2, num_parts, int(SLOTS), n)
    sums = new(2, num_sums, n)
    losses = new(2 * matrices, n)
    softmaxes = _Softmaxes.of(new(matrices, int(SOFTMAX_FIELDS), 2, n), problem.flags)

    rest = (parts, *problem.arguments, *features.widths)
    if has_cross:
        tile = features.tile("sums_with_reference")
        row_and_column_sums_with_reference[(pair.count_rectangles(tile),)](
            *features[:4], problem.scales, problem.shifts, *rest, **features.meta(tile)
        )
    else:
        tile = features.tile("sums")
        for k in range(matrices):
            row_and_column_sums[(pair.count_rectangles(tile),)](
                *features[2 * k : 2 * k + 2], problem.scales, problem.shifts, parts,
                *features.strides[2 * k : 2 * k + 2], split, n, features.widths[k], MATRIX=k,
                HAS_REF=has_ref, LANES=tile.lanes, **features.meta(tile),
            )  # fmt: skip
    spans = (pair.count_blocks(_SPAN),)
    meta = {"NUM_SUMS": num_sums, "HAS_REF": has_ref, "BLOCK_R": _SPAN}
    add_partial_sums[spans](parts, sums, problem.flags, split, n, **meta, **tile.blocks)
    tile = features.tile("sums_online")
    row_and_column_sums_online[(pair.count_rectangles(tile),)](
        *features[:4], problem.scales, problem.flags, *rest, HAS_REF=has_ref, **features.meta(tile)
    )
    losses_and_softmaxes[spans](
        parts, sums, problem.shifts, problem.flags, problem.diagonals, losses,
        softmaxes.fields, problem.upstream, problem.upstream_peak, softmaxes.factors,
        softmaxes.diagonal, split, n, HAS_UPSTREAM=is_step, **meta, **tile.blocks,
    )  # fmt: skip
    return losses, softmaxes


def _compute_gradients(
    problem: _Problem, softmaxes: _Softmaxes, wanted: Wanted, losses: Tensor | None
) -> Gradients:
    """Gradients of `(upstream * losses).sum()`; completes the KLs of a step's `losses`."""
    batch, features, has_ref = problem.batch, problem.features, problem.has_ref
    image, text = features[:2]
    n, width = image.shape
    new = softmaxes.fields.new_empty
    # The gradient of scale follows from either tower's, so one is made even if neither is wanted.
    makes_image = wanted.image or not wanted.text
    d_image = new(n, width) if makes_image else None
    d_text = new(n, width) if wanted.text else None
    has_cross = has_ref and losses is not None

    tile = features.tile("strip_with_reference" if has_ref else "strip")
    elements = max(
        triton_plan.WORKSPACE_BYTES // image.element_size(),
        triton_plan.LEAST_STRIP_ROWS * strip_stride(max(problem.pair.sizes)),
    )
    launches = plan_strips(problem.pair.sizes, elements, tile.block_m)
    longest = max(strip.num_rows for strips in launches for strip in strips)
    workspace = image.new_empty(
        max(s.offset + s.num_rows * strip_stride(s.n) for strips in launches for s in strips)
    )
    gain = _GAIN_FP16 if image.dtype == torch.float16 else 1.0
    unused = softmaxes.fields
    crosses = (
        new(int(SLOTS), n) if has_cross else unused,
        new(-(-longest // tile.block_m), n) if has_cross else unused,
    )
    for strips in launches:
        _fill_strips(problem, strips, softmaxes, workspace, crosses, gain, has_cross)
        for strip in strips:
            if not strip.num_rows:
                continue
            g = strip.select(workspace)
            if d_image is not None:
                _multiply(g, text[strip.cols], d_image[strip.rows], beta=0)
            if d_text is not None:
                _multiply(g.T, image[strip.rows], d_text[strip.cols], beta=int(strip.first > 0))

    d_scale = new(n)
    results = [
        made
        if made is None or tower.dtype == torch.float32 or not wanted.rounded
        else torch.empty_like(made, dtype=tower.dtype)
        for made, tower in ((d_image, batch.image), (d_text, batch.text))
    ]
    products, gradients = (
        tuple(unused if x is None else x for x in each) for each in ((d_image, d_text), results)
    )
    feature_gradients[(problem.pair.count_blocks(_ROWS), 2 if wanted.text else 1)](
        *products, batch.image, batch.text, batch.scale, problem.stretches, softmaxes.fields,
        problem.upstream_peak, softmaxes.diagonal, *crosses, softmaxes.flags,
        *gradients, d_scale, unused if losses is None else losses,
        batch.image.stride(0), batch.text.stride(0), problem.pair.split, n, longest, width, gain,
        WANTS_IMAGE=makes_image, WANTS_TEXT=wanted.text, HAS_CROSS=has_cross,
        **tile.blocks, BLOCK_R=_ROWS, BLOCK_K=_DEPTH,
    )  # fmt: skip
    return results[0] if wanted.image else None, results[1], d_scale.sum()


def _num_multiprocessors(device: torch.device) -> int:
    return 1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def _fill_strips(
    problem: _Problem,
    strips: tuple[Strip, Strip],
    softmaxes: _Softmaxes,
    workspace: Tensor,
    crosses: tuple[Tensor, Tensor],
    gain: float,
    has_cross: bool,
) -> None:
    """Compute a strip of G of each group, of those that are not flagged and then of the others."""
    features, has_ref = problem.features, problem.has_ref
    weights = softmaxes.fields, softmaxes.factors, softmaxes.flags
    rows = [strip.num_rows for strip in strips]
    sizes = problem.pair.split, len(features.image), max(strip.first for strip in strips), *rows
    if not has_ref:
        tile = features.tile("strip")
        counts = [
            (-(-strip.num_rows // tile.block_m), -(-strip.n // tile.block_n)) for strip in strips
        ]
        # Longer runs only if there are enough tiles for all multiprocessors.
        length = sum(a * b for a, b in counts) // (2 * _num_multiprocessors(workspace.device))
        length = max(1, min(RUN_LENGTH, length))
        gradient_strip_without_reference[(sum(-(-a // length) * b for a, b in counts),)](
            *features[:2], problem.scales, *weights, workspace, *features.strides[:2],
            *sizes, features.widths[0], length, gain, **features.meta(tile),
        )  # fmt: skip
    for is_online in (False, True) if has_ref else (True,):
        tile = features.tile("strip_online" if is_online else "strip_with_reference")
        programs = sum(
            -(-strip.num_rows // tile.block_m) * count_slots(strip.n, tile.block_n)
            for strip in strips
        )
        gradient_strip[(programs,)](
            *features[:4], problem.scales, *weights, workspace, *crosses,
            *features.strides, *sizes, *features.widths, gain, HAS_REF=has_ref,
            HAS_CROSS=has_cross and not is_online, IS_ONLINE=is_online, **features.meta(tile),
        )  # fmt: skip


def _join(parts: Sequence[tuple[Tensor | None, ...]], dims: tuple[int | None, ...]) -> Any:
    """Concatenate the results of all pairs of groups, or add them up where the dim is None."""
    if len(parts) == 1:
        return parts[0]
    return tuple(
        None if each[0] is None else sum(each) if dim is None else torch.cat(each, dim)
        for each, dim in zip(zip(*parts, strict=True), dims, strict=True)
    )


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


@contextlib.contextmanager
def _on_device(batch: Batch, products: str) -> Iterator[None]:
    """Launch on the batch's device, and keep cuBLAS at the precision of the products."""
    with (
        torch.cuda.device_of(batch.image),
        torch.autocast(batch.image.device.type, enabled=False),
        refuse_tf32() if products == "fp32" else contextlib.nullcontext(),
    ):
        yield


def forward(batch: Batch, groups: Groups, products: str) -> tuple[Tensor, Tensor, Tensor]:
    """(losses [4 or 2, N], softmaxes [matrices, SOFTMAX_FIELDS, 2, N], flags [num_groups])."""
    batch = with_contiguous_rows(batch)
    parts = []
    with _on_device(batch, products):
        for pair in pairs_of_groups(groups):
            problem = _Problem.prepare(batch, pair, products)
            losses, softmaxes = _compute_losses(problem, is_step=False)
            parts.append((losses, softmaxes.fields, problem.flags[: pair.num_groups]))
    return _join(parts, (-1, -1, -1))


def backward(
    upstream: Tensor,
    batch: Batch,
    saved: tuple[Tensor, ...],
    groups: Groups,
    wanted: Wanted,
    products: str,
) -> Gradients:
    batch = with_contiguous_rows(batch)
    fields, flags = saved
    parts = []
    with _on_device(batch, products):
        for pair in pairs_of_groups(groups):
            problem = _Problem.prepare(batch, pair, products, upstream)
            softmaxes = _Softmaxes.of(fields[..., pair.rows].contiguous(), flags[pair.groups])
            n = len(problem.batch.image)
            gradient_factors[(-(-n // _SPAN),)](
                problem.upstream, problem.upstream_peak, softmaxes.fields, softmaxes.factors,
                softmaxes.diagonal, n, HAS_REF=problem.has_ref, BLOCK_R=_SPAN,
            )  # fmt: skip
            parts.append(_compute_gradients(problem, softmaxes, wanted, None))
    return _join(parts, (0, 0, None))


def step(
    weights: Tensor, batch: Batch, groups: Groups, wanted: Wanted, products: str
) -> tuple[Tensor | None, ...]:
    batch = with_contiguous_rows(batch)
    parts = []
    with _on_device(batch, products):
        for pair in pairs_of_groups(groups):
            problem = _Problem.prepare(batch, pair, products, weights)
            losses, softmaxes = _compute_losses(problem, is_step=True)
            made = _compute_gradients(problem, softmaxes, wanted, losses)
            parts.append((losses, *made))
    return _join(parts, (-1, 0, 0, None))


contrastive_triton = register(
    "contrastive_triton_interpreted" if INTERPRETED else "contrastive_triton",
    {
        "flags": lambda batch, groups, products: batch.scale.new_empty(
            len(groups), dtype=torch.int32
        )
    },
    key="CPU" if INTERPRETED else "CUDA",
    forward=forward,
    backward=backward,
    step=step,
    options_schema="str products",
    options=_check,
)
