"""Real files of every depth and orientation become the upright 8-bit picture that they show."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from fasterase.models.preprocessing import ImageTransform
from fasterase.pairs.images import to_rgb
from fasterase.pairs.open import open_pairs
from fasterase.pairs.overlap import remove_overlap
from fasterase.pairs.prepare import Preparer
from fasterase.pairs.skips import BrokenPair

RAMP = np.linspace(0, 255, 12, dtype=np.uint8).reshape(3, 4)
PREPARE = Preparer(
    ImageTransform(lambda image: torch.from_numpy(np.asarray(image) / 255).permute(2, 0, 1)),
    None,
    (3, 4),
    8,
    100,
)


def pixels_of(path):
    """[H, W, 3] in 0..255 of an image file, by the way that a run takes."""
    record = open_pairs([(str(path), "a caption")], name="forget")[0]
    return (PREPARE.image(record) * 255).round().byte().permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("16 bit.png", RAMP.astype(np.uint16) * 257),
        ("16 bit.tif", RAMP.astype(np.uint16) * 257),
        ("big endian.tif", RAMP.astype(">u2") * 257),
        ("32 bit.tif", RAMP.astype(np.int32) * 257),
        ("wide.tif", RAMP.astype(np.int32) * 100_000),
        ("narrow.tif", RAMP.astype(np.int32)),
        ("unit.tif", RAMP.astype(np.float32) / 255),
        ("bytes.tif", RAMP.astype(np.float32)),
        ("signed.tif", (RAMP.astype(np.float32) - 100) * 7),
    ],
)
def test_grey_of_any_depth_is_scaled(tmp_path, name, values):
    Image.fromarray(values).save(tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert image.mode in ("I", "F", "I;16", "I;16B")
    assert np.array_equal(pixels_of(tmp_path / name), np.repeat(RAMP[..., None], 3, axis=2))


def test_a_dark_16_bit_png_stays_dark(tmp_path):
    Image.fromarray(np.full((3, 4), 200, np.uint16)).save(tmp_path / "dark.png")
    assert pixels_of(tmp_path / "dark.png").max() == 1


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "infinite")])
def test_non_finite_floats_make_a_broken_pair(tmp_path, value, word):
    Image.fromarray(np.array([[0, value]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(BrokenPair, match=rf"a\.tif: image holds {word} values"):
        pixels_of(tmp_path / "a.tif")


def exif_of(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_exif_orientation_is_applied(tmp_path, orientation, ending):
    upright = Image.new("RGB", (16, 8))
    upright.paste((255, 0, 0), (0, 0, 8, 4))
    upright.paste((0, 0, 255), (8, 4, 16, 8))
    ways = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = upright
    for way in ways.get(orientation, []):
        stored = stored.transpose(way)
    quality = {"quality": 95} if ending == "jpg" else {}
    stored.save(tmp_path / f"a.{ending}", exif=exif_of(orientation), **quality)
    found = pixels_of(tmp_path / f"a.{ending}").astype(int)
    assert found.shape == (8, 16, 3)
    assert np.abs(found[1::4, 3::8] - np.asarray(upright, int)[1::4, 3::8]).max() < 40


def test_exif_of_a_16_bit_file_is_applied(tmp_path):
    Image.fromarray(np.rot90(RAMP.astype(np.uint16) * 257).copy()).save(
        tmp_path / "a.png", exif=exif_of(6)
    )
    assert np.array_equal(pixels_of(tmp_path / "a.png")[..., 0], RAMP)


def test_the_picture_given_is_left_alone_and_damaged_exif_does_not_matter():
    damaged = b"Exif\0\0II*\0\xff\xff\xff\xff"
    for exif, size in ((exif_of(6).tobytes(), (2, 4)), (damaged, (4, 2))):
        image = Image.new("RGB", (4, 2))
        image.info["exif"] = exif
        assert to_rgb(image, id="x").size == size
        assert image.size == (4, 2)


def test_bright_16_bit_pictures_are_not_all_the_same():
    """Clipped they would be: white, and left out of retain as pictures of forget."""
    forget, retain = (
        open_pairs([(Image.fromarray(np.full((3, 4), v, np.uint16)), "a")], name=name)
        for name, v in (("forget", 30_000), ("retain", 50_000))
    )
    assert remove_overlap(retain, forget)[1] == []
