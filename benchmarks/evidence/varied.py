"""Variants of the default recipe, which `benchmarks.evidence.variants` compares with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.data import ConcatDataset

from benchmarks.evidence.closed_form import encode_captions, encode_images, encode_texts
from benchmarks.evidence.task import Method, Setting, Task, plain_config, train
from benchmarks.evidence.trained import OFF, erase_by_default
from fasterase.demo import emoji
from fasterase.demo.run import recipe_config
from fasterase.demo.sets import Drawings, open_teams
from fasterase.engine import baseline
from fasterase.models.dual_encoder import DualEncoder


def erase_to_a_higher_floor(task: Task, setting: Setting) -> None:
    """Leave pairs alone at `deviations` standard deviations above the mean unrelated cosine."""
    forget, retain = task.sets.forget.reworded(emoji.name_only), task.sets.retain
    image = encode_images(task.model, forget) @ encode_captions(task.model, retain).T
    text = encode_captions(task.model, forget) @ encode_images(task.model, retain).T
    cosines = torch.cat((image.flatten(), text.flatten()))
    floor = float(cosines.mean() + setting["deviations"] * cosines.std())
    erase_by_default(task, {"floor": floor})


def erase_with_all_drawn_alike(task: Task, setting: Setting) -> None:
    """Draw no retain pairs more often than others."""
    with patch.object(baseline, "NEAR_SHARE", 0.0):
        erase_by_default(task, {})


def erase_beside_unlabelled_pictures(task: Task, setting: Setting) -> None:
    """Hold pictures that have no captions, each with the nearest of retain's and its own features.

    They are drawings of everything by a team that no model has seen. What is nearest to a caption
    to forget is left out.
    """
    team = open_teams([emoji.UNSEEN_TEAM])
    pictures = Drawings.of(team, {team.meta(row)["concept"] for row in range(len(team))})
    retain = task.sets.retain
    features = encode_images(task.model, pictures)
    pairs = [
        {"image": pictures[row]["image"], "text": retain[nearest]["text"]}
        for row, nearest in _nearest_kept(task, features, encode_captions)
    ]
    _erase_beside(task, ConcatDataset([retain, cast(Any, pairs)]))


def erase_beside_all_wordings(task: Task, setting: Setting) -> None:
    """Hold the pictures to be kept with all of their captions, and so with more words."""
    _erase_beside(task, task.sets.retain.reworded(emoji.naming_captions))


def erase_beside_unlabelled_captions(task: Task, setting: Setting) -> None:
    """Hold captions that have no pictures, each with the nearest of retain's and its own features.

    They are the wordings of concepts that no model was trained on. What is nearest to a picture to
    forget is left out.
    """
    team = open_teams(emoji.TRAIN_TEAMS)
    records = [cast(emoji.EmojiInfo, team.meta(row)) for row in range(len(team))]
    wordings = [
        text for record in records if not record["member"] for text in emoji.naming_captions(record)
    ]
    captions, retain = list(dict.fromkeys(wordings)), task.sets.retain
    features = encode_texts(task.model, captions)
    pairs = [
        {"image": retain[nearest]["image"], "text": captions[row]}
        for row, nearest in _nearest_kept(task, features, encode_images)
    ]
    _erase_beside(task, ConcatDataset([retain, cast(Any, pairs)]))


def _nearest_kept(
    task: Task, features: Tensor, encode: Callable[[DualEncoder, Drawings], Tensor]
) -> list[tuple[int, int]]:
    """Return (row of `features`, nearest retain row), without those nearer to what is forgotten.

    `encode` gives the other side of retain, which has one caption a drawing, and of forget.
    """
    kept, forgotten = (encode(task.model, each) for each in (task.sets.retain, task.sets.forget))
    nearest = (features @ torch.cat((kept, forgotten)).T).argmax(1).tolist()
    return [(row, other) for row, other in enumerate(nearest) if other < len(kept)]


def erase_under_noise(task: Task, setting: Setting) -> None:
    """Erase in a neighbourhood of the weights: each pass adds noise to the MLPs' matrices.

    Its standard deviation is `share` of a matrix's own.
    """
    generator = torch.Generator().manual_seed(task.seed)
    with _noise(task.model.module, setting["share"], generator):
        taken = _erase_beside(task, task.sets.retain, measured=False)
    task.measure(taken)


@contextmanager
def _noise(module: nn.Module, share: float, generator: torch.Generator) -> Iterator[None]:
    """Add noise to the weights of linear layers in passes that are trained on."""

    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        weight = cast(Tensor, layer.weight).detach()
        noise = torch.randn(weight.shape, generator=generator) * (share * weight.std())
        return output + linear(inputs[0], noise)

    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    hooks = [layer.register_forward_hook(add) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def average_with_the_original(task: Task, setting: Setting) -> None:
    """Move the weights back towards the original's: `share` of the way is kept."""
    module = task.model.module
    before = {name: value.clone() for name, value in module.state_dict().items()}
    taken = _erase_beside(task, task.sets.retain, measured=False)
    averaged = {
        name: before[name].lerp(value, setting["share"]) if value.is_floating_point() else value
        for name, value in module.state_dict().items()
    }
    module.load_state_dict(averaged)
    task.measure(taken)


def erase_relearn_erase(task: Task, setting: Setting) -> None:
    """Erase, bring the concept back by `steps` of fine-tuning, and erase what came back."""
    _erase_beside(task, task.sets.retain, measured=False)
    names = task.sets.forget.reworded(emoji.name_only)
    config = plain_config(
        **OFF | {"retain_weight": 1.0}, lr=setting["lr"], max_steps=setting["steps"]
    )
    # As in `erase_by_negation`: the engine's retain loss is InfoNCE.
    train(task, config, forget=task.sets.holdout, retain=names)
    _erase_beside(task, task.sets.retain)


def _erase_beside(task: Task, retain: Any, *, measured: bool = True) -> int:
    """Erase by the default recipe beside other retain pairs; return the steps taken."""
    config = recipe_config("fasterase", small_model=True)
    taken = train(task, config, forget=task.sets.forget, retain=retain)
    if measured:
        task.measure(taken)
    return taken


def _tried(title: str, erase: Callable[[Task, Setting], None], **setting: Any) -> Method:
    return Method(title, "", erase, [setting], most_seeds=1)


METHODS = (
    Method("the default", "", erase_by_default, [{}]),
    Method("thorough", "", erase_by_default, [{"thorough": True}]),
    Method("a higher floor", "", erase_to_a_higher_floor, [{"deviations": 0.3}]),
    Method("all pairs drawn alike", "", erase_with_all_drawn_alike, [{}]),
    _tried("pictures without captions", erase_beside_unlabelled_pictures),
    _tried("captions without pictures", erase_beside_unlabelled_captions),
    _tried("all wordings of what is kept", erase_beside_all_wordings),
    _tried("noise in the weights", erase_under_noise, share=0.05),
    _tried("averaged with the original", average_with_the_original, share=0.8),
    _tried("erased, relearned, erased", erase_relearn_erase, lr=1e-5, steps=20),
)
