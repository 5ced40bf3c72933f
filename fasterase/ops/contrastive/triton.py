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
import functools
from collections.abc import Iterator, Sequence
from itertools import accumulate
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
    NUM_SCALARS,
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
from fasterase.ops.contrastive.triton_launch import Launcher
from fasterase.ops.contrastive.triton_plan import (
    INTERPRETED,
    Features,
    count_rectangles,
    count_slots,
    plan_strips,
    select_sides,
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
    """A group, prepared for products."""

    batch: Batch  # as given, rows contiguous
    features: Features
    diagonals: Tensor  # [matrices * N]
    scalars: Tensor  # [NUM_SCALARS]
    upstream: Tensor  # [2 * matrices, N] weights of the losses; not read if there are none
    flag: Tensor  # int32; the first is 1 if rows and columns have shifts of their own
    n: int
    launch: Launcher

    @classmethod
    def prepare(
        cls,
        batch: Batch,
        products: str,
        wanted: Wanted | None = None,
        upstream: Tensor | None = None,
    ) -> _Problem:
        """Prepare a batch of one group; with `upstream`, for the gradients that are `wanted`."""
        given = select_sides(batch)
        features = Features.of(given, products)
        n, matrices = batch.image.shape[0], batch.matrices
        blocks = -(-n // _ROWS)
        diagonals, peaks, scalars, flag = _allocate(
            batch.scale, matrices * n, matrices * 3 * blocks, int(NUM_SCALARS), 1
        )
        weights = diagonals if upstream is None else upstream.contiguous()
        strides = tuple(side.stride(0) for side in given)
        kinds = [(side.dtype, side.data_ptr() % 16) for side in given]
        launch = Launcher.of(
            batch.image.device, products, matrices, wanted, features.widths, strides, *kinds
        )
        problem = cls(
            batch, features, diagonals, scalars, weights, flag.view(torch.int32), n, launch
        )
        scales = batch.scale, batch.scale if batch.ref_scale is None else batch.ref_scale
        sizes = *strides, n, *features.widths
        launch(
            diagonals_and_peaks, (blocks, matrices), *given, *scales, weights, diagonals,
            peaks, *sizes, 0 if upstream is None else 2 * matrices, BLOCK_R=_ROWS, BLOCK_K=_DEPTH,
        )  # fmt: skip
        programs = blocks if features.is_rounded else 1
        launch(
            shifts_and_rounded_features, (programs, matrices), *given, *scales, peaks,
            *features[:4], scalars, problem.flag, *sizes, blocks, ROUNDS=features.is_rounded,
            BLOCK_R=_ROWS, BLOCK_K=_DEPTH,
        )  # fmt: skip
        return problem

    @property
    def has_ref(self) -> bool:
        return self.batch.ref_image is not None


class _Softmaxes(NamedTuple):
    """What the strips of G need of the softmaxes."""

    fields: Tensor  # [matrices, SOFTMAX_FIELDS, 2, N]
    factors: Tensor  # [1 + 2 * matrices, N] G's diagonal; weights times the fields

    @classmethod
    def of(cls, fields: Tensor) -> _Softmaxes:
        matrices, _, _, n = fields.shape
        return cls(fields, fields.new_empty(1 + 2 * matrices, n))


def _allocate(like: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    """Vectors of one allocation, at multiples of 16 bytes as if they had their own."""
    padded = [-(-size // 4) * 4 for size in sizes]
    return like.new_empty(sum(padded)).split_with_sizes(padded)


def _compute_losses(problem: _Problem, *, is_step: bool) -> tuple[Tensor, _Softmaxes]:
    """(losses [4 or 2, N], softmaxes).

    In a step weights are known and strips of G follow, which find the sums of e0 * (s0 - s): sweep
    over one matrix after the other, with larger tiles, and leave that part of the KL out.
    """
    _, features, diagonals, scalars, upstream, flag, n, launch = problem
    has_ref = problem.has_ref
    matrices = 1 + has_ref
    has_cross = has_ref and not is_step
    num_sums = matrices + has_cross
    num_parts = int(PART_STATS_WITH_REF if has_ref else PART_STATS)
    new = scalars.new_empty
    parts, sums = _allocate(scalars, 2 * num_parts * int(SLOTS) * n, 2 * num_sums * n)
    losses = new(2 * matrices, n)
    softmaxes = _Softmaxes.of(new(matrices, int(SOFTMAX_FIELDS), 2, n))

    tile, meta = features.plan("sums_with_reference" if has_cross else "sums")
    programs = count_rectangles(n, tile), 1
    sides: tuple[Tensor, ...] = features[:4]
    both = *features.strides, n, *features.widths
    if has_cross:
        launch(
            row_and_column_sums_with_reference, programs, *sides, scalars, parts,
            *both, **meta,
        )  # fmt: skip
    else:
        for k in range(matrices):
            pair = slice(2 * k, 2 * k + 2)
            launch(
                row_and_column_sums, programs, *sides[pair], scalars, parts,
                *features.strides[pair], n, features.widths[k], num_parts, k, variant=k,
                LANES=tile.lanes, **meta,
            )  # fmt: skip
    spans = -(-n // _SPAN), 1
    launch(
        add_partial_sums, spans, parts, sums, flag, n, num_parts, num_sums,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_R=_SPAN,
    )  # fmt: skip
    tile, meta = features.plan("sums_online")
    launch(
        row_and_column_sums_online, (count_rectangles(n, tile), 1), *sides,
        scalars, flag, parts, *both, HAS_REF=has_ref, **meta,
    )  # fmt: skip
    launch(
        losses_and_softmaxes, spans, parts, sums, scalars, flag, diagonals, losses,
        softmaxes.fields, upstream, softmaxes.factors, n, num_sums, HAS_REF=has_ref,
        HAS_UPSTREAM=is_step, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_R=_SPAN,
    )  # fmt: skip
    return losses, softmaxes


def _compute_gradients(
    problem: _Problem, softmaxes: _Softmaxes, wanted: Wanted, losses: Tensor | None
) -> Gradients:
    """Gradients of `(upstream * losses).sum()`; completes the KLs of a step's `losses`."""
    batch, features, n = problem.batch, problem.features, problem.n
    image, text = features[:2]
    width = features.widths[0]
    new = softmaxes.fields.new_empty
    # The gradient of scale follows from either tower's, so one is made even if neither is wanted.
    makes_image = wanted.image or not wanted.text
    d_image = new(n, width) if makes_image else None
    d_text = new(n, width) if wanted.text else None

    tile = features.plan("strip_with_reference" if problem.has_ref else "strip")[0]
    stride = strip_stride(n)
    elements = max(
        triton_plan.WORKSPACE_BYTES // image.element_size(), triton_plan.LEAST_STRIP_ROWS * stride
    )
    strips = plan_strips(n, elements, tile.block_m)
    longest = strips[0].stop
    workspace = image.new_empty(longest, stride)
    gain = _GAIN_FP16 if image.dtype == torch.float16 else 1.0
    crosses: tuple[Tensor, ...] = (softmaxes.fields,) * 2  # not read
    slots = 0, 0
    if problem.has_ref and losses is not None:
        slots = count_slots(n, tile.block_n), -(-longest // tile.block_m)
        crosses = _allocate(problem.scalars, slots[0] * n, slots[1] * n)
    for rows in strips:
        _fill_strip(problem, rows, softmaxes, workspace, crosses, gain, slots[0] > 0)
        g, of_image, of_rows = workspace, image, d_image
        if len(strips) > 1:  # else the views would take the host as long as four launches
            g, of_image = workspace[: rows.stop - rows.start], image[rows]
            of_rows = None if d_image is None else d_image[rows]
        g = g if stride == n else g[:, :n]
        if of_rows is not None:
            _multiply(g, text, of_rows, beta=0)
        if d_text is not None:
            _multiply(g.T, of_image, d_text, beta=int(rows.start > 0))

    d_scale = new(n)
    towers, made = (batch.image, batch.text), (d_image, d_text)
    results = [
        each
        if each is None or tower.dtype == torch.float32 or not wanted.rounded
        else torch.empty_like(each, dtype=tower.dtype)
        for each, tower in zip(made, towers, strict=True)
    ]
    order = 1 if makes_image else -1  # the first of the two is one that is made
    products, gradients = (
        [d_scale if x is None else x for x in each[::order]] for each in (made, results)
    )
    sides = towers[::order]
    problem.launch(
        feature_gradients, (-(-n // _ROWS), makes_image + wanted.text), *products,
        *sides, batch.scale, problem.scalars, *softmaxes, *crosses, problem.flag, *gradients,
        d_scale, d_scale if losses is None else losses, sides[0].stride(0), sides[1].stride(0), n,
        *slots, width, int(not makes_image), gain, BLOCK_R=_ROWS, BLOCK_K=_DEPTH,
    )  # fmt: skip
    return results[0] if wanted.image else None, results[1], d_scale.sum()


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    return 1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def _fill_strip(
    problem: _Problem,
    strip: slice,
    softmaxes: _Softmaxes,
    workspace: Tensor,
    crosses: Sequence[Tensor],
    gain: float,
    has_cross: bool,
) -> None:
    """Compute a strip of G, of a group that is not flagged and then of one that is."""
    features, has_ref, launch = problem.features, problem.has_ref, problem.launch
    rest = *softmaxes, problem.flag, workspace
    n, num_rows = problem.n, strip.stop - strip.start
    sizes = n, strip.start, num_rows
    if not has_ref:
        tile, meta = features.plan("strip")
        blocks = -(-num_rows // tile.block_m), -(-n // tile.block_n)
        # Longer runs only if there are enough tiles for all multiprocessors.
        length = blocks[0] * blocks[1] // (2 * _num_multiprocessors(workspace.device))
        length = max(1, min(RUN_LENGTH, length))
        launch(
            gradient_strip_without_reference, (-(-blocks[0] // length) * blocks[1], 1),
            *features[:2], problem.scalars, *rest, *features.strides[:2], *sizes,
            features.widths[0], length, gain, **meta,
        )  # fmt: skip
    for is_online in (False, True) if has_ref else (True,):
        tile, meta = features.plan("strip_online" if is_online else "strip_with_reference")
        programs = -(-num_rows // tile.block_m) * count_slots(n, tile.block_n)
        launch(
            gradient_strip, (programs, 1), *features[:4], problem.scalars, *rest, *crosses,
            *features.strides, *sizes, *features.widths, gain, HAS_REF=has_ref,
            HAS_CROSS=has_cross and not is_online, IS_ONLINE=is_online, **meta,
        )  # fmt: skip


def _join(parts: Sequence[tuple[Tensor | None, ...]], dims: tuple[int | None, ...]) -> Any:
    """Concatenate the results of all groups, or add them up where the dim is None."""
    if len(parts) == 1:
        return parts[0]
    return tuple(
        None if each[0] is None else sum(each) if dim is None else torch.cat(each, dim)
        for each, dim in zip(zip(*parts, strict=True), dims, strict=True)
    )


def _multiply(left: Tensor, right: Tensor, out: Tensor, *, beta: int) -> None:
    """out = beta * out + left @ right, with out in fp32: never rounded between strips."""
    if left.dtype == torch.float32 or not left.is_cuda or torch.version.hip is not None:
        out.addmm_(left.float(), right.float(), beta=beta)
    elif beta:
        try:
            torch.addmm(out, left, right, out_dtype=torch.float32, out=out)
        except RuntimeError:  # torch before 2.10 adds to matrices of the factors' dtype alone
            out.add_(torch.mm(left, right, out_dtype=torch.float32))
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


def _on_device(batch: Batch, products: str) -> contextlib.ExitStack:
    """Launch on the batch's device, and keep cuBLAS at the precision of the products."""
    device = batch.image.device
    stack = contextlib.ExitStack()
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        stack.enter_context(torch.cuda.device(device))
    if torch.is_autocast_enabled(device.type):
        stack.enter_context(torch.autocast(device.type, enabled=False))
    if products == "fp32":
        stack.enter_context(refuse_tf32())
    return stack


def _divide(
    batch: Batch, groups: Groups, weights: Tensor | None = None
) -> Iterator[tuple[slice, Batch, Tensor | None]]:
    """The rows of each group, its batch with contiguous rows, and its columns of the weights."""
    batch = with_contiguous_rows(batch)
    if len(groups) == 1:
        yield slice(None), batch, weights
        return
    for end, n in zip(accumulate(groups), groups, strict=True):
        rows = slice(end - n, end)
        parts = (None if x is None else x[rows] if x.dim() else x for x in batch)
        yield rows, Batch._make(parts), None if weights is None else weights[:, rows]


def forward(batch: Batch, groups: Groups, products: str) -> tuple[Tensor, Tensor, Tensor]:
    """(losses [4 or 2, N], softmaxes [matrices, SOFTMAX_FIELDS, 2, N], flags [num_groups])."""
    parts = []
    with _on_device(batch, products):
        for _, group, _ in _divide(batch, groups):
            problem = _Problem.prepare(group, products)
            losses, softmaxes = _compute_losses(problem, is_step=False)
            parts.append((losses, softmaxes.fields, problem.flag[:1].clone()))
    return _join(parts, (-1, -1, -1))


def backward(
    upstream: Tensor,
    batch: Batch,
    saved: tuple[Tensor, ...],
    groups: Groups,
    wanted: Wanted,
    products: str,
) -> Gradients:
    fields, flags = saved
    parts = []
    with _on_device(batch, products):
        for k, (rows, group, weights) in enumerate(_divide(batch, groups, upstream)):
            problem = _Problem.prepare(group, products, wanted, weights)
            problem = problem._replace(flag=flags[k : k + 1])
            softmaxes = _Softmaxes.of(fields[..., rows].contiguous())
            problem.launch(
                gradient_factors, (-(-problem.n // _SPAN), 1), problem.upstream,
                problem.scalars, *softmaxes, problem.n, HAS_REF=problem.has_ref, BLOCK_R=_SPAN,
            )  # fmt: skip
            parts.append(_compute_gradients(problem, softmaxes, wanted, None))
    return _join(parts, (0, 0, None))


def step(
    weights: Tensor, batch: Batch, groups: Groups, wanted: Wanted, products: str
) -> tuple[Tensor | None, ...]:
    parts = []
    with _on_device(batch, products):
        for _, group, of_group in _divide(batch, groups, weights):
            problem = _Problem.prepare(group, products, wanted, of_group)
            losses, softmaxes = _compute_losses(problem, is_step=True)
            parts.append((losses, *_compute_gradients(problem, softmaxes, wanted, losses)))
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
