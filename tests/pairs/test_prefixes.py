"""With prefixes the batches are the same, and no image whose output is cached is read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fasterase.models.forward import Halfway
from fasterase.pairs.batches import step_batches, sweep
from fasterase.pairs.open import open_pairs
from fasterase.pairs.prepare import augment
from fasterase.pairs.sampler import Sampler
from fasterase.seeds import Stream, generator
from tests.pairs.reading import PREPARE


class Pixels:
    """Caches the pixels themselves, as if the first frozen block returned its input."""

    def __init__(self, views=0):
        self.views = views
        self.cached = {}
        self.read = 0

    @staticmethod
    def keys(source, rows, views):
        rows = source.base_rows(rows).tolist()
        return [(id(source.base), *key) for key in zip(rows, views.tolist(), strict=True)]

    def has_images(self, source, rows, views):
        return np.array([key in self.cached for key in self.keys(source, rows, views)], bool)

    def images(self, batch, sources):
        came = dict(zip(batch.fresh.tolist(), batch.pixels, strict=True))
        self.read += len(came)
        images = []
        for place, number in enumerate(batch.which):
            here = slice(place, place + 1)
            (key,) = self.keys(sources[number], batch.rows[here], batch.views[here])
            images.append(self.cached.setdefault(key, came.get(place)))
        return Halfway(None, torch.stack(images))

    def texts(self, keys, tokens):
        return Halfway(None, tokens.ids, tokens)


@pytest.fixture
def sources(tmp_path):
    """Two tables of pictures of which one is broken, with one to three captions each."""
    lines = []
    for i in range(13):
        Image.fromarray(np.full((4, 4, 3), 20 + 15 * i, np.uint8)).save(tmp_path / f"{i}.png")
        captions = ", ".join(f'"{i} {k}"' for k in range(1 + i % 3))
        lines.append(f'{{"image": "{i}.png", "text": [{captions}]}}')
    (tmp_path / "5.png").write_bytes(b"no picture")
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    return tuple(open_pairs(tmp_path / "t.jsonl", name=name) for name in ("forget", "retain"))


def steps(sources, prefixes=None, *, size=None, workers=0, augmented=False, last=8):
    sampler = Sampler(13, 13, forget_batch_size=4, batch_size=6, seed=3)
    options = {"first_step": 0, "last_step": last, "augment_forget": augmented}
    options |= {"micro_batch_size": size, "prefixes": prefixes, "num_workers": workers}
    return step_batches(*sources, sampler, PREPARE, **options)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", [None, 4])
def test_steps_have_the_same_pairs(sources, reads, size, workers):
    prefixes = Pixels()
    whole = list(steps(sources, size=size))
    reads.clear()
    begun = list(steps(sources, prefixes, size=size, workers=workers))
    for plain, halfway in zip(whole, begun, strict=True):
        assert halfway.ids == plain.ids
        assert halfway.keys == plain.keys
        assert halfway.skipped == plain.skipped
        for one, other in zip(plain.micro_batches, halfway.micro_batches, strict=True):
            assert (other.offset, other.n_forget) == (one.offset, one.n_forget)
            assert torch.equal(other.tokens.rows, one.tokens.ids)
            assert torch.equal(other.pixels.rows, one.pixels)
    assert any(batch.skipped for batch in whole)
    if workers:  # they read a few batches ahead of what is cached meanwhile
        assert 24 <= prefixes.read < sum(len(batch.ids) for batch in whole)
    else:
        assert prefixes.read == 24
        assert sorted(row for row, _ in reads if row != 5) == sorted([*range(5), *range(6, 13)] * 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_views_are_drawn_from_a_few(sources, workers):
    """Half of them are the image itself; the others are seeded by its row."""
    drawn = {}
    for batch in steps(sources, Pixels(views=3), augmented=True, workers=workers, last=40):
        (part,) = batch.micro_batches
        assert not part.views[part.n_forget :].any()
        seen = zip(part.rows.tolist(), part.views.tolist(), part.pixels.rows, strict=True)
        drawn |= {(row, view): image for row, view, image in [*seen][: part.n_forget]}
    assert {view for _, view in drawn} == {0, 1, 2, 3}
    black = PREPARE.black_level()
    for (row, view), image in drawn.items():
        plain = PREPARE.image(sources[0][row])
        numbers = generator(3, Stream.AUGMENTATION, row, max(view - 1, 0))
        assert torch.equal(image, augment(plain, numbers, black=black) if view else plain)
        assert torch.equal(image, plain) == (view == 0)


@pytest.mark.parametrize("captions", ["all", "first"])
def test_a_sweep_has_the_same_pairs(sources, reads, captions):
    source, prefixes = sources[0], Pixels()
    rows = np.array([2, 5, 0, 12, 7, 8])
    plain = list(sweep(source, rows, PREPARE, captions=captions, batch_size=4))
    for expected in (rows.tolist(), [5]):  # the second time, the broken image alone
        reads.clear()
        begun = sweep(source, rows, PREPARE, captions=captions, batch_size=4, prefixes=prefixes)
        for one, other in zip(plain, begun, strict=True):
            assert np.array_equal(other.rows, one.rows)
            assert other.ids == one.ids
            assert other.captions == one.captions
            assert other.new_keys == one.new_keys
            assert other.skipped == one.skipped
            assert torch.equal(other.tokens.rows, one.tokens.ids)
            assert torch.equal(other.pixels.rows, one.pixels)
        assert [row for row, _ in reads] == expected


def test_masks_of_token_ids_are_known():
    items = [
        {
            "pixel_values": torch.zeros(3, 4, 4),
            "input_ids": torch.tensor(row),
            "attention_mask": torch.ones(len(row)),
        }
        for row in ([5, 6, 7], [8, 9])
    ]
    source, prefixes = open_pairs(items, name="retain"), Pixels()
    for _ in range(2):
        options = {"captions": "all", "batch_size": 2, "prefixes": prefixes}
        (batch,) = sweep(source, [0, 1], PREPARE, **options)
        assert batch.tokens.tokens.ids.tolist() == [[5, 6, 7], [8, 9, 0]]
        assert batch.tokens.tokens.mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert prefixes.read == 2
