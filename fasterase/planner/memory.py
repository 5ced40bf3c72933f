"""Memory of one GPU by part: what lasts through a step, and what the phases of a step add."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from fasterase.engine.optim import EIGHT_BIT

Parallel = Literal["plain", "zero1", "zero2", "zero3"]

FP32 = 4
# bitsandbytes: one byte per number, and an fp32 scale for each block of 256. Tensors of fewer than
# 4096 numbers stay in fp32.
_EIGHT_BIT_BLOCK, _EIGHT_BIT_LEAST = 256, 4096
# Numbers in the buffer that gradients are averaged through, and that ZeRO-3 gathers ahead:
# DeepSpeed's defaults, and plain data parallelism's own.
_REDUCE_BUCKET, _PREFETCH_BUCKET, _PLAIN_BUCKET = 500_000_000, 50_000_000, 1 << 26
# The backends of the loss but "dense" use no more (Triton's `WORKSPACE_BYTES`, C++'s kept logits).
LOSS_WORKSPACE_BYTES = 256 * 2**20
# Matrices [n, n] in fp32 that autograd holds for "dense", with the KL.
_DENSE_MATRICES = 10


@dataclass(frozen=True)
class ParameterCounts:
    """How many numbers a model holds.

    Attributes:
        total: all parameters.
        buffers: numbers in buffers.
        trained: trained parameters.
        eight_bit: those of them whose states an 8-bit optimiser keeps in 8 bits.
        largest: the largest trained parameter.
        largest_block: the largest part that ZeRO-3 gathers at a time: a block or an embedding.
    """

    total: int
    buffers: int
    trained: int
    eight_bit: int
    largest: int
    largest_block: int

    @classmethod
    def of(cls, module: nn.Module, blocks: list[nn.Module]) -> ParameterCounts:
        """Count; `requires_grad` tells what is trained."""
        parameters = list(module.parameters())
        trained = [each for each in parameters if each.requires_grad]
        embeddings = {
            id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)
        }
        return cls(
            total=sum(each.numel() for each in parameters),
            buffers=sum(each.numel() for each in module.buffers()),
            trained=sum(each.numel() for each in trained),
            eight_bit=sum(
                each.numel()
                for each in trained
                if each.ndim > 1 and each.numel() >= _EIGHT_BIT_LEAST and id(each) not in embeddings
            ),
            largest=max((each.numel() for each in trained), default=0),
            largest_block=max(
                [each.numel() for each in parameters]
                + [sum(each.numel() for each in block.parameters()) for block in blocks]
            ),
        )


def lasting_bytes(
    counts: ParameterCounts, *, parallel: Parallel, optimizer: str, gpus: int
) -> dict[str, int]:
    """Return what stays in memory between steps, and gradients, by part.

    DeepSpeed's `coalesce_grad_reduction`, the way in which several backward passes per step are
    exact, keeps whole local gradients at every stage; so ZeRO-2 saves nothing over ZeRO-1. Both
    update a copy of their share of the fp32 weights, from a copy of their share of the gradients;
    ZeRO-3, whose weights are shares already, has only the latter.
    """
    shares = 1 if parallel == "plain" else gpus
    share = -(-counts.trained // shares)
    weights = counts.total + counts.buffers
    if parallel == "zero3":
        gathered = min(counts.total, 2 * counts.largest_block + _PREFETCH_BUCKET)
        weights = -(-counts.total // gpus) + counts.buffers + gathered
    copies = {"plain": 0, "zero1": 2, "zero2": 2, "zero3": 1}[parallel]
    return {
        "weights": weights * FP32,
        "gradients": counts.trained * FP32,
        "optimizer_states": -(-_state_bytes(counts, optimizer) // shares),
        "partitions": copies * share * FP32,
    }


def _state_bytes(counts: ParameterCounts, optimizer: str) -> int:
    moments = 1 if optimizer == "lion8bit" else 2
    if optimizer not in EIGHT_BIT:
        return moments * counts.trained * FP32
    scales = -(-counts.eight_bit // _EIGHT_BIT_BLOCK) * FP32
    return moments * ((counts.trained - counts.eight_bit) * FP32 + counts.eight_bit + scales)


def update_bytes(
    counts: ParameterCounts, *, parallel: Parallel, optimizer: str, gpus: int, on_gpu: bool
) -> int:
    """Return what reducing the gradients or the optimiser's step needs for a moment.

    On a GPU torch's Adam updates all tensors at once, with one copy of their size; on a CPU one
    after the other, with two copies of the largest. 8-bit optimisers work in place.
    """
    shares = 1 if parallel == "plain" else gpus
    update = 0
    if optimizer not in EIGHT_BIT:
        update = -(-counts.trained // shares) if on_gpu else 2 * counts.largest
    bucket = max(_PLAIN_BUCKET, counts.largest) if parallel == "plain" else _REDUCE_BUCKET
    reduced = min(counts.trained, bucket) if gpus > 1 else 0
    return max(update, reduced) * FP32


def feature_bytes(pairs: int, width: int, *, gpus: int) -> int:
    """Return the bytes of image and text features of a step of `pairs` pairs over all GPUs.

    Encoded in parts, concatenated, the original's, and their gradients. Where there are several
    GPUs each holds all rows of the last three, since each computes the loss of the whole batch.
    """
    own = -(-pairs // gpus)
    rows = 8 * pairs if gpus == 1 else 6 * pairs + 6 * own
    return rows * width * FP32


def loss_bytes(groups: tuple[int, ...], *, backend: str) -> int:
    """Return the workspace of the loss over similarity matrices of these numbers of pairs."""
    largest = max((n * n for n in groups), default=0) * FP32
    if backend == "dense":
        return _DENSE_MATRICES * largest
    return min(LOSS_WORKSPACE_BYTES, _DENSE_MATRICES * largest)
