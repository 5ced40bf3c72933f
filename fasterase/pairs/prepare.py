"""From a decoded pair to what the towers take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from fasterase.errors import InputError
from fasterase.models.dual_encoder import Tokens
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.source import Record


class PreparedText(NamedTuple):
    """One caption.

    Attributes:
        tokens: ids [L] and mask [L] or None.
        key: equal for equal captions and for no others.
        caption: its index among the record's captions.
    """

    tokens: Tokens
    key: str
    caption: int


class Prepared(NamedTuple):
    pixels: Tensor  # [3, H, W] float32
    text: PreparedText


class Preparer:
    """Turns records into pixels and tokens; picklable as its two callables are, holds no weights.

    Args:
        image_transform: PIL image -> [3, H, W] float32; None where images must be float tensors.
        text_tokenizer: list of str -> `Tokens`; None where texts must be token ids.
        image_size: (H, W) pixels that the image tower takes.
        context_length: the most tokens that the text tower takes.
        vocab_size: token ids are below it.
    """

    def __init__(
        self,
        image_transform: Callable[[Image.Image], Tensor] | None,
        text_tokenizer: Callable[[Sequence[str]], Tokens] | None,
        image_size: tuple[int, int],
        context_length: int,
        vocab_size: int,
    ) -> None:
        self.image_transform = image_transform
        self.text_tokenizer = text_tokenizer
        self.image_size = image_size
        self.context_length = context_length
        self.vocab_size = vocab_size

    def __call__(self, record: Record, caption: int = 0) -> Prepared:
        """Both halves of a record; see `image` and `text`."""
        return Prepared(self.image(record), self.text(record, caption))

    def image(self, record: Record) -> Tensor:
        """Pixels [3, H, W] float32: float tensors as they are, everything else transformed.

        Raises:
            InputError: a float tensor of another size than the model's.
            BrokenPair: NaN or infinite values.
        """
        image = record.image
        if isinstance(image, Tensor) and image.is_floating_point():
            expected = (3, *self.image_size)
            if tuple(image.shape) != expected:
                raise InputError(
                    f"{record.id}: a float image is taken as preprocessed and must have the "
                    f"model's size {list(expected)}; found {list(image.shape)}. Resize it, or pass "
                    f"PIL images or uint8 tensors."
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
            pixels = self.image_transform(image.convert("RGB"))
        if not torch.isfinite(pixels).all():
            kind = "NaN" if torch.isnan(pixels).any() else "infinite"
            raise BrokenPair(record.id, f"image holds {kind} values")
        return pixels

    def text(self, record: Record, caption: int = 0) -> PreparedText:
        """Tokens of the record's caption number `caption` modulo how many it has.

        Raises:
            InputError: a str without a tokenizer, too many token ids, or ids that the model lacks.
        """
        text = record.text
        if isinstance(text, Tensor):
            return self._ids(record, text)
        captions = [text] if isinstance(text, str) else text
        index = caption % len(captions)
        if self.text_tokenizer is None:
            raise InputError(
                f"{record.id}: captions are strings and the model's `tokenizer` is not known; pass "
                f"`tokenizer`, or texts as token ids"
            )
        tokens = self.text_tokenizer([captions[index]])
        mask = None if tokens.mask is None else tokens.mask[0]
        return PreparedText(Tokens(tokens.ids[0], mask), caption_key(captions[index]), index)

    def _ids(self, record: Record, ids: Tensor) -> PreparedText:
        if len(ids) > self.context_length:
            raise InputError(
                f"{record.id}: {len(ids)} token ids, and the model takes at most "
                f"{self.context_length}"
            )
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise InputError(
                f"{record.id}: token ids from {int(ids.min())} to {int(ids.max())}, and the "
                f"model's vocabulary has {self.vocab_size}; they come from another tokenizer"
            )
        return PreparedText(Tokens(ids, record.mask), caption_key(ids), 0)


def caption_key(text: str | Tensor) -> str:
    """The identity of a caption: the string itself, or token ids without their trailing zeros."""
    if isinstance(text, str):
        return text
    values = text.tolist()
    while values and values[-1] == 0:
        values.pop()
    return f"ids {values}"


def stack_tokens(rows: Sequence[Tokens], context_length: int) -> Tokens:
    """Rows [L] to Tokens [B, L]; shorter rows are padded with zeros to the longest of the batch.

    Where only some rows have a mask, the others' is ones over their own length.
    """
    length = max((len(row.ids) for row in rows), default=context_length)
    masked = any(row.mask is not None for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids) if masked else None
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = row.ids
        if mask is not None:
            mask[i, : len(row.ids)] = 1 if row.mask is None else row.mask
    return Tokens(ids, mask)
