"""Read folders of images: captions in text files beside them, or classes as folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from fasterase.errors import InputError
from fasterase.pairs.images import ImageFiles
from fasterase.pairs.items import normalize_class_name
from fasterase.pairs.parts import pack
from fasterase.pairs.table import PairTable

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def open_folder(folder: Path, *, name: str) -> PairTable:
    """Read a folder of images.

    If any image, at any depth, has a `.txt` file with the same stem beside it, the captions come
    from those files (one caption per file), and an image without one is a broken pair. Otherwise
    the first level of folders are classes, and the caption is the name of the folder with spaces
    for underscores.

    Raises:
        InputError: there are no images, or some are outside any class folder.
    """
    images: list[str] = []
    captioned: set[str] = set()
    for relative in _walk(folder):
        stem, ending = os.path.splitext(relative)
        if ending.lower() in IMAGE_ENDINGS:
            images.append(relative)
        elif ending == ".txt":
            captioned.add(stem)
    if not images:
        raise InputError(
            f"`{name}`: folder {folder} holds neither images ({', '.join(IMAGE_ENDINGS)}) nor .tar "
            f"shards"
        )
    stems = [os.path.splitext(image)[0] for image in images]
    if not captioned.isdisjoint(stems):
        captions = (_read_caption(folder, stem) if stem in captioned else [] for stem in stems)
        rows = ((image, texts, None) for image, texts in zip(images, captions, strict=True))
        return PairTable(name, pack(rows), ImageFiles(folder))
    loose = [image for image in images if os.sep not in image]
    if loose:
        raise InputError(
            f"`{name}`: {folder} holds images with neither a .txt caption beside them nor a class "
            f"folder around them, such as {loose[0]}"
        )
    folders = [image.split(os.sep, 1)[0] for image in images]
    class_of = {each: normalize_class_name(each) for each in sorted(set(folders))}
    parts = pack(
        (image, [class_of[each]], {"class": class_of[each]})
        for image, each in zip(images, folders, strict=True)
    )
    classes = list(dict.fromkeys(class_of.values()))
    return PairTable(name, parts, ImageFiles(folder), classes=classes)


def _walk(folder: Path) -> Iterator[str]:
    """Yield the relative paths of all files in sorted order, without hidden files and folders."""
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__MACOSX")))
        relative = os.path.relpath(parent, folder)
        for file in sorted(files):
            if not file.startswith("."):
                yield file if relative == "." else os.path.join(relative, file)


def _read_caption(folder: Path, stem: str) -> list[str]:
    try:
        return [(folder / f"{stem}.txt").read_text(encoding="utf-8-sig")]
    # Like an unreadable image, an unreadable caption makes a broken pair.
    except (OSError, UnicodeDecodeError):
        return []
