"""The one loop that reads pairs and runs a model over them.

Evaluation, verdict, floor and feature cache all encode through `PairEncoder`: one rule for
precision, workers, progress, skipped pairs and batch size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fasterase.errors import InputError
from fasterase.models.dual_encoder import DualEncoder
from fasterase.models.forward import Halfway, TowerForward, resolve_precision
from fasterase.models.preprocessing import Tokens
from fasterase.pairs.batches import Captions, Prefixes, sweep
from fasterase.pairs.prepare import Preparer, stack_tokens
from fasterase.pairs.skips import Skip, SkipLedger
from fasterase.pairs.table import PairTable
from fasterase.parallel.engine import Engine
from fasterase.parallel.ranks import ALONE, Ranks
from fasterase.progress import Progress, WaitingShare
from fasterase.signals import current_stop
from fasterase.transfers import to_device

# Images encoded at a time, on a CPU and on a GPU. Texts are shorter: four times as many.
BATCH_SIZE, GPU_BATCH_SIZE = 64, 256
TEXTS_PER_IMAGE = 4


class EncodedBatch(NamedTuple):
    """The readable ones of some pairs, with features on the CPU, fp32, unit rows."""

    rows: np.ndarray  # [n] int64, rows of the source
    image: Tensor  # [n, D]
    captions: list[tuple[int, str]]  # (row, key) of each caption of these rows, in order
    text_keys: list[str]  # [m] those encoded: neither in an earlier batch nor known to the caller
    text: Tensor  # [m, D]
    skipped: list[Skip]


@dataclass(frozen=True)
class PairFeatures:
    """Features of n pairs of one source under one model, on the CPU, fp32, unit rows."""

    rows: np.ndarray  # [n] int64, rows of the source
    image: Tensor  # [n, D]
    text: Tensor  # [m, D], one row per distinct caption
    captions: list[str]  # [m] identities of those captions
    pair_text: list[list[int]]  # [n] rows in `text` of each pair's captions, the first one first
    skipped: list[Skip]  # further pairs, which cannot be read

    @property
    def first_text(self) -> Tensor:
        """[n, D] features of each pair's first caption."""
        return self.text[[captions[0] for captions in self.pair_text]]

    @property
    def first_captions(self) -> list[str]:
        """[n] identity of each pair's first caption."""
        return [self.captions[captions[0]] for captions in self.pair_text]

    @classmethod
    def joined(cls, parts: Sequence[PairFeatures]) -> PairFeatures:
        """Join features of different rows, in order; a caption of several parts is kept once."""
        if len(parts) == 1:
            return parts[0]
        place: dict[str, int] = {}
        texts: list[Tensor] = []
        pair_text: list[list[int]] = []
        for part in parts:
            fresh = [i for i, key in enumerate(part.captions) if key not in place]
            place |= {part.captions[i]: len(place) + k for k, i in enumerate(fresh)}
            texts.append(part.text[fresh])
            pair_text += [[place[part.captions[i]] for i in those] for those in part.pair_text]
        return cls(
            np.concatenate([part.rows for part in parts]),
            torch.cat([part.image for part in parts]),
            torch.cat(texts),
            list(place),
            pair_text,
            [skip for part in parts for skip in part.skipped],
        )

    def at(self, rows: np.ndarray) -> PairFeatures:
        """Return the features of those of `rows` (sorted) that could be read."""
        kept = np.flatnonzero(np.isin(self.rows, rows))
        pair_text = [self.pair_text[i] for i in kept]
        return replace(self, rows=self.rows[kept], image=self.image[kept], pair_text=pair_text)


class PairEncoder:
    """Reads pairs and encodes them with one model, without gradients and in eval mode.

    Args:
        model: on its device.
        precision: compute dtype of the towers, as in `UnlearnConfig`.
        ledger: counts unreadable pairs; None accepts any number of them.
        batch_size: images loaded and encoded at a time; None: 64 on a CPU, 256 on a GPU. Of a batch
            that does not fit in the device's memory the halves are encoded one after the other.
        num_workers: processes that load and decode pairs.
        ranks: who takes part: `pairs` divides the work among them.

    Attributes:
        prefixes: outputs of blocks that stay as they are, for pairs that are the same at each read;
            None: the towers run whole.
    """

    prefixes: Prefixes | None = None

    def __init__(
        self,
        model: DualEncoder,
        *,
        precision: str = "auto",
        ledger: SkipLedger | None = None,
        batch_size: int | None = None,
        num_workers: int = 0,
        progress: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model = model
        self.precision = resolve_precision(precision, model.device)
        self.ledger = ledger or SkipLedger(0, max_skipped=1.0)
        self.prepare = Preparer(
            model.image_transform,
            model.text_tokenizer,
            model.image_size,
            model.context_length,
            model.vocab_size,
        )
        # An engine trains on it, while the caller's model may wait elsewhere.
        self._device = model.device
        self.ranks = ranks
        self._towers: Engine | TowerForward = TowerForward(model, precision=self.precision)
        self._in_lockstep = False
        self._passes = 0
        on_gpu = self._device.type == "cuda"
        self.batch_size = batch_size or (GPU_BATCH_SIZE if on_gpu else BATCH_SIZE)
        self._fits = self.batch_size
        self._num_workers = num_workers
        self._progress = progress

    def of(self, model: DualEncoder) -> PairEncoder:
        """Return an encoder of a copy of the model, with the same settings and ledger."""
        other = copy.copy(self)
        other.model, other._device, other.prefixes = model, model.device, None
        other._towers = TowerForward(model, precision=self.precision)
        return other

    @contextmanager
    def through(self, engine: Engine) -> Iterator[None]:
        """Encode through an engine in the block, which holds the weights while they are trained."""
        before = self._towers, self._in_lockstep
        self._towers, self._in_lockstep = engine, engine.in_lockstep
        try:
            yield
        finally:
            self._towers, self._in_lockstep = before

    def progress(self, description: str, total: int, *, unit: str = "pair") -> Progress:
        """Return what counts pairs, for `batches`, or other things."""
        return Progress(description, total=total, unit=unit, shown=self._progress)

    def batches(
        self,
        source: PairTable,
        rows: np.ndarray,
        *,
        captions: Captions,
        bar: Progress,
        is_known: Callable[[list[str]], np.ndarray] | None = None,
    ) -> Iterator[EncodedBatch]:
        """Encode distinct rows in the given order, each image and each distinct caption once.

        `captions` are all of each pair, or the first one; those that `is_known` names need no
        encoding. `bar` is advanced by the pairs read.

        Raises:
            InputError: too many pairs cannot be read.
        """
        loaded = sweep(
            source,
            rows,
            self.prepare,
            captions=captions,
            batch_size=self.batch_size,
            num_workers=self._num_workers,
            prefixes=self.prefixes if source.stable else None,
            on_this_host=self.ranks.on_this_host,
        )
        waiting = WaitingShare()
        for batch in waiting.over(loaded):
            self.ledger.add(batch.ids, batch.skipped)
            keys, tokens = batch.new_keys, batch.tokens
            if is_known is not None and keys:
                fresh = np.flatnonzero(~is_known(keys)).tolist()
                keys, tokens = [keys[i] for i in fresh], tokens.index(fresh)
            yield EncodedBatch(
                batch.rows,
                self._encode("image", batch.pixels),
                batch.captions,
                keys,
                self._encode("text", tokens),
                batch.skipped,
            )
            read = len(batch.rows) + len(batch.skipped)
            bar.update(read, {"waiting for data": str(waiting)})

    def pairs(
        self,
        source: PairTable,
        rows: np.ndarray,
        *,
        captions: Captions = "first",
        description: str,
    ) -> PairFeatures:
        """Encode rows (sorted, distinct) and keep all features in memory, the same on all ranks.

        Raises:
            InputError: too many pairs cannot be read, or none.
        """
        images, texts = ([torch.empty(0, self.model.embed_dim)] for _ in range(2))
        place: dict[str, int] = {}
        pair_text: dict[int, list[int]] = {}
        skipped: list[Skip] = []
        own = self.own_rows(rows)
        passes = -(-len(rows) // (self.batch_size * self.ranks.world_size))
        bar = self.progress(description, len(own))
        with self.ranks.raising_together(), bar, self._passing(passes):
            for batch in self.batches(source, own, captions=captions, bar=bar):
                images.append(batch.image)
                texts.append(batch.text)
                for key in batch.text_keys:
                    place[key] = len(place)
                for row, key in batch.captions:
                    pair_text.setdefault(row, []).append(place[key])
                skipped += batch.skipped
        mine = PairFeatures(
            np.fromiter(pair_text, dtype=np.int64),
            torch.cat(images),
            torch.cat(texts),
            list(place),
            list(pair_text.values()),
            skipped,
        )
        found = PairFeatures.joined(self.ranks.gather_objects(mine))
        self.ledger.exchange(self.ranks)
        self.ledger.warn()
        check_readable(source, len(rows), len(found.rows), found.skipped)
        return found

    def own_rows(self, rows: np.ndarray) -> np.ndarray:
        """Return this rank's share of `rows`, in whole batches."""
        share = self.ranks.share(-(-len(rows) // self.batch_size))
        return rows[share.start * self.batch_size : share.stop * self.batch_size]

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Encode texts that belong to no pair, such as class prompts; [len(texts), D]."""
        step = TEXTS_PER_IMAGE * self.batch_size
        parts = [texts[start : start + step] for start in range(0, len(texts), step)]
        return torch.cat([self._encode("text", self.model.tokenize(part)) for part in parts])

    @contextmanager
    def _passing(self, passes: int) -> Iterator[None]:
        """Encode `passes` batches in the block: also empty ones, where ranks go in lockstep."""
        self._passes = 0
        try:
            yield
        finally:
            # After an error too: the other ranks are waiting; but they leave after a signal.
            while self._in_lockstep and self._passes < passes and not current_stop().is_raised:
                self._encode("image", self.prepare.stack([]))
                self._encode("text", stack_tokens([], self.prepare.context_length))

    def _encode(self, tower: str, given: Tensor | Tokens | Halfway) -> Tensor:
        """Encode pixels [n, 3, H, W] or token ids [n, L], or either halfway; n may be 0.

        As many at a time as fit in the device's memory. Returns [n, D] on the CPU.
        """
        is_image = tower == "image"
        if not is_image:
            self._passes += 1
        wanted = count = len(given.ids if isinstance(given, Tokens) else given)
        if not count and self._in_lockstep:  # the other ranks wait for this one's pass
            count, given = 1, _zeros_like_one(given)
        per_image = 1 if is_image else TEXTS_PER_IMAGE
        while True:
            parts = [torch.empty(0, self.model.embed_dim)]
            size = per_image * self._fits
            try:
                with measuring(self._towers.module):
                    for start in range(0, count, size):
                        rows = slice(start, start + size)
                        part = given[rows] if isinstance(given, Tensor) else given.index(rows)
                        moved: Any = to_device(part, self._device)
                        towers = self._towers(moved) if is_image else self._towers(None, moved)
                        found = towers.image if is_image else towers.text
                        assert found is not None
                        parts.append(found.cpu())
                return torch.cat(parts)[:wanted]
            except torch.OutOfMemoryError:
                # In lockstep, the other ranks would wait for more passes than they make.
                if self._fits == 1 or self._in_lockstep:
                    raise
                self._fits = -(-min(self._fits, -(-count // per_image)) // 2)


def _zeros_like_one(given: Tensor | Tokens | Halfway) -> Tensor | Tokens:
    """Return one row of zeros in the form of `given`, which is empty."""
    assert not isinstance(given, Halfway), "a prefix cache works in one process"
    if isinstance(given, Tokens):
        return Tokens(given.ids.new_zeros(1, given.ids.shape[1]))
    return given.new_zeros(1, *given.shape[1:])


def check_readable(
    source: PairTable, tried: int, readable: int, skipped: Sequence[Skip] = ()
) -> None:
    """Raise `InputError` if pairs were tried and none of them could be read."""
    if tried and not readable:
        first = f" The first: {skipped[0].id}: {skipped[0].reason}." if skipped else ""
        raise InputError(
            f"`{source.name}`: none of its {tried} pairs can be read.{first} Repair them, or give "
            "other pairs."
        )


@contextmanager
def measuring(module: nn.Module) -> Iterator[None]:
    """Disable gradients and switch to eval mode; afterwards each part gets its own mode back."""
    training = [part for part in module.modules() if part.training]
    if training:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True
