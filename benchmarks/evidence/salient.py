"""Methods that ask gradients which weights hold the concept: SLUG, SalUn and SSD.

Each is its published algorithm, with CLIP's loss over pairs in place of a classifier's. They are
given every wording of the pairs, as the library's default is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import ConcatDataset

from benchmarks.evidence.task import Method, Setting, Task
from benchmarks.evidence.trained import RATES, STEPS
from fasterase.demo.run import BATCHES, trained_pairs
from fasterase.models.dual_encoder import DualEncoder
from fasterase.models.preprocessing import Tokens
from fasterase.ops.contrastive import contrastive
from fasterase.pairs.prepare import hash_captions

BATCH = 64  # pairs behind one gradient
ROUNDS = 4  # passes over the forget set, each with other wordings
SEARCH_STEPS = 10  # of SLUG's binary search
SEARCHED = 200  # retain drawings that it is judged by
BETAS = (0.9, 0.98)  # of Adam, as everywhere

Weights = dict[str, Tensor]  # name of a parameter -> one value for each weight


class Batch(NamedTuple):
    """n pairs with one wording each."""

    pixels: Tensor  # [n, 3, H, W]
    tokens: Tokens  # [n, L]
    labels: Tensor  # [n], equal for equal captions


class Step(NamedTuple):
    """A step of one layer along its gradient, and what is known after it."""

    layer: str
    size: float
    forgotten: float  # share of forget drawings whose nearest name is their own
    kept: float  # of retain drawings


def erase_one_layer(task: Task, setting: Setting) -> None:
    """SLUG: move one layer along the gradient of the forget pairs' distance, once.

    Of the layers of a `tower`, those on the Pareto front of much importance (norm of the gradient
    over that of the weights) and little alignment (|cosine| with the gradient of CLIP's loss on
    retain pairs) are searched for the smallest step that leaves no forget drawing with its name
    nearest. Of these the one is taken that keeps the most, less what it still knows.
    """
    forget, retain = trained_pairs(task.sets, "fasterase")
    uphill = gradients(task, forget, mean_distance, rounds=ROUNDS)
    layers = pareto_front(task.model, uphill, gradients(task, retain, clip_loss), setting["tower"])
    judge = naming(task)
    found = [search_step(task.model, layer, uphill[layer], judge) for layer in layers]
    best = max(found, key=lambda step: step.kept - step.forgotten)
    with torch.no_grad():
        task.model.module.get_parameter(best.layer).add_(uphill[best.layer], alpha=best.size)
    task.measure(0)


def pareto_front(model: DualEncoder, uphill: Weights, kept: Weights, tower: str) -> list[str]:
    """Return the layers of a tower that no other one beats in importance and in alignment.

    Biases, embeddings and the scale are no layers.
    """
    scores = {}
    for name, weight in model.module.named_parameters():
        is_layer = not any(part in name for part in ("bias", "logit_scale", "embedding"))
        in_tower = (tower == "image") == name.startswith("visual.")
        if is_layer and in_tower and uphill[name].any():
            importance = float(uphill[name].norm() / weight.detach().norm())
            pair = uphill[name].flatten(), kept[name].flatten()
            scores[name] = importance, abs(float(torch.cosine_similarity(*pair, dim=0)))
    return [
        name
        for name, (importance, alignment) in scores.items()
        if not any(more > importance and less < alignment for more, less in scores.values())
    ]


def search_step(
    model: DualEncoder, layer: str, uphill: Tensor, judge: Callable[[], tuple[float, float]]
) -> Step:
    """Return the smallest step found after which nothing to forget is known, or else the last.

    The first is a tenth of the norm of weights over that of the gradient; they double until one is
    enough, and then halve the interval. The weights are put back.
    """
    weight = model.module.get_parameter(layer)
    before = weight.detach().clone()
    low, high, size = 0.0, math.inf, float(before.norm() / uphill.norm()) / 10
    enough = None
    for _ in range(SEARCH_STEPS):
        with torch.no_grad():
            weight.copy_(before + size * uphill)
        step = Step(layer, size, *judge())
        if step.forgotten == 0:
            enough, high = step, size
        else:
            low = size
        size = 2 * size if math.isinf(high) else (low + high) / 2
    with torch.no_grad():
        weight.copy_(before)
    return enough or step


def naming(task: Task) -> Callable[[], tuple[float, float]]:
    """Return what gives the shares of forget and of retain drawings whose own name is nearest."""
    model, forget, retain = task.model, task.sets.forget, task.sets.retain
    names = sorted({*forget.names, *retain.names})
    chosen = np.random.default_rng(task.seed).permutation(len(retain))[:SEARCHED]
    shown = [(forget, row) for row in range(len(forget))] + [(retain, int(row)) for row in chosen]
    pixels = torch.stack([model.preprocess(those[row]["image"]) for those, row in shown])
    own = torch.tensor([names.index(those.names[row]) for those, row in shown])
    tokens = model.tokenize(names)

    @torch.no_grad()
    def judge() -> tuple[float, float]:
        right = (model.encode_image(pixels) @ model.encode_text(tokens).T).argmax(1) == own
        known, kept = right[: len(forget)].double().mean(), right[len(forget) :].double().mean()
        return float(known), float(kept)

    return judge


def relabel_salient(task: Task, setting: Setting) -> None:
    """SalUn: teach forget pictures other things' captions, drawn anew in each step, beside retain.

    Only the `share` of the weights with the largest gradient of the forget pairs' loss changes.
    """
    forget, retain = trained_pairs(task.sets, "fasterase")
    masks = salient(gradients(task, forget, clip_loss, rounds=ROUNDS), setting["share"])
    named = dict(task.model.module.named_parameters())
    optimizer = torch.optim.Adam(named.values(), lr=setting["lr"], betas=BETAS)
    last = max(setting["steps"])
    drawn = (
        batches(task, each, rounds=last, size=BATCHES[size])  # a round is a batch or more
        for each, size in ((forget, "forget_batch_size"), (retain, "batch_size"))
    )
    for step, (wrong, right) in zip(range(1, last + 1), zip(*drawn, strict=False), strict=False):
        loss = setting["retain_weight"] * clip_loss(task.model, right)
        loss = loss + relabelled_loss(task.model, wrong, right, seed=[task.seed, step])
        gradient = torch.autograd.grad(loss, [*named.values()], allow_unused=True)
        for (name, weight), each in zip(named.items(), gradient, strict=True):
            weight.grad = None if each is None else each * masks[name]
        optimizer.step()
        if step in setting["steps"]:
            optimizer.zero_grad()
            task.measure(step)


def relabelled_loss(model: DualEncoder, wrong: Batch, right: Batch, *, seed: list[int]) -> Tensor:
    """Return the cross-entropy of the pictures of `wrong` with random captions of `right`.

    All captions compete, those of `wrong` too: for a classifier, the right class of a relabelled
    picture is a wrong answer as well.
    """
    text = model.encode_text(right.tokens)
    candidates = torch.cat([text, model.encode_text(wrong.tokens)])
    logits = model.scale() * model.encode_image(wrong.pixels) @ candidates.T
    answers = np.random.default_rng(seed).integers(len(text), size=len(logits))
    return cross_entropy(logits, torch.from_numpy(answers))


def salient(gradient: Weights, share: float) -> Weights:
    """Return masks: 1 for the `share` of all weights with the largest gradients, else 0.

    Fewer where most gradients are 0, as those of words that no caption has.
    """
    sizes = torch.cat([each.abs().flatten() for each in gradient.values()])
    least = sizes.kthvalue(len(sizes) - max(1, round(share * len(sizes))) + 1).values
    return {
        name: ((each.abs() >= least) & (each != 0)).to(each.dtype)
        for name, each in gradient.items()
    }


def dampen(task: Task, setting: Setting) -> None:
    """SSD: scale down the weights that matter much more to forget pairs than to all pairs.

    A weight's importance is its mean squared gradient of CLIP's loss. Where that on forget pairs
    exceeds `selection` times that on all pairs, the weight is multiplied by `dampening` times the
    latter over the former, or by 1 if that is more.
    """
    forget, retain = trained_pairs(task.sets, "fasterase")
    of_forget = gradients(task, forget, clip_loss, rounds=ROUNDS, power=2)
    # Forget pairs come first, so that they have the same wordings: else the words of some would
    # matter to forget pairs alone.
    both: ConcatDataset[Any] = ConcatDataset([forget, retain])
    of_all = gradients(task, both, clip_loss, rounds=ROUNDS, power=2)
    with torch.no_grad():
        for name, weight in task.model.module.named_parameters():
            factor = (setting["dampening"] * of_all[name] / of_forget[name]).clamp(max=1)
            chosen = of_forget[name] > setting["selection"] * of_all[name]
            weight.mul_(torch.where(chosen, factor, 1))
    task.measure(0)


def mean_distance(model: DualEncoder, batch: Batch) -> Tensor:
    """Return the mean of 1 - cosine of the pairs."""
    cosines = (model.encode_image(batch.pixels) * model.encode_text(batch.tokens)).sum(1)
    return 1 - cosines.mean()


def clip_loss(model: DualEncoder, batch: Batch) -> Tensor:
    image, text = model.encode_image(batch.pixels), model.encode_text(batch.tokens)
    losses = contrastive(image, text, model.scale(), labels=batch.labels, backend="dense")
    return (losses.ce_row + losses.ce_col).mean() / 2


def gradients(
    task: Task,
    pairs: Any,
    loss: Callable[[DualEncoder, Batch], Tensor],
    *,
    rounds: int = 1,
    power: int = 1,
) -> Weights:
    """Return the mean over batches of the loss's gradient to a power, for each parameter."""
    named = dict(task.model.module.named_parameters())
    total = {name: torch.zeros_like(weight) for name, weight in named.items()}
    count = 0
    for batch in batches(task, pairs, rounds=rounds, size=BATCH):
        found = torch.autograd.grad(loss(task.model, batch), [*named.values()], allow_unused=True)
        for name, gradient in zip(named, found, strict=True):
            if gradient is not None:
                total[name] += gradient**power
        count += 1
    return {name: each / count for name, each in total.items()}


def batches(task: Task, pairs: Any, *, rounds: int, size: int) -> Iterator[Batch]:
    """Yield all pairs `rounds` times, in random order, each with one of its wordings.

    A batch has `size` pairs or somewhat more, or all. The wording depends on round and row alone.
    """
    for number in range(rounds):
        order = np.random.default_rng([task.seed, number]).permutation(len(pairs))
        for rows in np.array_split(order, max(1, len(order) // size)):
            items: list[Mapping[str, Any]] = [pairs[int(row)] for row in rows]
            captions = [
                str(np.random.default_rng([task.seed, number, row]).choice(item["text"]))
                for row, item in zip(rows, items, strict=True)
            ]
            yield Batch(
                torch.stack([task.model.preprocess(item["image"]) for item in items]),
                task.model.tokenize(captions),
                torch.from_numpy(hash_captions(captions).astype(np.int64)),
            )


TOWERS = [{"tower": tower} for tower in ("image", "text")]
MASKED = [
    {"lr": lr, "share": share, "retain_weight": weight, "steps": STEPS}
    for lr, share, weight in product(RATES, (0.1, 0.5), (1.0, 5.0))
]
DAMPENED = [
    {"selection": selection, "dampening": dampening}
    for selection, dampening in product((10.0, 20.0, 30.0, 100.0), (1.0, 10.0))
]
METHODS = (
    Method("SLUG", "arXiv 2407.11867", erase_one_layer, TOWERS),
    Method("SalUn", "arXiv 2310.12508", relabel_salient, MASKED),
    Method("SSD", "arXiv 2308.07707", dampen, DAMPENED),
)
