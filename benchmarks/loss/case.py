"""One case of the contrastive benchmark: its inputs, its FLOPs and its exact losses in fp64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from fasterase.ops.contrastive import contrastive

MODES = ("full", "forward", "backward", "no-grad-forward")
REF_SCALE = 100.0
SIGLIP_BIAS = -10.0
PAIRS_PER_LABEL = 4


@dataclass(frozen=True)
class Case:
    """One problem; `kl` adds the KL to a frozen original of the same width.

    `labels` makes four pairs at a time each other's positives, as pairs with equal captions are.
    """

    num_pairs: int
    width: int
    dtype: str = "float32"
    scale: float = 100.0
    kl: bool = False
    device: str = "cpu"
    labels: bool = False

    @property
    def num_labels(self) -> int:
        return -(-self.num_pairs // PAIRS_PER_LABEL)

    @property
    def torch_dtype(self) -> torch.dtype:
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found

    @property
    def matrix_bytes(self) -> int:
        """Size of one [N, N] matrix of logits in the case's dtype."""
        return self.num_pairs**2 * self.torch_dtype.itemsize


class Inputs(NamedTuple):
    """Leaves of the loss; the reference's features are constants, None without the KL."""

    image: Tensor  # [N, D]
    text: Tensor  # [N, D]
    scale: Tensor  # [] fp32 (fp64 for fp64 features)
    ref_image: Tensor | None  # [N, D]
    ref_text: Tensor | None  # [N, D]
    ref_scale: Tensor | None  # []
    labels: Tensor | None = None  # [N] 0 to num_labels - 1

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.image, self.text, self.scale

    @property
    def reference(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("ref_image", "ref_text", "ref_scale")}


class Losses(NamedTuple):
    """The scalars that the providers compute from one set of inputs, differentiable."""

    clip: Tensor  # mean InfoNCE of both directions, plus the mean KL of both with a reference
    reference_entropy: Tensor  # open_clip's distillation term is the KL plus this constant
    siglip: Tensor  # pairwise sigmoid loss


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Return noisy matched pairs as a trained CLIP gives them; the reference is close to them.

    All features are unit rows. Pairs with the same label are scattered over the batch.
    """
    # On the device: a CPU would take most of a sweep's time to draw them.
    random = torch.Generator(case.device).manual_seed(seed)

    def rows() -> Tensor:
        shape = case.num_pairs, case.width
        return torch.randn(shape, generator=random, device=case.device)

    concept = rows()
    image, text = (normalize(concept + 2.0 * rows()) for _ in range(2))
    ref = (normalize(x + 0.3 * normalize(rows())) for x in (image, text)) if case.kl else ()
    features = [x.to(case.torch_dtype) for x in (image, text, *ref)]
    scale_dtype = torch.float64 if case.dtype == "float64" else torch.float32
    scale = torch.tensor(case.scale, device=case.device, dtype=scale_dtype)
    for leaf in (*features[:2], scale):
        leaf.requires_grad_()
    labels = None
    if case.labels:
        order = torch.randperm(case.num_pairs, generator=random, device=case.device)
        labels = order % case.num_labels
    if not case.kl:
        return Inputs(features[0], features[1], scale, None, None, None, labels)
    ref_scale = torch.tensor(REF_SCALE, device=case.device, dtype=scale_dtype)
    return Inputs(features[0], features[1], scale, features[2], features[3], ref_scale, labels)


def flops(case: Case, mode: str, objective: str = "clip") -> int:
    """Count the multiplications and additions of the loss if no [N, N] matrix is kept.

    In units of N^2 D: forward 2 (4 with the KL), backward 6 (8), for the logits again and two
    gradients. The sigmoid loss computes its gradients with the loss: 2 and 4. The count is the
    same for every provider, whatever it does, so rates compare as times do.
    """
    forward = 4 if case.kl else 2
    backward = 4 if objective == "siglip" else forward + 4
    units = {"forward": forward, "no-grad-forward": forward, "backward": backward}
    return units.get(mode, forward + backward) * case.num_pairs**2 * case.width


def tiled_losses(inputs: Inputs) -> Losses:
    """Compute the losses as `exact_losses` does, SigLIP's left out, without an [N, N] matrix.

    In fp64 they are as exact: the tests of the operator hold its tiles to whole matrices.
    """
    found = contrastive(**inputs._asdict(), backend="chunked")
    clip = (found.ce_row + found.ce_col).mean() / 2
    entropy = torch.zeros_like(clip)
    if found.kl_row is not None and found.kl_col is not None:
        clip = clip + (found.kl_row + found.kl_col).mean() / 2
        # Of equal features: KL(p0 || uniform) = log N - entropy.
        ones = torch.ones_like(inputs.image[:, :1])
        uniform = contrastive(ones, ones, 1.0, **inputs.reference, backend="chunked")
        assert uniform.kl_row is not None
        assert uniform.kl_col is not None
        entropy = math.log(len(ones)) - (uniform.kl_row + uniform.kl_col).mean() / 2
    return Losses(clip, entropy, torch.full_like(clip, torch.nan))


def exact_losses(inputs: Inputs) -> Losses:
    """Compute the losses from whole matrices in the inputs' dtype; fp64 inputs give the truth."""
    logits = inputs.scale * inputs.image @ inputs.text.T
    labels = inputs.labels
    if labels is None:
        labels = torch.arange(len(logits), device=logits.device)
    target = (labels[:, None] == labels).to(logits.dtype)
    target = target / target.sum(1, keepdim=True)
    clip = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
    entropy = torch.zeros_like(clip)
    ref_image, ref_text, ref_scale = inputs[3:6]
    if ref_image is not None and ref_text is not None and ref_scale is not None:
        ref = ref_scale * ref_image @ ref_text.T
        for now, before in ((logits, ref), (logits.T, ref.T)):
            p0, log_p0 = before.softmax(1), before.log_softmax(1)
            clip = clip + (p0 * (log_p0 - now.log_softmax(1))).sum(1).mean() / 2
            entropy = entropy - (p0 * log_p0).sum(1).mean() / 2
    sign = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    siglip = -logsigmoid(sign * (logits + SIGLIP_BIAS)).sum() / len(logits)
    return Losses(clip, entropy, siglip)


def in_fp64(inputs: Inputs) -> Inputs:
    """Copy the inputs to new fp64 leaves."""
    copies = [None if x is None else x.detach().double() for x in inputs[:6]]
    for leaf in copies[:3]:
        assert leaf is not None
        leaf.requires_grad_()
    return Inputs(*copies)._replace(labels=inputs.labels)  # type: ignore[arg-type]
