"""One image-text pair, and the decoding of its picture."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fasterase.pairs.skips import BrokenPair


@dataclass(frozen=True)
class Record:
    """A decoded pair.

    Attributes:
        image: PIL image, uint8 tensor [3, H, W], or float tensor [3, H, W] (already preprocessed).
        text: a caption, a list of alternative captions, or token ids [L] int64.
        id: stable and readable: a file path, `shard.tar/key`, or `forget[12]`.
        mask: attention mask [L] that came with token ids.
        meta: what else the source knows: json of a tar sample, other columns of a table row,
            `{"class": name}` of a class-per-folder image.
    """

    image: Any
    text: Any
    id: str
    mask: Tensor | None = None
    meta: dict[str, Any] = field(default_factory=dict)


def decode_image(data: bytes, *, id: str) -> Image.Image:
    """Decode the bytes of a JPEG, PNG, WebP, ... completely; `BrokenPair` where that fails.

    Decompression bombs (PIL's limit, here an error from the first threshold on) and truncated
    files count as broken: a half-grey picture must not be trained on.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            image.load()
    except UnidentifiedImageError as error:
        raise BrokenPair(id, "image cannot be decoded: not a picture format known here") from error
    # PIL's plugins raise OSError, SyntaxError, ValueError, struct.error, ... on damaged input.
    except Exception as error:
        raise BrokenPair(id, f"image cannot be decoded: {error}") from error
    return image


def read_image_file(path: str, *, id: str) -> bytes:
    """Bytes of an image file; `BrokenPair` where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BrokenPair(id, f"image file {path} cannot be read: {reason}") from error
