"""open_clip's training losses over the fused operator: the same interface and values, no N x N."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fasterase.errors import InputError
from fasterase.ops.contrastive import contrastive


class _Pairs(NamedTuple):
    image: Tensor  # [N, D]
    text: Tensor  # [N, D]
    scale: Tensor | float


class ClipLoss(nn.Module):
    """Drop-in for `open_clip.loss.ClipLoss`: symmetric InfoNCE in O(N D) memory.

    `F.cross_entropy(S, arange(N)) / 2 + F.cross_entropy(S.T, arange(N)) / 2`, with
    `S = logit_scale * image_features @ text_features.T`, never rounded to half precision. Inside
    `torch.autocast("cuda", dtype)` the features are, before the GPU kernels multiply them; on the
    CPU, and by the torch tiles where those kernels are missing, nothing is.

    With `world_size` W > 1 the pairs are those of all ranks of torch's default process group: N
    in all, N / W on each. Values and gradients on each rank are open_clip's, in O(N D) memory:

    | `local_loss` | the loss of a rank | similarities on a rank |
    |---|---|---|
    | False | mean over all N pairs | N^2, one problem |
    | True | mean over its own N / W pairs | 2 N^2 / W, W square blocks for each direction |

    Args:
        local_loss: a rank's own pairs against those of all ranks; else all pairs on every rank.
        gather_with_grad: gathering is differentiated: a rank's features also get the gradient of
            the other ranks' losses, by one more exchange in the backward pass. Otherwise gathered
            features are constants; without `local_loss` a rank's own are not.
        cache_labels: accepted; no labels are made, so there are none to keep.
        rank, world_size: of this process; see `torch.distributed`.
        use_horovod: accepted on one process only.

    Raises:
        InputError: `rank` is not below `world_size`, or `use_horovod` with several processes; in
            the call, torch's process group is missing, or of another size or rank.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if world_size < 1:
            raise InputError(f"world_size={world_size} must be 1 or more.")
        if not 0 <= rank < world_size:
            raise InputError(
                f"rank={rank} must be from 0 to world_size - 1, and world_size={world_size}."
            )
        if use_horovod and world_size > 1:
            raise InputError(
                f"use_horovod=True with world_size={world_size}: features are gathered by "
                "torch.distributed only. Leave use_horovod False, or use "
                f"open_clip.loss.{type(self).__name__}."
            )
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod

    def forward(
        self,
        image_features: Tensor,  # [N / W, D], as many on every rank
        text_features: Tensor,  # [N / W, D]
        logit_scale: Tensor | float,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The mean loss; a bias common to all logits cancels and is not looked at."""
        pairs = _Pairs(image_features, text_features, _scale(logit_scale))
        loss, _ = self._mean_losses(pairs, teacher=None)
        return {"contrastive_loss": loss} if output_dict else loss

    def _mean_losses(self, own: _Pairs, teacher: _Pairs | None) -> tuple[Tensor, Tensor | None]:
        """The means of InfoNCE and, with a teacher, of the cross-entropy to it."""
        if self.world_size > 1:
            self._check_process_group()
        every = self._gather(own, with_grad=self.gather_with_grad)
        every_teacher = None if teacher is None else self._gather(teacher, with_grad=False)
        if self.world_size == 1 or not self.local_loss:
            return _square_losses(every, every_teacher)
        teachers: tuple[_Pairs | None, ...] = (None, None)
        if teacher is not None and every_teacher is not None:
            teachers = _own_sides(teacher, every_teacher)
        found = [
            _block_losses(side, of_teacher, rank=self.rank)
            for side, of_teacher in zip(_own_sides(own, every), teachers, strict=True)
        ]
        cross_entropy, distilled = zip(*found, strict=True)
        mean = torch.stack(cross_entropy).mean()
        return mean, None if teacher is None else torch.stack(distilled).mean()

    def _gather(self, own: _Pairs, *, with_grad: bool) -> _Pairs:
        """Concatenate the features of all ranks, rank by rank."""
        if self.world_size == 1:
            return own
        image = self._gather_rows(own.image.contiguous(), with_grad)
        text = self._gather_rows(own.text.contiguous(), with_grad)
        return _Pairs(image, text, own.scale)

    def _gather_rows(self, own: Tensor, with_grad: bool) -> Tensor:
        if with_grad:
            from torch.distributed.nn.functional import all_gather

            return torch.cat(all_gather(own))
        parts = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(parts, own.detach())
        if not self.local_loss:
            parts[self.rank] = own
        return torch.cat(parts)

    def _check_process_group(self) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise InputError(
                f"world_size={self.world_size}: this process is in no process group. Call "
                "torch.distributed.init_process_group first, or leave world_size 1."
            )
        for name, found in (("world_size", dist.get_world_size()), ("rank", dist.get_rank())):
            given = getattr(self, name)
            if given != found:
                raise InputError(
                    f"{name}={given}, but torch's process group says {found}. Pass what "
                    f"torch.distributed.get_{name}() returns."
                )


class DistillClipLoss(ClipLoss):
    """Drop-in for `open_clip.loss.DistillClipLoss`: InfoNCE, and cross-entropy to a teacher.

    The teacher's features and scale are constants here: they get no gradient. Arguments, several
    processes and memory are as in `ClipLoss`; the teacher's features are gathered too. Its
    similarities are made once more than the student's, for their entropy, and once again with
    `local_loss` on several processes, to weigh the blocks.
    """

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,  # [N / W, D], as many on every rank
        text_features: Tensor,  # [N / W, D]
        logit_scale: Tensor | float,
        dist_image_features: Tensor,  # [N / W, D0]
        dist_text_features: Tensor,  # [N / W, D0]
        dist_logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """(contrastive, distillation) means, the latter over rows and columns alike."""
        pairs = _Pairs(image_features, text_features, _scale(logit_scale))
        dist_scale = _scale(dist_logit_scale)
        if isinstance(dist_scale, Tensor):
            dist_scale = dist_scale.detach()
        teacher = _Pairs(dist_image_features.detach(), dist_text_features.detach(), dist_scale)
        contrastive_loss, distill_loss = self._mean_losses(pairs, teacher)
        assert distill_loss is not None
        if output_dict:
            return {"contrastive_loss": contrastive_loss, "distill_loss": distill_loss}
        return contrastive_loss, distill_loss


def _scale(value: Tensor | float) -> Tensor | float:
    """open_clip's models also hold it with shape (1,)."""
    return value.reshape(()) if isinstance(value, Tensor) and value.numel() == 1 else value


def _reference(teacher: _Pairs | None) -> dict[str, Any]:
    if teacher is None:
        return {}
    return {"ref_image": teacher.image, "ref_text": teacher.text, "ref_scale": teacher.scale}


def _square_losses(pairs: _Pairs, teacher: _Pairs | None) -> tuple[Tensor, Tensor | None]:
    """The means of InfoNCE and of the cross-entropy to the teacher, over all rows and columns."""
    losses = contrastive(*pairs, **_reference(teacher))
    mean = ((losses.ce_row + losses.ce_col) / 2).mean()
    if teacher is None:
        return mean, None
    assert losses.kl_row is not None
    assert losses.kl_col is not None
    row, col = _entropies(teacher)
    return mean, ((losses.kl_row + row + losses.kl_col + col) / 2).mean()


def _own_sides(own: _Pairs, every: _Pairs) -> tuple[_Pairs, _Pairs]:
    """A rank's own images [n, D] with the texts of all ranks [W n, D], and the reverse."""
    return _Pairs(own.image, every.text, own.scale), _Pairs(own.text, every.image, own.scale)


def _block_losses(
    side: _Pairs, teacher: _Pairs | None, *, rank: int
) -> tuple[Tensor, Tensor | None]:
    """InfoNCE of n queries among the keys of all ranks, and the cross-entropy to a teacher: [n].

    The operator takes square problems, so the queries meet the keys of one rank at a time. With
    `lse_r` of block r, and the teacher's distribution in it and share `w_r` of it,

        InfoNCE       = logsumexp over r of lse_r - own diagonal
        cross-entropy = logsumexp over r of lse_r - sum over r of w_r (lse_r - KL_r - entropy_r)
    """
    pairs, groups = _in_blocks(side)
    of_teacher = None if teacher is None else _in_blocks(teacher)[0]
    losses = contrastive(*pairs, groups=groups, **_reference(of_teacher))
    gaps = _block_gaps(losses.ce_row, pairs, rank=rank, blocks=len(groups))
    cross_entropy = gaps.logsumexp(0)
    if of_teacher is None:
        return cross_entropy, None
    assert losses.kl_row is not None
    with torch.no_grad():
        alone = contrastive(*of_teacher, groups=groups)
        teacher_gaps = _block_gaps(alone.ce_row, of_teacher, rank=rank, blocks=len(groups))
        entropy = _entropies(of_teacher, groups)[0].reshape(gaps.shape)
    expected = gaps - losses.kl_row.reshape(gaps.shape) - entropy
    return cross_entropy, cross_entropy - (teacher_gaps.softmax(0) * expected).sum(0)


def _in_blocks(side: _Pairs) -> tuple[_Pairs, tuple[int, ...]]:
    """Pair the queries with the keys of each rank in turn; and the sizes of the square problems."""
    n = len(side.image)
    blocks = len(side.text) // n
    return side._replace(image=side.image.repeat(blocks, 1)), (n,) * blocks


def _block_gaps(ce_row: Tensor, pairs: _Pairs, *, rank: int, blocks: int) -> Tensor:
    """`lse_r - own diagonal` of each query and block, [W, n].

    By differences of diagonals: the diagonal itself may be 100 where the loss is 1e-6.
    """
    dtype = ce_row.dtype
    diagonal = pairs.scale * (pairs.image.to(dtype) * pairs.text.to(dtype)).sum(1)
    of_block = diagonal.reshape(blocks, -1)
    return ce_row.reshape(blocks, -1) + of_block - of_block[rank]


@torch.no_grad()
def _entropies(teacher: _Pairs, groups: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    """Entropies of the teacher's rows and columns, `log n - KL(teacher || uniform)`.

    A model whose features are all zero is the uniform one.
    """
    zeros = teacher.image.new_zeros(len(teacher.image), 1)
    gap = contrastive(zeros, zeros, 1.0, groups=groups, **_reference(teacher))
    assert gap.kl_row is not None
    assert gap.kl_col is not None
    # Of an n x n matrix of zeros the cross-entropy is log n.
    return gap.ce_row - gap.kl_row, gap.ce_col - gap.kl_col
