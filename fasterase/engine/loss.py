"""The loss of a step over the pairs of all ranks, and its gradients with respect to one's own.

The features are gathered without a graph and every rank computes the whole loss: at a batch of 32k
that is a thousandth of what the towers of ViT-bigG compute. Each rank keeps the gradients of its
own rows, so that no collective is differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasterase.engine.job import Job
from fasterase.engine.optim import Trained
from fasterase.objective import (
    EraseLoss,
    ForgetGroup,
    Objective,
    Strangers,
    moved_distance,
    weighted_erase_loss,
)
from fasterase.original.features import Unmatched
from fasterase.parallel.ranks import ALONE, Ranks
from fasterase.transfers import to_device

# CLIP's own ceiling of the scale (Radford et al., 2021, section 2.5).
MAX_SCALE = 100.0
# How far above the floor a pair rests, in standard deviations of unrelated cosines. To retrained
# models a concept they never saw is a little nearer than what is unrelated, for it is like others.
FLOOR_MARGIN = 0.15
# The original's image features [n, D0], text features [n, D0] and scale []; Nones if not used.
OfOriginal = tuple[Tensor | None, Tensor | None, Tensor | None]


def loss_products(precision: str) -> str:
    """Return how the loss multiplies features where the towers run in `precision` (resolved).

    fp16 for bf16 towers too: of unit rows it keeps eight times bf16's precision at the same speed.
    """
    return "fp32" if precision == "fp32" else "fp16"


class FeatureGradients(NamedTuple):
    """The loss of a step, detached, and the gradients of its total.

    They are None for what is not trained, and if the total does not depend on it. If a term of the
    loss is not finite they are NaN, so that no engine takes the step, and nothing has to be read.
    """

    loss: EraseLoss
    image: Tensor | None  # [n, D]
    text: Tensor | None  # [n, D]
    scale: Tensor | None  # []


@dataclass(frozen=True)
class StepLoss:
    """Computes the loss from features, and its gradients, without touching the towers.

    The rows of all ranks stand in the order of the step's draw, forget pairs first, so that the
    loss is the one that a single process would compute.

    Attributes:
        floors: of several concepts, floor and margin of each; empty for one, whose floor the
            objective has.
        strangers: of links, for each concept, what they are to end at in place of a floor.
        max_scale: a trained scale is clamped to it inside the loss. Clamping the weight would be
            lost in optimisers that have master weights of their own.
        measures_distance: report the anchor term, the distance that retained features have moved,
            even where its weight is 0 and it is no part of the total.
    """

    objective: Objective
    image_trained: bool  # whether its gradient is needed
    text_trained: bool
    scale_trained: bool
    floors: Sequence[tuple[float | None, float]] = ()
    strangers: Sequence[Strangers] = ()
    max_scale: float = MAX_SCALE
    measures_distance: bool = False
    ranks: Ranks = ALONE

    @classmethod
    def of_job(
        cls,
        job: Job,
        trained: Trained,
        *,
        floors: Sequence[Unmatched],
        strangers: Sequence[Strangers] = (),
    ) -> StepLoss:
        """Return the loss of a run; automatic floors rest on the `floors` of its concepts."""
        config = job.config
        chosen: list[tuple[float | None, float]] = [
            (each.mean, FLOOR_MARGIN * each.deviation)
            if config.floor == "auto"
            else (config.floor, 0.0)
            for each in floors
        ]
        objective = Objective(
            forget_weight=config.forget_weight,
            retain_weight=config.retain_weight,
            consistency_weight=config.consistency_weight,
            forget_loss=config.forget_loss,
            floor=chosen[0][0] if config.forget_loss == "similarity" else None,
            anchor_weight=config.anchor_weight,
            negatives=config.negatives,
            backend=config.backend,
            products=loss_products(job.precision),
            cross_weight=config.used_cross_weight,
            floor_margin=chosen[0][1],
        )
        return cls(
            objective,
            image_trained=trained.image,
            text_trained=trained.text,
            scale_trained=trained.scale,
            floors=chosen if job.concepts else (),
            strangers=strangers,
            max_scale=max(MAX_SCALE, float(job.model.scale().detach())),
            measures_distance=config.lr == "auto" and not config.anchor_weight,
            ranks=job.ranks,
        )

    def __call__(
        self,
        image: Tensor,  # [n, D]
        text: Tensor,  # [n, D]
        scale: Tensor,  # []
        original: OfOriginal,
        *,
        n_forget: int,
        labels: Tensor,  # [n]
        upstream: Tensor,  # []
        concepts: tuple[Tensor, Sequence[float]] | None = None,  # [n], one for each concept
    ) -> FeatureGradients:
        """Return the loss over all ranks' rows, and one's own gradients of `upstream * total`.

        The gradients of rows are multiplied by the world size, since engines average over the
        ranks; that of the scale is the same on all ranks, and stays itself.

        Args:
            image, text, scale: features, the `n_forget` forget pairs first, and exp(logit_scale).
            original: what the original makes of the pairs.
            labels: equal for equal captions; on the CPU, where the operator can look at them.
            upstream: the scaling of the loss in fp16, else 1.
            concepts: of several, the number of each pair's, on the CPU, and the weight of each.
        """
        ranks = self.ranks
        if ranks.world_size == 1:
            return self._compute(image, text, scale, original, n_forget, labels, upstream, concepts)
        numbers = None if concepts is None else concepts[0].numpy()
        found = ranks.gather_objects((n_forget, len(image), labels.numpy(), numbers))
        counts = [(forget, total) for forget, total, *_ in found]
        is_retain = torch.cat([torch.arange(total) >= forget for forget, total in counts])
        order = is_retain.argsort(stable=True)  # of all rows, those of the first rank first
        owner = torch.cat([torch.full((total,), rank) for rank, (_, total) in enumerate(counts)])
        own = to_device((owner[order] == ranks.rank).nonzero().flatten(), image.device)
        order_there = to_device(order, image.device)

        def gathered(rows: Tensor) -> Tensor:
            parts = ranks.gather_rows(rows, [total for _, total in counts])
            return torch.cat(parts)[order_there]

        def joined(parts: Sequence[np.ndarray]) -> Tensor:
            return torch.from_numpy(np.concatenate(parts))[order]

        ref_image, ref_text, ref_scale = original
        *_, of_labels, of_numbers = zip(*found, strict=True)
        computed = self._compute(
            gathered(image),
            gathered(text),
            scale,
            (
                None if ref_image is None else gathered(ref_image),
                None if ref_text is None else gathered(ref_text),
                ref_scale,
            ),
            sum(forget for forget, _ in counts),
            joined(of_labels),
            upstream,
            None if concepts is None else (joined(of_numbers), concepts[1]),
        )
        image_gradient, text_gradient = (
            None if gradient is None else gradient[own] * ranks.world_size
            for gradient in (computed.image, computed.text)
        )
        return computed._replace(image=image_gradient, text=text_gradient)

    def _compute(
        self,
        image: Tensor,  # [N, D]
        text: Tensor,  # [N, D]
        scale: Tensor,  # []
        original: OfOriginal,
        n_forget: int,
        labels: Tensor,  # [N]
        upstream: Tensor,  # []
        concepts: tuple[Tensor, Sequence[float]] | None,  # [N], one for each concept
    ) -> FeatureGradients:
        """Return the loss over all given rows, and its gradients."""
        trained = (self.image_trained, self.text_trained, self.scale_trained)
        leaves = [
            tensor.detach().requires_grad_(wanted)
            for tensor, wanted in zip((image, text, scale), trained, strict=True)
        ]
        clamped = leaves[2].clamp(max=self.max_scale) if self.scale_trained else leaves[2]
        with torch.enable_grad():
            loss = weighted_erase_loss(
                leaves[0],
                leaves[1],
                clamped,
                *original,
                self.objective,
                n_forget=n_forget,
                labels=labels,
                groups=self._groups(concepts, n_forget, image.device),
                strangers=self.strangers[0] if self.strangers else None,
            )
        detached = EraseLoss(*(term.detach() for term in loss))
        ref_image, ref_text, _ = original
        if self.measures_distance and n_forget < len(image) and ref_image is not None:
            assert ref_text is not None
            features = (image.detach(), text.detach(), ref_image, ref_text)
            moved = moved_distance(*(each[n_forget:] for each in features))
            detached = detached._replace(anchor=moved)
        if not loss.total.requires_grad:
            return FeatureGradients(detached, None, None, None)
        is_finite = torch.stack(detached).isfinite().all()
        upstream = torch.where(is_finite, upstream, torch.nan)
        needed = [leaf for leaf in leaves if leaf.requires_grad]
        computed = iter(torch.autograd.grad(loss.total, needed, upstream, allow_unused=True))
        gradients = [next(computed) if leaf.requires_grad else None for leaf in leaves]
        return FeatureGradients(detached, *gradients)

    def _groups(
        self,
        concepts: tuple[Tensor, Sequence[float]] | None,
        n_forget: int,
        device: torch.device,
    ) -> list[ForgetGroup]:
        """Return the forget rows of each concept that has some, with its floor and weight."""
        if concepts is None:
            return []
        numbers, weights = concepts
        found = [(numbers[:n_forget] == k).nonzero().flatten() for k in range(len(weights))]
        here = [number for number, rows in enumerate(found) if len(rows)]
        total = sum(weights[number] for number in here)
        return [
            ForgetGroup(
                to_device(found[number], device),
                self.floors[number][0],
                weights[number] / total,
                self.floors[number][1],
                self.strangers[number] if self.strangers else None,
            )
            for number in here
        ]
