"""open_clip's training losses over the fused operator: the same interface and values, no N x N."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fasterase.errors import InputError
from fasterase.ops.contrastive import contrastive, weighted_contrastive
from fasterase.ops.contrastive.checks import check_pairs, check_scale, compute_dtype

_Groups = tuple[int, ...] | None


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
        """The mean loss, 0 of no pairs; a bias common to all logits cancels and is ignored."""
        (loss,) = self._mean_losses(_Pairs(image_features, text_features, _scale(logit_scale)))
        return {"contrastive_loss": loss} if output_dict else loss

    def _mean_losses(self, own: _Pairs, *teacher: _Pairs) -> tuple[Tensor, ...]:
        """The means of InfoNCE and, with a teacher, of the cross-entropy to it."""
        if self.world_size > 1:
            self._check_process_group()
            with_grad = self.gather_with_grad
            every = [self._gather(own, with_grad), *(self._gather(x, False) for x in teacher)]
        else:
            every = [own, *teacher]
        if self.world_size == 1 or not self.local_loss or not len(own.image):
            return _square_losses(*every)
        # A rank's own images [n, D] with the texts of all ranks [W n, D], and the reverse.
        models = list(zip((own, *teacher), every, strict=True))
        found = (
            _block_losses(self.rank, *(_Pairs(o.image, e.text, o.scale) for o, e in models)),
            _block_losses(self.rank, *(_Pairs(o.text, e.image, o.scale) for o, e in models)),
        )
        return tuple(torch.stack(sides).mean() for sides in zip(*found, strict=True))

    def _gather(self, own: _Pairs, with_grad: bool) -> _Pairs:
        """Concatenate the features of all ranks, rank by rank."""
        sides: list[Tensor] = []
        for rows in (own.image.contiguous(), own.text.contiguous()):
            if with_grad:
                from torch.distributed.nn.functional import all_gather

                parts = list(all_gather(rows))
            else:
                parts = [torch.empty_like(rows) for _ in range(self.world_size)]
                dist.all_gather(parts, rows.detach())
                if not self.local_loss:
                    parts[self.rank] = rows
            sides.append(torch.cat(parts))
        image, text = sides
        return _Pairs(image, text, own.scale)

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
        names = ("dist_image_features", "dist_text_features")
        check_pairs(dist_image_features, dist_text_features, names)
        dist_scale = _scale(dist_logit_scale)
        check_scale(dist_scale, "dist_logit_scale")
        if isinstance(dist_scale, Tensor):
            dist_scale = dist_scale.detach()
        teacher = _Pairs(dist_image_features.detach(), dist_text_features.detach(), dist_scale)
        contrastive_loss, distill_loss = self._mean_losses(pairs, teacher)
        if output_dict:
            return {"contrastive_loss": contrastive_loss, "distill_loss": distill_loss}
        return contrastive_loss, distill_loss


def _scale(value: Tensor | float) -> Tensor | float:
    """open_clip's models also hold it with shape (1,)."""
    return value.reshape(()) if isinstance(value, Tensor) and value.numel() == 1 else value


def _losses(pairs: _Pairs, *teacher: _Pairs, groups: _Groups = None) -> list[Tensor]:
    """The operator's two losses, or four with a teacher."""
    names = ("ref_image", "ref_text", "ref_scale")
    reference: dict[str, Any] = {k: v for each in teacher for k, v in zip(names, each, strict=True)}
    found = contrastive(*pairs, groups=groups, **reference)
    return [loss for loss in found if loss is not None]


def _square_losses(pairs: _Pairs, *teacher: _Pairs) -> tuple[Tensor, ...]:
    """The means of InfoNCE and of the cross-entropy to the teacher, over all rows and columns."""
    if not teacher:
        check_pairs(pairs.image, pairs.text)
        n, dtype = len(pairs.image), compute_dtype(pairs.image, pairs.text)
        weights = pairs.image.new_full((2, n), 0.5 / max(n, 1), dtype=dtype)
        return (weighted_contrastive(*pairs, weights).total,)
    ce_row, ce_col, *kl = _losses(pairs, *teacher)
    row, col = _entropies(teacher[0])
    return _mean((ce_row + ce_col) / 2), _mean((kl[0] + row + kl[1] + col) / 2)


def _mean(losses: Tensor) -> Tensor:
    """[] the mean of [n] losses, 0 of none."""
    return losses.mean() if len(losses) else losses.sum()


def _block_losses(rank: int, side: _Pairs, *teacher: _Pairs) -> tuple[Tensor, ...]:
    """InfoNCE of n queries among the keys of all ranks, and the cross-entropy to a teacher: [n].

    The operator takes square problems, so the queries meet the keys of one rank at a time. With
    `lse_r` of block r, and the teacher's distribution in it and share `w_r` of it,

        InfoNCE       = logsumexp over r of lse_r - own diagonal
        cross-entropy = logsumexp over r of lse_r - sum over r of w_r (lse_r - KL_r - entropy_r)
    """
    n = len(side.image)
    groups = (n,) * (len(side.text) // n)
    pairs, *of_teacher = (
        each._replace(image=each.image.repeat(len(groups), 1)) for each in (side, *teacher)
    )
    ce_row, _, *kl = _losses(pairs, *of_teacher, groups=groups)
    gaps = _block_gaps(ce_row, pairs, rank=rank, blocks=len(groups))
    cross_entropy = gaps.logsumexp(0)
    if not teacher:
        return (cross_entropy,)
    with torch.no_grad():
        alone = _losses(*of_teacher, groups=groups)
        teacher_gaps = _block_gaps(alone[0], *of_teacher, rank=rank, blocks=len(groups))
        entropy = _entropies(of_teacher[0], groups)[0].reshape(gaps.shape)
    expected = gaps - kl[0].reshape(gaps.shape) - entropy
    return cross_entropy, cross_entropy - (teacher_gaps.softmax(0) * expected).sum(0)


def _block_gaps(ce_row: Tensor, pairs: _Pairs, *, rank: int, blocks: int) -> Tensor:
    """`lse_r - own diagonal` of each query and block, [W, n].

    By differences of diagonals: the diagonal itself may be 100 where the loss is 1e-6.
    """
    dtype = ce_row.dtype
    diagonal = pairs.scale * (pairs.image.to(dtype) * pairs.text.to(dtype)).sum(1)
    of_block = diagonal.reshape(blocks, -1)
    return ce_row.reshape(blocks, -1) + of_block - of_block[rank]


@torch.no_grad()
def _entropies(teacher: _Pairs, groups: _Groups = None) -> tuple[Tensor, Tensor]:
    """Entropies of the teacher's rows and columns, `log n - KL(teacher || uniform)`.

    A model whose features are all zero is the uniform one; its cross-entropy is log n.
    """
    zeros = teacher.image.new_zeros(len(teacher.image), 1)
    ce_row, ce_col, kl_row, kl_col = _losses(_Pairs(zeros, zeros, 1.0), teacher, groups=groups)
    return ce_row - kl_row, ce_col - kl_col
