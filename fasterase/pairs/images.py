"""Images of pairs: where their bytes are, and how they are decoded and made RGB."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from fasterase.pairs.skips import BrokenPair

# Of an image, read from its start and up to its end, to tell it from another one of its size.
END_BYTES = 1 << 12
# Of a file that is read whole: a file with holes may claim more than any memory.
_MOST_BYTES = 1 << 30


class Images(ABC):
    """The encoded images of a table, by row; ids are for messages, and of files their paths."""

    @abstractmethod
    def sizes(self, ids: Iterable[str]) -> np.ndarray:
        """Return the bytes of each image, [n] int64; -1 if it is missing."""

    @abstractmethod
    def read(self, row: int, id: str) -> bytes:
        """Return the bytes of an image; raise `BrokenPair` if it cannot be read."""

    def location(self, row: int, id: str) -> str:
        """Return what identifies an image among all: its place, or here a hash of its bytes.

        Ids do not: files in different folders may have one name.
        """
        return f"bytes {hashlib.blake2b(self.read(row, id)).hexdigest()}"

    def ends(self, row: int, id: str) -> bytes:
        """Return the first and the last bytes of an image; raise `BrokenPair` as `read`."""
        data = self.read(row, id)
        return data[:END_BYTES] + data[-END_BYTES:]


class ImageFiles(Images):
    """Image files under `root`; the ids are their paths, absolute or relative to `root`."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = os.path.abspath(root)

    def path(self, id: str) -> str:
        return os.path.join(self.root, id)

    def sizes(self, ids: Iterable[str]) -> np.ndarray:
        return np.fromiter((_file_size(self.path(id)) for id in ids), dtype=np.int64)

    def read(self, row: int, id: str) -> bytes:
        return read_image_file(self.path(id), id=id)

    def ends(self, row: int, id: str) -> bytes:
        try:
            with open_regular(self.path(id)) as file:
                return read_ends(file, 0, os.fstat(file.fileno()).st_size)
        except (OSError, ValueError) as error:
            raise BrokenPair(id, str(error)) from error

    def location(self, row: int, id: str) -> str:
        return os.path.realpath(self.path(id))


class ImagesInMemory(Images):
    """Encoded images held in memory, None where a pair has none."""

    def __init__(self, images: Sequence[bytes | None]) -> None:
        self._images = images

    def sizes(self, ids: Iterable[str]) -> np.ndarray:
        return np.array([-1 if image is None else len(image) for image in self._images], np.int64)

    def read(self, row: int, id: str) -> bytes:
        image = self._images[row]
        if image is None:
            raise BrokenPair(id, "no image")
        return image


def read_image_file(path: str, *, id: str) -> bytes:
    """Read the bytes of an image file; raise `BrokenPair` if it cannot be read."""
    try:
        return read_regular_file(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BrokenPair(id, f"image file {path} cannot be read: {reason}") from error


def read_regular_file(path: str | os.PathLike[str]) -> bytes:
    """Return what a file holds; OSError for a pipe, a device or a file larger than any image."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _MOST_BYTES:
            raise OSError(f"it has {size} bytes, more than {_MOST_BYTES}")
        return file.read(size)


def open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a file to read; OSError for a pipe or a device."""
    # A pipe would block while it is opened, before anything can be asked of it.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("it is no regular file")
    return open(path, "rb")


def read_ends(file: IO[bytes], start: int, size: int) -> bytes:
    """Return the first and the last bytes, `END_BYTES` of each, of an image in a file."""
    file.seek(start)
    first = file.read(min(size, END_BYTES))
    file.seek(start + max(size - END_BYTES, len(first)))
    return first + file.read(min(size - len(first), END_BYTES))


def _file_size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return -1


def decode_image(data: bytes, *, id: str) -> Image.Image:
    """Decode the bytes of a JPEG, PNG, WebP, ... completely.

    BrokenPair: damage; a truncated file, since a half-grey picture must not be trained on; a
    decompression bomb, from the size at which PIL only warns.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            image.load()
    # PIL's plugins raise OSError, SyntaxError, ValueError, struct.error, ... on damaged input.
    except Exception as error:
        is_unknown = isinstance(error, UnidentifiedImageError)
        reason = "unknown image format" if is_unknown else error
        raise BrokenPair(id, f"image cannot be decoded: {reason}") from error
    return image


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
    # PIL raises errors of many kinds on damaged metadata. The picture itself is whole.
    with suppress(Exception):
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
    return image.convert("RGB")


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
