"""Folders of images: one folder a class, or a caption file beside each image."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from fasterase.errors import InputError
from fasterase.pairs.image_files import ImageFiles
from fasterase.pairs.packed import PackedCaptions, PackedStrings

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def open_folder(folder: Path, *, name: str) -> ImageFiles:
    """Read a folder of images.

    Where any image, at any depth, has a `.txt` of its own stem beside it, captions come from those
    files (one caption a file) and an image without one is a broken pair. Otherwise the first level
    of folders are classes, and the caption is the folder's name, underscores read as spaces.

    Raises:
        InputError: no images, or images outside any class folder.
    """
    images: list[str] = []
    captioned: set[str] = set()
    for relative in _files(folder):
        _, ending = os.path.splitext(relative)
        if ending.lower() in IMAGE_ENDINGS:
            images.append(relative)
        elif ending.lower() == ".txt":
            captioned.add(relative)
    if not images:
        raise InputError(
            f"`{name}`: folder {folder} holds neither images ({', '.join(IMAGE_ENDINGS)}) nor .tar "
            f"shards"
        )
    if any(_caption_file(image) in captioned for image in images):
        captions = PackedCaptions(
            _read_caption(folder / _caption_file(image))
            if _caption_file(image) in captioned
            else []
            for image in images
        )
        return ImageFiles(name, root=folder, ids=PackedStrings(images), captions=captions)
    return _class_folders(folder, images, name)


def _files(folder: Path) -> Iterator[str]:
    """Relative paths of all files in sorted order; hidden files and folders are left out."""
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__MACOSX")))
        relative = os.path.relpath(parent, folder)
        for file in sorted(files):
            if not file.startswith("."):
                yield file if relative == "." else os.path.join(relative, file)


def _caption_file(image: str) -> str:
    return os.path.splitext(image)[0] + ".txt"


def _read_caption(path: Path) -> list[str]:
    try:
        return [path.read_text(encoding="utf-8-sig")]
    # An unreadable caption makes a broken pair, as an unreadable image does.
    except (OSError, UnicodeDecodeError):
        return []


def _class_folders(folder: Path, images: list[str], name: str) -> ImageFiles:
    loose = [image for image in images if os.sep not in image]
    if loose:
        raise InputError(
            f"`{name}`: {folder} holds images with neither a .txt caption beside them nor a class "
            f"folder around them, such as {loose[0]}"
        )
    folders = [image.split(os.sep, 1)[0] for image in images]
    class_of = {each: class_name(each) for each in sorted(set(folders))}
    return ImageFiles(
        name,
        root=folder,
        ids=PackedStrings(images),
        captions=PackedCaptions([class_of[each]] for each in folders),
        metas=PackedStrings(json.dumps({"class": class_of[each]}) for each in folders),
        classes=list(dict.fromkeys(class_of.values())),
    )


def class_name(folder: str) -> str:
    """A folder's name as a caption."""
    return " ".join(folder.replace("_", " ").split())
