"""With a keeper the batches are the same, and nothing that is kept is read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fasterase.models.preprocessing import ImageTransform
from fasterase.pairs.augment import augment
from fasterase.pairs.batches import step_batches, sweep
from fasterase.pairs.images import ImageFiles
from fasterase.pairs.kept import KnownPairs
from fasterase.pairs.open import open_pairs
from fasterase.pairs.prepare import Preparer
from fasterase.pairs.sampler import Sampler
from fasterase.seeds import Stream, generator
from tests.pairs.test_batches import tokenizer, transform

PREPARE = Preparer(ImageTransform(transform), tokenizer, (4, 4), 6, 1000)


class Pixels:
    """Keeps the pixels themselves."""

    def __init__(self, views=0):
        self.known = KnownPairs()
        self.views = views
        self.kept = {}

    @staticmethod
    def keys(source, rows, views):
        base = id(getattr(source, "base", source))
        keys = zip(source.base_rows(rows).tolist(), views.tolist(), strict=True)
        return [(base, *key) for key in keys]

    def has_images(self, source, rows, views):
        return np.array([key in self.kept for key in self.keys(source, rows, views)], bool)

    def complete(self, source, batch, views=None, *, chosen=None):
        """Return the pixels of (chosen) pairs of a batch, and keep what came."""
        chosen = np.ones(len(batch.rows), bool) if chosen is None else chosen
        views = np.zeros(len(batch.rows), np.int64) if views is None else views
        came = dict(zip(batch.fresh.tolist(), batch.pixels, strict=True))
        places = np.flatnonzero(chosen)
        keys = self.keys(source, batch.rows[chosen], views[chosen])
        for place, key in zip(places.tolist(), keys, strict=True):
            self.kept.setdefault(key, came.get(place))
        return [self.kept[key] for key in keys]


@pytest.fixture
def sources(tmp_path):
    """Pictures of which one is broken, with one to three captions each."""
    lines = []
    for i in range(13):
        Image.fromarray(np.full((4, 4, 3), 20 + 15 * i, np.uint8)).save(tmp_path / f"{i}.png")
        captions = ", ".join(f'"{i} {k}"' for k in range(1 + i % 3))
        lines.append(f'{{"image": "{i}.png", "text": [{captions}]}}')
    (tmp_path / "5.png").write_bytes(b"no picture")
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    table = open_pairs(tmp_path / "t.jsonl", name="forget")
    return open_pairs(tmp_path / "t.jsonl", name="forget"), table


@pytest.fixture
def opened(monkeypatch):
    """Lists the images that this process has opened."""
    rows = []
    read = ImageFiles.read
    monkeypatch.setattr(
        ImageFiles, "read", lambda self, row, id: (rows.append(row), read(self, row, id))[1]
    )
    return rows


def steps(forget, retain, keeper=None, *, size=None, workers=0, augmented=False, last=8):
    sampler = Sampler(len(forget), len(retain), forget_batch_size=4, batch_size=6, seed=3)
    return step_batches(
        forget,
        retain,
        sampler,
        PREPARE,
        first_step=0,
        last_step=last,
        micro_batch_size=size,
        augment_forget=augmented,
        keeper=keeper,
        num_workers=workers,
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", [None, 4])
def test_steps_have_the_same_pairs(sources, size, workers):
    keeper = Pixels()
    whole = list(steps(*sources, size=size))
    read = 0
    for plain, kept in zip(whole, steps(*sources, keeper, size=size, workers=workers), strict=True):
        assert kept.ids == plain.ids
        assert kept.keys == plain.keys
        assert sorted(kept.skipped) == sorted(plain.skipped)
        for one, other in zip(plain.micro_batches, kept.micro_batches, strict=True):
            assert (other.offset, other.n_forget) == (one.offset, one.n_forget)
            assert torch.equal(other.tokens.ids, one.tokens.ids)
            is_forget = np.arange(len(one.ids)) < one.n_forget
            pixels = [
                image
                for source, chosen in zip(sources, (is_forget, ~is_forget), strict=True)
                for image in keeper.complete(source, other, chosen=chosen)
            ]
            assert torch.equal(torch.stack(pixels), one.pixels)
            read += len(other.fresh)
    assert any(batch.skipped for batch in whole)
    # Workers read a few batches ahead of what is kept meanwhile.
    assert read == 24 if workers == 0 else 24 <= read < sum(len(batch.ids) for batch in whole)


def test_an_image_is_opened_once(sources, opened):
    keeper = Pixels()
    for batch in steps(*sources, keeper, last=6):
        for part in batch.micro_batches:
            is_forget = np.arange(len(part.ids)) < part.n_forget
            keeper.complete(sources[0], part, chosen=is_forget)
            keeper.complete(sources[1], part, chosen=~is_forget)
    assert sorted(opened) == sorted([*range(13)] * 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_views_are_drawn_from_a_few(sources, workers):
    """Half of them are the image itself; the others are seeded by its row."""
    keeper, drawn = Pixels(views=3), {}
    for batch in steps(*sources, keeper, augmented=True, workers=workers, last=40):
        (part,) = batch.micro_batches
        is_forget = np.arange(len(part.ids)) < part.n_forget
        assert not part.views[~is_forget].any()
        images = keeper.complete(sources[0], part, part.views, chosen=is_forget)
        keeper.complete(sources[1], part, chosen=~is_forget)
        seen = zip(part.rows.tolist(), part.views.tolist(), images, strict=False)
        drawn |= {(row, view): image for row, view, image in seen}
    assert {view for _, view in drawn} == {0, 1, 2, 3}
    black = PREPARE.black_level()
    for (row, view), image in drawn.items():
        plain = PREPARE.image(sources[0][row])
        numbers = generator(3, Stream.AUGMENTATION, row, max(view - 1, 0))
        assert torch.equal(image, augment(plain, numbers, black=black) if view else plain)
        assert torch.equal(image, plain) == (view == 0)


@pytest.mark.parametrize("captions", ["all", "first"])
def test_a_sweep_has_the_same_pairs(sources, opened, captions):
    source, keeper = sources[0], Pixels()
    rows = np.array([2, 5, 0, 12, 7, 8])
    plain = list(sweep(source, rows, PREPARE, captions=captions, batch_size=4))
    for again in (False, True):
        opened.clear()
        kept = sweep(source, rows, PREPARE, captions=captions, batch_size=4, keeper=keeper)
        for one, other in zip(plain, kept, strict=True):
            assert np.array_equal(other.rows, one.rows)
            assert other.ids == one.ids
            assert other.captions == one.captions
            assert other.new_keys == one.new_keys
            assert other.skipped == one.skipped
            assert torch.equal(other.tokens.ids, one.tokens.ids)
            assert torch.equal(torch.stack(keeper.complete(source, other)), one.pixels)
        assert opened == ([] if again else rows.tolist())


def test_captions_are_read_without_the_image(sources, opened):
    """As those of a run that finds the images kept by an earlier one."""
    source, rows = sources[0], np.array([0, 1, 2])
    first, second = Pixels(), Pixels()
    for batch in sweep(source, rows, PREPARE, captions="all", batch_size=2, keeper=first):
        first.complete(source, batch)
    second.kept = first.kept
    opened.clear()
    (batch,) = sweep(source, rows, PREPARE, captions="all", batch_size=4, keeper=second)
    assert not opened
    assert [key for _, key in batch.captions] == ["0 0", "1 0", "1 1", "2 0", "2 1", "2 2"]


def test_masks_of_token_ids_are_known():
    ids = [torch.tensor([5, 6, 7]), torch.tensor([8, 9])]
    items = [
        {
            "pixel_values": torch.zeros(3, 4, 4),
            "input_ids": row,
            "attention_mask": torch.ones(len(row)),
        }
        for row in ids
    ]
    source, keeper = open_pairs(items, name="retain"), Pixels()
    for _ in range(2):
        (batch,) = sweep(source, [0, 1], PREPARE, captions="all", batch_size=2, keeper=keeper)
        keeper.complete(source, batch)
        assert batch.tokens.ids.tolist() == [[5, 6, 7], [8, 9, 0]]
        assert batch.tokens.mask.tolist() == [[1, 1, 1], [1, 1, 0]]
        keeper.known = KnownPairs()
