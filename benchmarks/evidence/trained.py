"""Methods that train: objectives of the engine, noise in place of pictures, negated task vectors.

Learning rates and steps are tried alike for all of them. `steps` is a tuple: one run is judged at
each of its numbers.
"""

from __future__ import annotations

import itertools
from typing import Any, cast

import torch
from torch.nn.functional import cosine_similarity
from torch.utils.data import ConcatDataset

from benchmarks.evidence.task import Method, Setting, Task, plain_config, train
from fasterase.demo import emoji
from fasterase.demo.run import recipe_config, trained_pairs

RATES, STEPS = (3e-5, 1e-4), (15, 30, 60)
OFF = {"forget_weight": 0.0, "retain_weight": 0.0, "consistency_weight": 0.0, "anchor_weight": 0.0}
ASCENT = {**OFF, "forget_loss": "contrastive", "forget_weight": 1.0}

# Error-maximising noise: pictures per forgotten concept, and how they are found.
NOISE_PER_CONCEPT, NOISE_STEPS, NOISE_RATE = 12, 30, 0.1


def erase_by_objective(task: Task, setting: Setting) -> None:
    """Train with weights of the engine's own terms, on the names of the forgotten concepts."""
    config = plain_config(max_steps=max(setting["steps"]), **_fields_of(setting))
    train(
        task,
        config,
        forget=task.sets.forget.reworded(emoji.name_only),
        retain=task.sets.retain,
        measured_at=setting["steps"],
    )


def erase_by_default(task: Task, setting: Setting) -> None:
    """The library's default, which chooses rate and steps for itself."""
    config = recipe_config("fasterase", small_model=True, **setting)
    forget, retain = trained_pairs(task.sets, "fasterase")
    task.measure(train(task, config, forget=forget, retain=retain))


def erase_by_noise(task: Task, setting: Setting) -> None:
    """Error-maximising noise: impair with noise under the forgotten names, then repair on retain.

    The noise is the picture that the model least associates with a name; half of the steps train on
    it and on retain pairs, half on retain pairs alone.
    """
    fields = _fields_of(setting) | {"retain_weight": 1.0}
    both: ConcatDataset[Any] = ConcatDataset([task.sets.retain, cast(Any, find_noise(task))])
    # With weight 0; the engine wants a forget set.
    names = task.sets.forget.reworded(emoji.name_only)
    for steps in setting["steps"]:  # each in halves of its own
        before = {name: value.clone() for name, value in task.model.module.state_dict().items()}
        config = plain_config(max_steps=steps // 2, **fields)
        train(task, config, forget=names, retain=both)
        train(task, config, forget=names, retain=task.sets.retain)
        task.measure(steps)
        task.model.module.load_state_dict(before)


def find_noise(task: Task) -> list[dict[str, Any]]:
    """Return pictures, as tensors, that the model associates least with the forgotten names."""
    model, names = task.model, [n for n in task.sets.concepts for _ in range(NOISE_PER_CONCEPT)]
    generator = torch.Generator().manual_seed(task.seed)
    pictures = torch.randn(len(names), 3, *model.image_size, generator=generator).requires_grad_()
    with torch.no_grad():
        text = model.encode_text(model.tokenize(names))
    optimizer = torch.optim.Adam([pictures], lr=NOISE_RATE)
    for _ in range(NOISE_STEPS):
        similarity = cosine_similarity(model.encode_image(pictures), text).mean()
        (pictures.grad,) = torch.autograd.grad(
            similarity + 1e-3 * pictures.square().mean(), pictures
        )
        optimizer.step()
    return [
        {"image": picture, "text": name}
        for picture, name in zip(pictures.detach(), names, strict=True)
    ]


def erase_by_negation(task: Task, setting: Setting) -> None:
    """Subtract `share` times what fine-tuning on the forget set alone adds to the weights."""
    module = task.model.module
    before = {name: value.clone() for name, value in module.state_dict().items()}
    config = plain_config(
        **OFF | {"retain_weight": 1.0}, lr=setting["lr"], max_steps=setting["max_steps"]
    )
    # The engine's retain loss is InfoNCE: its retain set is the forget set here. The held-out pairs
    # in the place of the other have weight 0.
    names = task.sets.forget.reworded(emoji.name_only)
    taken = train(task, config, forget=task.sets.holdout, retain=names)
    after = module.state_dict()
    for name, value in before.items():
        share = setting["share"] if value.is_floating_point() else 0
        after[name].copy_(value - share * (after[name] - value))
    task.measure(taken)


def _fields_of(setting: Setting) -> dict[str, Any]:
    return {name: value for name, value in setting.items() if name != "steps"}


def _grid(weights: Setting, **more: tuple[float, ...]) -> list[Setting]:
    """Every learning rate with every value of a further field."""
    return [
        {**weights, "steps": STEPS, "lr": lr, **dict(zip(more, values, strict=True))}
        for lr, *values in itertools.product(RATES, *more.values())
    ]


def _objective(title: str, source: str, weights: Setting, **more: tuple[float, ...]) -> Method:
    return Method(title, source, erase_by_objective, _grid(weights, **more))


PAPER, ABLATION = "ACL 2025, long.1469", "ACL 2025, long.1469, ablation"
DEFAULT = "the library's default"
# Ablated: nothing is done to words and between the towers. Low-rank adapters. 8-bit states.
VARIED: dict[str, Setting] = {
    "plain": {"forget_words": False, "cross_weight": 0.0},
    "lora:8": {"tune": "lora:8"},
    "adamw8bit": {"optimizer": "adamw8bit"},
}
FORGETTING, RETAINING = {**OFF, "forget_weight": 3.0}, {"retain_weight": 1.0}
METHODS = (
    _objective("retain only", "fine-tuning on the retain set", OFF | RETAINING),
    _objective("gradient ascent", "arXiv 2109.13398", ASCENT),
    _objective("gradient difference", "arXiv 2203.12817", ASCENT | RETAINING),
    _objective("KL-constrained ascent", "arXiv 2401.06121", ASCENT, consistency_weight=(3.0, 9.0)),
    Method("error-maximising noise", "arXiv 2111.08947", erase_by_noise, _grid(OFF)),
    Method(
        "negated task vector",
        "arXiv 2212.04089",
        erase_by_negation,
        [{"lr": 1e-4, "max_steps": 60, "share": share} for share in (0.5, 1.0, 2.0, 4.0)],
    ),
    _objective("CLIPErase, FM", ABLATION, FORGETTING),
    _objective("CLIPErase, FM + RM", ABLATION, FORGETTING | RETAINING),
    _objective("CLIPErase", PAPER, FORGETTING | RETAINING, consistency_weight=(3.0, 9.0)),
    Method("fasterase", DEFAULT, erase_by_default, [{}]),
    *(
        Method(f"fasterase, {title}", DEFAULT, erase_by_default, [setting], most_seeds=1)
        for title, setting in VARIED.items()
    ),
)
