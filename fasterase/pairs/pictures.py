"""PIL images of any mode and orientation as upright 8-bit RGB."""

from __future__ import annotations

import numpy as np
from PIL import ExifTags, Image, ImageOps

from fasterase.pairs.skips import BrokenPair


def to_rgb(image: Image.Image, *, id: str) -> Image.Image:
    """Turn a PIL image upright (EXIF orientation) and into RGB.

    PIL clips grey values above 255. Here 16 bits are scaled to 8; so are 32-bit integers of a PNG,
    and of any file if they fit 16 bits. Floats up to 1 are taken as 0..1, and up to 255 as 0..255.
    Integers and floats of another range are scaled from their own range, with 0 in it.

    Raises:
        BrokenPair: NaN or infinite values.
    """
    if image.mode.startswith("I;16"):
        image = _from_grey(np.asarray(image) / 257, image)
    elif image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            kind = "NaN" if np.isnan(values).any() else "infinite"
            raise BrokenPair(id, f"image holds {kind} values")
        image = _from_grey(_scale(values, image), image)
    return _turn_upright(image).convert("RGB")


def _scale(values: np.ndarray, image: Image.Image) -> np.ndarray:
    """Map values of mode I or F to 0..255."""
    low, high = values.min(initial=0), values.max(initial=0)
    if low >= 0:
        # Pillow before 11 opens a 16-bit PNG in mode I.
        if image.mode == "I" and high <= 65535 and (high > 255 or image.format == "PNG"):
            return values / 257
        if image.mode == "F" and high <= 1:
            return values * 255
        if high <= 255:
            return values
    return (values - low) * (255 / (high - low))


def _from_grey(values: np.ndarray, like: Image.Image) -> Image.Image:
    """Make a grey image of values in 0..255, with the metadata of `like`."""
    grey = Image.fromarray(np.rint(values).astype(np.uint8))
    grey.info.update(like.info)
    return grey


def _turn_upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        return ImageOps.exif_transpose(image) if orientation != 1 else image
    # PIL raises errors of many kinds on damaged metadata. The picture itself is whole.
    except Exception:
        return image
