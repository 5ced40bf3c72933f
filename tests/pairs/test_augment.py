"""Random views of forget images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fasterase.pairs.augment import PLAIN, TINT, alter, augment


def view(pixels, seed=0, **options):
    return alter(pixels, np.random.default_rng(seed), **options)


def drawing(height=32, width=48):
    """A dark square off the centre of white paper, pixel values 0 to 1."""
    pixels = torch.ones(3, height, width)
    pixels[:, height // 4 : height // 2, width // 4 : width // 2] = 0.1
    return pixels


def test_repeats_by_seed_and_differs_between_seeds():
    pixels = drawing()
    assert torch.equal(view(pixels, 3), view(pixels, 3))
    assert not torch.equal(view(pixels, 3), view(pixels, 4))
    assert view(pixels).shape == pixels.shape
    assert torch.equal(pixels, drawing())


@pytest.mark.parametrize("seed", range(5))
def test_white_paper_takes_a_colour_to_the_corners(seed):
    result = view(drawing(), seed, black=torch.zeros(3))
    corners = result[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners - corners[:, :1]).abs().max() < 1e-5
    paper = corners[:, 0]
    assert (paper >= 1 - TINT - 1e-5).all()
    assert (paper <= 1).all()
    assert paper.max() - paper.min() > 0.01


@pytest.mark.parametrize("seed", range(5))
def test_shape_survives(seed):
    """The square keeps about its area (zoom within 1.25) and its sides stay in proportion."""
    result = view(drawing(), seed, black=torch.zeros(3))
    dark = (result < 0.4).all(dim=0)
    area = int(dark.sum())
    assert 96 / 1.25**2 * 0.7 < area < 96 * 1.25**2 * 1.3
    rows, columns = torch.where(dark)
    assert 0.5 < (columns.max() - columns.min() + 1) / (rows.max() - rows.min() + 1) / 1.5 < 2


def test_preprocessing_does_not_change_the_view():
    """Augmenting normalised pixels is normalising augmented ones, given what black became."""
    mean = torch.tensor([0.48, 0.46, 0.41]).view(3, 1, 1)
    std = torch.tensor([0.27, 0.26, 0.28]).view(3, 1, 1)
    plain = (view(drawing(), 1, black=torch.zeros(3)) - mean) / std
    normalised = view((drawing() - mean) / std, 1, black=(-mean / std).flatten())
    torch.testing.assert_close(normalised, plain, atol=1e-5, rtol=0)


def test_without_a_black_level_the_darkest_pixel_stays():
    result = view(drawing() * 2 - 5)
    assert torch.isfinite(result).all()
    assert result.min() >= -4.8 - 1e-4


def test_a_share_of_the_views_is_the_image_itself():
    pixels = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    generator = np.random.default_rng(0)
    same = [torch.equal(augment(pixels, generator), pixels) for _ in range(400)]
    assert abs(np.mean(same) - PLAIN) < 0.1


def test_uint8_pixels_get_the_view_of_their_floats_rounded():
    pixels = (drawing() * 255).round().to(torch.uint8)
    seeds = [seed for seed in range(20) if np.random.default_rng(seed).uniform() >= PLAIN]
    for seed in seeds:
        generator = np.random.default_rng(seed)
        found = augment(pixels, np.random.default_rng(seed))
        generator.uniform()
        expected = alter(pixels.float(), generator, black=torch.zeros(3))
        assert found.dtype == torch.uint8
        assert (found.float() - expected.clamp(0, 255)).abs().max() <= 0.5
        assert not torch.equal(found, pixels)
