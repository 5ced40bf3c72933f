"""Training data of the demo's small CLIP: all drawings in memory, augmentation, classes."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from fasterase.demo.emoji import EmojiInfo, samples
from tools.demo_assets.small_clip import MEAN, STD

# Light augmentation: uniform within these bounds.
ROTATION_DEGREES = 15.0
SHIFT = 0.12  # of the half width
ZOOM = (0.8, 1.15)


class Pairs(NamedTuple):
    """All drawings in memory; the records are in the order of the concepts."""

    images: Tensor  # [teams, concepts, 3, 64, 64], normalised
    records: list[EmojiInfo]  # one per concept


def load_pairs(teams: tuple[str, ...]) -> Pairs:
    """Decode the teams' shards; every team has the same concepts in the same order."""
    rows: list[np.ndarray] = []
    records: list[EmojiInfo] = []
    for team in teams:
        found = list(samples(team))
        records = [record for record, _ in found]
        rows += [np.asarray(Image.open(io.BytesIO(png)).convert("RGB")) for _, png in found]
    pixels = torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).float().div_(255)
    images = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    return Pairs(images.unflatten(0, (len(teams), len(records))), records)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate, shift and scale each image of [B, 3, H, W] at random, on white."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(len(images), *shape, generator=generator) * (high - low) + low

    angle = uniform(-ROTATION_DEGREES, ROTATION_DEGREES).deg2rad()
    zoom = uniform(*ZOOM)
    rows = [
        torch.stack([angle.cos() / zoom, -angle.sin() / zoom], dim=1),
        torch.stack([angle.sin() / zoom, angle.cos() / zoom], dim=1),
    ]
    affine = torch.cat([torch.stack(rows, dim=1), uniform(-SHIFT, SHIFT, 2, 1)], dim=2)
    grid = functional.affine_grid(affine, list(images.shape), align_corners=False)
    # grid_sample pads with 0; white is +1 here.
    return functional.grid_sample(images - 1, grid, align_corners=False) + 1


class Classes(NamedTuple):
    """Group and subgroup names as zero-shot classes."""

    groups: list[str]
    subgroups: list[str]
    group_of: Tensor  # [concepts]
    subgroup_of: Tensor  # [concepts]


def find_classes(records: list[EmojiInfo]) -> Classes:
    """Return the classes of these records, sorted."""
    groups = sorted({record["group"] for record in records})
    subgroups = sorted({record["subgroup"] for record in records})
    return Classes(
        groups,
        subgroups,
        torch.tensor([groups.index(record["group"]) for record in records]),
        torch.tensor([subgroups.index(record["subgroup"]) for record in records]),
    )
