"""open_clip's training losses over the fused operator: the same interface and values, no N x N."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fasterase.errors import InputError
from fasterase.ops.contrastive import Contrastive, contrastive


class ClipLoss(nn.Module):
    """Drop-in for `open_clip.loss.ClipLoss`: symmetric InfoNCE in O(N D) memory.

    `F.cross_entropy(S, arange(N)) / 2 + F.cross_entropy(S.T, arange(N)) / 2`, with
    `S = logit_scale * image_features @ text_features.T`, never rounded to half precision. Inside
    `torch.autocast("cuda", dtype)` the features are, before they are multiplied; on the CPU nothing
    is. `local_loss`, `gather_with_grad` and `cache_labels` are accepted and make no
    difference on one process.

    Raises:
        InputError: world_size above 1: gathering features across processes is not supported.
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
        if world_size > 1:
            raise InputError(
                f"world_size must be 1; got {world_size}. This loss does not gather features "
                f"across processes; use open_clip.loss.{type(self).__name__} there."
            )
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod

    def forward(
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        logit_scale: Tensor | float,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The mean loss; a bias common to all logits cancels and is not looked at."""
        loss = _mean_cross_entropy(contrastive(image_features, text_features, _scale(logit_scale)))
        return {"contrastive_loss": loss} if output_dict else loss


class DistillClipLoss(ClipLoss):
    """Drop-in for `open_clip.loss.DistillClipLoss`: InfoNCE, and cross-entropy to a teacher.

    The teacher's features and scale are constants here: they get no gradient.
    """

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        logit_scale: Tensor | float,
        dist_image_features: Tensor,  # [N, D0]
        dist_text_features: Tensor,  # [N, D0]
        dist_logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """(contrastive, distillation) means, the latter over rows and columns alike."""
        teacher = (
            dist_image_features.detach(),
            dist_text_features.detach(),
            _scale(dist_logit_scale),
        )
        losses = contrastive(
            image_features,
            text_features,
            _scale(logit_scale),
            ref_image=teacher[0],
            ref_text=teacher[1],
            ref_scale=teacher[2],
        )
        assert losses.kl_row is not None
        assert losses.kl_col is not None
        distill_loss = ((losses.kl_row + losses.kl_col) / 2).mean() + _mean_entropy(*teacher)
        contrastive_loss = _mean_cross_entropy(losses)
        if output_dict:
            return {"contrastive_loss": contrastive_loss, "distill_loss": distill_loss}
        return contrastive_loss, distill_loss


def _scale(value: Tensor | float) -> Tensor | float:
    """open_clip's models also hold it with shape (1,)."""
    return value.reshape(()) if isinstance(value, Tensor) and value.numel() == 1 else value


def _mean_cross_entropy(losses: Contrastive) -> Tensor:
    return ((losses.ce_row + losses.ce_col) / 2).mean()


@torch.no_grad()
def _mean_entropy(image: Tensor, text: Tensor, scale: Tensor | float) -> Tensor:
    """Mean entropy of the teacher's rows and columns, `log N - KL(teacher || uniform)`.

    A model whose features are all zero is the uniform one.
    """
    zeros = image.new_zeros(len(image), 1)
    gap = contrastive(zeros, zeros, 1.0, ref_image=image, ref_text=text, ref_scale=scale)
    assert gap.kl_row is not None
    assert gap.kl_col is not None
    # Of an N x N matrix of zeros the cross-entropy is log N.
    return ((gap.ce_row - gap.kl_row + gap.ce_col - gap.kl_col) / 2).mean()
