"""Turn decoded pairs into pixels, tokens and caption keys; alter pixels at random."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fasterase.errors import InputError
from fasterase.models.preprocessing import ImageTransform, Tokens
from fasterase.numerals import counted
from fasterase.pairs.images import to_rgb
from fasterase.pairs.items import Record
from fasterase.pairs.skips import BrokenPair

# Forget images are altered so that the association is erased and not one picture of it.
ROTATION_DEGREES = 15.0
SHIFT = 0.1  # of the image's side
SCALE = 1.25  # largest zoom in, and largest zoom out
TINT = 0.35  # largest share of a colour channel's light that is removed
# Retain images are never altered. If forget images always were, the model would unlearn the tint
# (the demo's small CLIP, 100 steps: 59 % of the untinted forget drawings still recognised).
PLAIN = 0.5  # share of views that are the image itself
# Captions whose tokens are remembered, 10 MB at CLIP's length: the same pairs are read in steps and
# in checks, and tokenising a caption takes as long as a small text tower.
KNOWN_CAPTIONS = 16_384


class PreparedText(NamedTuple):
    """One caption: ids [L] and mask [L] or None, and its identity, see `caption_key`."""

    tokens: Tokens
    key: str


@dataclass
class Preparer:
    """Turns records into pixels and tokens. Picklable if its callables are; holds no weights."""

    image_transform: ImageTransform | None  # None if images must be float tensors
    text_tokenizer: Callable[[Sequence[str]], Tokens] | None  # None if texts must be token ids
    image_size: tuple[int, int]  # (H, W) pixels that the image tower takes
    context_length: int  # the largest number of tokens that the text tower takes
    vocab_size: int  # token ids are below it
    _known_tokens: dict[str, Tokens] = field(default_factory=dict, init=False, repr=False)

    @property
    def image_bytes(self) -> int:
        """Bytes of an image's pixels, if it is not given as a float tensor."""
        is_split = self.image_transform is not None and self.image_transform.parts is not None
        return 3 * math.prod(self.image_size) * (1 if is_split else 4)

    def image(self, record: Record) -> Tensor:
        """Return pixels [3, H, W]: uint8 where the model's transform splits, else float32.

        uint8 pixels are normalised later, on the device. Float tensors are returned as they are.

        Raises:
            InputError: a float tensor of another size than the model's.
            BrokenPair: NaN or infinite values.
        """
        image, expected = record.image, [3, *self.image_size]
        if isinstance(image, Tensor) and image.is_floating_point():
            if list(image.shape) != expected:
                raise InputError(
                    f"{record.id}: a float image is taken as preprocessed and must have the "
                    f"model's size {expected}; found {list(image.shape)}. Resize it, or pass PIL "
                    f"images or uint8 tensors."
                )
            pixels = image.detach().to("cpu", torch.float32)
        else:
            if self.image_transform is None:
                raise InputError(
                    f"{record.id}: this image needs preprocessing and `preprocess` is not known; "
                    f"pass it, or images as preprocessed float tensors"
                )
            if isinstance(image, Tensor):
                image = Image.fromarray(image.permute(1, 2, 0).cpu().contiguous().numpy())
            pixels = self.image_transform.pixels(to_rgb(image, id=record.id))
        if pixels.is_floating_point() and not torch.isfinite(pixels).all():
            kind = "NaN" if torch.isnan(pixels).any() else "infinite"
            raise BrokenPair(record.id, f"image holds {kind} values")
        return pixels

    def stack(self, images: Sequence[Tensor]) -> Tensor:
        """Stack pixels to [n, 3, H, W]: uint8 if all are, else float32, normalised."""
        if not images:
            return torch.empty(0, 3, *self.image_size)
        if self.image_transform is not None and any(i.is_floating_point() for i in images):
            images = [self.image_transform.normalise(image) for image in images]
        return torch.stack(list(images))

    def black_level(self) -> Tensor | None:
        """Return what preprocessing makes of a black picture, [3]; None if it is not known."""
        if self.image_transform is None:
            return None
        height, width = self.image_size
        return self.image_transform(Image.new("RGB", (width, height))).amin(dim=(1, 2))

    def text(self, record: Record, caption: int = 0) -> PreparedText:
        """Return the tokens of caption number `caption`, modulo the number of captions.

        Raises:
            InputError: a str without a tokenizer, too many token ids, or ids outside the
                vocabulary.
        """
        if isinstance(record.text, Tensor):
            self._check_ids(record.text, record.id)
            return PreparedText(Tokens(record.text, record.mask), caption_key(record.text))
        captions = [record.text] if isinstance(record.text, str) else record.text
        chosen = captions[caption % len(captions)]
        if self.text_tokenizer is None:
            raise InputError(
                f"{record.id}: captions are strings and the model's `tokenizer` is not known; pass "
                f"`tokenizer`, or texts as token ids"
            )
        tokens = self._known_tokens.get(chosen)
        if tokens is None:
            tokens = self.text_tokenizer([chosen]).index(0)
            if len(self._known_tokens) < KNOWN_CAPTIONS:
                self._known_tokens[chosen] = tokens
        return PreparedText(tokens, caption_key(chosen))

    def _check_ids(self, ids: Tensor, id: str) -> None:
        if len(ids) > self.context_length:
            raise InputError(
                f"{id}: {counted(len(ids), 'token id')}, but the model takes at most "
                f"{self.context_length}"
            )
        low, high = (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
        if low < 0 or high >= self.vocab_size:
            raise InputError(
                f"{id}: token ids from {low} to {high}, but the model's vocabulary has "
                f"{self.vocab_size}; they come from another tokenizer"
            )


def caption_key(text: str | Tensor) -> str:
    """Return the identity of a caption: the string, or token ids without trailing zeros."""
    if isinstance(text, str):
        return text
    values = text.tolist()
    while values and values[-1] == 0:
        values.pop()
    return f"ids {values}"


def hash_captions(keys: Iterable[str]) -> np.ndarray:
    """Return 64-bit hashes [n] int64 of caption identities, the same in every process.

    They label the pairs of a batch and name the rows of the feature cache. Among 12 million
    captions the chance of any collision is 4e-6.
    """
    data = (key.encode("utf-8", "surrogatepass") for key in keys)
    digests = (hashlib.blake2b(each, digest_size=8).digest() for each in data)
    return np.frombuffer(b"".join(digests), dtype="<i8")


def stack_tokens(rows: Sequence[Tokens], context_length: int) -> Tokens:
    """Stack rows [L] to Tokens [B, L], padded with zeros to the longest row of the batch.

    If only some rows have a mask, the others' is ones over their own length.
    """
    if not rows:
        return Tokens(torch.zeros(0, context_length, dtype=torch.long))
    ids = pad_sequence([row.ids.long() for row in rows], batch_first=True)
    if all(row.mask is None for row in rows):
        return Tokens(ids)
    masks = [torch.ones_like(row.ids) if row.mask is None else row.mask for row in rows]
    return Tokens(ids, pad_sequence([mask.long() for mask in masks], batch_first=True))


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
    matrix = [[cos, -sin * height / width, shift[0]], [sin * width / height, cos, shift[1]]]
    theta = torch.tensor([matrix], dtype=torch.float32)
    grid = F.affine_grid(theta, [1, 3, height, width], align_corners=False)
    border = torch.cat((pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]), dim=1)
    fill = border.median(dim=1).values.view(3, 1, 1)
    # grid_sample pads with zeros; shifted by the fill colour, the padding is the fill colour.
    moved = F.grid_sample((pixels - fill)[None], grid, align_corners=False)[0] + fill
    dark = (moved.amin(dim=(1, 2)) if black is None else black).view(3, 1, 1)
    return dark + (moved - dark) * strength
