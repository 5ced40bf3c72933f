"""Small pictures, what tests read of pairs, and a small preparer."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from fasterase.models.preprocessing import ImageTransform, Tokens
from fasterase.pairs.open import open_pairs
from fasterase.pairs.prepare import Preparer
from fasterase.pairs.skips import BrokenPair


def picture(shade, size=(9, 7)):
    """A picture that no other shade (0-255) has."""
    image = Image.new("RGB", size, (shade, 255 - shade, 7))
    image.putpixel((1, 2), (shade, shade, 200))
    return image


def encoded(shade, kind="PNG"):
    buffer = io.BytesIO()
    picture(shade).save(buffer, kind)
    return buffer.getvalue()


def samples(captions, *, metas=None, key="k"):
    """Entries of a tar: for each `shade: caption`, a picture and a caption, perhaps a json."""
    entries = {}
    for number, (shade, caption) in enumerate(captions.items()):
        if metas is not None:
            entries[f"{key}{shade}.json"] = metas[number]
        entries |= {f"{key}{shade}.png": encoded(shade), f"{key}{shade}.txt": caption}
    return entries


def captions(pairs):
    return [pairs.texts(i) for i in range(len(pairs))]


def shade(pairs, row):
    """The red of a picture's first pixel: which of the pictures of `conftest.py` it is."""
    return pairs[row].image.getpixel((0, 0))[0]


def contents(source):
    """Everything that is stored of each pair."""
    pairs = open_pairs(str(source) if not isinstance(source, list) else source, name="retain")
    rows = range(len(pairs))
    return [(pairs.id(i), pairs.texts(i), pairs.meta(i), pairs.encoded_image(i)) for i in rows]


def read_all(pairs, read=lambda pairs, row: pairs[row].text):
    """id -> what is read of a pair, and id -> why it is broken."""
    good, broken = {}, {}
    for row in range(len(pairs)):
        try:
            good[pairs.id(row)] = read(pairs, row)
        except BrokenPair as error:
            broken[error.id] = error.reason
    return good, broken


def transform(image):
    assert image.mode == "RGB"
    values = np.asarray(image.resize((4, 4)), dtype=np.float32)
    return torch.from_numpy(values.copy()).permute(2, 0, 1) / 255


def resized(image):
    return torch.from_numpy(np.asarray(image.resize((4, 4))).copy()).permute(2, 0, 1)


def tokenizer(texts, *, length=6, with_mask=False):
    ids = torch.zeros(len(texts), length, dtype=torch.long)
    for row, text in enumerate(texts):
        codes = torch.tensor([ord(c) for c in text[:length]])
        ids[row, : len(codes)] = codes
    return Tokens(ids, (ids > 0).long() if with_mask else None)


PREPARE = Preparer(ImageTransform(transform), tokenizer, (4, 4), 6, 1000)
