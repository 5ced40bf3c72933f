"""Random views of forget images, so that the association is erased and not one picture of it."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROTATION_DEGREES = 15.0
SHIFT = 0.1  # of the image's side
SCALE = 1.25  # largest zoom in, and largest zoom out
TINT = 0.35  # largest share of a colour channel's light that is removed
# Retain images are never altered. If forget images always were, the model would unlearn the tint
# (the demo's small CLIP, 100 steps: 59 % of the untinted forget drawings still recognised).
PLAIN = 0.5  # share of views that are the image itself


def augment(
    pixels: Tensor,  # [3, H, W] uint8, or float32 preprocessed
    generator: np.random.Generator,
    *,
    black: Tensor | None = None,  # [3] what preprocessing makes of black, for float32 pixels
) -> Tensor:
    """Return the image itself or, equally often, an altered view of it; same shape and dtype."""
    if is_plain(generator):
        return pixels
    if pixels.dtype != torch.uint8:
        return alter(pixels, generator, black=black)
    altered = alter(pixels.float(), generator, black=torch.zeros(3))
    return altered.round_().clamp_(0, 255).to(torch.uint8)


def is_plain(generator: np.random.Generator) -> bool:
    """Decide, by the first number of `generator`, whether `augment` returns the image itself."""
    return generator.uniform() < PLAIN


def alter(
    pixels: Tensor,  # [3, H, W] float32
    generator: np.random.Generator,
    *,
    black: Tensor | None = None,  # [3]
) -> Tensor:
    """Apply a random rotation, shift and zoom, then a random tint; [3, H, W] float32.

    Areas from outside the image take the median colour of its border. The tint multiplies each
    channel's light, `black + (pixels - black) * strength`, as coloured lamps would: a white
    background takes the lamp's colour. Without `black`, each channel's darkest value is used.
    """
    angle = math.radians(generator.uniform(-ROTATION_DEGREES, ROTATION_DEGREES))
    shift = generator.uniform(-2 * SHIFT, 2 * SHIFT, size=2)  # the sides run from -1 to 1
    zoom = SCALE ** generator.uniform(-1, 1)
    strength = torch.from_numpy(1 - TINT * generator.uniform(0, 1, size=3)).float().view(3, 1, 1)

    height, width = pixels.shape[1:]
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    theta = torch.tensor(
        [
            [cos, -sin * height / width, shift[0]],
            [sin * width / height, cos, shift[1]],
        ],
        dtype=torch.float32,
    )
    grid = F.affine_grid(theta[None], [1, 3, height, width], align_corners=False)
    border = torch.cat((pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]), dim=1)
    fill = border.median(dim=1).values.view(3, 1, 1)
    # grid_sample pads with zeros; shifted by the fill colour, the padding is the fill colour.
    moved = F.grid_sample((pixels - fill)[None], grid, align_corners=False)[0] + fill

    dark = moved.amin(dim=(1, 2)) if black is None else black
    dark = dark.view(3, 1, 1)
    return dark + (moved - dark) * strength
