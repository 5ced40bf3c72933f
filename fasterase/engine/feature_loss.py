"""The objective over one step's features, and its gradients with respect to them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasterase.objective import EraseLoss, Objective, moved_distance, weighted_erase_loss

# CLIP's own ceiling of the scale (Radford et al., 2021, section 2.5).
MAX_SCALE = 100.0


def loss_products(precision: str) -> str:
    """Return how the loss multiplies features where the towers run in `precision` (resolved).

    fp16 for bf16 towers too: of unit rows it keeps eight times bf16's precision at the same speed.
    """
    return "fp32" if precision == "fp32" else "fp16"


class FeatureGradients(NamedTuple):
    """The loss of a step and its gradients with respect to features and scale.

    Attributes:
        loss: the total and its terms, detached.
        image, text: [n, D] gradients of the total; None for a tower that is not trained, and if the
            total is not finite or does not depend on it.
        scale: [] gradient of the total, likewise.
    """

    loss: EraseLoss
    image: Tensor | None
    text: Tensor | None
    scale: Tensor | None


class FeatureLoss:
    """Computes the loss from features, and its gradients, without touching the towers.

    Args:
        image_trained, text_trained, scale_trained: which gradients are needed.
        max_scale: the scale is clamped to it inside the loss, if it is trained. Clamping the weight
            would be lost in optimisers that keep master weights of their own.
        measures_distance: report the anchor term, the distance that kept features have moved,
            even where its weight is 0 and it is no part of the total.
        options: fields of `Objective`.
    """

    def __init__(
        self,
        *,
        image_trained: bool,
        text_trained: bool,
        scale_trained: bool,
        max_scale: float,
        measures_distance: bool = False,
        **options: Any,
    ) -> None:
        self._trained = (image_trained, text_trained, scale_trained)
        self._max_scale = max_scale
        self._measures_distance = measures_distance and not options.get("anchor_weight")
        self._objective = Objective(**options)

    def __call__(
        self,
        image: Tensor,  # [n, D]
        text: Tensor,  # [n, D]
        scale: Tensor,  # []
        reference: tuple[Tensor | None, Tensor | None, Tensor | None],
        *,
        n_forget: int,
        labels: Tensor,  # [n]
        upstream: Tensor,  # []
    ) -> FeatureGradients:
        """Return the loss and the gradients of `upstream * total`.

        Args:
            image, text, scale: features, forget pairs first, and exp(logit_scale).
            reference: the original's image features, text features and scale, or Nones.
            n_forget: how many of the pairs are forget pairs.
            labels: equal for equal captions; on the CPU, where the operator can look at them.
            upstream: the scaling of the loss in fp16, else 1.
        """
        leaves = [
            tensor.detach().requires_grad_(trained)
            for tensor, trained in zip((image, text, scale), self._trained, strict=True)
        ]
        clamped = leaves[2].clamp(max=self._max_scale) if self._trained[2] else leaves[2]
        with torch.enable_grad():
            loss = weighted_erase_loss(
                leaves[0],
                leaves[1],
                clamped,
                *reference,
                self._objective,
                n_forget=n_forget,
                labels=labels,
            )
        detached = EraseLoss(*(term.detach() for term in loss))
        has_retain = n_forget < len(image)
        if (
            self._measures_distance
            and has_retain
            and reference[0] is not None
            and reference[1] is not None
        ):
            moved = moved_distance(
                leaves[0].detach()[n_forget:],
                leaves[1].detach()[n_forget:],
                reference[0][n_forget:],
                reference[1][n_forget:],
            )
            detached = detached._replace(anchor=moved)
        if not (bool(detached.total.isfinite()) and loss.total.requires_grad):
            return FeatureGradients(detached, None, None, None)
        needed = [leaf for leaf in leaves if leaf.requires_grad]
        computed = iter(torch.autograd.grad(loss.total, needed, upstream, allow_unused=True))
        gradients = [next(computed) if leaf.requires_grad else None for leaf in leaves]
        return FeatureGradients(detached, *gradients)
